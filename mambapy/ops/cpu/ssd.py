"""The (tokens, tokens) matrices of state-space duality, forward and backward, in one pass each.

`ops/ssd_chunked.py` has the algorithm and its products. What it would do to those matrices op by op
(differences, mask, exp, three multiplications, sums) is done here while they are in the cache. Rows
are tokens: this is for one row a token (r = 1).

The running sums of log decays come as two numbers each, `high` + `low`, so that their differences
are as exact as those of the float64 that they were.
"""

import torch
from torch import Tensor

from mambapy.ops.cpu.exp import LOG2E, exp2
from mambapy.ops.cpu.memory import (
    fetch_add,
    lanes_total,
    load,
    load_first,
    pointer,
    store,
    store_first,
)
from mambapy.ops.cpu.rows import (
    NEXT_TASK,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    given,
    pack,
    place,
)
from mambapy.ops.cpu.simd import LANES, fma, inline, like, smallest, splat, where_greater, zeros
from mambapy.ops.cpu.threads import arithmetic, compiled, run

# Rows of a task of the backward kernel.
ROWS = 16

TASKS, HEADS, Q = range(SIZES, SIZES + 3)
HIGH, LOW, SCALE, OWN, SKIP, SCORES, M, G_SCORES, G_DECAY, G_COLUMN, G_OWN = range(11)


@inline
def some(w, at, left):
    """A vector of which only the first `left` numbers may be read; the others are 0."""
    return load(w, at) if left >= LANES else load_first(w, at, left)


@inline
def put(w, at, value, left):
    """Write the first `left` numbers of a vector."""
    if left >= LANES:
        store(w, at, value)
    else:
        store_first(w, at, value, left)


@inline
def decay_row(high, low, index, i, j, left, F):
    """exp(cum_i - cum_j) for LANES j from `j` on: 0 from the diagonal on."""
    difference = splat(high[i]) - some(high, j, left)
    difference = difference + (splat(low[i]) - some(low, j, left))
    # Rounding can make it positive.
    difference = smallest(difference, zeros(F))
    decay = exp2(difference * like(difference, LOG2E))
    return where_greater(splat(F(i)), load(index, j), decay, zeros(F))


