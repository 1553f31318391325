"""Mamba-3's K and Q: B and C for each head, with their biases, turned by the running phase.

Forward, a task is one head of one row of the batch, from the first step to the last: the phase is a
running sum (compensated, and kept within a turn), the same for K and Q. Backward, a task is ROWS
steps of one row of the batch, as gradients of B and C are sums over heads; the sum of the phase's
gradient over later steps is the caller's.

A pair (a, b) of channels becomes (a cos - b sin, a sin + b cos). Channels beyond the pairs that are
turned have cos = 1 and sin = 0.
"""

import torch
from torch import Tensor

from mambapy.ops.cpu.exp import cos_and_sin, within_a_turn
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
    rowwise,
    stage,
    unstage,
)
from mambapy.ops.cpu.scan_forward import whole_vectors
from mambapy.ops.cpu.simd import (
    LANES,
    evens,
    fma,
    inline,
    inner,
    odds,
    splat,
    zeros,
    zip_high,
    zip_low,
)
from mambapy.ops.cpu.threads import arithmetic, compiled, run

ROWS = 16
BATCH, LENGTH, HEADS, GROUPS, RANK, STATES, ANGLES, HALVES = range(SIZES, SIZES + 8)
B, C, B_BIAS, C_BIAS, DT, OMEGA, BEFORE, STARTS, PHASE, K, Q = range(11)
GRAD_K, GRAD_Q, GRAD_B, GRAD_C, GRAD_B_BIAS, GRAD_C_BIAS, GRAD_PHASE = range(9, 16)


