"""The forward kernel of the selective scan.

A task is one batch row and one block of up to WIDTH channels, from the first step to the last. Its
states stay in L1 as (group, states, LANES) for groups of LANES channels; steps are staged TILE at a
time. The inner loop has 16 operations on whole vectors per step, channel group and state, 13 of
them for the decay.

Buffers that are read and written together are interleaved, or apart by PAD: a load waits for an
earlier store whose address differs by a multiple of 4096 bytes, which cost 10 to 24 % of the time.
"""

from mambapy.ops.cpu.exp import LOG2E, exp2, exp2_within, silu, softplus
from mambapy.ops.cpu.memory import fetch_add, load, load_narrow, pointer, store
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
from mambapy.ops.cpu.simd import (
    HALF,
    LANES,
    fma,
    inline,
    inner,
    largest,
    like,
    splat,
    zeros,
)

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
    return (
        LANES
        + WIDTH * (2 * even(states) + 2 + 3 * TILE)
        + 3 * PAD
        + 2 * TILE * whole_vectors(states)
    )


def even(states: int) -> int:
    """Room for states in pairs: kernels take two at a time."""
    return states + states % 2


@inner
def load_rates(args, first, count, states, base, offset, pitch, F):
    """Stage A * log2(e) of `count` channels as (group, even states, LANES), states `pitch` apart; 0
    where missing."""
    buffer, rates = pointer(base, F), pointer(place(args, A, 0, 0, 0), F)
    paired = states + states % 2
    for i in range(-(-count // LANES) * LANES):
        at = offset + (i // LANES) * paired * pitch + i % LANES
        for n in range(paired):
            value = F(0)
            if i < count and n < states:
                value = rates[(first + i) * states + n] * F(LOG2E)
            buffer[at + n * pitch] = value


@inner
def load_state(args, which, batch, first, count, channels, states, base, offset, pitch, F):
    """Stage `count` channels of a (b, e, n) tensor as (group, even states, LANES), states `pitch`
    apart; or zeros."""
    buffer = pointer(base, F)
    paired = states + states % 2
    for i in range(-(-count // LANES) * paired):
        store(buffer, offset + i * pitch, zeros(F))
    if not given(args, which):
        return
    source = pointer(place(args, which, 0, 0, 0), F)
    for i in range(count):
        at = offset + (i // LANES) * paired * pitch + i % LANES
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
    paired = states + states % 2
    for i in range(count):
        at = offset + (i // LANES) * paired * pitch + i % LANES
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


# Decays between 2^-LIMIT and 2^LIMIT need no clamps.
LIMIT = 126.0


@inline
def longest_steps(w, rate, states, pitch, F):
    """The |dt| of each of LANES channels from which on some state's decay needs clamps."""
    most = zeros(F)
    for n in range(states):
        a = load(w, rate + n * pitch)
        most = largest(most, largest(a, like(a, 0.0) - a))
    return like(most, LIMIT) / most


@inline
def read_cuts(args, batch, start, rows, w, cuts, F):
    """What is added to the exponent of each step's decay: so little that it is 0 where a document
    starts. Returns whether none does."""
    whole = True
    for t in range(rows):
        w[cuts + t] = F(0)
        if starts_document(args, batch, start + t):
            w[cuts + t] = F(-1e30)
            whole = False
    return whole


@inline
def take_decays(w, steps, record, rows, a0, a1, cuts, decays, pitch, within):
    """The decays of two states of HALF channels: `pitch` from one step to the next.

    They come before the recurrence, as they do not wait for each other. Most tiles are `within`
    the range that needs no clamps, which are a seventh of the work.
    """
    if within:
        for t in range(rows):
            dt, i = load_narrow(w, steps + t * record), decays + t * pitch
            store(w, i, exp2_within(dt * a0))
            store(w, i + HALF, exp2_within(dt * a1))
    else:
        for t in range(rows):
            dt, i = load_narrow(w, steps + t * record), decays + t * pitch
            cut = like(dt, w[cuts + t])
            store(w, i, exp2(fma(dt, a0, cut)))
            store(w, i + HALF, exp2(fma(dt, a1, cut)))


def build_forward(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def selective_scan_forward(args):
        stamp  # noqa: B018
        batch_size, length, channels = args[BATCH], args[LENGTH], args[CHANNELS]
        states, soft = args[STATES], args[SOFTPLUS] != 0
        blocks = (channels + args[BLOCK] - 1) // args[BLOCK]
        all_groups = (channels + LANES - 1) // LANES
        columns = (states + LANES - 1) // LANES * LANES
        paired = states + states % 2

        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        rate = LANES
        state = rate + LANES
        pitch = 2 * LANES
        bias = rate + 2 * WIDTH * paired
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
                    for j in range(groups):
                        for n in range(states):
                            value = load(w, state + (j * paired + n) * pitch)
                            store(saved, ((at + j) * states + n) * LANES, value)

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
                                store(w, state + (j * paired + n) * pitch, zeros(F))
                        for n in range(states):
                            i = (j * paired + n) * pitch
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
