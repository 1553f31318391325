"""The backward kernel of the selective scan: states again from the saved ones, then the adjoint
recurrence.

With u_t = exp(dt_t A) h_{t-1}, so that h_t = u_t + dt_t B_t x_t, g_t the gradient of h_t, and gy
that of C h + D x, which is grad_y * silu(z):

    g_t = C_t gy_t + exp(dt_{t+1} A) g_{t+1}
    grad C_t = sum_e gy_t h_t           grad B_t = sum_e g_t dt_t x_t
    grad A = sum_t g_t u_t dt_t         grad dt_t = sum_n g_t (u_t A + B_t x_t)
    grad x_t = D gy_t + dt_t sum_n g_t B_t

Only u_t and the decays of one chunk, two states and HALF channels are kept; where a document starts
both are 0, and nothing flows across. Within a chunk adjoints stay in registers. A task is one batch
row and one block of channels, from the last chunk to the first. The sums over channels (B, C) leave
one part for each block, those over batch (A, D, dt_bias) one for each row; the caller adds the
parts.
"""

from mambapy.ops.cpu.exp import LN2, silu_and_slope, softplus_and_slope
from mambapy.ops.cpu.memory import (
    accumulate,
    fetch_add,
    lanes_total,
    load,
    load_narrow,
    pointer,
    store,
    total,
)
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
from mambapy.ops.cpu.scan_forward import (
    CHUNK,
    GROUPS,
    WIDTH,
    even,
    load_rates,
    load_state,
    longest_steps,
    read_cuts,
    save_state,
    take_decays,
    whole_vectors,
)
from mambapy.ops.cpu.simd import (
    FOLDED,
    HALF,
    LANES,
    fma,
    inline,
    largest,
    like,
    where_greater,
    zeros,
)

BATCH, LENGTH, CHANNELS, STATES, SOFTPLUS, BLOCK = range(SIZES, SIZES + 6)
X, DT, A, B, C, D, Z, BIAS, STATE, SEQ, STARTS, GRAD_Y, GRAD_LAST = range(13)
GRAD_X, GRAD_DT, GRAD_A, GRAD_B, GRAD_C, GRAD_D, GRAD_Z, GRAD_BIAS, GRAD_STATE = range(13, 22)
# What has a row for each step.
STEPWISE = (X, DT, B, C, Z, SEQ, GRAD_Y, GRAD_X, GRAD_DT, GRAD_B, GRAD_C, GRAD_Z)


# What a step of LANES channels has at hand: dt; dt x; the gradient of C h + D x; three sums over
# states; x; dt's slope; what silu(z) is to z, times grad_y.
STEP, DRIVE, GRAD, INTO_DT, INTO_X, OUT, INPUT, SLOPE, GATE = range(0, 9 * LANES, LANES)
RECORD = 9 * LANES
# Decays and u of two states of HALF channels.
KEPT = 4 * HALF
# From one state to the next: rate, adjoint, gradient of A, state.
PITCH = 4 * LANES


def backward_floats(states: int) -> int:
    """Numbers of scratch that a worker needs."""
    return (
        LANES
        + WIDTH * (4 * even(states) + 4)
        + CHUNK * (RECORD + KEPT + 1)
        + 2 * CHUNK * whole_vectors(states)
        + 2 * CHUNK * even(states) * FOLDED
        + LANES
    )


@inline
def prepare(args, w, steps, rows, shift, through, longest, F):
    """Fill the records of LANES channels, whose x, dt, grad_y and z have been staged.

    Returns whether |dt| < `longest` throughout.
    """
    soft, gated = args[SOFTPLUS] != 0, given(args, Z)
    longer = zeros(F)
    for at in range(steps, steps + rows * RECORD, RECORD):
        dt, x, grad = load(w, at + STEP) + shift, load(w, at + INPUT), load(w, at + GRAD)
        slope = like(dt, 1.0)
        if soft:
            dt, slope = softplus_and_slope(dt)
        if gated:
            out, gate_slope = silu_and_slope(load(w, at + GATE))
            store(w, at + GATE, grad * gate_slope)
            store(w, at + GRAD, grad * out)
        longer = where_greater(longest, largest(dt, like(dt, 0.0) - dt), longer, like(dt, 1.0))
        store(w, at + STEP, dt)
        store(w, at + SLOPE, slope)
        store(w, at + DRIVE, dt * x)
        store(w, at + OUT, through * x)
        store(w, at + INTO_DT, zeros(F))
        store(w, at + INTO_X, zeros(F))
    return lanes_total(longer) == 0


