"""The kernel of `step.py`: a list of stages, one after the other, each spread over all workers.

Decoding reads every weight once for one token, so it is bound by memory; what costs time besides is
starting threads for each small product. Here they start once for a whole model. A worker draws
tasks of a stage until none is left, waits until the others have finished theirs, and goes on; it
never waits for a worker that has not come, so any number of workers will do.

Activations live in one workspace, (b, width) rows of whole vectors; weights and states are read and
written where the caller has them.
"""

import math

from mambapy.ops.cpu.exp import LOG2E, exp, exp2, silu, softplus
from mambapy.ops.cpu.memory import (
    fetch_add,
    finish,
    lanes_total,
    load,
    load_acquire,
    load_first,
    pause,
    pointer,
    store,
    store_first,
)
from mambapy.ops.cpu.rows import (
    FIRST_SLOT,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    copy_bytes,
    load_some,
    size_of,
)
from mambapy.ops.cpu.simd import LANES, fma, inline, splat, zeros

STAGES, WORK, BATCH = range(SIZES, SIZES + 3)
# A stage: what it is, its number of tasks, two counters, its operands. Places in the workspace (X,
# Y, DT, B, C, Z) are counted in numbers, a pitch is the distance of two rows; the rest are
# addresses (0: there is none) and sizes.
FIELDS = 24
NORM, LINEAR, CONV, SCAN, SSD, GATED_NORM = range(6)
KIND, TASKS, NEXT, DONE, X, X_PITCH, Y, Y_PITCH, WEIGHT, BIAS, CHANNELS = range(11)
EPS_BITS = 11
CODE, SCALE, INNER, BLOCK, ADD = range(11, 16)
OLD, NEW, TAPS, SILU = range(11, 15)
DT, DT_PITCH, B, C, BC_PITCH, Z, Z_PITCH, D, STATES, SOFTPLUS, IS_LOG = range(13, 24)
HEAD, GROUP, LIMITS, SKIP, SSD_STATES, SKIP_BY_CHANNEL = range(18, 24)
GATE, GATE_PITCH, GROUPS, GATED_EPS_BITS = range(11, 15)
WIDTH = 128


@inline
def _some(w, at, left):
    """A vector of which only the first `left` numbers may be read; the others are 0."""
    return load(w, at) if left >= LANES else load_first(w, at, left)


@inline
def _norm(args, at, row, F):
    """One row of an RMSNorm."""
    w, weight = pointer(args[WORK], F), pointer(args[at + WEIGHT], F)
    x, y, width = args[at + X] + row * args[at + X_PITCH], args[at + Y], args[at + CHANNELS]
    y += row * args[at + Y_PITCH]
    squares = zeros(F)
    for c in range(0, width, LANES):
        v = _some(w, x + c, width - c)
        squares = fma(v, v, squares)
    eps = pointer(args[at + EPS_BITS], F)[0]
    scale = splat(F(1) / F(math.sqrt(lanes_total(squares) / F(width) + eps)))
    for c in range(0, width, LANES):
        store(w, y + c, _some(w, x + c, width - c) * scale * _some(weight, c, width - c))


@inline
def _two_dots(w, x, a, b, code, inner, spare, tail, F):
    """x · (inner numbers of dtype `code` at address a), and at b; `code` must be a constant."""
    size = size_of(code)
    sum_a, more_a, sum_b, more_b = zeros(F), zeros(F), zeros(F), zeros(F)
    pairs, whole = inner // (2 * LANES) * 2 * LANES, inner // LANES * LANES
    for i in range(0, pairs, 2 * LANES):
        v, more, j = load(w, x + i), load(w, x + i + LANES), i * size
        sum_a = fma(load_some(a + j, code, F), v, sum_a)
        more_a = fma(load_some(a + j + LANES * size, code, F), more, more_a)
        sum_b = fma(load_some(b + j, code, F), v, sum_b)
        more_b = fma(load_some(b + j + LANES * size, code, F), more, more_b)
    if pairs < whole:
        v, j = load(w, x + pairs), pairs * size
        sum_a = fma(load_some(a + j, code, F), v, sum_a)
        sum_b = fma(load_some(b + j, code, F), v, sum_b)
    if whole < inner:
        # The last vector of a row ends with the row, and what was counted already meets zeros. A
        # row of less than a vector is copied to where a vector can be read.
        v, j = load(pointer(spare, F), tail), (inner - LANES) * size
        if inner >= LANES:
            more_a = fma(load_some(a + j, code, F), v, more_a)
            more_b = fma(load_some(b + j, code, F), v, more_b)
        else:
            copy_bytes(a, spare, inner * size)
            more_a = fma(load_some(spare, code, F), v, more_a)
            copy_bytes(b, spare, inner * size)
            more_b = fma(load_some(spare, code, F), v, more_b)
    return lanes_total(sum_a + more_a), lanes_total(sum_b + more_b)


