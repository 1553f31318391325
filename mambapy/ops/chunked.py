"""The selective scan in plain PyTorch, a chunk of the length at a time, on any device.

The states of a whole sequence, (b, l, n, e), are n times larger than its input, and a framework
that differentiates the recurrence keeps several such tensors. Here they exist for one chunk at a
time. The forward pass keeps the state at the start of each chunk, e n / chunk numbers a token; the
backward pass visits the chunks from the last to the first, and computes each one's states again.

    _forward   for each chunk:  _discretise -> _scan -> y
    _backward  for each chunk, reversed:  _discretise -> _scan -> reverse _scan of the gradient

Both are registered as one operator each, so torch.compile and torch.export see two opaque calls.
Inside, the state stands as (b, n, e): the channels are the long axis, so they come last.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from mambapy.ops import reference
from mambapy.ops.custom_op import (
    differentiable,
    differentiable_gradients,
    never_twice,
    nothing,
    transform,
)
from mambapy.ops.reference import continues, step_size, wide_dtype
from mambapy.pscan import scan_in_place

# Gradients of x, dt, A, B, C, D, z, dt_bias, state. (A schema needs each of them spelt out.)
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Steps between saved states, at least: 64 keeps them at e/4 numbers a token where n = 16.
CHUNK, LONGEST_CHUNK = 64, 2048
# Numbers in a (rows, chunk, n, e) tensor: a CPU's cache holds them, or an accelerator is full.
TILE_CPU, TILE_ACCELERATOR = 2**20, 2**25


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
    """`ops.selective_scan`, a chunk at a time. Returns y (b, l, e) and the last state (b, e, n)."""
    y, last, _ = _call_forward(x, dt, A, B, C, D, z, dt_bias, state, seq_idx, dt_softplus)
    return y, last


@torch.library.custom_op("mambapy::chunked_scan", mutates_args=())
def _forward(
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
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b, l, e), the last state (b, e, n), and the states between chunks (b, chunks+1, n, e)."""
    y, last, bounds = _empty_outputs(x, dt, A, B, C, state)
    keep = None if seq_idx is None else continues(seq_idx)
    wide = last.dtype
    A = A.t().to(wide)  # (n, e)
    for rows in _tiles(x, A):
        h = bounds.new_zeros(bounds[rows, 0].shape)  # (b, n, e)
        if state is not None:
            h.copy_(state[rows].transpose(1, 2))
        for i, steps in enumerate(_chunks(x, A.shape[0])):
            bounds[rows, i] = h
            _, _, H = _states(x, dt, A, B, dt_bias, dt_softplus, keep, h, rows, steps)
            out = torch.einsum("bcne,bcn->bce", H, C[rows, steps].to(wide))
            if D is not None:
                out.addcmul_(D.to(wide), x[rows, steps].to(wide))
            if z is not None:
                out.mul_(torch.nn.functional.silu(z[rows, steps].to(wide)))
            y[rows, steps] = out
            h = H[:, -1]
        bounds[rows, -1] = h
        last[rows] = h.transpose(1, 2)
    return y, last, bounds


@_forward.register_fake
def _(
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
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, dt, A, B, C, state)


