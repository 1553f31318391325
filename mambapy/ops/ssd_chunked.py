"""State-space duality in plain PyTorch: matrix products inside chunks, a recurrence between them.

Over a chunk of tokens the recurrence of a head is a product with a matrix of (tokens, tokens):

    y_i = sum_{j <= i} M_ij x_j + exp(cum_i) h Q_i,      M_ij = exp(cum_i - cum_j) scale_j (Q_i K_j)

with cum the running sum of the log decays and h the state before the chunk. Such matrices exist for
a few chunks at a time (`_Tile`); between chunks only states (p, n) are passed. The forward pass
keeps a state each SEGMENT chunks, the backward pass visits the segments from the last to the first,
computes the states inside them again, and then everything else.

    dual       ops.ssd and ops.mamba3_scan call it
      _forward     for each tile of chunks: _Tile.forward
      _backward    for each segment, reversed: states again, then _Tile.backward for each tile

Letters: b batch, t chunks of a tile, i and j rows of a chunk (tokens times r), g groups, e heads of
a group, p channels of a head, n state size. States stand as (b, g, n, e, p) here.

Source: Dao & Gu 2024 (arXiv 2405.21060), section 6 and listing 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

# Gradients of x, log_decay, scale, K, Q, own, D, state; an empty tensor for what was None.
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# Tokens of a chunk, measured on the 130m shape: see `chunk_for`.
CHUNK_CPU, CHUNK_ACCELERATOR = 64, 128
# Chunks from one kept state to the next.
SEGMENT = 16
# Numbers of the (tokens, tokens) matrices that exist at one time.
TILE_CPU, TILE_ACCELERATOR = 2**18, 2**25
# The log decay where a document starts: exp of it is exactly 0, in every dtype, and its sums round
# no more than those of others do.
RESET = -1e3


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

    Returns:
        y (b, l, r, h, p) and the last state (b, h, p, n); all in one dtype, float32 or float64.
    """
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
    for rows in _batch_tiles(x, chunk):
        S = _first_state(state, bounds, rows)
        for i, segment in enumerate(_spans(x.shape[1], SEGMENT * chunk)):
            bounds[rows, i] = S
            for steps in _chunk_tiles(x, rows, segment, chunk):
                tile = _Tile.of(x, log_decay, scale, K, Q, own, D, rows, steps, chunk, fused)
                S = tile.forward(S, y[rows, steps])
        bounds[rows, -1] = S
        last[rows] = S.permute(0, 1, 3, 4, 2).flatten(1, 2)
    return y, last, bounds


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
    for rows in _batch_tiles(x, chunk):
        G = grad_last[rows].unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).contiguous()
        for i, segment in reversed(list(enumerate(_spans(x.shape[1], SEGMENT * chunk)))):
            tiles, S = [], bounds[rows, i]
            for steps in _chunk_tiles(x, rows, segment, chunk):
                tile = _Tile.of(x, log_decay, scale, K, Q, own, D, rows, steps, chunk, fused)
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


