"""State-space duality, Mamba-2's recurrence: the public op, its one-step twin, its backends."""

import math
from functools import partial
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, official, reference_ssd, ssd_chunked
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.reference import continues, step_size, wide_dtype
from mambapy.ops.running_sum import since_start
from mambapy.ops.selective_scan import check_seq_idx


@overload
def ssd(*args: Any, return_state: Literal[True], **kwargs: Any) -> tuple[Tensor, Tensor]: ...
@overload
def ssd(*args: Any, **kwargs: Any) -> Tensor: ...
def ssd(  # type: ignore[misc]
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_state: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 recurrence, for each head: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T.

    The output is y_t = (h_t C_t + D x_t) silu(z_t). It runs in float32, or in float64 where an
    argument has it, and is differentiable in every floating-point argument.

    Args:
        x: (b, l, h, p) input after convolution and SiLU, p channels in each of h heads, l >= 1.
        dt: (b, l, h) step sizes, >= 0 once bias, softplus and limit are applied.
        A: (h), < 0.
        B: (b, l, g, n) input weights; h / g heads in a row share those of a group.
        C: (b, l, g, n) output weights.
        D: (h) or (h, p) weight of the skip from x to y; none without it.
        z: (b, l, h, p) gate, applied as silu(z); none without it.
        chunk_size: tokens that are handled at once; it changes the speed, not the result. None
            for what was measured to be best.
        dt_bias: (h) added to dt.
        dt_softplus: whether dt is passed through softplus.
        dt_limit: (low, high) that dt is clamped to, after bias and softplus.
        state: (b, h, p, n) h before the first step; zeros without it.
        seq_idx: (b, l) integers, the document of each token. Where it changes, the state restarts
            from zero; the initial state belongs to the first token's document.
        return_state: whether to return h after the last step too.
        out: (b, l, h, p) where to write y, in x's dtype; it may be x itself, which saves memory.
            Only where no gradient is needed.
        backend: "auto", or one of "cpu", "official", "chunked", "reference".

    Returns:
        y (b, l, h, p) in x's dtype; with `return_state` also the state (b, h, p, n), float32 or
        wider.

    Raises:
        ShapeError: a shape, dtype or device does not fit, or chunk_size is below 1.
        BackendError: the backend asked for cannot run this, or `out` would need a gradient.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 6.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, seq_idx)
    dispatch.check_out(out, x, dt, A, B, C, D, z, dt_bias, state)
    if chunk_size is not None and chunk_size < 1:
        raise ShapeError(f"chunk_size={chunk_size} must be >= 1, or None")
    options: dict[str, Any] = {
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
        "dt_limit": dt_limit,
        "state": state,
        "seq_idx": seq_idx,
    }
    run = dispatch.pick("ssd", BACKENDS, backend, x, dt, A, B, C, D, z, **options)
    if run is not reference_ssd.ssd:
        options |= {"chunk_size": chunk_size, "out": out}
    with dispatch.without_autocast(x):
        y, last = run(x, dt, A, B, C, D, z, **options)
    y = dispatch.written(y, out)
    return (y, last) if return_state else y


