"""Mamba-3's recurrence: the public op, its one-step twin, its backends.

The recurrence looks one token back: h_t = e^{a_t} h_{t-1} + b_t X_{t-1} K_{t-1} + c_t X_t K_t. But
what token j adds to a later state is X_j K_j, once at its own step and once at the next, so that

    h_t = sum_{j <= t} E(t, j) s_j X_j K_j,    s_j = trap_j dt_j + (1 - trap_{j+1}) dt_{j+1}

where token t itself has only its first half so far. That is the recurrence of `ssd_chunked.dual`,
with `scale` s and `own` trap dt: one pass.

Source: Mamba-3 (2026), the trapezoidal recurrence with data-dependent rotations.
"""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops import dispatch, reference_ssd, ssd_chunked
from mambapy.ops.cpu import backend as cpu
from mambapy.ops.reference import continues, wide_dtype
from mambapy.ops.reference_ssd import Mamba3Parts, inputs, zero_parts
from mambapy.ops.selective_scan import check_seq_idx
from mambapy.ops.ssd import check_tensors
from mambapy.ops.turning import keys_and_queries


@overload
def mamba3_scan(
    *args: Any, return_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Mamba3Parts]: ...
@overload
def mamba3_scan(*args: Any, **kwargs: Any) -> Tensor: ...
def mamba3_scan(  # type: ignore[misc]
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    rotate: str = "pairs",
    chunk_size: int | None = None,
    state: Mamba3Parts | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Mamba3Parts]:
    """A trapezoidal recurrence whose state turns as it decays, with r inputs and outputs a step.

        phase_t = phase_{t-1} + omega_t dt_t
        K_t, Q_t = B_t + B_bias, C_t + C_bias, pairs of channels turned by phase_t
        h_t = e^{dt_t A_t} (h_{t-1} + (1 - trap_t) dt_t X_{t-1} K_{t-1}) + trap_t dt_t X_t K_t
        y_t[r] = h_t Q_t[r] + D X_t[r],    X_t[r] = mimo_x[r] x_t  (X_t K_t is a sum over r)

    It runs in float32, or in float64 where an argument has it, and is differentiable in every
    floating-point argument and in the state.

    Args:
        x: (b, l, h, p) input, p channels in each of h heads, l >= 1.
        dt: (b, l, h) step sizes, >= 0.
        A: (b, l, h) decay rates, < 0.
        trap: (b, l, h) in (0, 1): 1 is Euler's rule, 1/2 the trapezoidal one.
        omega: (b, l, s) speeds, radians per unit of dt; the same for all heads. 2 s <= n.
        B: (b, l, r, g, n) input weights; h / g heads in a row share those of a group.
        C: (b, l, r, g, n) output weights.
        D: (h) weight of the skip; none without it.
        B_bias: (h, r, n) added to B before the turn.
        C_bias: (h, r, n) added to C before the turn.
        mimo_x: (h, r, p) weights of a step's inputs; needed where r > 1.
        rotate: "pairs" turns channels (2i, 2i + 1) of n together, "halves" (i, i + n/2); i < s.
        chunk_size: tokens that are handled at once; it changes the speed, not the result.
        state: before the first step; zeros without it.
        seq_idx: (b, l) integers, the document of each token. Where it changes, everything
            restarts; the initial state belongs to the first token's document.
        lengths: (b) how many tokens of each row are real, the rest is padding on the right: the
            state stands after the last real one.
        return_state: whether to return the state too.
        backend: "auto", or one of "cpu", "chunked", "reference".

    Returns:
        y (b, l, r, h, p) in x's dtype; with `return_state` also the state, float32 or wider.

    Raises:
        ShapeError: a shape, dtype or device does not fit, or chunk_size is below 1.
        BackendError: the backend asked for cannot run this.
    """
    _check(x, dt, A, trap, omega, B, C, D, B_bias, C_bias, mimo_x, rotate, state)
    check_seq_idx(seq_idx, *x.shape[:2])
    if lengths is not None and (lengths.shape != x.shape[:1] or lengths.is_floating_point()):
        raise ShapeError(
            f"lengths must be ({x.shape[0]},) integers, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ShapeError(f"chunk_size={chunk_size} must be >= 1, or None")
    options: dict[str, Any] = {
        "B_bias": B_bias,
        "C_bias": C_bias,
        "mimo_x": mimo_x,
        "rotate": rotate,
        "state": state,
        "seq_idx": seq_idx,
        "lengths": lengths,
    }
    tensors = (x, dt, A, trap, omega, B, C, D)
    run = dispatch.pick("mamba3_scan", BACKENDS, backend, *tensors, **options)
    if run is not reference_ssd.mamba3_scan:
        options["chunk_size"] = chunk_size
    with dispatch.without_autocast(x):
        y, parts = run(*tensors, **options)
    return (y, parts) if return_state else y


def mamba3_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Mamba3Parts,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    rotate: str = "pairs",
) -> tuple[Tensor, Mamba3Parts]:
    """One step of `mamba3_scan`; each argument as there, without the length.

    Args:
        x: (b, h, p).
        dt: (b, h).
        A: (b, h).
        trap: (b, h).
        omega: (b, s).
        B: (b, r, g, n).
        C: (b, r, g, n).
        D: (h) or None.
        state: before the step; it is not written to.
        B_bias: (h, r, n) or None.
        C_bias: (h, r, n) or None.
        mimo_x: (h, r, p) or None.
        rotate: "pairs" or "halves".

    Returns:
        y (b, r, h, p) in x's dtype, and the state after the step.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
    """
    tensors = (x, dt, A, trap, omega, B, C)
    x1, dt1, A1, trap1, omega1, B1, C1 = (T.unsqueeze(1) for T in tensors)
    _check(x1, dt1, A1, trap1, omega1, B1, C1, D, B_bias, C_bias, mimo_x, rotate, state)
    with dispatch.without_autocast(x):
        return reference_ssd.mamba3_step(
            *(x, dt, A, trap, omega, B, C, D),
            B_bias=B_bias,
            C_bias=C_bias,
            mimo_x=mimo_x,
            rotate=rotate,
            state=state,
        )


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    rotate: str = "pairs",
    chunk_size: int | None = None,
    state: Mamba3Parts | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Mamba3Parts]:
    """`mamba3_scan` by `ssd_chunked.dual`; see the head of this file."""
    wide = wide_dtype(x, dt, A, trap, omega, B, C, None if state is None else state.ssm)
    x_wide, dt, A, trap, omega, B, C = (T.to(wide) for T in (x, dt, A, trap, omega, B, C))
    if state is None:
        parts = zero_parts(x, B, omega, wide)
    else:
        parts = Mamba3Parts(*(T.to(wide) for T in state))
    starts = None if seq_idx is None else ~continues(seq_idx)  # (b, l)
    if lengths is not None:
        # Without a step the state stands still.
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (b, l)
        dt = torch.where(real[:, :, None], dt, 0.0)
        starts = None if starts is None else starts & real
    nothing = ssd_chunked.RESET[wide]
    log_decay, later = (dt * A).clamp(min=nothing), (1 - trap) * dt  # (b, l, h)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[:, :, None], nothing)
        later = later.masked_fill(starts[:, :, None], 0.0)
    own = trap * dt  # (b, l, h)
    # Padded first: a length of l - 1 would make torch.export take l = 2 for another case.
    scale = own + torch.nn.functional.pad(later, (0, 0, 0, 1))[:, 1:]  # (b, l, h)

    make = cpu.keys_and_queries if fused else keys_and_queries
    K, Q, phase = make(B, C, B_bias, C_bias, dt, omega, parts.phase, starts, rotate)
    X = inputs(x_wide, mimo_x)  # (b, l, r, h, p)
    # The half of the token before the first that is still to come.
    before = torch.einsum("brhp,brhn->bhpn", inputs(parts.value, mimo_x), parts.key)
    ssm = parts.ssm + later[:, 0, :, None, None] * before
    y, ssm = ssd_chunked.dual(
        X,
        log_decay,
        scale,
        K,
        Q,
        own,
        None if D is None else D.to(wide),
        ssm,
        chunk_size=chunk_size or ssd_chunked.chunk_for(x, X.shape[2]),
        fused=fused and X.shape[2] == 1,
    )
    # A copy: a view would keep the whole sequence alive.
    last = tuple(_last(T, lengths, old) for T, old in ((K, parts.key), (x_wide, parts.value)))
    return y.to(x.dtype), Mamba3Parts(phase[:, -1].clone(), ssm, *last)