@inline
def _put(args, at, r, row, value, F):
    """Scale one output of a product, add bias and residual, and write it."""
    w, y = pointer(args[WORK], F), args[at + Y] + r * args[at + Y_PITCH] + row
    if args[at + SCALE] != 0:
        value *= pointer(args[at + SCALE], F)[row]
    if args[at + BIAS] != 0:
        value += pointer(args[at + BIAS], F)[row]
    w[y] = w[y] + value if args[at + ADD] != 0 else value


@inline
def _linear(args, at, task, base, F):
    """BLOCK outputs of a product: y = W x, or y += W x."""
    w, spare = pointer(args[WORK], F), pointer(base, F)
    inner, code = args[at + INNER], args[at + CODE]
    rest, start = inner % LANES, max(inner - LANES, 0)
    if rest > 0:
        store(spare, 0, zeros(F))
        for r in range(args[BATCH]):
            x, tail = args[at + X] + r * args[at + X_PITCH] + inner, (1 + r) * LANES
            store(spare, tail, zeros(F))
            for i in range(1, rest + 1):
                spare[tail + inner - start - i] = w[x - i]
    first = task * args[at + BLOCK]
    last = min(first + args[at + BLOCK], args[at + CHANNELS])
    # Two streams of weights, each sequential, keep memory busier than one: a row of either half.
    half = (last - first + 1) // 2
    for row in range(first, first + half):
        other = min(row + half, last - 1)
        a = args[at + WEIGHT] + row * inner * size_of(code)
        b = args[at + WEIGHT] + other * inner * size_of(code)
        for r in range(args[BATCH]):
            x, tail = args[at + X] + r * args[at + X_PITCH], (1 + r) * LANES
            if code == 4:
                one, two = _two_dots(w, x, a, b, 4, inner, base, tail, F)
            elif code == 2:
                one, two = _two_dots(w, x, a, b, 2, inner, base, tail, F)
            elif code == 1:
                one, two = _two_dots(w, x, a, b, 1, inner, base, tail, F)
            elif code == 3:
                one, two = _two_dots(w, x, a, b, 3, inner, base, tail, F)
            else:
                one, two = _two_dots(w, x, a, b, 8, inner, base, tail, F)
            _put(args, at, r, row, one, F)
            # Where the halves differ, the last row comes twice.
            if row + half < last:
                _put(args, at, r, other, two, F)


@inline
def _conv(args, at, task, base, F):
    """One token through the convolution of a block of channels, and the state after it."""
    w = pointer(args[WORK], F)
    channels, taps = args[at + CHANNELS], args[at + TAPS]
    blocks = (channels + WIDTH - 1) // WIDTH
    row, first = task // blocks, task % blocks * WIDTH
    last = min(first + WIDTH, channels)
    x, y = args[at + X] + row * args[at + X_PITCH], args[at + Y] + row * args[at + Y_PITCH]
    weight, spare = pointer(args[at + WEIGHT], F), pointer(base, F)
    old, new = pointer(args[at + OLD], F), pointer(args[at + NEW], F)
    before = row * (taps - 1) * channels
    for c in range(first, last):
        for j in range(taps):
            spare[j * WIDTH + c - first] = weight[c * taps + j]
    for c in range(first, last, LANES):
        left, i, now, value = last - c, c - first, load(w, x + c), zeros(F)
        if args[at + BIAS] != 0:
            value = _some(pointer(args[at + BIAS], F), c, left)
        value = fma(load(spare, (taps - 1) * WIDTH + i), now, value)
        for d in range(1, taps):
            j = taps - 1 - d
            earlier = _some(old, before + j * channels + c, left)
            value = fma(load(spare, j * WIDTH + i), earlier, value)
            if j > 0:
                store_first(new, before + (j - 1) * channels + c, earlier, left)
        if taps > 1:
            store_first(new, before + (taps - 2) * channels + c, now, left)
        store(w, y + c, silu(value) if args[at + SILU] != 0 else value)


@inline
def _scan(args, at, task, base, F):
    """One token through the recurrence of a block of channels; a vector holds one channel."""
    w, spare = pointer(args[WORK], F), pointer(base, F)
    channels, states = args[at + CHANNELS], args[at + STATES]
    blocks = (channels + WIDTH - 1) // WIDTH
    row, first = task // blocks, task % blocks * WIDTH
    last = min(first + WIDTH, channels)
    x, y = args[at + X] + row * args[at + X_PITCH], args[at + Y] + row * args[at + Y_PITCH]
    dt = args[at + DT] + row * args[at + DT_PITCH]
    b_row = args[at + B] + row * args[at + BC_PITCH]
    c_row = args[at + C] + row * args[at + BC_PITCH]
    rates = pointer(args[at + WEIGHT], F)
    old, new = pointer(args[at + OLD], F), pointer(args[at + NEW], F)
    for c in range(first, last, LANES):
        v = load(w, dt + c)
        if args[at + BIAS] != 0:
            v = v + _some(pointer(args[at + BIAS], F), c, last - c)
        if args[at + SOFTPLUS] != 0:
            v = softplus(v)
        store(spare, c - first, v)
    for c in range(first, last):
        step, value = spare[c - first], w[x + c]
        rate, dx, sums = splat(step * F(LOG2E)), splat(step * value), zeros(F)
        for n in range(0, states, LANES):
            left, i = states - n, (row * channels + c) * states + n
            A = _some(rates, c * states + n, left)
            if args[at + IS_LOG] != 0:
                A = zeros(F) - exp(A)
            h = _some(old, i, left) * exp2(rate * A)
            h = fma(dx, _some(w, b_row + n, left), h)
            store_first(new, i, h, left)
            sums = fma(h, _some(w, c_row + n, left), sums)
        total = lanes_total(sums)
        if args[at + D] != 0:
            total += pointer(args[at + D], F)[c] * value
        w[y + c] = total
    if args[at + Z] >= 0:
        z = args[at + Z] + row * args[at + Z_PITCH]
        for c in range(first, last, LANES):
            store(w, y + c, load(w, y + c) * silu(load(w, z + c)))


