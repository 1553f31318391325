"""The forward kernel of the selective scan.

A task is one batch row and one block of up to WIDTH channels, from the first step to the last; TILE
steps of LANES channels are staged at a time, as one record for each step. Two states of HALF
channels then go through these steps together: they stay in registers, and only the sum over states
is in memory. Their decays, most of the work, are taken before, since they do not wait for each
other. A step and state costs 14 operations on whole vectors, 11 of them for the decay.

What is read and written together lies side by side: a load waits for an earlier store whose address
differs by a multiple of 4096 bytes.
"""

from mambapy.ops.cpu.exp import LOG2E, exp2, exp2_within, silu, softplus
from mambapy.ops.cpu.memory import fetch_add, lanes_total, load, load_narrow, pointer, store
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
    where_greater,
    zeros,
)

WIDTH = 128
GROUPS = WIDTH // LANES
TILE = 32
# Steps from one saved state to the next; a multiple of TILE.
CHUNK = 64

BATCH, LENGTH, CHANNELS, STATES, SOFTPLUS, BLOCK = range(SIZES, SIZES + 6)
X, DT, A, B, C, D, Z, BIAS, STATE, SEQ, Y, STARTS, LAST = range(13)
# What has a row for each step. The states have none: they stand in the order of processing.
STEPWISE = (X, DT, B, C, Z, SEQ, Y)


def whole_vectors(count: int) -> int:
    """`count` rounded up to a multiple of LANES."""
    return -(-count // LANES) * LANES


# What a step of LANES channels has at hand: dt; dt x; the sum over states that y is.
STEP, DRIVE, OUT = range(0, 3 * LANES, LANES)
RECORD = 3 * LANES
# From one state to the next: rate, state.
PITCH = 2 * LANES


def forward_floats(states: int) -> int:
    """Numbers of scratch that a worker needs."""
    return (
        LANES
        + WIDTH * (2 * even(states) + 2)
        + TILE * (RECORD + 2 * HALF + 1)
        + 2 * TILE * whole_vectors(states)
        + LANES
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


@inline
def prepare(args, w, steps, rows, shift, through, longest):
    """Fill the records of LANES channels, whose dt and x (in DRIVE) have been staged.

    Returns whether |dt| < `longest` throughout.
    """
    soft = args[SOFTPLUS] != 0
    longer = like(shift, 0.0)
    for at in range(steps, steps + rows * RECORD, RECORD):
        dt, x = load(w, at + STEP) + shift, load(w, at + DRIVE)
        if soft:
            dt = softplus(dt)
        longer = where_greater(longest, largest(dt, like(dt, 0.0) - dt), longer, like(dt, 1.0))
        store(w, at + STEP, dt)
        store(w, at + DRIVE, dt * x)
        store(w, at + OUT, through * x)
    return lanes_total(longer) == 0


@inline
def advance(w, steps, rows, rate, b_column, c_column, columns, cuts, decays, within):
    """Take two states of HALF channels, which stand behind their rates, through the steps, and add
    them to y."""
    a0, a1 = load_narrow(w, rate), load_narrow(w, rate + PITCH)
    take_decays(w, steps + STEP, RECORD, rows, a0, a1, cuts, decays, 2 * HALF, within)
    state = rate + LANES
    h0, h1 = load_narrow(w, state), load_narrow(w, state + PITCH)
    for t in range(rows):
        at, i = steps + t * RECORD, decays + t * 2 * HALF
        b, c = b_column + t * columns, c_column + t * columns
        dx = load_narrow(w, at + DRIVE)
        if w[cuts + t] != 0:
            h0, h1 = like(dx, 0.0), like(dx, 0.0)
        h0 = fma(load_narrow(w, i), h0, dx * like(dx, w[b]))
        h1 = fma(load_narrow(w, i + HALF), h1, dx * like(dx, w[b + 1]))
        y = fma(h0, like(dx, w[c]), load_narrow(w, at + OUT))
        store(w, at + OUT, fma(h1, like(dx, w[c + 1]), y))
    store(w, state, h0)
    store(w, state + PITCH, h1)


def build_forward(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def selective_scan_forward(args):
        stamp  # noqa: B018
        batch_size, length, channels = args[BATCH], args[LENGTH], args[CHANNELS]
        states = args[STATES]
        blocks = (channels + args[BLOCK] - 1) // args[BLOCK]
        all_groups = (channels + LANES - 1) // LANES
        columns = (states + LANES - 1) // LANES * LANES
        # States go in pairs; where their number is odd, the last is 0 and stays 0.
        paired = states + states % 2

        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        rate = LANES
        state = rate + LANES
        bias = rate + 2 * WIDTH * paired
        skip = bias + WIDTH
        steps = skip + WIDTH
        decays = steps + TILE * RECORD
        b_rows = decays + TILE * 2 * HALF
        c_rows = b_rows + TILE * columns
        cuts = c_rows + TILE * columns

        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= batch_size * blocks:
                break
            batch, first = task // blocks, (task % blocks) * args[BLOCK]
            count = min(args[BLOCK], channels - first)
            groups = (count + LANES - 1) // LANES
            load_rates(args, first, count, states, base, rate, PITCH, F)
            load_state(args, STATE, batch, first, count, channels, states, base, state, PITCH, F)
            for j in range(2 * GROUPS):
                store(w, bias + j * LANES, zeros(F))
            if given(args, BIAS):
                stage(args, BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
            if given(args, D):
                stage(args, D, 0, 0, 1, first, count, base, skip, WIDTH, F)

            for start in range(0, length, TILE):
                rows = min(TILE, length - start)
                saves = start % CHUNK == 0 and start > 0 and given(args, STARTS)
                stage(args, B, batch, start, rows, 0, states, base, b_rows, columns, F)
                stage(args, C, batch, start, rows, 0, states, base, c_rows, columns, F)
                whole = read_cuts(args, batch, start, rows, w, cuts, F)
                for j in range(groups):
                    here, column = j * paired * PITCH, first + j * LANES
                    left = min(LANES, count - j * LANES)
                    if saves:
                        at = (start // CHUNK - 1) * all_groups + column // LANES
                        saved = pointer(place(args, STARTS, batch, 0, 0), F)
                        for n in range(states):
                            value = load(w, state + here + n * PITCH)
                            store(saved, (at * states + n) * LANES, value)
                    for which, into in ((DT, STEP), (X, DRIVE)):
                        stage(
                            args, which, batch, start, rows, column, left, base, steps + into,
                            RECORD, F,
                        )  # fmt: skip
                    shift, through = load(w, bias + j * LANES), load(w, skip + j * LANES)
                    longest = longest_steps(w, rate + here, states, PITCH, F)
                    within = prepare(args, w, steps, rows, shift, through, longest) and whole
                    for half in (0, HALF):
                        for n in range(0, states, 2):
                            advance(
                                w, steps + half, rows, rate + here + n * PITCH + half, b_rows + n,
                                c_rows + n, columns, cuts, decays, within,
                            )  # fmt: skip
                    if given(args, Z):
                        stage(
                            args, Z, batch, start, rows, column, left, base, steps + DRIVE,
                            RECORD, F,
                        )  # fmt: skip
                        for at in range(steps, steps + rows * RECORD, RECORD):
                            store(w, at + OUT, load(w, at + OUT) * silu(load(w, at + DRIVE)))
                    unstage(
                        args, Y, batch, start, rows, column, left, base, steps + OUT, RECORD, F
                    )  # fmt: skip
            save_state(args, LAST, batch, first, count, channels, states, base, state, PITCH, F)

    return selective_scan_forward
