"""The selective scan, Mamba-1's recurrence: the public op, its one-step twin, its backends."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import chunked, dispatch, official, reference
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.direction import scan_from_the_end
from mambapy.ops.gpu import backend as gpu
from mambapy.ops.reference import continues, step_size, wide_dtype
from mambapy.pscan import pscan


@overload
def selective_scan(
    *args: Any, return_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_scan(*args: Any, **kwargs: Any) -> Tensor: ...
def selective_scan(  # type: ignore[misc]
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
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1 recurrence: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t.

    The output is y_t = (C_t h_t + D x_t) silu(z_t). It runs in float32, or in
    float64 where an argument has it, and is differentiable in every floating-point argument. No
    argument but `out` is written to.

    Args:
        x: (b, l, e) input after convolution and SiLU, l >= 1.
        dt: (b, l, e) step sizes, > 0 once `dt_bias` and softplus are applied, where asked for.
        A: (e, n), < 0.
        B: (b, l, n) input weights.
        C: (b, l, n) output weights.
        D: (e) weight of the skip from x to y; none without it.
        z: (b, l, e) gate, applied as silu(z); none without it.
        dt_bias: (e) added to dt.
        dt_softplus: whether dt is passed through softplus.
        state: (b, e, n) h before the first step; zeros without it.
        seq_idx: (b, l) integers, the document of each token. Where it changes, the state restarts
            from zero; the initial state belongs to the first token's document.
        reverse: whether time runs from the last step to the first. The result is that of flipping
            every (b, l, ...) argument along l, and y back; `state` comes before the last step, and
            the state returned after the first.
        return_state: whether to return h after the last step too.
        out: (b, l, e) where to write y, in x's dtype; it may be x, dt or z itself, which saves
            memory. Only where no gradient is needed.
        backend: "auto", or one of "cpu", "gpu", "official", "chunked", "pscan", "reference".

    Returns:
        y (b, l, e) in x's dtype; with `return_state` also the state (b, e, n), float32 or wider.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        BackendError: the backend asked for cannot run this, or `out` would need a gradient.

    Source: Gu & Dao 2023 (arXiv 2312.00752), Algorithm 2.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, seq_idx)
    dispatch.check_out(out, x, dt, A, B, C, D, z, dt_bias, state)
    options = {
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "state": state,
        "seq_idx": seq_idx,
    }
    run = dispatch.pick("selective_scan", BACKENDS, backend, x, dt, A, B, C, D, z, **options)
    if run in (cpu.selective_scan, gpu.selective_scan):
        options |= {"out": out, "reverse": reverse}
    elif reverse:
        run = partial(scan_from_the_end, run)
    with dispatch.without_autocast(x):
        y, last = run(x, dt, A, B, C, D, z, **options)
    y = dispatch.written(y, out)
    return (y, last) if return_state else y


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`.

    Args:
        x: (b, e) input.
        dt: (b, e) step sizes.
        A: (e, n).
        B: (b, n).
        C: (b, n).
        D: (e) or None.
        z: (b, e) gate or None.
        state: (b, e, n) h before the step; it is not written to.
        dt_bias: (e) or None.
        dt_softplus: whether dt is passed through softplus.
        backend: "auto", "cpu" (where no gradient is needed) or "reference".

    Returns:
        y (b, e) in x's dtype, and the state after the step (b, e, n).

    Raises:
        ShapeError: a shape, dtype or device does not fit.
    """
    sequence = (T if T is None else T.unsqueeze(1) for T in (x, dt, B, C, z))
    x1, dt1, B1, C1, z1 = sequence
    if x1 is None or dt1 is None or B1 is None or C1 is None:
        raise ShapeError("selective_scan_step needs x, dt, B and C")
    _check(x1, dt1, A, B1, C1, D, z1, dt_bias, state, None)
    options = {"state": state, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
    run = dispatch.pick(
        "selective_scan_step", STEP_BACKENDS, backend, x, dt, A, B, C, D, z, **options
    )
    with dispatch.without_autocast(x):
        return run(x, dt, A, B, C, D, z, **options)


def _pscan(
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
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole sequence at once by `pscan`, with every state in memory: (b, l, e, n)."""
    wide = wide_dtype(x, dt, A, B, C, state)
    delta = step_size(dt.to(wide), dt_bias, dt_softplus)  # (b, l, e)
    decay = torch.exp(delta[..., None] * A.to(wide))  # (b, l, e, n)
    if seq_idx is not None:
        decay = decay * continues(seq_idx)[:, :, None, None]
    drive = (delta * x.to(wide))[..., None] * B.to(wide)[:, :, None]  # (b, l, e, n)
    if state is not None:
        first = drive[:, :1] + decay[:, :1] * state[:, None].to(wide)
        drive = torch.cat((first, drive[:, 1:]), dim=1)
    h = pscan(decay, drive)
    y = torch.einsum("blen,bln->ble", h, C.to(wide))
    if D is not None:
        y = y + D.to(wide) * x.to(wide)
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(x.dtype), h[:, -1]


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Raise unless every tensor has the shape, kind and device that x and A call for."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ShapeError(f"x must be (b, l, e) with l >= 1, got {tuple(x.shape)}")
    if A.dim() != 2:
        raise ShapeError(f"A must be (e, n), got {tuple(A.shape)}")
    (b, l, e), n = x.shape, A.shape[1]
    expected = {
        "dt (b, l, e)": (dt, (b, l, e)),
        "A (e, n)": (A, (e, n)),
        "B (b, l, n)": (B, (b, l, n)),
        "C (b, l, n)": (C, (b, l, n)),
        "D (e)": (D, (e,)),
        "z (b, l, e)": (z, (b, l, e)),
        "dt_bias (e)": (dt_bias, (e,)),
        "state (b, e, n)": (state, (b, e, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ShapeError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ShapeError(f"{name} is on {tensor.device}, x on {x.device}")
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}")
    check_seq_idx(seq_idx, b, l, x.device)


def check_seq_idx(
    seq_idx: Tensor | None, b: int, l: int, device: torch.device | None = None
) -> None:
    """Raise unless seq_idx, where given, is (b, l) of integers, and on a device, where given."""
    if seq_idx is None:
        return
    if seq_idx.shape != (b, l):
        raise ShapeError(f"seq_idx must be (b, l) = {(b, l)}, got {tuple(seq_idx.shape)}")
    if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
        raise ShapeError(f"seq_idx must hold integers, got {seq_idx.dtype}")
    if device is not None and seq_idx.device != device:
        raise ShapeError(f"seq_idx is on {seq_idx.device}, x on {device}")


BACKENDS = dispatch.register(
    "selective_scan",
    [
        dispatch.Backend("cpu", cpu.selective_scan, cpu.refuses),
        dispatch.Backend("gpu", gpu.selective_scan, gpu.refuses_scan),
        dispatch.Backend("official", official.selective_scan, official.refuses_scan),
        dispatch.Backend("chunked", chunked.selective_scan),
        dispatch.Backend("pscan", _pscan),
        dispatch.Backend("reference", reference.selective_scan),
    ],
)

STEP_BACKENDS = dispatch.register(
    "selective_scan_step",
    [
        dispatch.Backend("cpu", cpu.selective_scan_step, cpu.refuses_step),
        dispatch.Backend("reference", reference.selective_scan_step),
    ],
)
