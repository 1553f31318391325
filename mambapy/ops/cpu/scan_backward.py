"""The backward kernel of the selective scan: states again from the saved ones, then the adjoint
recurrence.

With u_t = exp(dt_t A) h_{t-1}, so that h_t = u_t + dt_t B_t x_t, and g_t the gradient of h_t:
    g_t = C_t gy_t + exp(dt_{t+1} A) g_{t+1}        (gy: gradient of C h + D x, that is grad_y *
    silu(z)) grad C_t = sum_e gy_t h_t        grad B_t = sum_e g_t dt_t x_t        grad A = sum_t
    g_t u_t dt_t grad dt_t = sum_n g_t (u_t A + B_t x_t)        grad x_t = D gy_t + dt_t sum_n g_t
    B_t
So only u_t and the decay of one chunk and LANES channels are kept; where a document starts both are
0, and nothing flows across. A task is one batch row and one block of channels, from the last chunk
to the first. The sums over channels (B, C) leave one part for each block, those over batch (A, D,
dt_bias) one for each row; the caller adds the parts.
"""

from mambapy.ops.cpu.exp import LN2, exp2, silu_and_slope, softplus_and_slope
from mambapy.ops.cpu.memory import accumulate, fetch_add, load, pointer, store, total
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
    PAD,
    WIDTH,
    load_rates,
    load_state,
    save_state,
    starts_document,
    whole_vectors,
)
from mambapy.ops.cpu.simd import FOLDED, LANES, fma, like, splat, zeros

BATCH, LENGTH, CHANNELS, STATES, SOFTPLUS, BLOCK = range(SIZES, SIZES + 6)
X, DT, A, B, C, D, Z, BIAS, STATE, SEQ, STARTS, GRAD_Y, GRAD_LAST = range(13)
GRAD_X, GRAD_DT, GRAD_A, GRAD_B, GRAD_C, GRAD_D, GRAD_Z, GRAD_BIAS, GRAD_STATE = range(13, 22)
# What has a row for each step.
STEPWISE = (X, DT, B, C, Z, SEQ, GRAD_Y, GRAD_X, GRAD_DT, GRAD_B, GRAD_C, GRAD_Z)


def backward_floats(states: int) -> int:
    """Numbers of scratch that a worker needs."""
    return (
        LANES
        + WIDTH * (4 * states + 4 + 6 * CHUNK)
        + 6 * PAD
        + 2 * CHUNK * whole_vectors(states)
        + 2 * CHUNK * states * LANES
        + 2 * CHUNK * states * FOLDED
    )


