"""State-space duality in plain PyTorch: matrix products inside chunks, a recurrence between them.

Over a chunk of tokens the recurrence of a head is a product with a matrix of (tokens, tokens):

    y_i = sum_{j <= i} M_ij x_j + exp(cum_i) h Q_i,      M_ij = exp(cum_i - cum_j) scale_j (Q_i K_j)

with cum the running sum of the log decays and h the state before the chunk. Such matrices exist for
a few chunks at a time (`Tile`); between chunks only states (p, n) are passed. The forward pass
keeps a state each SEGMENT chunks, the backward pass visits the segments from the last to the first,
computes the states inside them again, and then everything else.

    dual       ops.ssd and ops.mamba3_scan call it
      _forward     for each tile of chunks: Tile.forward
      _backward    for each segment, reversed: states again, then Tile.backward for each tile

Letters: b batch, t chunks of a tile, i and j rows of a chunk (tokens times r), g groups, e heads of
a group, p channels of a head, n state size. States stand as (b, g, n, e, p) here.

Source: Dao & Gu 2024 (arXiv 2405.21060), section 6 and listing 1.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambapy.ops import reference_ssd
from mambapy.ops.custom_op import (
    differentiable,
    differentiable_gradients,
    never_twice,
    nothing,
    transform,
)
from mambapy.ops.ssd_tile import Sequence

# Gradients of x, log_decay, scale, K, Q, own, D, state; an empty tensor for what was None.
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Tokens of a chunk; on CPUs measured on the 130m shape, where 64 takes up to 1.4 times as long.
CHUNK_CPU, CHUNK_ACCELERATOR = 128, 128
# Chunks from one kept state to the next.
SEGMENT = 16
# Numbers of the (tokens, tokens) matrices that exist at one time.
TILE_CPU, TILE_ACCELERATOR = 2**17, 2**26
# The least log decay, and that where a document starts: exp of it is exactly 0, and of less, too.
# What is less would only cost the running sums their precision.
RESET = {torch.float32: -104.0, torch.float64: -746.0}


def chunk_for(x: Tensor, rows: int = 1) -> int:
    """The chunk size for x's device where the caller has no wish: fewer tokens if each has rows."""
    chunk = CHUNK_CPU if x.device.type == "cpu" else CHUNK_ACCELERATOR
    return max(1, chunk // rows)


def dual(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None = None,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int,
    fused: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of a head with r inputs and outputs a step, in chunks.

        y_t[r] = exp(a_t) h_{t-1} Q_t[r] + own_t sum_r' (Q_t[r] K_t[r']) x_t[r'] + D x_t[r]
        h_t    = exp(a_t) h_{t-1} + scale_t sum_r x_t[r] K_t[r]^T

    Args:
        x: (b, l, r, h, p) inputs.
        log_decay: (b, l, h) a <= 0.
        scale: (b, l, h) how much a token counts for later ones.
        K: (b, l, r, g, n) how it is written.
        Q: (b, l, r, g, n) how the state is read.
        own: (b, l, h) how much a token counts for itself; `scale` without it.
        D: (h) skip, or None.
        state: (b, h, p, n) before the first step; zeros without it.
        chunk_size: tokens of a chunk.
        fused: whether `ops/cpu/ssd.py` makes the matrices; for CPU tensors and r = 1.
        out: where to write y, it may be x; where nothing is traced and no gradient is needed.

    Returns:
        y (b, l, r, h, p) and the last state (b, h, p, n); all in one dtype, float32 or float64.
    """
    if out is not None:
        _, last, bounds = _empty_outputs(x[:, :1], K, chunk_size)
        sequence = Sequence.of(x, log_decay, scale, K, Q, own, D, chunk_size, fused)
        _fill(sequence, state, out, last, bounds)
        return out, last
    y, last, _ = _call_forward(x, log_decay, scale, K, Q, own, D, state, chunk_size, fused)
    return y, last


def _reference(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`dual`, step by step: for second derivatives."""
    y, last = reference_ssd.dual(x, log_decay, scale, K, Q, own, state)
    return y if D is None else y + reference_ssd.skip(D, x), last


@torch.library.custom_op("mambapy::ssd_chunked", mutates_args=())
def _forward(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    chunk: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states before each segment and after all: (b, s+1, g, n, e, p)."""
    y, last, bounds = _empty_outputs(x, K, chunk)
    sequence = Sequence.of(x, log_decay, scale, K, Q, own, D, chunk, fused)
    _fill(sequence, state, y, last, bounds)
    return y, last, bounds


def _fill(
    sequence: Sequence, state: Tensor | None, y: Tensor, last: Tensor, bounds: Tensor
) -> None:
    """Write the outputs of `_forward`; bounds of size 2 are for those who need none."""
    x, chunk = sequence.x, sequence.chunk
    for rows in _batch_tiles(x, chunk):
        S = _first_state(state, bounds, rows)
        for i, segment in enumerate(_spans(x.shape[1], SEGMENT * chunk)):
            if i < bounds.shape[1] - 1:
                bounds[rows, i] = S
            for steps in _chunk_tiles(x, rows, segment, chunk):
                # The tile's x is read before its y is written: they may be the same memory.
                S = sequence.tile(rows, steps).forward(S, y[rows, steps])
        bounds[rows, -1] = S
        last[rows] = S.permute(0, 1, 3, 4, 2).flatten(1, 2)


@_forward.register_fake
def _(
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    chunk: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, K, chunk)


@torch.library.custom_op("mambapy::ssd_chunked_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    bounds: Tensor,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    chunk: int,
    fused: bool,
) -> Grads:
    """The gradients; an empty tensor for what was None."""
    grads = _empty_grads(x, log_decay, scale, K, Q, own, D, state)
    gx, ga, gscale, gK, gQ, gown, gD, gstate = grads
    gD.zero_()
    g = K.shape[3]
    sequence = Sequence.of(x, log_decay, scale, K, Q, own, D, chunk, fused)
    for rows in _batch_tiles(x, chunk):
        G = grad_last[rows].unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).contiguous()
        for i, segment in reversed(list(enumerate(_spans(x.shape[1], SEGMENT * chunk)))):
            tiles, S = [], bounds[rows, i]
            for steps in _chunk_tiles(x, rows, segment, chunk):
                tile = sequence.tile(rows, steps)
                before = tile.states(S)
                tiles.append((steps, tile, before[:, :-1]))
                S = before[:, -1]
            for steps, tile, before in reversed(tiles):
                G, found = tile.backward(before, G, grad_y[rows, steps])
                for grad, part in zip((gx, ga, gscale, gK, gQ), found[:5], strict=True):
                    grad[rows, steps] = part
                if own is not None:
                    gown[rows, steps] = found[5]
                if D is not None:
                    gD += found[6]
        if state is not None:
            gstate[rows] = G.permute(0, 1, 3, 4, 2).flatten(1, 2)
    return grads


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    bounds: Tensor,
    x: Tensor,
    log_decay: Tensor,
    scale: Tensor,
    K: Tensor,
    Q: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    state: Tensor | None,
    chunk: int,
    fused: bool,
) -> Grads:
    return _empty_grads(x, log_decay, scale, K, Q, own, D, state)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs and the states between the segments."""
    *tensors, ctx.chunk, ctx.fused = inputs
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of `_forward`; itself differentiable where a second derivative is asked for."""
    *tensors, bounds = ctx.saved_tensors
    if torch.is_grad_enabled() and transform() is None:
        grads = differentiable_gradients(
            _reference, tensors, ctx.needs_input_grad[:8], (grad_y, grad_last)
        )
    else:
        grads = _call_backward(grad_y, grad_last, bounds, *tensors, ctx.chunk, ctx.fused)
    given = [g if T is not None else None for g, T in zip(grads, tensors, strict=True)]
    return (*given, None, None)


# vmap folds its axis into the batch where only what has a batch has one.
_call_forward = differentiable(_forward, _setup_context, _autograd, rows=(0, 1, 2, 3, 4, 5, 7))
_call_backward = differentiable(_backward, nothing, never_twice)


def _spans(l: int, size: int) -> Iterator[slice]:
    """0 to l in pieces of `size`; the last may be shorter."""
    for start in range(0, l, size):
        yield slice(start, min(start + size, l))


def _tile_size(x: Tensor, chunk: int) -> int:
    """How many (tokens, tokens) matrices, one for each head, a tile may have."""
    tile = TILE_CPU if x.device.type == "cpu" else TILE_ACCELERATOR
    rows = min(chunk, x.shape[1]) * x.shape[2]
    return max(1, tile // (x.shape[3] * rows * rows))


def _batch_tiles(x: Tensor, chunk: int) -> Iterator[slice]:
    """Groups of rows of the batch."""
    return _spans(x.shape[0], _tile_size(x, chunk))


def _chunk_tiles(x: Tensor, rows: slice, segment: slice, chunk: int) -> Iterator[slice]:
    """The steps of each tile of a segment: whole chunks, then what is left of it."""
    count = max(1, _tile_size(x, chunk) // len(range(*rows.indices(x.shape[0]))))
    whole = (segment.stop - segment.start) // chunk * chunk
    for span in _spans(whole, count * chunk):
        yield slice(segment.start + span.start, segment.start + span.stop)
    if segment.start + whole < segment.stop:
        yield slice(segment.start + whole, segment.stop)


def _first_state(state: Tensor | None, bounds: Tensor, rows: slice) -> Tensor:
    """The state before the first step, (b, g, n, e, p)."""
    if state is None:
        return torch.zeros_like(bounds[rows, 0])
    return state[rows].unflatten(1, (bounds.shape[2], -1)).permute(0, 1, 4, 2, 3)


def _empty_outputs(x: Tensor, K: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for y, the last state and the bounds.

    (That there are never fewer than two bounds also matters to torch.export, which would take a
    size of 1 for a constant.)
    """
    (b, l, _, h, p), (g, n) = x.shape, K.shape[3:]
    tokens = SEGMENT * chunk
    return (
        x.new_empty(x.shape),
        x.new_empty(b, h, p, n),
        x.new_empty(b, (l + 2 * tokens - 1) // tokens, g, n, h // g, p),
    )


def _empty_grads(x: Tensor, *others: Tensor | None) -> Grads:
    """A contiguous tensor like each argument; an empty one in place of None."""
    grads = [x.new_empty(0) if T is None else x.new_empty(T.shape) for T in (x, *others)]
    return (grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7])