@inline
def _ssd(args, at, task, base, F):
    """One token through the recurrence of a head of Mamba-2."""
    w, spare = pointer(args[WORK], F), pointer(base, F)
    width, states, groups = args[at + HEAD], args[at + SSD_STATES], args[at + GROUP]
    heads = args[at + CHANNELS] // width
    row, head = task // heads, task % heads
    group = head // (heads // groups)
    x = args[at + X] + row * args[at + X_PITCH] + head * width
    y = args[at + Y] + row * args[at + Y_PITCH] + head * width
    b_row = args[at + B] + row * args[at + BC_PITCH] + group * states
    c_row = args[at + C] + row * args[at + BC_PITCH] + group * states
    old, new = pointer(args[at + OLD], F), pointer(args[at + NEW], F)
    limits = pointer(args[at + LIMITS], F)
    step = w[args[at + DT] + row * args[at + DT_PITCH] + head]
    if args[at + BIAS] != 0:
        step += pointer(args[at + BIAS], F)[head]
    store(spare, 0, softplus(splat(step)))
    step = min(max(spare[0], limits[0]), limits[1])
    store(spare, 0, exp(splat(pointer(args[at + WEIGHT], F)[head])))
    decay = exp2(splat(-step * spare[0] * F(LOG2E)))
    for p in range(width):
        value, sums = w[x + p], zeros(F)
        dx = splat(step * value)
        for n in range(0, states, LANES):
            left, i = states - n, ((row * heads + head) * width + p) * states + n
            h = fma(dx, _some(w, b_row + n, left), decay * _some(old, i, left))
            if left >= LANES:
                store(new, i, h)
            else:
                store_first(new, i, h, left)
            sums = fma(h, _some(w, c_row + n, left), sums)
        total = lanes_total(sums)
        if args[at + SKIP] != 0:
            skip = head * width + p if args[at + SKIP_BY_CHANNEL] != 0 else head
            total += pointer(args[at + SKIP], F)[skip] * value
        w[y + p] = total


@inline
def _gated_norm(args, at, task, F):
    """One group of one row of the norm of x silu(gate)."""
    w, groups = pointer(args[WORK], F), args[at + GROUPS]
    row, width = task // groups, args[at + CHANNELS] // groups
    first = task % groups * width
    x = args[at + X] + row * args[at + X_PITCH] + first
    gate = args[at + GATE] + row * args[at + GATE_PITCH] + first
    y = args[at + Y] + row * args[at + Y_PITCH] + first
    weight = pointer(args[at + WEIGHT], F)
    squares = zeros(F)
    for c in range(0, width, LANES):
        u = _some(w, x + c, width - c) * silu(_some(w, gate + c, width - c))
        squares = fma(u, u, squares)
    eps = pointer(args[at + GATED_EPS_BITS], F)[0]
    scale = splat(F(1) / F(math.sqrt(lanes_total(squares) / F(width) + eps)))
    for c in range(0, width, LANES):
        left = width - c
        u = _some(w, x + c, left) * silu(_some(w, gate + c, left))
        value = u * scale * _some(weight, first + c, left)
        if left >= LANES:
            store(w, y + c, value)
        else:
            store_first(w, y + c, value, left)


def build(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def step(args):
        stamp  # noqa: B018
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        for stage in range(args[STAGES]):
            at = FIRST_SLOT + stage * FIELDS
            while True:
                task = fetch_add(args, at + NEXT)
                if task >= args[at + TASKS]:
                    break
                if args[at + KIND] == LINEAR:
                    _linear(args, at, task, base, F)
                elif args[at + KIND] == NORM:
                    _norm(args, at, task, F)
                elif args[at + KIND] == CONV:
                    _conv(args, at, task, base, F)
                elif args[at + KIND] == SSD:
                    _ssd(args, at, task, base, F)
                elif args[at + KIND] == GATED_NORM:
                    _gated_norm(args, at, task, F)
                else:
                    _scan(args, at, task, base, F)
                finish(args, at + DONE)
            while load_acquire(args, at + DONE) < args[at + TASKS]:
                pause()

    return step
