"""The definition of the ops of Mamba-2 and Mamba-3: step by step, in float32 or wider.

The other half of `reference.py`. The channels are in heads, and a head has one decay a step, so
its state h (p, n) is a sum of outer products.

Letters: b batch, l length, h heads, p channels of a head, g groups, n state size, r MIMO rank,
s angles.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapy.ops.reference import continues, step_size, wide_dtype


def ssd(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = (h_t C_t + D x_t) silu(z_t), by head.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, seq_idx: see `ops.ssd`.

    Returns:
        y (b, l, h, p) in x's dtype, and the last state (b, h, p, n).

    Source: Dao & Gu 2024 (arXiv 2405.21060), equations 1 and 2 and section 6.
    """
    wide = wide_dtype(x, dt, A, B, C, state)
    b, l, h, p = x.shape
    H = x.new_zeros(b, h, p, B.shape[3], dtype=wide) if state is None else state.to(wide)
    keep = None if seq_idx is None else continues(seq_idx)
    outputs = []
    for t in range(l):
        if keep is not None:
            H = torch.where(keep[:, t, None, None, None], H, 0.0)
        y, H = ssd_step(
            x[:, t],
            dt[:, t],
            A,
            B[:, t],
            C[:, t],
            D,
            None if z is None else z[:, t],
            state=H,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
        )
        outputs.append(y)
    return torch.stack(outputs, dim=1), H


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
    """One step of `ssd`: x, z (b, h, p), dt (b, h), B and C (b, g, n), state (b, h, p, n)."""
    wide = wide_dtype(x, dt, A, B, C, state)
    delta = step_size(dt.to(wide), dt_bias, dt_softplus).clamp(*dt_limit)  # (b, h)
    heads = x.shape[1] // B.shape[1]
    B, C = (T.to(wide).repeat_interleave(heads, dim=1) for T in (B, C))  # (b, h, n)
    decay = torch.exp(delta * A.to(wide))  # (b, h)
    drive = torch.einsum("bhp,bhn->bhpn", delta[:, :, None] * x.to(wide), B)
    H = decay[:, :, None, None] * state.to(wide) + drive
    y = torch.einsum("bhpn,bhn->bhp", H, C)
    if D is not None:
        y = y + skip(D, x.to(wide))
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), H


def skip(D: Tensor, x: Tensor) -> Tensor:
    """D x, with D (h), one number a head, or (h, p); x (..., h, p)."""
    return (D if D.dim() == 2 else D[:, None]).to(x.dtype) * x


