"""Which backends this machine can use, for `mambapy info`."""

from typing import Any

import torch

from mambapy.ops import dispatch


def backends_info(device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """What every backend of every op says to a small float32 call on a device.

    Args:
        device: where the call's tensors would be.

    Returns:
        One dict a backend: op, backend, usable, chosen (by "auto"), reason (empty if usable).
    """
    x = torch.zeros(1, 2, 4, device=device)
    A, B = torch.zeros(4, 3, device=device), torch.zeros(1, 2, 3, device=device)
    weight = torch.zeros(4, 4, device=device)
    heads, groups = x.view(1, 2, 2, 2), B.view(1, 2, 1, 3)
    dt, rows = x[..., :2], B.view(1, 2, 1, 1, 3)
    calls = {
        "selective_scan": (x, x, A, B, B),
        "causal_conv1d": (x, weight),
        "ssd": (heads, dt, A[:2, 0], groups, groups),
        "mamba3_scan": (heads, dt, dt, dt, x[..., :1], rows, rows),
        "rms_norm": (x, weight[0]),
        "add_rms_norm": (x, x, weight[0]),
        "gated_rms_norm": (x, x, weight[0]),
        "linear_cross_entropy": (x[0], weight, weight[0].long(), None),
        "model_step": (x[0], x.dtype),
    }
    return [
        {
            "op": verdict.op,
            "backend": verdict.backend,
            "usable": verdict.reason is None,
            "chosen": verdict.chosen,
            "reason": verdict.reason or "",
        }
        for op, call in calls.items()
        for verdict in _explain(op, *call)
    ]


@torch.no_grad()
def _explain(op: str, *call: Any) -> list[dispatch.Verdict]:
    """What the backends say where no gradient is asked for."""
    return dispatch.explain(op, *call)
