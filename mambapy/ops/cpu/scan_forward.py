"""The forward kernel of the selective scan.

A task is one batch row and one block of up to WIDTH channels, from the first step to the last. Its
states stay in L1 as (group, states, LANES) for groups of LANES channels; steps are staged TILE at a
time. The inner loop has 16 operations on whole vectors per step, channel group and state, 13 of
them for the decay.

Buffers that are read and written together are interleaved, or apart by PAD: a load waits for an
earlier store whose address differs by a multiple of 4096 bytes, which cost 10 to 24 % of the time.
"""

from mambapy.ops.cpu.exp import LOG2E, exp2, silu, softplus
from mambapy.ops.cpu.memory import fetch_add, load, pointer, store
from mambapy.ops.cpu.rows import (
    NEXT_TASK,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    given,
    place,
    stage,
    unstage,
)
from mambapy.ops.cpu.simd import LANES, fma, inline, inner, splat, zeros

WIDTH = 128
GROUPS = WIDTH // LANES
TILE = 16
# Steps from one saved state to the next; a multiple of TILE.
CHUNK = 64
PAD = 3 * LANES

BATCH, LENGTH, CHANNELS, STATES, SOFTPLUS, BLOCK = range(SIZES, SIZES + 6)
X, DT, A, B, C, D, Z, BIAS, STATE, SEQ, Y, STARTS, LAST = range(13)
# What has a row for each step. The states have none: they stand in the order of processing.
STEPWISE = (X, DT, B, C, Z, SEQ, Y)