def ssd_step(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """One step of `ssd`.

    Args:
        x: (b, h, p) input.
        dt: (b, h) step sizes.
        A: (h).
        B: (b, g, n).
        C: (b, g, n).
        D: (h) or (h, p) or None.
        z: (b, h, p) gate or None.
        state: (b, h, p, n) h before the step; it is not written to.
        dt_bias: (h) or None.
        dt_softplus: whether dt is passed through softplus.
        dt_limit: (low, high) that dt is clamped to.

    Returns:
        y (b, h, p) in x's dtype, and the state after the step (b, h, p, n).

    Raises:
        ShapeError: a shape, dtype or device does not fit.
    """
    x1, dt1, B1, C1 = (T.unsqueeze(1) for T in (x, dt, B, C))
    _check(x1, dt1, A, B1, C1, D, None if z is None else z.unsqueeze(1), dt_bias, state, None)
    with dispatch.without_autocast(x):
        return reference_ssd.ssd_step(
            *(x, dt, A, B, C, D, z),
            state=state,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
        )


def ssd_from_start(
    initial: Tensor, dt: Tensor, A: Tensor, C: Tensor, seq_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """What `ssd` would add if documents that start inside the sequence started from `initial`.

    The first token's document is left out: its state is an argument of `ssd`.

    Args:
        initial: (h, p, n) the state before a document.
        dt: (b, l, h) step sizes, bias, softplus and limit applied.
        A: (h), < 0.
        C: (b, l, g, n) output weights.
        seq_idx: (b, l) integers, the document of each token.

    Returns:
        To be added to y, (b, l, h, p), and to the last state, (b, h, p, n).
    """
    least = ssd_chunked.RESET[wide_dtype(dt, A)]
    log_decay = (dt * A).clamp(min=least)
    log_decay, goes_on = since_start(log_decay, ~continues(seq_idx))  # (b, l, h), (b, l, 1)
    left = log_decay.clamp(max=0.0).exp().to(initial.dtype)  # (b, l, h)
    left = torch.where(cast(Tensor, goes_on), 0.0, left)
    heads = initial.unflatten(0, (C.shape[2], -1))  # (g, e, p, n)
    with dispatch.without_autocast(C):
        read = torch.einsum("blgn,gepn->blgep", C.to(initial.dtype), heads).flatten(2, 3)
    return left.unsqueeze(-1) * read, left[:, -1, :, None, None] * initial


def _chunked(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    fused: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` by `ssd_chunked.dual`: B is its K, C its Q, and a token counts as much as its dt."""
    wide = wide_dtype(x, dt, A, B, C, state)
    delta = step_size(dt.to(wide), dt_bias, dt_softplus).clamp(*dt_limit)  # (b, l, h)
    nothing = ssd_chunked.RESET[wide]
    log_decay = (delta * A.to(wide)).clamp(min=nothing)  # (b, l, h)
    if seq_idx is not None:
        log_decay = log_decay.masked_fill(~continues(seq_idx)[:, :, None], nothing)
    x_wide = x.to(wide)
    by_channel = D is not None and D.dim() == 2
    if out is not None and (out.dtype != wide or by_channel or dispatch.is_traced()):
        # Not at once: x is needed afterwards, or y has another dtype. The caller copies it.
        out = None
    y, last = ssd_chunked.dual(
        x_wide.unsqueeze(2),
        log_decay,
        delta,
        B.to(wide).unsqueeze(2),
        C.to(wide).unsqueeze(2),
        D=D.to(wide) if D is not None and D.dim() == 1 else None,
        state=None if state is None else state.to(wide),
        chunk_size=chunk_size or ssd_chunked.chunk_for(x),
        fused=fused,
        out=None if out is None else out.unsqueeze(2),
    )
    y = y.squeeze(2) if out is None else out  # (b, l, h, p)
    if D is not None and D.dim() == 2:
        y = y + reference_ssd.skip(D, x_wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), last


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
    """Raise unless every tensor has the shape, kind and device that x and B call for."""
    if x.dim() != 4 or x.shape[1] == 0:
        raise ShapeError(f"x must be (b, l, h, p) with l >= 1, got {tuple(x.shape)}")
    if B.dim() != 4:
        raise ShapeError(f"B must be (b, l, g, n), got {tuple(B.shape)}")
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    if not g or h % g:
        raise ShapeError(f"the {g} groups of B must divide the {h} heads of x")
    D_shape = (h,) if D is None or D.dim() == 1 else (h, p)
    expected = {
        "dt (b, l, h)": (dt, (b, l, h)),
        "A (h)": (A, (h,)),
        "B (b, l, g, n)": (B, (b, l, g, n)),
        "C (b, l, g, n)": (C, (b, l, g, n)),
        "D (h) or (h, p)": (D, D_shape),
        "z (b, l, h, p)": (z, (b, l, h, p)),
        "dt_bias (h)": (dt_bias, (h,)),
        "state (b, h, p, n)": (state, (b, h, p, n)),
    }
    check_tensors(x, expected)
    check_seq_idx(seq_idx, b, l)


def check_tensors(x: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise unless each tensor, where given, has its shape, is floating point, and is by x."""
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


BACKENDS = dispatch.register(
    "ssd",
    [
        dispatch.Backend("cpu", partial(_chunked, fused=True), cpu.refuses),
        dispatch.Backend("official", official.ssd, official.refuses_ssd),
        dispatch.Backend("chunked", _chunked),
        dispatch.Backend("reference", reference_ssd.ssd),
    ],
)