def build_backward(F, size, stamp):
    """The kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def selective_scan_backward(args):
        stamp  # noqa: B018
        batch_size, length, channels = args[BATCH], args[LENGTH], args[CHANNELS]
        states, soft = args[STATES], args[SOFTPLUS] != 0
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
        pitch = 4 * LANES
        bias = rate + 4 * WIDTH * states
        skip = bias + WIDTH
        grad_d = skip + WIDTH
        grad_bias = grad_d + WIDTH
        # Of the chunk (steps, channels).
        xs = grad_bias + WIDTH
        step_size = xs + CHUNK * WIDTH + PAD
        slope = step_size + CHUNK * WIDTH + PAD
        gy = slope + CHUNK * WIDTH + PAD
        gz = gy + CHUNK * WIDTH + PAD
        gx = gz + CHUNK * WIDTH + PAD
        b_rows = gx + CHUNK * WIDTH + PAD
        c_rows = b_rows + CHUNK * columns
        # Of one group of LANES channels (steps, states, LANES), and sums over channels (steps,
        # states, FOLDED).
        carried = c_rows + CHUNK * columns
        decays = carried + LANES
        grad_b = carried + 2 * CHUNK * states * LANES
        grad_c = grad_b + FOLDED

        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= batch_size * blocks:
                break
            batch, block = task // blocks, task % blocks
            first = block * args[BLOCK]
            count = min(args[BLOCK], channels - first)
            groups = (count + LANES - 1) // LANES
            load_rates(args, first, count, states, base, rate, pitch, F)
            load_state(
                args, GRAD_LAST, batch, first, count, channels, states, base, adjoint, pitch, F
            )
            for i in range(GROUPS * states):
                store(w, grad_a + i * pitch, zeros(F))
            for j in range(4 * GROUPS):
                store(w, bias + j * LANES, zeros(F))
            if given(args, BIAS):
                stage(args, BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
            if given(args, D):
                stage(args, D, 0, 0, 1, first, count, base, skip, WIDTH, F)

            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                rows = min(CHUNK, length - start)
                stage(args, X, batch, start, rows, first, count, base, xs, WIDTH, F)
                stage(args, DT, batch, start, rows, first, count, base, step_size, WIDTH, F)
                stage(args, GRAD_Y, batch, start, rows, first, count, base, gy, WIDTH, F)
                stage(args, B, batch, start, rows, 0, states, base, b_rows, columns, F)
                stage(args, C, batch, start, rows, 0, states, base, c_rows, columns, F)
                if gated:
                    stage(args, Z, batch, start, rows, first, count, base, gz, WIDTH, F)
                for j in range(groups):
                    shift = load(w, bias + j * LANES)
                    for at in range(j * LANES, rows * WIDTH, WIDTH):
                        dt = load(w, step_size + at) + shift
                        one = like(dt, 1.0)
                        if soft:
                            dt, one = softplus_and_slope(dt)
                        store(w, step_size + at, dt)
                        store(w, slope + at, one)
                        if gated:
                            out, gate_slope = silu_and_slope(load(w, gz + at))
                            grad = load(w, gy + at)
                            store(w, gy + at, grad * out)
                            store(w, gz + at, grad * gate_slope)
                for i in range(grad_b, grad_b + 2 * rows * states * FOLDED, LANES):
                    store(w, i, zeros(F))

                for j in range(groups):
                    here = j * states * pitch
                    if chunk > 0:
                        at = (chunk - 1) * all_groups + first // LANES + j
                        saved = pointer(place(args, STARTS, batch, 0, 0), F)
                        for n in range(states):
                            value = load(saved, (at * states + n) * LANES)
                            store(w, state + here + n * pitch, value)
                    else:
                        left, into = min(LANES, count - j * LANES), state + here
                        load_state(
                            args,
                            STATE,
                            batch,
                            first + j * LANES,
                            left,
                            channels,
                            states,
                            base,
                            into,
                            pitch,
                            F,
                        )
                    for t in range(rows):
                        at = t * WIDTH + j * LANES
                        dt = load(w, step_size + at)
                        dx = dt * load(w, xs + at)
                        keep = like(dt, 1.0)
                        if starts_document(args, batch, start + t):
                            keep = like(dt, 0.0)
                            for n in range(states):
                                store(w, state + here + n * pitch, zeros(F))
                        for n in range(states):
                            i, k = (t * states + n) * 2 * LANES, here + n * pitch
                            decay = keep * exp2(dt * load(w, rate + k))
                            u = decay * load(w, state + k)
                            h = fma(dx, splat(w[b_rows + t * columns + n]), u)
                            store(w, state + k, h)
                            store(w, carried + i, u)
                            store(w, decays + i, decay)

                    through = load(w, skip + j * LANES)
                    sum_d, sum_bias = load(w, grad_d + j * LANES), load(w, grad_bias + j * LANES)
                    for t in range(rows - 1, -1, -1):
                        at = t * WIDTH + j * LANES
                        dt, x, grad = load(w, step_size + at), load(w, xs + at), load(w, gy + at)
                        dx = dt * x
                        into_x, into_dt, y = like(dt, 0.0), like(dt, 0.0), through * x
                        for n in range(states):
                            i, k = (t * states + n) * 2 * LANES, here + n * pitch
                            b, c = (
                                splat(w[b_rows + t * columns + n]),
                                splat(w[c_rows + t * columns + n]),
                            )
                            u = load(w, carried + i)
                            h = fma(dx, b, u)
                            g = fma(grad, c, load(w, adjoint + k))
                            store(w, adjoint + k, g * load(w, decays + i))
                            accumulate(w, grad_c + (t * states + n) * 2 * FOLDED, grad, h)
                            accumulate(w, grad_b + (t * states + n) * 2 * FOLDED, g, dx)
                            gu = g * u
                            store(w, grad_a + k, fma(gu, dt, load(w, grad_a + k)))
                            into_dt = fma(gu, load(w, rate + k), into_dt)
                            into_x = fma(g, b, into_x)
                            y = fma(c, h, y)
                        grad_dt = fma(into_x, x, into_dt * like(dt, LN2)) * load(w, slope + at)
                        sum_bias = sum_bias + grad_dt
                        sum_d = fma(grad, x, sum_d)
                        store(w, slope + at, grad_dt)
                        store(w, gx + at, fma(into_x, dt, grad * through))
                        if gated:
                            store(w, gz + at, load(w, gz + at) * y)
                    store(w, grad_d + j * LANES, sum_d)
                    store(w, grad_bias + j * LANES, sum_bias)

                unstage(args, GRAD_X, batch, start, rows, first, count, base, gx, WIDTH, F)
                unstage(args, GRAD_DT, batch, start, rows, first, count, base, slope, WIDTH, F)
                if gated:
                    unstage(args, GRAD_Z, batch, start, rows, first, count, base, gz, WIDTH, F)
                part = block * batch_size + batch
                for t in range(rows):
                    b_part = pointer(place(args, GRAD_B, part, start + t, 0), F)
                    c_part = pointer(place(args, GRAD_C, part, start + t, 0), F)
                    for n in range(states):
                        i = (t * states + n) * 2 * FOLDED
                        b_part[n] = total(w, grad_b + i)
                        c_part[n] = total(w, grad_c + i)

            save_state(
                args, GRAD_STATE, batch, first, count, channels, states, base, adjoint, pitch, F
            )
            save_state(args, GRAD_A, batch, first, count, channels, states, base, grad_a, pitch, F)
            if given(args, GRAD_D):
                unstage(args, GRAD_D, batch, 0, 1, first, count, base, grad_d, WIDTH, F)
            if given(args, GRAD_BIAS):
                unstage(args, GRAD_BIAS, batch, 0, 1, first, count, base, grad_bias, WIDTH, F)

    return selective_scan_backward
