"""The definition of every op: step by step, in float32 or wider, as the papers write it.

Nothing here is fast. Every other backend is tested against this file, on outputs and on gradients.

Letters: b batch, l length, e channels (d_inner), n state size, k convolution width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to calculate in: float64 if any tensor has it, else float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """dt -> softplus(dt + dt_bias), each part only where asked for; keeps dt's dtype."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def continues(seq_idx: Tensor) -> Tensor:
    """(b, l) bool: whether a token's document is that of the token before it.

    A row's first token counts as a continuation: the initial state belongs to its document.
    """
    same = seq_idx[:, 1:] == seq_idx[:, :-1]
    return torch.cat((torch.ones_like(seq_idx[:, :1], dtype=torch.bool), same), dim=1)


def runs(seq_idx: Tensor) -> Tensor:
    """(b, l) int64: documents counted from 0 along each row.

    A number that comes back after another one names a new document.
    """
    return (~continues(seq_idx)).cumsum(dim=1)


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
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = (C_t h_t + D x_t) silu(z_t).

    The decay is discretised exactly (zero-order hold), the input by Euler's rule: this is what
    the paper's code does, and what its checkpoints expect.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, seq_idx: see `ops.selective_scan`.

    Returns:
        y (b, l, e) in x's dtype, and the last state (b, e, n).

    Source: Gu & Dao 2023 (arXiv 2312.00752), equations 2 to 4 and Algorithm 2.
    """
    wide = wide_dtype(x, dt, A, B, C, state)
    b, l, e = x.shape
    h = x.new_zeros(b, e, A.shape[1], dtype=wide) if state is None else state.to(wide)
    keep = None if seq_idx is None else continues(seq_idx)
    outputs = []
    for t in range(l):
        if keep is not None:
            h = torch.where(keep[:, t, None, None], h, 0.0)
        y, h = selective_scan_step(
            x[:, t],
            dt[:, t],
            A,
            B[:, t],
            C[:, t],
            D,
            None if z is None else z[:, t],
            state=h,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
        )
        outputs.append(y)
    return torch.stack(outputs, dim=1), h


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
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`: x, dt, z (b, e), B and C (b, n), state (b, e, n)."""
    wide = wide_dtype(x, dt, A, B, C, state)
    delta = step_size(dt.to(wide), dt_bias, dt_softplus)  # (b, e)
    decay = torch.exp(delta[:, :, None] * A.to(wide))  # (b, e, n)
    drive = (delta * x.to(wide))[:, :, None] * B.to(wide)[:, None]  # (b, e, n)
    h = decay * state.to(wide) + drive
    y = torch.einsum("ben,bn->be", h, C.to(wide))
    if D is not None:
        y = y + D.to(wide) * x.to(wide)
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), h


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j}), each channel on its own.

    Tokens before the first are the state's (zero without one); a tap into another document
    counts as zero.

    Args:
        x, weight, bias, activation, state, seq_idx: see `ops.causal_conv1d`.

    Returns:
        y (b, l, e), in x's dtype.

    Source: Gu & Dao 2023 (arXiv 2312.00752), figure 3.
    """
    wide = wide_dtype(x, weight, state)
    l, k = x.shape[1], weight.shape[1]
    before = x.new_zeros(x.shape[0], k - 1, x.shape[2]) if state is None else state
    padded = torch.cat((before.to(wide), x.to(wide)), dim=1)  # (b, k-1+l, e)
    documents = None
    if seq_idx is not None:
        seq_idx = runs(seq_idx)
        documents = torch.cat((seq_idx[:, :1].expand(-1, k - 1), seq_idx), dim=1)  # (b, k-1+l)
    y = padded[:, k - 1 :] * weight[:, k - 1].to(wide)
    for j in range(k - 1):
        tap = padded[:, j : j + l]
        if documents is not None and seq_idx is not None:
            tap = torch.where((documents[:, j : j + l] == seq_idx)[:, :, None], tap, 0.0)
        y = y + tap * weight[:, j].to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`: x (b, e), state (b, k-1, e) -> y (b, e) and the new state."""
    window = torch.cat((state, x[:, None].to(state.dtype)), dim=1)  # (b, k, e)
    wide = wide_dtype(x, weight, state)
    y = torch.einsum("bke,ek->be", window.to(wide), weight.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), window[:, 1:]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension, in x's dtype or another.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    wide = x.to(wide_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(dtype or x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """s = residual + x in the wider dtype of both, and y = rms_norm(s), in x's dtype or another.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    s = residual + x
    return rms_norm(s, weight, eps, dtype or x.dtype), s


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, n_groups: int = 1, eps: float = 1e-5
) -> Tensor:
    """weight * norm(y silu(z)), the norm over each of n_groups groups of channels, in y's dtype.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.1.
    """
    wide = wide_dtype(y, z, weight)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (n_groups, -1))
    return (rms_norm(gated, None, eps).flatten(-2) * weight.to(wide)).to(y.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """lse(L) - L[target] with L = x W^T + bias, over the rows of x whose target counts."""
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    wide = wide_dtype(x, weight, bias)
    L = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return F.cross_entropy(L, target, ignore_index=ignore_index, reduction=reduction)