@inline
def replay(w, steps, rows, rate, state, b_column, columns, cuts, kept, within):
    """Keep the decay and u_t of two states of HALF channels for each step."""
    a0, a1 = load_narrow(w, rate), load_narrow(w, rate + PITCH)
    take_decays(w, steps + STEP, RECORD, rows, a0, a1, cuts, kept, KEPT, within)
    h0, h1 = load_narrow(w, state), load_narrow(w, state + PITCH)
    for t in range(rows):
        b, i = b_column + t * columns, kept + t * KEPT
        dx = load_narrow(w, steps + t * RECORD + DRIVE)
        if w[cuts + t] != 0:
            h0, h1 = like(dx, 0.0), like(dx, 0.0)
        u0, u1 = load_narrow(w, i) * h0, load_narrow(w, i + HALF) * h1
        store(w, i + 2 * HALF, u0)
        store(w, i + 3 * HALF, u1)
        h0, h1 = fma(dx, like(dx, w[b]), u0), fma(dx, like(dx, w[b + 1]), u1)


@inline
def adjoin(w, steps, rows, rate, adjoint, grad_a, b_column, c_column, columns, kept, sums):
    """Take the adjoints of two states of HALF channels from the last step to the first, and add to
    every sum."""
    a0, a1 = load_narrow(w, rate), load_narrow(w, rate + PITCH)
    adjoint0, adjoint1 = load_narrow(w, adjoint), load_narrow(w, adjoint + PITCH)
    grad_a0, grad_a1 = load_narrow(w, grad_a), load_narrow(w, grad_a + PITCH)
    for t in range(rows - 1, -1, -1):
        at, i, sum_c = steps + t * RECORD, kept + t * KEPT, sums + t * 4 * FOLDED
        sum_b = sum_c + 2 * FOLDED
        b, c = b_column + t * columns, c_column + t * columns
        dx, grad = load_narrow(w, at + DRIVE), load_narrow(w, at + GRAD)
        b0, b1, c0, c1 = like(dx, w[b]), like(dx, w[b + 1]), like(dx, w[c]), like(dx, w[c + 1])
        g0, g1 = fma(grad, c0, adjoint0), fma(grad, c1, adjoint1)
        store(w, at + INTO_X, fma(g1, b1, fma(g0, b0, load_narrow(w, at + INTO_X))))
        accumulate(w, sum_b, g0, dx)
        accumulate(w, sum_b + FOLDED, g1, dx)
        adjoint0, adjoint1 = g0 * load_narrow(w, i), g1 * load_narrow(w, i + HALF)
        u0, u1 = load_narrow(w, i + 2 * HALF), load_narrow(w, i + 3 * HALF)
        h0, h1 = fma(dx, b0, u0), fma(dx, b1, u1)
        store(w, at + OUT, fma(c1, h1, fma(c0, h0, load_narrow(w, at + OUT))))
        accumulate(w, sum_c, grad, h0)
        accumulate(w, sum_c + FOLDED, grad, h1)
        gu0, gu1 = g0 * u0, g1 * u1
        store(w, at + INTO_DT, fma(gu1, a1, fma(gu0, a0, load_narrow(w, at + INTO_DT))))
        dt = load_narrow(w, at + STEP)
        grad_a0, grad_a1 = fma(gu0, dt, grad_a0), fma(gu1, dt, grad_a1)
    store(w, adjoint, adjoint0)
    store(w, adjoint + PITCH, adjoint1)
    store(w, grad_a, grad_a0)
    store(w, grad_a + PITCH, grad_a1)


@inline
def conclude(w, steps, rows, through, sum_d, sum_bias):
    """Turn the sums over states into the gradients of dt (SLOPE), x (INPUT) and z (GATE)."""
    for at in range(steps, steps + rows * RECORD, RECORD):
        x, grad, into_x = load(w, at + INPUT), load(w, at + GRAD), load(w, at + INTO_X)
        into_dt = load(w, at + INTO_DT) * like(x, LN2)
        grad_dt = fma(into_x, x, into_dt) * load(w, at + SLOPE)
        sum_bias = sum_bias + grad_dt
        sum_d = fma(grad, x, sum_d)
        store(w, at + SLOPE, grad_dt)
        store(w, at + INPUT, fma(into_x, load(w, at + STEP), grad * through))
        store(w, at + GATE, load(w, at + GATE) * load(w, at + OUT))
    return sum_d, sum_bias


