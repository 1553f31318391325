"""Causal depthwise convolution with bias and SiLU, forward and backward; autograd is in
`ops/kernel_ops.py`.

A task is one batch row and one block of channels. Rows are staged TILE at a time behind the k - 1
rows before them. `reach` of a step is how many steps back its taps may look: k - 1, or less where
its document has just begun.
"""

import torch
from torch import Tensor

from mambapy.ops.cpu.exp import silu, silu_and_slope
from mambapy.ops.cpu.memory import fetch_add, load, pointer, store
from mambapy.ops.cpu.rows import (
    NEXT_TASK,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    documents,
    given,
    pack,
    place,
    result_like,
    rowwise,
    stage,
    unstage,
)
from mambapy.ops.cpu.simd import LANES, fma, inline, inner, zeros
from mambapy.ops.cpu.threads import arithmetic, compiled, run

WIDTH = 128
GROUPS = WIDTH // LANES
TILE = 32

BATCH, LENGTH, CHANNELS, TAPS, SILU = range(SIZES, SIZES + 5)
X, WEIGHT, BIAS, STATE, SEQ, Y, GRAD_Y, GRAD_X, GRAD_WEIGHT, GRAD_BIAS, GRAD_STATE = range(11)
# What has a row for each step. The state has not: it stands in the order of processing.
STEPWISE = (X, SEQ, Y, GRAD_Y, GRAD_X)


@inner
def load_taps(args, first, count, taps, base, offset, F):
    """Stage the weights (e, k) as (tap, channel): tap d is for the input d steps back."""
    buffer, weight = pointer(base, F), pointer(place(args, WEIGHT, 0, 0, 0), F)
    for c in range(WIDTH):
        for d in range(taps):
            value = F(0)
            if c < count:
                value = weight[(first + c) * taps + taps - 1 - d]
            buffer[offset + d * WIDTH + c] = value


@inline
def next_reach(args, batch, step, reach, taps):
    """How far back the taps of `step` may look, given the reach of the step before it."""
    if not given(args, SEQ) or step == 0:
        return taps - 1
    now = pointer(place(args, SEQ, batch, step, 0), int)
    before = pointer(place(args, SEQ, batch, step - 1, 0), int)
    if now[0] != before[0]:
        return 0
    return min(reach + 1, taps - 1)