def channels_of(states: int) -> int:
    """Channels with room for whole vectors of pairs, and for what is written beyond them."""
    return 2 * whole_vectors(-(-states // 2)) + LANES


@inline
def make_cos_and_sin(w, phase, angles, pairs, cos, sin, F):
    """cos and sin of each pair, 1 and 0 beyond those that are turned."""
    for i in range(0, pairs, LANES):
        c, s = cos_and_sin(load(w, phase + i))
        store(w, cos + i, c)
        store(w, sin + i, s)
    for i in range(angles, pairs):
        w[cos + i] = F(1)
        w[sin + i] = F(0)


@inline
def pair_at(w, source, i, half, halves):
    """The first and second channels of the pairs from i on."""
    if halves != 0:
        return load(w, source + i), load(w, source + half + i)
    low, high = load(w, source + 2 * i), load(w, source + 2 * i + LANES)
    return evens(low, high), odds(low, high)


@inline
def write_pairs(w, target, second, i, half, halves, a, b):
    """Write pairs; in halves, `second` says which of them, since the last vector reaches over."""
    if halves == 0:
        store(w, target + 2 * i, zip_low(a, b))
        store(w, target + 2 * i + LANES, zip_high(a, b))
    elif second != 0:
        store(w, target + half + i, b)
    else:
        store(w, target + i, a)


@inner
def rotate(base, source, target, cos, sin, pairs, half, halves, F):
    """target = source, turned."""
    w = pointer(base, F)
    for second in range(2 if halves != 0 else 1):
        for i in range(0, pairs, LANES):
            a, b = pair_at(w, source, i, half, halves)
            c, s = load(w, cos + i), load(w, sin + i)
            write_pairs(w, target, second, i, half, halves, a * c - b * s, fma(a, s, b * c))


@inner
def rotate_back(base, value, grad, target, cos, sin, phase, pairs, half, halves, F):
    """target = grad, turned back; grad_phase += the gradient of the angle that turned `value`."""
    w = pointer(base, F)
    for second in range(2 if halves != 0 else 1):
        for i in range(0, pairs, LANES):
            g, h = pair_at(w, grad, i, half, halves)
            c, s = load(w, cos + i), load(w, sin + i)
            back, other = fma(g, c, h * s), h * c - g * s
            write_pairs(w, target, second, i, half, halves, back, other)
            if second == 0:
                a, b = pair_at(w, value, i, half, halves)
                # d(turned a) = -(turned b), d(turned b) = turned a; and turning both changes no
                # product of two.
                store(w, phase + i, fma(a, other, load(w, phase + i)) - b * back)


@inner
def with_bias(args, which, bias, batch, t, row, group, head, base, at, F):
    """Stage a row of B or C, with the bias of the head; zeros up to whole vectors."""
    w, states, rank = pointer(base, F), args[STATES], args[RANK]
    stage(args, which, batch, t, 1, (row * args[GROUPS] + group) * states, states, base, at, 0, F)
    if given(args, bias):
        add = pointer(place(args, bias, 0, 0, (head * rank + row) * states), F)
        for i in range(states):
            w[at + i] += add[i]


@inline
def restarts(args, batch, t):
    """Whether the phase is set to 0 before step t."""
    return given(args, STARTS) and pointer(place(args, STARTS, batch, t, 0), int)[0] != 0


def build_forward(F, size, stamp):
    """The forward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def turn_forward(args):
        stamp  # noqa: B018
        states, angles, halves, heads = args[STATES], args[ANGLES], args[HALVES], args[HEADS]
        half = states // 2
        pairs = ((states + 1) // 2 + LANES - 1) // LANES * LANES
        room = 2 * pairs + LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        omega, phase, rest = LANES, LANES + pairs, LANES + 2 * pairs
        cos, sin = LANES + 3 * pairs, LANES + 4 * pairs
        source = LANES + 5 * pairs
        target = source + room
        for i in range(0, 5 * pairs + 2 * room, LANES):
            store(w, LANES + i, zeros(F))
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * heads:
                break
            batch, head = task // heads, task % heads
            group = head // (heads // args[GROUPS])
            for i in range(0, pairs, LANES):
                store(w, rest + i, zeros(F))
            stage(args, BEFORE, batch, 0, 1, head * angles, angles, base, phase, 0, F)
            for t in range(args[LENGTH]):
                if restarts(args, batch, t):
                    for i in range(0, pairs, LANES):
                        store(w, phase + i, zeros(F))
                        store(w, rest + i, zeros(F))
                stage(args, OMEGA, batch, t, 1, 0, angles, base, omega, 0, F)
                dt = splat(pointer(place(args, DT, batch, t, head), F)[0])
                for i in range(0, pairs, LANES):
                    now, add = load(w, phase + i), fma(load(w, omega + i), dt, load(w, rest + i))
                    then = now + add
                    then, lost = within_a_turn(then, add - (then - now))
                    store(w, phase + i, then)
                    store(w, rest + i, lost)
                make_cos_and_sin(w, phase, angles, pairs, cos, sin, F)
                unstage(args, PHASE, batch, t, 1, head * angles, angles, base, phase, 0, F)
                for row in range(args[RANK]):
                    column = (row * heads + head) * states
                    with_bias(args, B, B_BIAS, batch, t, row, group, head, base, source, F)
                    rotate(base, source, target, cos, sin, pairs, half, halves, F)
                    unstage(args, K, batch, t, 1, column, states, base, target, 0, F)
                    with_bias(args, C, C_BIAS, batch, t, row, group, head, base, source, F)
                    rotate(base, source, target, cos, sin, pairs, half, halves, F)
                    unstage(args, Q, batch, t, 1, column, states, base, target, 0, F)

    return turn_forward


def build_backward(F, size, stamp):
    """The backward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def turn_backward(args):
        stamp  # noqa: B018
        states, angles, halves, heads = args[STATES], args[ANGLES], args[HALVES], args[HEADS]
        groups, rank = args[GROUPS], args[RANK]
        half, blocks = states // 2, (args[LENGTH] + ROWS - 1) // ROWS
        pairs = ((states + 1) // 2 + LANES - 1) // LANES * LANES
        room = 2 * pairs + LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        phase, grad_phase = LANES, LANES + pairs
        cos, sin = LANES + 2 * pairs, LANES + 3 * pairs
        source = LANES + 4 * pairs
        grad = source + room
        back = grad + room
        # Sums over heads (2, r, g, n), and over steps (2, h, r, n), rows `room` apart.
        sums = back + room
        biases = sums + 2 * rank * groups * room
        for i in range(0, biases + 2 * heads * rank * room - LANES, LANES):
            store(w, LANES + i, zeros(F))
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * blocks:
                break
            batch, first = task // blocks, task % blocks * ROWS
            for i in range(0, 2 * heads * rank * room, LANES):
                store(w, biases + i, zeros(F))
            for t in range(first, min(first + ROWS, args[LENGTH])):
                for i in range(0, 2 * rank * groups * room, LANES):
                    store(w, sums + i, zeros(F))
                for head in range(heads):
                    group = head // (heads // groups)
                    stage(args, PHASE, batch, t, 1, head * angles, angles, base, phase, 0, F)
                    make_cos_and_sin(w, phase, angles, pairs, cos, sin, F)
                    for i in range(0, pairs, LANES):
                        store(w, grad_phase + i, zeros(F))
                    for row in range(rank):
                        column = (row * heads + head) * states
                        for which in range(2):
                            from_tensor, bias = (C, C_BIAS) if which != 0 else (B, B_BIAS)
                            gradient = GRAD_Q if which != 0 else GRAD_K
                            with_bias(
                                args, from_tensor, bias, batch, t, row, group, head, base, source, F
                            )  # fmt: skip
                            stage(args, gradient, batch, t, 1, column, states, base, grad, 0, F)
                            rotate_back(
                                base, source, grad, back, cos, sin, grad_phase, pairs, half, halves,
                                F,
                            )  # fmt: skip
                            total = sums + ((which * rank + row) * groups + group) * room
                            share = biases + ((which * heads + head) * rank + row) * room
                            for i in range(0, 2 * pairs, LANES):
                                value = load(w, back + i)
                                store(w, total + i, load(w, total + i) + value)
                                store(w, share + i, load(w, share + i) + value)
                    unstage(
                        args, GRAD_PHASE, batch, t, 1, head * angles, angles, base, grad_phase, 0, F
                    )  # fmt: skip
                for i in range(rank * groups):
                    at = sums + i * room
                    unstage(args, GRAD_B, batch, t, 1, i * states, states, base, at, 0, F)
                    at = sums + (rank * groups + i) * room
                    unstage(args, GRAD_C, batch, t, 1, i * states, states, base, at, 0, F)
            for i in range(heads * rank):
                at = biases + i * room
                unstage(args, GRAD_B_BIAS, task, 0, 1, i * states, states, base, at, 0, F)
                at = biases + (heads * rank + i) * room
                unstage(args, GRAD_C_BIAS, task, 0, 1, i * states, states, base, at, 0, F)

    return turn_backward


def _flat(T: Tensor | None, start: int, F: torch.dtype) -> Tensor | None:
    """T with the axes from `start` on as one, contiguous there, as a kernel takes it."""
    return None if T is None else rowwise(T.detach().flatten(start), F)


def _small(T: Tensor | None, F: torch.dtype) -> Tensor | None:
    """T as a contiguous vector of the arithmetic's dtype."""
    return None if T is None else T.detach().to(F).contiguous().flatten()


def forward(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    dt: Tensor,
    omega: Tensor,
    before: Tensor,
    starts: Tensor | None,
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """K, Q (b, l, r, h, n), and the phases (b, l, h, s) that turned them.

    Args:
        B, C: (b, l, r, g, n).    B_bias, C_bias: (h, r, n) or None.
        dt: (b, l, h).    omega: (b, l, s).
        before: (b, h, s) the phase before the first step.
        starts: (b, l) bool, where the phase is set to 0 first; None for nowhere.
        halves: whether pairs are (i, i + n/2), not (2i, 2i + 1).
    """
    (b, l, r, g, n), (h, s) = B.shape, before.shape[1:]
    F = arithmetic(B.dtype)
    K, Q = (B.new_empty(b, l, r * h * n, dtype=F) for _ in range(2))
    phase = B.new_empty(b, l, h * s, dtype=F)
    tensors = [_flat(B, 2, F), _flat(C, 2, F), _small(B_bias, F), _small(C_bias, F)]
    tensors += [dt.detach().to(F).contiguous(), _flat(omega, 2, F)]
    tensors += [before.detach().to(F).contiguous().flatten(1), documents(starts), phase, K, Q]
    args = pack([b, l, h, g, r, n, s, halves], tensors)
    pairs, room = whole_vectors(-(-n // 2)), channels_of(n)
    scratch = (LANES + 5 * pairs + 2 * room) * F.itemsize
    run(compiled(build_forward, F), args, b * h, scratch, 12 * b * l * h * r * n)
    shape = (r, h, n)
    return K.unflatten(2, shape), Q.unflatten(2, shape), phase.unflatten(2, (h, s))


def backward(
    grad_K: Tensor,
    grad_Q: Tensor,
    phase: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to B and C (b, l, r, g, n), their biases (h, r, n), and each step's own angle."""
    (b, l, r, g, n), (h, s) = B.shape, phase.shape[2:]
    F = arithmetic(B.dtype)
    grad_B, grad_C = (B.new_empty(b, l, r * g * n, dtype=F) for _ in range(2))
    tasks = b * -(-l // ROWS)
    biases = [B.new_empty(tasks, h * r * n, dtype=F) for _ in range(2)]
    grad_phase = B.new_empty(b, l, h * s, dtype=F)
    tensors = [_flat(B, 2, F), _flat(C, 2, F), _small(B_bias, F), _small(C_bias, F)]
    tensors += [None, None, None, None, phase.flatten(2), _flat(grad_K, 2, F), _flat(grad_Q, 2, F)]
    tensors += [grad_B, grad_C, *biases, grad_phase]
    args = pack([b, l, h, g, r, n, s, halves], tensors)
    pairs, room = whole_vectors(-(-n // 2)), channels_of(n)
    scratch = LANES + 4 * pairs + 3 * room + 2 * r * (g + h) * room
    work = 20 * b * l * h * r * n
    run(compiled(build_backward, F), args, tasks, scratch * F.itemsize, work)
    sums = [part.sum(0).unflatten(0, (h, r, n)) for part in biases]
    shape = (r, g, n)
    return (
        grad_B.unflatten(2, shape),
        grad_C.unflatten(2, shape),
        sums[0],
        sums[1],
        grad_phase.unflatten(2, (h, s)),
    )
