"""The backend `gpu` of the ops. What the kernels need is imported when the first one runs."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from mambapy.ops.reference import wide_dtype


def _is_installed(package: str, module: str) -> bool:
    """Whether a module of a namespace package can be imported; nothing of it is run."""
    return importlib.util.find_spec(package) is not None and (
        importlib.util.find_spec(f"{package}.{module}") is not None
    )


# torch's CUDA builds bring it on Linux.
HAS_CUDA_BINDINGS = _is_installed("cuda", "bindings")
OLDEST = 8
MOST_STATES = 256
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not_this_card(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, x is on {device.type}"
    # torch.compile sees through this question, and not through get_device_capability.
    card = torch.cuda.get_device_properties(device)
    if card.major < OLDEST:
        return f"{card.name} has compute capability {card.major}.{card.minor}: it needs 8.0"
    return None


def refuses_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None, **options: Any
) -> str | None:
    """Why the kernels cannot run a scan, or None."""
    why = why_not_this_card(x.device)
    if why is not None:
        return why
    if not HAS_CUDA_BINDINGS:
        return "cuda.bindings is not installed: pip install mambapy[gpu]"
    if A.shape[1] > MOST_STATES:
        return f"it is for at most {MOST_STATES} states, A has {A.shape[1]}"
    if wide_dtype(x, dt, A, B, C, options.get("state")) == torch.float64:
        return "it calculates in float32, and is given float64"
    return None


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *optional: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan` in one pass: y (b, l, e) and the last state (b, e, n)."""
    from mambapy.ops.cpu import torch_ops

    return torch_ops.cpu_selective_scan(x, dt, A, B, C, *optional, **options)