@inner
def begin_task(args, batch, first, count, taps, base, weight, bias, xs, F):
    """Stage weights, bias and the rows before the first step."""
    w = pointer(base, F)
    load_taps(args, first, count, taps, base, weight, F)
    for i in range(0, WIDTH, LANES):
        store(w, bias + i, zeros(F))
    if given(args, BIAS):
        stage(args, BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
    for i in range(0, (taps - 1) * WIDTH, LANES):
        store(w, xs + i, zeros(F))
    if given(args, STATE):
        stage(args, STATE, batch, 0, taps - 1, first, count, base, xs, WIDTH, F)


@inner
def move_rows(base, source, target, rows, F):
    """Copy `rows` rows of a block within the scratch memory, from the first to the last."""
    w = pointer(base, F)
    for i in range(0, rows * WIDTH, LANES):
        store(w, target + i, load(w, source + i))


def build_forward(F, size, stamp):
    """The forward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def conv1d_forward(args):
        stamp  # noqa: B018
        length, channels, taps = args[LENGTH], args[CHANNELS], args[TAPS]
        blocks = (channels + WIDTH - 1) // WIDTH
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        weight = LANES
        bias = weight + taps * WIDTH
        xs = bias + WIDTH
        ys = xs + (taps - 1 + TILE) * WIDTH
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * blocks:
                break
            batch, first = task // blocks, (task % blocks) * WIDTH
            count = min(WIDTH, channels - first)
            begin_task(args, batch, first, count, taps, base, weight, bias, xs, F)
            reach = taps - 1
            for start in range(0, length, TILE):
                rows = min(TILE, length - start)
                now = xs + (taps - 1) * WIDTH
                stage(args, X, batch, start, rows, first, count, base, now, WIDTH, F)
                for t in range(rows):
                    reach = next_reach(args, batch, start + t, reach, taps)
                    for c in range(0, count, LANES):
                        y = load(w, bias + c)
                        for d in range(reach + 1):
                            x = load(w, now + (t - d) * WIDTH + c)
                            y = fma(load(w, weight + d * WIDTH + c), x, y)
                        if args[SILU] != 0:
                            y = silu(y)
                        store(w, ys + t * WIDTH + c, y)
                unstage(args, Y, batch, start, rows, first, count, base, ys, WIDTH, F)
                move_rows(base, xs + rows * WIDTH, xs, taps - 1, F)

    return conv1d_forward


def build_backward(F, size, stamp):
    """The backward kernel in the arithmetic of `F`; `stamp` keys the cache on disk.

    The gradient of row t is complete when row t + k - 1 has been seen: rows leave the buffer k - 1
    steps late, those before the first step into the gradient of the state.
    """

    def conv1d_backward(args):
        stamp  # noqa: B018
        length, channels, taps = args[LENGTH], args[CHANNELS], args[TAPS]
        before = taps - 1
        blocks = (channels + WIDTH - 1) // WIDTH
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        weight = LANES
        bias = weight + taps * WIDTH
        grad_bias = bias + WIDTH
        grad_weight = grad_bias + WIDTH
        xs = grad_weight + taps * WIDTH
        gx = xs + (before + TILE) * WIDTH
        gy = gx + (before + TILE) * WIDTH
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * blocks:
                break
            batch, first = task // blocks, (task % blocks) * WIDTH
            count = min(WIDTH, channels - first)
            begin_task(args, batch, first, count, taps, base, weight, bias, xs, F)
            for i in range(grad_bias, xs, LANES):
                store(w, i, zeros(F))
            for i in range(gx, gx + before * WIDTH, LANES):
                store(w, i, zeros(F))
            reach = before
            for start in range(0, length, TILE):
                rows = min(TILE, length - start)
                now, into = xs + before * WIDTH, gx + before * WIDTH
                stage(args, X, batch, start, rows, first, count, base, now, WIDTH, F)
                stage(args, GRAD_Y, batch, start, rows, first, count, base, gy, WIDTH, F)
                for i in range(into, into + rows * WIDTH, LANES):
                    store(w, i, zeros(F))
                for t in range(rows):
                    reach = next_reach(args, batch, start + t, reach, taps)
                    for c in range(0, count, LANES):
                        grad = load(w, gy + t * WIDTH + c)
                        if args[SILU] != 0:
                            y = load(w, bias + c)
                            for d in range(reach + 1):
                                x = load(w, now + (t - d) * WIDTH + c)
                                y = fma(load(w, weight + d * WIDTH + c), x, y)
                            grad = grad * silu_and_slope(y)[1]
                        store(w, grad_bias + c, load(w, grad_bias + c) + grad)
                        for d in range(reach + 1):
                            tap, row = d * WIDTH + c, (t - d) * WIDTH + c
                            part = fma(grad, load(w, now + row), load(w, grad_weight + tap))
                            store(w, grad_weight + tap, part)
                            part = fma(grad, load(w, weight + tap), load(w, into + row))
                            store(w, into + row, part)
                ready = start + rows - before
                early = max(0, min(before - start, rows))
                if early > 0 and given(args, GRAD_STATE):
                    unstage(args, GRAD_STATE, batch, start, early, first, count, base, gx, WIDTH, F)
                if ready > 0:
                    at = gx + early * WIDTH
                    unstage(
                        args, GRAD_X, batch, start + early - before, rows - early, first, count,
                        base, at, WIDTH, F,
                    )  # fmt: skip
                move_rows(base, xs + rows * WIDTH, xs, before, F)
                move_rows(base, gx + rows * WIDTH, gx, before, F)
            early = max(0, before - length)
            if early > 0 and given(args, GRAD_STATE):
                unstage(args, GRAD_STATE, batch, length, early, first, count, base, gx, WIDTH, F)
            at = gx + early * WIDTH
            left = before - early
            unstage(
                args, GRAD_X, batch, length - left, left, first, count, base, at, WIDTH, F
            )  # fmt: skip
            unstage(
                args, GRAD_WEIGHT, batch, 0, taps, first, count, base, grad_weight, WIDTH, F
            )  # fmt: skip
            if given(args, GRAD_BIAS):
                unstage(args, GRAD_BIAS, batch, 0, 1, first, count, base, grad_bias, WIDTH, F)

    return conv1d_backward


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j}).

    Args:
        x: (b, l, e).    weight: (e, k).    bias: (e).
        activation: SiLU if true.
        state: (b, k-1, e) inputs before the first step; of the first step's document. Zeros if
            missing.
        seq_idx: (b, l) int64; taps do not reach back over a step where it changes.
        reverse: whether steps are taken from the last to the first.
        out: where to write y, if a kernel can; it may be x.

    Returns:
        y (b, l, e) in the dtype of x.
    """
    b, l, e = x.shape
    k = weight.shape[1]
    F = arithmetic(x.dtype)
    y = result_like(x, out)
    tensors = [
        rowwise(x, F),
        weight.detach().to(F).contiguous(),
        bias,
        state,
        documents(seq_idx),
        y,
    ]
    tensors[2:4] = [
        None if t is None or t.numel() == 0 else rowwise(t.detach(), F) for t in tensors[2:4]
    ]
    args = pack([b, l, e, k, activation], tensors, STEPWISE if reverse else ())
    scratch = (LANES + (2 * k + 2 * TILE) * WIDTH) * F.itemsize
    run(compiled(build_forward, F), args, b * -(-e // WIDTH), scratch, b * l * e * k)
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    activation: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward` to (x, weight, bias, state); the pre-activation is computed again."""
    b, l, e = x.shape
    k = weight.shape[1]
    F = arithmetic(x.dtype)
    grad_x = torch.empty(b, l, e, dtype=x.dtype)
    grad_weight = torch.empty(b, k, e, dtype=F)
    grad_bias = None if bias is None else torch.empty(b, e, dtype=F)
    grad_state = None if state is None else torch.empty(b, k - 1, e, dtype=state.dtype)
    given_state = None if state is None or k == 1 else rowwise(state.detach(), F)
    given_bias = None if bias is None else rowwise(bias.detach(), F)
    tensors = [rowwise(x.detach(), F), weight.detach().to(F).contiguous(), given_bias, given_state]
    tensors += [
        documents(seq_idx),
        None,
        rowwise(grad_y.detach(), F),
        grad_x,
        grad_weight,
        grad_bias,
    ]
    tensors += [None if given_state is None else grad_state]
    args = pack([b, l, e, k, activation], tensors, STEPWISE if reverse else ())
    scratch = (LANES + (4 * k + 2 + 3 * TILE) * WIDTH) * F.itemsize
    run(compiled(build_backward, F), args, b * -(-e // WIDTH), scratch, 3 * b * l * e * k)
    # Parts are by tap, the newest first: (b, k, e) -> (e, k).
    grad_weight = grad_weight.sum(0).flip(0).t().to(weight.dtype)
    grad_bias = None if grad_bias is None else grad_bias.sum(0).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad_state


def next_state(
    x: Tensor, k: int, state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """The (b, k-1, e) inputs that the step after x looks back on, zero where another document was
    (plain torch)."""
    b, l, e = x.shape
    if state is None:
        state = x.new_zeros(b, k - 1, e)
    inputs = torch.cat([state, x], 1)[:, l:]  # (b, k-1, e)
    if seq_idx is None or k == 1:
        return inputs
    # The first step's document goes back into the state.
    ids = torch.cat([seq_idx[:, :1].expand(b, k - 1), seq_idx], 1)[:, l:]  # (b, k-1)
    same = (ids == ids[:, -1:]).flip(1).cumprod(1).flip(1).bool()
    return torch.where(same[..., None], inputs, inputs.new_zeros(()))