def _last(T: Tensor, lengths: Tensor | None, before: Tensor) -> Tensor:
    """T (b, l, ...) at each row's last real token; `before` (b, ...) where it has none."""
    if lengths is None:
        return T[:, -1].clone()
    shape = (-1, *[1] * (T.dim() - 1))
    index = (lengths - 1).clamp(0, T.shape[1] - 1).view(shape).expand(-1, 1, *T.shape[2:])
    found = T.gather(1, index).squeeze(1)
    return torch.where((lengths > 0).view(shape[:-1]), found, before)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    omega: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    rotate: str,
    state: Mamba3Parts | None,
) -> None:
    """Raise unless every tensor has the shape, kind and device that x, B and omega call for."""
    if x.dim() != 4 or x.shape[1] == 0:
        raise ShapeError(f"x must be (b, l, h, p) with l >= 1, got {tuple(x.shape)}")
    if B.dim() != 5 or omega.dim() != 3:
        raise ShapeError(
            f"B must be (b, l, r, g, n) and omega (b, l, s), "
            f"got {tuple(B.shape)} and {tuple(omega.shape)}"
        )
    (b, l, h, p), (r, g, n), s = x.shape, B.shape[2:], omega.shape[2]
    if not g or h % g:
        raise ShapeError(f"the {g} groups of B must divide the {h} heads of x")
    if rotate not in ("pairs", "halves"):
        raise ShapeError(f"rotate must be 'pairs' or 'halves', got {rotate!r}")
    if 2 * s > n or (rotate == "halves" and n % 2):
        raise ShapeError(f"{s} angles need n >= {2 * s} channels, even for 'halves'; n is {n}")
    if mimo_x is None and r > 1:
        raise ShapeError(f"B has r = {r} rows a step: mimo_x (h, r, p) is needed")
    heads = (b, l, h)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt (b, l, h)": (dt, heads),
        "A (b, l, h)": (A, heads),
        "trap (b, l, h)": (trap, heads),
        "omega (b, l, s)": (omega, (b, l, s)),
        "B (b, l, r, g, n)": (B, (b, l, r, g, n)),
        "C (b, l, r, g, n)": (C, (b, l, r, g, n)),
        "D (h)": (D, (h,)),
        "B_bias (h, r, n)": (B_bias, (h, r, n)),
        "C_bias (h, r, n)": (C_bias, (h, r, n)),
        "mimo_x (h, r, p)": (mimo_x, (h, r, p)),
    }
    if state is not None:
        phase, ssm, key, value = state
        expected |= {
            "state's phase (b, h, s)": (phase, (b, h, s)),
            "state's ssm (b, h, p, n)": (ssm, (b, h, p, n)),
            "state's key (b, r, h, n)": (key, (b, r, h, n)),
            "state's value (b, h, p)": (value, (b, h, p)),
        }
    check_tensors(x, expected)


BACKENDS = dispatch.register(
    "mamba3_scan",
    [
        dispatch.Backend("cpu", partial(_chunked, fused=True), cpu.refuses),
        dispatch.Backend("chunked", _chunked),
        dispatch.Backend("reference", reference_ssd.mamba3_scan),
    ],
)