def dual(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `ssd` and `mamba3_scan` have in common, with r inputs and outputs a step.

        y_t[r] = exp(a_t) h_{t-1} Q_t[r] + own_t sum_r' (Q_t[r] K_t[r']) x_t[r']
        h_t    = exp(a_t) h_{t-1} + scale_t sum_r x_t[r] K_t[r]^T

    Args:
        x, log_decay, scale, K, Q, own, state: see `ssd_chunked.dual`.

    Returns:
        y (b, l, r, h, p) and the last state (b, h, p, n), in the dtype of x.
    """
    b, l, _, h, p = x.shape
    own = scale if own is None else own
    heads = h // K.shape[3]
    K, Q = (T.repeat_interleave(heads, dim=3) for T in (K, Q))  # (b, l, r, h, n)
    H = x.new_zeros(b, h, p, K.shape[4]) if state is None else state
    outputs = []
    for t in range(l):
        H = torch.exp(log_decay[:, t])[:, :, None, None] * H
        pairs = torch.einsum("brhn,bshn->bhrs", Q[:, t], K[:, t])
        mixed = torch.einsum("bhrs,bshp->brhp", pairs, x[:, t])
        y = torch.einsum("bhpn,brhn->brhp", H, Q[:, t]) + own[:, t, None, :, None] * mixed
        outputs.append(y)
        drive = torch.einsum("brhp,brhn->bhpn", x[:, t], K[:, t])
        H = H + scale[:, t][:, :, None, None] * drive
    return torch.stack(outputs, dim=1), H


class Mamba3Parts(NamedTuple):
    """What Mamba-3's recurrence carries from one step to the next.

    Args:
        phase: (b, h, s) the angle that each pair of channels has been turned by, radians.
        ssm: (b, h, p, n) h.
        key: (b, r, h, n) the last K, turned.
        value: (b, h, p) the last x.
    """

    phase: Tensor
    ssm: Tensor
    key: Tensor
    value: Tensor


def mamba3_scan(
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
    state: Mamba3Parts | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Mamba3Parts]:
    """A trapezoidal recurrence whose state turns as it decays; see `mamba3_step`.

    Args:
        x, dt, A, trap, omega, B, C, D, B_bias, C_bias, mimo_x, rotate, state, seq_idx, lengths: see
            `ops.mamba3_scan`.

    Returns:
        y (b, l, r, h, p) in x's dtype, and what it leaves.
    """
    wide = wide_dtype(x, dt, A, trap, omega, B, C)
    parts = zero_parts(x, B, omega, wide) if state is None else state
    keep = None if seq_idx is None else continues(seq_idx)
    outputs = []
    for t in range(x.shape[1]):
        before = parts
        if keep is not None:
            before = _where(keep[:, t], parts, Mamba3Parts(*map(torch.zeros_like, parts)))
        y, after = mamba3_step(
            x[:, t],
            dt[:, t],
            A[:, t],
            trap[:, t],
            omega[:, t],
            B[:, t],
            C[:, t],
            D,
            B_bias=B_bias,
            C_bias=C_bias,
            mimo_x=mimo_x,
            rotate=rotate,
            state=before,
        )
        parts = after if lengths is None else _where(t < lengths, after, parts)
        outputs.append(y)
    return torch.stack(outputs, dim=1), parts


def _where(rows: Tensor, yes: Mamba3Parts, no: Mamba3Parts) -> Mamba3Parts:
    """The rows (b) of `yes` where True, of `no` elsewhere."""
    pairs = zip(yes, no, strict=True)
    return Mamba3Parts(*(torch.where(rows.view(-1, *[1] * (Y.dim() - 1)), Y, N) for Y, N in pairs))


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
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    rotate: str = "pairs",
    state: Mamba3Parts,
) -> tuple[Tensor, Mamba3Parts]:
    """h_t = e^{dt A} h_{t-1} + (1 - trap) dt e^{dt A} X_{t-1} K_{t-1} + trap dt X_t K_t.

    K and Q are B and C with their biases, turned by the phase; y_t[r] = h_t Q_t[r] + D X_t[r].

    Args:
        x: (b, h, p).    dt, A, trap: (b, h).    omega: (b, s).    B, C: (b, r, g, n).
        D, B_bias, C_bias, mimo_x, rotate: see `ops.mamba3_scan`.
        state: before the step.

    Returns:
        y (b, r, h, p), and the state after the step.

    Source: Mamba-3 (2026), the trapezoidal recurrence with data-dependent rotations.
    """
    wide = wide_dtype(x, dt, A, trap, omega, B, C, state.ssm)
    x_wide, dt, A, trap, omega = (T.to(wide) for T in (x, dt, A, trap, omega))
    phase = state.phase.to(wide) + dt[:, :, None] * omega[:, None]  # (b, h, s)
    K = turned(biased(B.to(wide), B_bias, x.shape[1]), phase[:, None], rotate)  # (b, r, h, n)
    Q = turned(biased(C.to(wide), C_bias, x.shape[1]), phase[:, None], rotate)  # (b, r, h, n)
    decay = torch.exp(dt * A)  # (b, h)
    X, before = inputs(x_wide, mimo_x), inputs(state.value.to(wide), mimo_x)  # (b, r, h, p)
    old = torch.einsum("brhp,brhn->bhpn", before, state.key.to(wide))
    new = torch.einsum("brhp,brhn->bhpn", X, K)
    carried, driven = (1 - trap) * dt * decay, trap * dt  # (b, h)
    H = decay[:, :, None, None] * state.ssm.to(wide)
    H = H + carried[:, :, None, None] * old + driven[:, :, None, None] * new
    y = torch.einsum("bhpn,brhn->brhp", H, Q)
    if D is not None:
        y = y + skip(D, X)
    # Only the angle counts; kept small, it keeps its precision.
    phase = torch.remainder(phase + math.pi, 2 * math.pi) - math.pi
    return y.to(x.dtype), Mamba3Parts(phase, H, K, x_wide)


def zero_parts(x: Tensor, B: Tensor, omega: Tensor, wide: torch.dtype) -> Mamba3Parts:
    """The state before the first step of x (b, l, h, p), B (b, l, r, g, n), omega (b, l, s)."""
    b, _, h, p = x.shape
    r, n = B.shape[2], B.shape[4]
    shapes = ((b, h, omega.shape[2]), (b, h, p, n), (b, r, h, n), (b, h, p))
    return Mamba3Parts(*(x.new_zeros(shape, dtype=wide) for shape in shapes))


def biased(B: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """B (..., r, g, n) for each head, with the bias (h, r, n) added: (..., r, h, n)."""
    B = B.repeat_interleave(heads // B.shape[-2], dim=-2)  # (..., r, h, n)
    return B if bias is None else B + bias.transpose(0, 1).to(B.dtype)


def inputs(x: Tensor, mimo_x: Tensor | None) -> Tensor:
    """x (..., h, p) as the r inputs of a step, weighted by mimo_x (h, r, p): (..., r, h, p)."""
    x = x.unsqueeze(-3)  # (..., 1, h, p)
    return x if mimo_x is None else x * mimo_x.transpose(0, 1).to(x.dtype)


def turned(B: Tensor, phase: Tensor, rotate: str) -> Tensor:
    """The first s pairs of B's channels (..., n), turned by `phase` (..., s).

    A pair is channels (2i, 2i + 1) for "pairs", (i, i + n/2) for "halves".
    """
    s = phase.shape[-1]
    cos, sin = torch.cos(phase), torch.sin(phase)
    if rotate == "pairs":
        first, second = B[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)  # (..., s)
        pair = (first * cos - second * sin, first * sin + second * cos)
        return torch.cat((torch.stack(pair, dim=-1).flatten(-2), B[..., 2 * s :]), dim=-1)
    half = B.shape[-1] // 2
    first, second = B[..., :s], B[..., half : half + s]
    return torch.cat(
        (
            first * cos - second * sin,
            B[..., s:half],
            first * sin + second * cos,
            B[..., half + s :],
        ),
        dim=-1,
    )