@torch.library.custom_op("mambapy::chunked_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    bounds: Tensor,
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
    dt_softplus: bool,
) -> Grads:
    """The gradients; an empty tensor for what was None."""
    grads = _empty_grads(x, dt, A, B, C, D, z, dt_bias, state)
    gx, gdt, gA, gB, gC, gD, gz, gbias, gstate = grads
    keep = None if seq_idx is None else continues(seq_idx)
    wide = bounds.dtype
    A = A.t().to(wide)  # (n, e)
    # Summed over tokens, so in the wide dtype until the end.
    sum_A, sum_D, sum_bias = torch.zeros_like(A), A.new_zeros(A.shape[1]), A.new_zeros(A.shape[1])
    for rows in _tiles(x, A):
        G_next = grad_last[rows].transpose(1, 2).to(wide)  # (b, n, e): dLoss/dh after the chunk
        for i, steps in reversed(list(enumerate(_chunks(x, A.shape[0])))):
            xs, Bs, Cs = (T[rows, steps].to(wide) for T in (x, B, C))
            h = bounds[rows, i]
            delta, decay, H = _states(x, dt, A, B, dt_bias, dt_softplus, keep, h, rows, steps)
            g = grad_y[rows, steps].to(wide)  # (b, c, e)
            if z is not None:
                zs = z[rows, steps].to(wide)
                y = torch.einsum("bcne,bcn->bce", H, Cs)
                if D is not None:
                    y.addcmul_(D.to(wide), xs)
                sigmoid = torch.sigmoid(zs)
                gz[rows, steps] = g * y * (sigmoid * (1 + zs * (1 - sigmoid)))
                g = g * (zs * sigmoid)
            gC[rows, steps] = torch.einsum("bcne,bce->bcn", H, g)
            H_before = torch.cat((h[:, None], H[:, :-1]), dim=1)  # (b, c, n, e)

            # G_t = dLoss/dh_t = C_t g_t + decay_{t+1} G_{t+1}, from the last step to the first.
            G = g[:, :, None] * Cs[..., None]  # (b, c, n, e)
            G[:, -1] += G_next
            following = torch.cat((decay[:, 1:], torch.zeros_like(decay[:, :1])), dim=1)
            _scan(following, G, reverse=True)
            G_next = decay[:, 0] * G[:, 0]

            g_drive = torch.einsum("bcne,bcn->bce", G, Bs)  # dLoss/d(delta x)
            gB[rows, steps] = torch.einsum("bcne,bce->bcn", G, delta * xs)
            # From here `decay` holds dLoss/d(delta A), which is G h_{t-1} exp(delta A).
            decay.mul_(G).mul_(H_before)
            sum_A += torch.einsum("bcne,bce->ne", decay, delta)
            g_delta = torch.einsum("bcne,ne->bce", decay, A).addcmul_(g_drive, xs)
            if dt_softplus:
                # d softplus(v) / dv = sigmoid(v) = 1 - exp(-softplus(v))
                g_delta = g_delta * -torch.expm1(-delta)
            g_x = g_drive * delta
            if D is not None:
                g_x.addcmul_(D.to(wide), g)
                sum_D += torch.einsum("bce,bce->e", g, xs)
            gx[rows, steps] = g_x
            gdt[rows, steps] = g_delta
            sum_bias += g_delta.sum(dim=(0, 1))
        if state is not None:
            gstate[rows] = G_next.transpose(1, 2)
    gA.copy_(sum_A.t())
    if D is not None:
        gD.copy_(sum_D)
    if dt_bias is not None:
        gbias.copy_(sum_bias)
    return grads


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    bounds: Tensor,
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
    dt_softplus: bool,
) -> Grads:
    return _empty_grads(x, dt, A, B, C, D, z, dt_bias, state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and the states between the chunks."""
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _autograd(
    ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor
) -> tuple[Tensor | bool | None, ...]:
    """The gradient of `_forward`; itself differentiable where a second derivative is asked for."""
    *tensors, bounds = ctx.saved_tensors
    if torch.is_grad_enabled() and transform() is None:
        grads = differentiable_gradients(
            lambda x, dt, A, B, C, D, z, dt_bias, state: reference.selective_scan(
                *(x, dt, A, B, C, D, z),
                dt_bias=dt_bias,
                dt_softplus=ctx.dt_softplus,
                state=state,
                seq_idx=tensors[9],
            ),
            tensors[:9],
            ctx.needs_input_grad[:9],
            (grad_y, grad_last),
        )
    else:
        grads = _call_backward(grad_y, grad_last, bounds, *tensors, ctx.dt_softplus)
    given = [g if t is not None else None for g, t in zip(grads, tensors[:9], strict=True)]
    return (*given, None, None)  # none for seq_idx and dt_softplus


# vmap folds its axis into the batch where only x, dt, B, C, z, state or seq_idx have one.
_call_forward = differentiable(_forward, _setup_context, _autograd, rows=(0, 1, 3, 4, 6, 8, 9))
_call_backward = differentiable(_backward, nothing, never_twice)


def _states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    keep: Tensor | None,
    h: Tensor,
    rows: slice,
    steps: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk's delta (b, c, e), decays and states (b, c, n, e), from the state h before it."""
    wide = h.dtype
    delta = step_size(dt[rows, steps].to(wide), dt_bias, dt_softplus)  # (b, c, e)
    decay = (delta[:, :, None] * A).exp_()  # (b, c, n, e)
    if keep is not None:
        decay.mul_(keep[rows, steps, None, None])
    H = (delta * x[rows, steps].to(wide))[:, :, None] * B[rows, steps, :, None].to(wide)
    H[:, 0].addcmul_(decay[:, 0], h)
    if h.device.type == "cpu":
        _scan(decay, H)
    else:
        # The sweeps overwrite their first argument.
        _scan(decay.clone(), H)
    return delta, decay, H


def _scan(A: Tensor, X: Tensor, *, reverse: bool = False) -> None:
    """X[t] += A[t] X[t-1] in place, or X[t] += A[t] X[t+1] in reverse.

    A plain loop over the chunk on a CPU, where a step fills the cores and its operands are in the
    cache; the parallel scan elsewhere, where the number of calls is what costs.
    """
    if X.device.type != "cpu":
        scan_in_place(A, X, reverse=reverse)
    elif reverse:
        for t in range(X.shape[1] - 2, -1, -1):
            X[:, t].addcmul_(A[:, t], X[:, t + 1])
    else:
        for t in range(1, X.shape[1]):
            X[:, t].addcmul_(A[:, t], X[:, t - 1])


def chunk_length(x: Tensor, n: int) -> int:
    """Steps of a chunk of x (b, l, e) with n states.

    On an accelerator the number of calls is what costs: half of what fills it goes to one row.
    """
    fitting, length = TILE_ACCELERATOR // (2 * n * x.shape[2]), CHUNK
    if x.device.type == "cpu":
        return length
    while 2 * length <= min(fitting, LONGEST_CHUNK):
        length *= 2
    return length


def _tiles(x: Tensor, A: Tensor) -> Iterator[slice]:
    """Groups of rows of the batch whose chunk of states has about TILE numbers."""
    tile = TILE_CPU if x.device.type == "cpu" else TILE_ACCELERATOR
    size = max(1, tile // (min(chunk_length(x, A.shape[0]), x.shape[1]) * A.numel()))
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)


def _chunks(x: Tensor, n: int) -> Iterator[slice]:
    """The steps of each chunk; the last one may be shorter."""
    length = chunk_length(x, n)
    for start in range(0, x.shape[1], length):
        yield slice(start, min(start + length, x.shape[1]))


def _empty_outputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for y (b, l, e), the last state (b, e, n) and the bounds (b, chunks+1, n, e).

    The bounds are the states before each chunk and the last one. (That they are never just one
    also matters to torch.export, which would take a size of 1 for a constant.)
    """
    wide = wide_dtype(x, dt, A, B, C, state)
    (b, l, e), n = x.shape, A.shape[1]
    chunk = chunk_length(x, n)
    return (
        x.new_empty(b, l, e),
        x.new_empty(b, e, n, dtype=wide),
        x.new_empty(b, (l + 2 * chunk - 1) // chunk, n, e, dtype=wide),
    )


def _empty_grads(x: Tensor, *others: Tensor | None) -> Grads:
    """A contiguous tensor like each argument; an empty one in place of None."""
    like = torch.contiguous_format
    grads = [
        x.new_empty(0) if T is None else torch.empty_like(T, memory_format=like) for T in others
    ]
    return cast(Grads, (torch.empty_like(x, memory_format=like), *grads))
