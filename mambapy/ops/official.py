"""Adapters to the original authors' kernels, mamba_ssm and causal_conv1d, where a user has them.

Layout conversion only: those kernels want the channels before the length, (b, e, l).
"""

import importlib
import importlib.util
from typing import Any

from torch import Tensor

# Looked up once, at import: a search of the path is nothing that torch.compile can trace.
HAS_SCAN = importlib.util.find_spec("mamba_ssm") is not None
HAS_CONV = importlib.util.find_spec("causal_conv1d") is not None


def refuses_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why mamba_ssm cannot run this scan, or None."""
    if not HAS_SCAN:
        return "mamba_ssm is not installed"
    if x.device.type != "cuda":
        return f"mamba_ssm needs a CUDA device, the tensors are on {x.device.type}"
    if state is not None or seq_idx is not None:
        return "mamba_ssm's selective scan takes neither an initial state nor seq_idx"
    if "torch.float64" in {str(T.dtype) for T in (x, dt, B, C)}:
        return "mamba_ssm has no float64 kernel"
    return None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`ops.selective_scan` by mamba_ssm: y (b, l, e) and the last state (b, e, n)."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    y, last = interface.selective_scan_fn(
        _channels_first(x),
        _channels_first(dt.to(x.dtype)),
        A.float(),
        _channels_first(B.to(x.dtype)),
        _channels_first(C.to(x.dtype)),
        None if D is None else D.float(),
        None if z is None else _channels_first(z.to(x.dtype)),
        None if dt_bias is None else dt_bias.float(),
        dt_softplus,
        return_last_state=True,
    )
    return y.transpose(1, 2), last


def refuses_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why causal_conv1d cannot run this convolution, or None."""
    if not HAS_CONV:
        return "causal_conv1d is not installed"
    if x.device.type != "cuda":
        return f"causal_conv1d needs a CUDA device, the tensors are on {x.device.type}"
    if not 2 <= weight.shape[1] <= 4:
        return f"causal_conv1d takes widths 2 to 4, got {weight.shape[1]}"
    if state is not None or seq_idx is not None:
        return "this adapter passes causal_conv1d neither an initial state nor seq_idx"
    return None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """`ops.causal_conv1d` by causal_conv1d: y (b, l, e)."""
    interface = importlib.import_module("causal_conv1d")
    y: Tensor = interface.causal_conv1d_fn(
        _channels_first(x),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        activation=activation,
    )
    return y.transpose(1, 2)


def refuses_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why mamba_ssm cannot run this state-space duality, or None."""
    if not HAS_SCAN:
        return "mamba_ssm is not installed"
    if x.device.type != "cuda":
        return f"mamba_ssm needs a CUDA device, the tensors are on {x.device.type}"
    if seq_idx is not None:
        return "this adapter passes mamba_ssm no seq_idx"
    if "torch.float64" in {str(T.dtype) for T in (x, dt, B, C)}:
        return "mamba_ssm has no float64 kernel"
    return None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`ops.ssd` by mamba_ssm: y (b, l, h, p) and the last state (b, h, p, n)."""
    interface = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    y, last = interface.mamba_chunk_scan_combined(
        x,
        dt.to(x.dtype),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size or 256,
        D=None if D is None else D.float(),
        z=None if z is None else z.to(x.dtype),
        dt_bias=None if dt_bias is None else dt_bias.float(),
        initial_states=state,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    return y, last.float()


def _channels_first(x: Tensor) -> Tensor:
    """(b, l, c) -> (b, c, l), contiguous along the length."""
    return x.transpose(1, 2).contiguous()