def whole_vectors(count: int) -> int:
    """`count` rounded up to a multiple of LANES."""
    return -(-count // LANES) * LANES


def forward_floats(states: int) -> int:
    """Numbers of scratch that a worker needs."""
    return LANES + WIDTH * (2 * states + 2 + 3 * TILE) + 3 * PAD + 2 * TILE * whole_vectors(states)


@inner
def load_rates(args, first, count, states, base, offset, pitch, F):
    """Stage A * log2(e) of `count` channels as (group, states, LANES), states `pitch` apart; 0
    where missing."""
    buffer, rates = pointer(base, F), pointer(place(args, A, 0, 0, 0), F)
    for i in range(-(-count // LANES) * LANES):
        at = offset + (i // LANES) * states * pitch + i % LANES
        for n in range(states):
            value = F(0)
            if i < count:
                value = rates[(first + i) * states + n] * F(LOG2E)
            buffer[at + n * pitch] = value


@inner
def load_state(args, which, batch, first, count, channels, states, base, offset, pitch, F):
    """Stage `count` channels of a (b, e, n) tensor as (group, states, LANES), states `pitch` apart;
    or zeros."""
    buffer = pointer(base, F)
    for i in range(-(-count // LANES) * states):
        store(buffer, offset + i * pitch, zeros(F))
    if not given(args, which):
        return
    source = pointer(place(args, which, 0, 0, 0), F)
    for i in range(count):
        at = offset + (i // LANES) * states * pitch + i % LANES
        row = ((batch * channels) + first + i) * states
        for n in range(states):
            buffer[at + n * pitch] = source[row + n]


@inner
def save_state(args, which, batch, first, count, channels, states, base, offset, pitch, F):
    """Write what `load_state` staged to `count` channels of a (b, e, n) tensor, where it is
    wanted."""
    if not given(args, which):
        return
    buffer, target = pointer(base, F), pointer(place(args, which, 0, 0, 0), F)
    for i in range(count):
        at = offset + (i // LANES) * states * pitch + i % LANES
        row = ((batch * channels) + first + i) * states
        for n in range(states):
            target[row + n] = buffer[at + n * pitch]


@inline
def starts_document(args, batch, step):
    """Whether `step` belongs to another document than the step before it."""
    if step == 0 or not given(args, SEQ):
        return False
    now = pointer(place(args, SEQ, batch, step, 0), int)
    before = pointer(place(args, SEQ, batch, step - 1, 0), int)
    return now[0] != before[0]


def build_forward(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def selective_scan_forward(args):
        stamp  # noqa: B018
        batch_size, length, channels = args[BATCH], args[LENGTH], args[CHANNELS]
        states, soft = args[STATES], args[SOFTPLUS] != 0
        blocks = (channels + args[BLOCK] - 1) // args[BLOCK]
        all_groups = (channels + LANES - 1) // LANES
        columns = (states + LANES - 1) // LANES * LANES

        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        rate = LANES
        state = rate + LANES
        pitch = 2 * LANES
        bias = rate + 2 * WIDTH * states
        skip = bias + WIDTH
        step_size = skip + WIDTH
        xs = step_size + TILE * WIDTH + PAD
        ys = xs + TILE * WIDTH + PAD
        b_rows = ys + TILE * WIDTH + PAD
        c_rows = b_rows + TILE * columns

        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= batch_size * blocks:
                break
            batch, first = task // blocks, (task % blocks) * args[BLOCK]
            count = min(args[BLOCK], channels - first)
            groups = (count + LANES - 1) // LANES
            load_rates(args, first, count, states, base, rate, pitch, F)
            load_state(args, STATE, batch, first, count, channels, states, base, state, pitch, F)
            for j in range(2 * GROUPS):
                store(w, bias + j * LANES, zeros(F))
            if given(args, BIAS):
                stage(args, BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
            if given(args, D):
                stage(args, D, 0, 0, 1, first, count, base, skip, WIDTH, F)

            for start in range(0, length, TILE):
                rows = min(TILE, length - start)
                if start % CHUNK == 0 and start > 0 and given(args, STARTS):
                    at = (start // CHUNK - 1) * all_groups + first // LANES
                    saved = pointer(place(args, STARTS, batch, 0, 0), F)
                    for i in range(groups * states):
                        value = load(w, state + i * pitch)
                        store(saved, (at * states + i) * LANES, value)

                stage(args, X, batch, start, rows, first, count, base, xs, WIDTH, F)
                stage(args, DT, batch, start, rows, first, count, base, step_size, WIDTH, F)
                stage(args, B, batch, start, rows, 0, states, base, b_rows, columns, F)
                stage(args, C, batch, start, rows, 0, states, base, c_rows, columns, F)
                for j in range(groups):
                    shift, through = load(w, bias + j * LANES), load(w, skip + j * LANES)
                    for at in range(j * LANES, rows * WIDTH, WIDTH):
                        dt = load(w, step_size + at) + shift
                        if soft:
                            dt = softplus(dt)
                        x = load(w, xs + at)
                        store(w, step_size + at, dt)
                        store(w, xs + at, dt * x)
                        store(w, ys + at, through * x)

                for j in range(groups):
                    for t in range(rows):
                        at = t * WIDTH + j * LANES
                        dt, dx, y = load(w, step_size + at), load(w, xs + at), load(w, ys + at)
                        if starts_document(args, batch, start + t):
                            for n in range(states):
                                store(w, state + (j * states + n) * pitch, zeros(F))
                        for n in range(states):
                            i = (j * states + n) * pitch
                            decay = exp2(dt * load(w, rate + i))
                            dh = dx * splat(w[b_rows + t * columns + n])
                            h = fma(decay, load(w, state + i), dh)
                            store(w, state + i, h)
                            y = fma(h, splat(w[c_rows + t * columns + n]), y)
                        store(w, ys + at, y)

                if given(args, Z):
                    stage(args, Z, batch, start, rows, first, count, base, xs, WIDTH, F)
                    for t in range(rows):
                        for at in range(t * WIDTH, t * WIDTH + groups * LANES, LANES):
                            store(w, ys + at, load(w, ys + at) * silu(load(w, xs + at)))
                unstage(args, Y, batch, start, rows, first, count, base, ys, WIDTH, F)
            save_state(args, LAST, batch, first, count, channels, states, base, state, pitch, F)

    return selective_scan_forward