def build_backward(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def selective_scan_backward(args):
        stamp  # noqa: B018
        batch_size, length, channels = args[BATCH], args[LENGTH], args[CHANNELS]
        states = args[STATES]
        # States go in pairs; where their number is odd, the last is 0 and stays 0.
        paired = states + states % 2
        blocks = (channels + args[BLOCK] - 1) // args[BLOCK]
        all_groups = (channels + LANES - 1) // LANES
        chunks = (length + CHUNK - 1) // CHUNK
        columns = (states + LANES - 1) // LANES * LANES
        gated = given(args, Z)

        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        # Of the whole block, for all steps: rates, gradients of the state and of A, state (group,
        # states, LANES).
        rate = LANES
        adjoint = rate + LANES
        grad_a = adjoint + LANES
        state = grad_a + LANES
        bias = rate + 4 * WIDTH * paired
        skip = bias + WIDTH
        grad_d = skip + WIDTH
        grad_bias = grad_d + WIDTH
        # Of the chunk: records, u and decay of one state, sums over channels (states, steps, 2
        # FOLDED), B and C.
        steps = grad_bias + WIDTH
        kept = steps + CHUNK * RECORD
        sums = kept + CHUNK * KEPT
        b_rows = sums + 2 * CHUNK * paired * FOLDED
        c_rows = b_rows + CHUNK * columns
        cuts = c_rows + CHUNK * columns

        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= batch_size * blocks:
                break
            batch, block = task // blocks, task % blocks
            first = block * args[BLOCK]
            count = min(args[BLOCK], channels - first)
            groups = (count + LANES - 1) // LANES
            load_rates(args, first, count, states, base, rate, PITCH, F)
            load_state(
                args, GRAD_LAST, batch, first, count, channels, states, base, adjoint, PITCH, F
            )
            for i in range(0, GROUPS * paired * PITCH, PITCH):
                store(w, grad_a + i, zeros(F))
                store(w, state + i, zeros(F))
            for j in range(4 * GROUPS):
                store(w, bias + j * LANES, zeros(F))
            if given(args, BIAS):
                stage(args, BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
            if given(args, D):
                stage(args, D, 0, 0, 1, first, count, base, skip, WIDTH, F)

            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                rows = min(CHUNK, length - start)
                stage(args, B, batch, start, rows, 0, states, base, b_rows, columns, F)
                stage(args, C, batch, start, rows, 0, states, base, c_rows, columns, F)
                whole = read_cuts(args, batch, start, rows, w, cuts, F)
                for i in range(sums, sums + 2 * CHUNK * paired * FOLDED, LANES):
                    store(w, i, zeros(F))

                for j in range(groups):
                    here, column = j * paired * PITCH, first + j * LANES
                    left = min(LANES, count - j * LANES)
                    if chunk > 0:
                        at = (chunk - 1) * all_groups + column // LANES
                        saved = pointer(place(args, STARTS, batch, 0, 0), F)
                        for n in range(states):
                            value = load(saved, (at * states + n) * LANES)
                            store(w, state + here + n * PITCH, value)
                    else:
                        load_state(
                            args, STATE, batch, column, left, channels, states, base, state + here,
                            PITCH, F,
                        )  # fmt: skip
                    for which, into in ((X, INPUT), (DT, STEP), (GRAD_Y, GRAD), (Z, GATE)):
                        if which != Z or gated:
                            stage(
                                args, which, batch, start, rows, column, left, base, steps + into,
                                RECORD, F,
                            )  # fmt: skip
                    through = load(w, skip + j * LANES)
                    longest = longest_steps(w, rate + here, states, PITCH, F)
                    shift = load(w, bias + j * LANES)
                    within = prepare(args, w, steps, rows, shift, through, longest, F) and whole
                    for half in (0, HALF):
                        for n in range(0, states, 2):
                            k = here + n * PITCH + half
                            replay(
                                w, steps + half, rows, rate + k, state + k, b_rows + n, columns,
                                cuts, kept, within,
                            )  # fmt: skip
                            adjoin(
                                w, steps + half, rows, rate + k, adjoint + k, grad_a + k,
                                b_rows + n, c_rows + n, columns, kept,
                                sums + 2 * n * CHUNK * FOLDED + half // 2,
                            )  # fmt: skip
                    sum_d, sum_bias = conclude(
                        w, steps, rows, through,
                        load(w, grad_d + j * LANES), load(w, grad_bias + j * LANES),
                    )  # fmt: skip
                    store(w, grad_d + j * LANES, sum_d)
                    store(w, grad_bias + j * LANES, sum_bias)
                    for which, out in ((GRAD_X, INPUT), (GRAD_DT, SLOPE), (GRAD_Z, GATE)):
                        if which != GRAD_Z or gated:
                            unstage(
                                args, which, batch, start, rows, column, left, base, steps + out,
                                RECORD, F,
                            )  # fmt: skip

                part = block * batch_size + batch
                for t in range(rows):
                    b_part = pointer(place(args, GRAD_B, part, start + t, 0), F)
                    c_part = pointer(place(args, GRAD_C, part, start + t, 0), F)
                    for n in range(states):
                        i = sums + ((n // 2 * CHUNK + t) * 4 + n % 2) * FOLDED
                        c_part[n] = total(w, i)
                        b_part[n] = total(w, i + 2 * FOLDED)

            save_state(
                args, GRAD_STATE, batch, first, count, channels, states, base, adjoint, PITCH, F
            )
            save_state(args, GRAD_A, batch, first, count, channels, states, base, grad_a, PITCH, F)
            if given(args, GRAD_D):
                unstage(args, GRAD_D, batch, 0, 1, first, count, base, grad_d, WIDTH, F)
            if given(args, GRAD_BIAS):
                unstage(args, GRAD_BIAS, batch, 0, 1, first, count, base, grad_bias, WIDTH, F)

    return selective_scan_backward