@dataclass(frozen=True)
class _Tile:
    """A few chunks of a few rows of the batch.

    Args:
        X: (b, t, j, g, e, p).
        K: (b, t, j, g, n).
        Q: (b, t, i, g, n).
        cum: (b, t, g, e, q) running sums of the log decays of a chunk's q tokens, in float64.
        scale: (b, t, g, e, q).
        own: (b, t, g, e, q) or None.
        D: (g, e, 1) or None.
        r: rows of a token.
        fused: whether a kernel makes the matrices.
    """

    X: Tensor
    K: Tensor
    Q: Tensor
    cum: Tensor
    scale: Tensor
    own: Tensor | None
    D: Tensor | None
    r: int
    fused: bool

    @classmethod
    def of(
        cls,
        x: Tensor,
        log_decay: Tensor,
        scale: Tensor,
        K: Tensor,
        Q: Tensor,
        own: Tensor | None,
        D: Tensor | None,
        rows: slice,
        steps: slice,
        chunk: int,
        fused: bool,
    ) -> "_Tile":
        """The tile of some rows and steps: whole chunks, or the shorter one at the end."""
        g, q = K.shape[3], min(chunk, steps.stop - steps.start)

        def by_head(T: Tensor) -> Tensor:
            T = T[rows, steps].unflatten(1, (-1, q)).unflatten(3, (g, -1))  # (b, t, q, g, e)
            return T.permute(0, 1, 3, 4, 2)

        def by_row(T: Tensor) -> Tensor:
            return T[rows, steps].unflatten(1, (-1, q)).flatten(2, 3)  # (b, t, i, ...)

        return cls(
            by_row(x).unflatten(3, (g, -1)),
            by_row(K),
            by_row(Q),
            _running_sum(by_head(log_decay)),
            by_head(scale),
            None if own is None else by_head(own),
            None if D is None else D.view(g, -1, 1),
            x.shape[2],
            fused,
        )

    def forward(self, S: Tensor, y: Tensor) -> Tensor:
        """Write the outputs to y (b, l, r, h, p); the state after the tile."""
        before = self.states(S)  # (b, t+1, g, n, e, p)
        M = self.matrix(self.scores())
        inside = torch.einsum("btgeij,btjgep->btigep", M, self.X)
        across = torch.einsum("btign,btgnep->btigep", self.Q, before[:, :-1])
        y = y.unflatten(1, (before.shape[1] - 1, -1)).flatten(2, 3).unflatten(3, M.shape[2:4])
        torch.addcmul(inside, across, self.by_row(self.cum.exp()), out=y)
        return before[:, -1]

    def states(self, S: Tensor) -> Tensor:
        """(b, t+1, g, n, e, p): S, and the state after each chunk."""
        W = self.X * self.by_row(self.left() * self.scale)
        new = torch.einsum("btjgn,btjgep->btgnep", self.K, W)
        total = self.total()
        found = new.new_empty(new.shape[0], new.shape[1] + 1, *new.shape[2:])
        found[:, 0] = S
        for c in range(new.shape[1]):
            torch.addcmul(new[:, c], total[:, c], found[:, c], out=found[:, c + 1])
        return found

    def backward(
        self, before: Tensor, grad_S: Tensor, grad_y: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the state before the tile; those of x, log_decay, scale, K, Q, own, D.

        Args:
            before: (b, t, g, n, e, p) the state before each chunk.
            grad_S: (b, g, n, e, p) the gradient of the state after the tile.
            grad_y: (b, l, r, h, p).
        """
        X, K, Q, scale = self.X, self.K, self.Q, self.scale
        gY = grad_y.unflatten(1, (X.shape[1], -1)).flatten(2, 3).unflatten(3, X.shape[3:5])
        left, total = self.left(), self.total()
        into = self.by_row(self.cum.exp())
        # Between chunks: from the last to the first.
        P = gY * into
        after = torch.einsum("btign,btigep->btgnep", Q, P)
        for c in reversed(range(X.shape[1])):
            # Now the gradient of the state after chunk c, and the one after that of chunk c - 1.
            after[:, c], grad_S = grad_S, after[:, c].addcmul(total[:, c], grad_S)
        gW = torch.einsum("btjgn,btgnep->btjgep", K, after)
        counts = self.by_row(left * scale)
        across = torch.einsum("btign,btgnep->btigep", Q, before)
        by_into = self.by_token((P * across).sum(-1))  # (b, t, g, e, q)
        by_left = self.by_token((X * gW).sum(-1)) * left  # (b, t, g, e, q)
        by_total = torch.einsum("btgnep,btgnep->btge", after, before) * total[..., 0, :, 0]

        # Inside chunks.
        scores = self.scores()
        gM = torch.einsum("btigep,btjgep->btgeij", gY, X)
        gD = gM.diagonal(dim1=-2, dim2=-1).sum((0, 1, 4)).flatten()  # (h)
        M, g_scores, g_cum, g_scale, g_own = self.inside(scores, gM)
        gX = torch.einsum("btgeij,btigep->btjgep", M, gY).addcmul_(gW, counts)
        gQ = torch.einsum("btgij,btjgn->btign", g_scores, K)
        gQ += torch.einsum("btigep,btgnep->btign", P, before)
        gK = torch.einsum("btgij,btign->btjgn", g_scores, Q)
        gK += torch.einsum("btjgep,btgnep->btjgn", X * counts, after)
        g_cum = g_cum - g_scale * scale
        g_scale = g_scale + by_left
        by_left = by_left * scale
        g_cum += by_into - by_left
        g_cum[..., -1] += by_left.sum(-1) + by_total
        if self.own is None:
            g_scale = g_scale + g_own
        g_log_decay = _running_sum(g_cum, reverse=True).to(g_cum.dtype)
        found = [self.back(gX.flatten(3, 4)), *map(self.flat, (g_log_decay, g_scale))]
        return grad_S, [*found, self.back(gK), self.back(gQ), self.flat(g_own), gD]

    def inside(self, scores: Tensor, gM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """M, and gradients from that of M, which may be overwritten.

        Returns:
            M (b, t, g, e, i, j), the gradients of the scores (b, t, g, i, j), of cum by row, of
            scale, and of what a token counts for itself, (b, t, g, e, q) each.
        """
        if self.fused:
            from mambapy.ops.cpu import ssd

            return ssd.inside(self.cum, self.scale, self.own, self.D, scores, gM.contiguous())
        E = self.decays()
        weights = self.weights(E)
        g_scores = (gM * weights).sum(3)  # (b, t, g, i, j)
        g_weights = self.by_pair(gM * scores[:, :, :, None])  # (b, t, g, e, q, q)
        g_own = g_weights.diagonal(dim1=-2, dim2=-1).clone()
        g_weights.mul_(E)
        g_cum = torch.einsum("btgeij,btgej->btgei", g_weights, self.scale)
        return (
            self.skipped(weights * scores[:, :, :, None]),
            g_scores,
            g_cum,
            g_weights.sum(-2),
            g_own,
        )

    def decays(self) -> Tensor:
        """(b, t, g, e, q, q): exp(cum_i - cum_j) below the diagonal, 0 elsewhere."""
        # Rounding can make a difference positive, and above the diagonal it is: exp of that could
        # be infinite, and would stay so under a mask.
        E = (self.cum.unsqueeze(-1) - self.cum.unsqueeze(-2)).to(self.X.dtype).clamp_(max=0.0)
        above = torch.ones(E.shape[-2:], dtype=torch.bool, device=E.device).triu_()
        return E.masked_fill_(above, -torch.inf).exp_()

    def weights(self, E: Tensor) -> Tensor:
        """(b, t, g, e, i, j): how much token j counts for token i, its score apart."""
        weights = E * self.scale.unsqueeze(-2)
        own = self.scale if self.own is None else self.own
        weights.diagonal(dim1=-2, dim2=-1).copy_(own)
        if self.r > 1:
            weights = weights.repeat_interleave(self.r, -2).repeat_interleave(self.r, -1)
        return weights

    def scores(self) -> Tensor:
        """(b, t, g, i, j): Q_i K_j."""
        return torch.einsum("btign,btjgn->btgij", self.Q, self.K)

    def matrix(self, scores: Tensor) -> Tensor:
        """(b, t, g, e, i, j): M, with the skip on its diagonal."""
        if self.fused:
            from mambapy.ops.cpu import ssd

            return ssd.matrix(self.cum, self.scale, self.own, self.D, scores)
        return self.skipped(self.weights(self.decays()) * scores[:, :, :, None])

    def skipped(self, M: Tensor) -> Tensor:
        """M with the skip on its diagonal."""
        if self.D is not None:
            M.diagonal(dim1=-2, dim2=-1).add_(self.D)
        return M

    def left(self) -> Tensor:
        """(b, t, g, e, q): what is left of a token at the chunk's end."""
        return (self.cum[..., -1:] - self.cum).clamp_(max=0.0).exp_().to(self.X.dtype)

    def total(self) -> Tensor:
        """(b, t, g, 1, e, 1): what is left of a state after each chunk."""
        return self.cum[..., -1].exp().to(self.X.dtype)[:, :, :, None, :, None]

    def by_row(self, T: Tensor) -> Tensor:
        """T (b, t, g, e, q) for each row: (b, t, i, g, e, 1)."""
        T = T.to(self.X.dtype).permute(0, 1, 4, 2, 3)  # (b, t, q, g, e)
        return (T if self.r == 1 else T.repeat_interleave(self.r, dim=2)).unsqueeze(-1)

    def by_token(self, T: Tensor) -> Tensor:
        """The sum of T (b, t, i, g, e) over the rows of each token: (b, t, g, e, q)."""
        T = T if self.r == 1 else T.unflatten(2, (-1, self.r)).sum(3)  # (b, t, q, g, e)
        return T.permute(0, 1, 3, 4, 2)

    def by_pair(self, T: Tensor) -> Tensor:
        """The sum of T (..., i, j) over the rows of each pair of tokens: (..., q, q)."""
        if self.r == 1:
            return T
        return T.unflatten(-1, (-1, self.r)).sum(-1).unflatten(-2, (-1, self.r)).sum(-2)

    def back(self, T: Tensor) -> Tensor:
        """T (b, t, i, ...) as (b, l, r, ...)."""
        return T.unflatten(2, (-1, self.r)).flatten(1, 2)

    @staticmethod
    def flat(T: Tensor) -> Tensor:
        """T (b, t, g, e, q) as (b, l, h)."""
        return T.permute(0, 1, 4, 2, 3).flatten(1, 2).flatten(2, 3)


def _running_sum(a: Tensor, *, reverse: bool = False) -> Tensor:
    """Sums of a (..., q) up to each step, or from it on; in float64 where the device has it."""
    a = a.to(torch.float32 if a.device.type == "mps" else torch.float64)
    # Not cumsum: CUDA refuses it where deterministic algorithms are asked for.
    ones = torch.ones(a.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
    return a @ (ones.tril_() if reverse else ones.triu_())


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