@inline
def count_up(base, count, F):
    """The numbers 0, 1, ... in the scratch memory, whole vectors of them."""
    index = pointer(base, F)
    for j in range((count + LANES - 1) // LANES * LANES):
        index[j] = F(j)
    return index


def build_matrix(F, size, stamp):
    """M of each head; `stamp` keys the cache on disk."""

    def ssd_matrix(args):
        stamp  # noqa: B018
        q, heads = args[Q], args[HEADS]
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        index = count_up(base, q, F)
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[TASKS]:
                break
            high = pointer(place(args, HIGH, 0, 0, task * q), F)
            low = pointer(place(args, LOW, 0, 0, task * q), F)
            scale = pointer(place(args, SCALE, 0, 0, task * q), F)
            own = pointer(place(args, OWN, 0, 0, task * q), F)
            scores = pointer(place(args, SCORES, 0, 0, task // heads * q * q), F)
            found = pointer(place(args, M, 0, 0, task * q * q), F)
            skip = F(0)
            if given(args, SKIP):
                skip = pointer(place(args, SKIP, 0, 0, task), F)[0]
            for i in range(q):
                for j in range(0, q, LANES):
                    left = q - j
                    value = zeros(F)
                    if j < i:
                        decay = decay_row(high, low, index, i, j, left, F)
                        value = decay * some(scale, j, left) * some(scores, i * q + j, left)
                    put(found, i * q + j, value, left)
                found[i * q + i] = own[i] * scores[i * q + i] + skip

    return ssd_matrix


def build_inside(F, size, stamp):
    """The gradients inside chunks from that of M, which M replaces; `stamp` keys the cache."""

    def ssd_inside(args):
        stamp  # noqa: B018
        q, heads = args[Q], args[HEADS]
        blocks = (q + ROWS - 1) // ROWS
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        index = count_up(base, q, F)
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[TASKS]:
                break
            group, block = task // blocks, task % blocks
            first, last = block * ROWS, min(block * ROWS + ROWS, q)
            scores = pointer(place(args, SCORES, 0, 0, group * q * q), F)
            g_scores = pointer(place(args, G_SCORES, 0, 0, group * q * q), F)
            for i in range(first, last):
                for j in range(0, q, LANES):
                    put(g_scores, i * q + j, zeros(F), q - j)
            for e in range(heads):
                head = group * heads + e
                high = pointer(place(args, HIGH, 0, 0, head * q), F)
                low = pointer(place(args, LOW, 0, 0, head * q), F)
                scale = pointer(place(args, SCALE, 0, 0, head * q), F)
                own = pointer(place(args, OWN, 0, 0, head * q), F)
                m = pointer(place(args, M, 0, 0, head * q * q), F)
                g_decay = pointer(place(args, G_DECAY, 0, 0, head * q), F)
                g_own = pointer(place(args, G_OWN, 0, 0, head * q), F)
                g_column = pointer(place(args, G_COLUMN, 0, 0, (head * blocks + block) * q), F)
                skip = F(0)
                if given(args, SKIP):
                    skip = pointer(place(args, SKIP, 0, 0, head), F)[0]
                for j in range(0, q, LANES):
                    put(g_column, j, zeros(F), q - j)
                # From the last row on: what a column has added up to so far is what goes by row i.
                for i in range(last - 1, first - 1, -1):
                    at, row = i * q, zeros(F)
                    g_diagonal = m[at + i]
                    for j in range(0, q, LANES):
                        left = q - j
                        if j < i:
                            decay = decay_row(high, low, index, i, j, left, F)
                            counts, score = some(scale, j, left), some(scores, at + j, left)
                            g, weight = some(m, at + j, left), decay * counts
                            put(m, at + j, weight * score, left)
                            into = fma(g, weight, some(g_scores, at + j, left))
                            put(g_scores, at + j, into, left)
                            part = g * score * decay
                            column = some(g_column, j, left) + part
                            put(g_column, j, column, left)
                            before = where_greater(splat(F(i)), load(index, j), column, zeros(F))
                            row = fma(before, counts, row)
                        else:
                            put(m, at + j, zeros(F), left)
                    score = scores[at + i]
                    m[at + i] = own[i] * score + skip
                    g_scores[at + i] += g_diagonal * own[i]
                    g_own[i] = g_diagonal * score
                    g_decay[i] = lanes_total(row)

    return ssd_inside


def _halves(cum: Tensor, F: torch.dtype) -> list[Tensor]:
    """cum as the sum of two numbers of the arithmetic's dtype."""
    high = cum.to(F)
    return [high.contiguous(), (cum - high).to(F).contiguous()]


def _skips(D: Tensor | None, like: Tensor) -> Tensor | None:
    """D (g, e, 1) for each head of each chunk: (b, t, g, e)."""
    return None if D is None else D.squeeze(-1).expand(like.shape[:4]).contiguous()


def matrix(
    cum: Tensor, scale: Tensor, own: Tensor | None, D: Tensor | None, scores: Tensor
) -> Tensor:
    """M (b, t, g, e, q, q) of `ssd_chunked`.

    Args:
        cum: (b, t, g, e, q) float64.
        scale: (b, t, g, e, q).
        own: (b, t, g, e, q), or None for `scale`.
        D: (g, e, 1) or None.
        scores: (b, t, g, q, q).
    """
    F, q, e = arithmetic(scores.dtype), cum.shape[-1], cum.shape[3]
    scale = scale.contiguous()
    M = scores.new_empty(*cum.shape, q)
    tensors: list[Tensor | None]
    tensors = [*_halves(cum, F), scale, scale if own is None else own.contiguous()]
    tensors += [_skips(D, cum), scores.to(F).contiguous(), M]
    heads = cum.numel() // q
    args = pack([heads, e, q], [None if T is None else T.view(-1) for T in tensors])
    scratch = (q + LANES) * F.itemsize
    run(compiled(build_matrix, F), args, heads, scratch, 8 * M.numel())
    return M


def inside(
    cum: Tensor,
    scale: Tensor,
    own: Tensor | None,
    D: Tensor | None,
    earlier: Tensor,
    scores: Tensor,
    gM: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients inside chunks, from gM (b, t, g, e, q, q), which is overwritten with M.

    Args:
        cum, scale, own, D, scores: as for `matrix`.
        earlier: (q, q) 1 where token j comes before token t, else 0.
        gM: the gradient of M; contiguous.

    Returns:
        M; the gradients of the scores (b, t, g, q, q), of the log decays, of scale, and of what a
        token counts for itself, (b, t, g, e, q) each.
    """
    F, q, e = arithmetic(scores.dtype), cum.shape[-1], cum.shape[3]
    scale, scores = scale.contiguous(), scores.to(F).contiguous()
    blocks, heads = -(-q // ROWS), cum.numel() // q
    g_scores = torch.empty_like(scores)
    g_decay, g_own = (scores.new_empty(cum.shape) for _ in range(2))
    g_column = scores.new_empty(*cum.shape[:4], blocks, q)
    tensors: list[Tensor | None]
    tensors = [*_halves(cum, F), scale, scale if own is None else own.contiguous()]
    tensors += [_skips(D, cum), scores, gM, g_scores, g_decay, g_column, g_own]
    tasks = heads // e * blocks
    args = pack([tasks, e, q], [None if T is None else T.view(-1) for T in tensors])
    scratch = (q + LANES) * F.itemsize
    run(compiled(build_inside, F), args, tasks, scratch, 12 * gM.numel())
    # What the rows of later blocks add: the sums over their columns before each token.
    later = g_column.new_zeros(g_column.shape)
    for k in range(blocks - 1, 0, -1):
        torch.add(later[..., k, :], g_column[..., k, :], out=later[..., k - 1, :])
    token = torch.arange(q)
    g_decay += ((later * scale.unsqueeze(-2)) @ earlier)[..., token // ROWS, token]
    return gM, g_scores, g_decay, g_column.sum(-2), g_own
