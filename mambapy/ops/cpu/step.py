"""One decoding step: the convolution of one token and the recurrence of one token.

Here a vector holds the states of one channel, as a tensor (b, e, n) has them, not one state of many
channels.
"""

import torch
from torch import Tensor

from mambapy.ops.cpu import scan_forward as scan
from mambapy.ops.cpu.conv1d import SILU, TAPS, X, Y, begin_task
from mambapy.ops.cpu.exp import LOG2E, exp2, silu, softplus
from mambapy.ops.cpu.memory import (
    accumulate,
    fetch_add,
    load,
    load_first,
    pointer,
    store,
    store_first,
    total,
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
    rowwise,
    stage,
    unstage,
)
from mambapy.ops.cpu.simd import LANES, fma, splat, zeros
from mambapy.ops.cpu.threads import arithmetic, compiled, run

WIDTH = 128
BATCH, CHANNELS, STATES, SOFTPLUS = SIZES, SIZES + 2, SIZES + 3, SIZES + 4
NEW_STATE = 6


def build_conv(F, size, stamp):
    """The convolution's kernel; slots and sizes as in `conv1d.py`, then the new state."""

    def conv1d_step(args):
        stamp  # noqa: B018
        channels, taps = args[CHANNELS], args[TAPS]
        blocks = (channels + WIDTH - 1) // WIDTH
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        weight = LANES
        bias = weight + taps * WIDTH
        xs = bias + WIDTH
        ys = xs + taps * WIDTH
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * blocks:
                break
            batch, first = task // blocks, (task % blocks) * WIDTH
            count = min(WIDTH, channels - first)
            begin_task(args, batch, first, count, taps, base, weight, bias, xs, F)
            now = xs + (taps - 1) * WIDTH
            stage(args, X, batch, 0, 1, first, count, base, now, WIDTH, F)
            for c in range(0, count, LANES):
                y = load(w, bias + c)
                for d in range(taps):
                    y = fma(load(w, weight + d * WIDTH + c), load(w, now - d * WIDTH + c), y)
                if args[SILU] != 0:
                    y = silu(y)
                store(w, ys + c, y)
            unstage(args, Y, batch, 0, 1, first, count, base, ys, WIDTH, F)
            if given(args, NEW_STATE):
                unstage(
                    args, NEW_STATE, batch, 0, taps - 1, first, count, base, xs + WIDTH, WIDTH, F
                )

    return conv1d_step


def build_scan(F, size, stamp):
    """The recurrence's kernel; slots and sizes as in `scan_forward.py`."""

    def selective_scan_step(args):
        stamp  # noqa: B018
        channels, states = args[CHANNELS], args[STATES]
        soft = args[SOFTPLUS] != 0
        columns = (states + LANES - 1) // LANES * LANES
        blocks = (channels + WIDTH - 1) // WIDTH
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        partial = LANES
        b_row = partial + LANES
        c_row = b_row + columns
        xs = c_row + columns
        step_size = xs + WIDTH
        bias = step_size + WIDTH
        skip = bias + WIDTH
        ys = skip + WIDTH
        rates = pointer(place(args, scan.A, 0, 0, 0), F)
        old, new = (
            pointer(place(args, scan.STATE, 0, 0, 0), F),
            pointer(place(args, scan.LAST, 0, 0, 0), F),
        )
        while True:
            task = fetch_add(args, NEXT_TASK)
            if task >= args[BATCH] * blocks:
                break
            batch, first = task // blocks, (task % blocks) * WIDTH
            count = min(WIDTH, channels - first)
            for i in range(bias, ys, LANES):
                store(w, i, zeros(F))
            if given(args, scan.BIAS):
                stage(args, scan.BIAS, 0, 0, 1, first, count, base, bias, WIDTH, F)
            if given(args, scan.D):
                stage(args, scan.D, 0, 0, 1, first, count, base, skip, WIDTH, F)
            stage(args, scan.X, batch, 0, 1, first, count, base, xs, WIDTH, F)
            stage(args, scan.DT, batch, 0, 1, first, count, base, step_size, WIDTH, F)
            stage(args, scan.B, batch, 0, 1, 0, states, base, b_row, columns, F)
            stage(args, scan.C, batch, 0, 1, 0, states, base, c_row, columns, F)
            for c in range(0, count, LANES):
                dt = load(w, step_size + c) + load(w, bias + c)
                if soft:
                    dt = softplus(dt)
                store(w, step_size + c, dt)
            for c in range(count):
                dt = w[step_size + c]
                rate, dx = splat(dt * F(LOG2E)), splat(dt * w[xs + c])
                at = first + c
                row = (batch * channels + at) * states
                store(w, partial, zeros(F))
                for n in range(0, states, LANES):
                    left = states - n
                    h = zeros(F)
                    if given(args, scan.STATE):
                        h = load_first(old, row + n, left)
                    h = h * exp2(rate * load_first(rates, at * states + n, left))
                    h = fma(dx, load(w, b_row + n), h)
                    store_first(new, row + n, h, left)
                    accumulate(w, partial, h, load(w, c_row + n))
                w[ys + c] = total(w, partial) + w[skip + c] * w[xs + c]
            if given(args, scan.Z):
                stage(args, scan.Z, batch, 0, 1, first, count, base, xs, WIDTH, F)
                for c in range(0, count, LANES):
                    store(w, ys + c, load(w, ys + c) * silu(load(w, xs + c)))
            unstage(args, scan.Y, batch, 0, 1, first, count, base, ys, WIDTH, F)

    return selective_scan_step


def conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: bool = False
) -> tuple[Tensor, Tensor]:
    """`conv1d.forward` for one token: x (b, e), state (b, k-1, e) -> y (b, e), new state (b, k-1,
    e)."""
    b, e = x.shape
    k = weight.shape[1]
    F = arithmetic(x.dtype)
    y = torch.empty(b, e, dtype=x.dtype)
    new = torch.empty(b, k - 1, e, dtype=state.dtype)
    old = None if k == 1 else rowwise(state.detach(), F)
    bias = None if bias is None else rowwise(bias.detach(), F)
    tensors = [rowwise(x.detach(), F), weight.detach().to(F).contiguous(), bias, old, None, y]
    args = pack([b, 1, e, k, activation], [*tensors, None if k == 1 else new])
    scratch = (LANES + (2 * k + 2) * WIDTH) * F.itemsize
    run(compiled(build_conv, F), args, b * -(-e // WIDTH), scratch, threads=_threads(b * e * k))
    return y, new


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan.forward` for one token.

    Args:
        x, dt, z: (b, e).    B, C: (b, n).    The rest as there.

    Returns:
        y (b, e) and a new state (b, e, n); `state` is not changed.
    """
    b, e = x.shape
    n = A.shape[1]
    F = arithmetic(x.dtype)
    y = torch.empty(b, e, dtype=x.dtype)
    new = torch.empty(b, e, n, dtype=F)
    A, state = [None if t is None else t.detach().to(F).contiguous() for t in (A, state)]
    rows = [None if t is None else rowwise(t.detach(), F) for t in (x, dt, B, C, D, z, dt_bias)]
    x, dt, B, C, D, z, dt_bias = rows
    tensors = [x, dt, A, B, C, D, z, dt_bias, state, None, y, None, new]
    args = pack([b, 1, e, n, dt_softplus], tensors)
    scratch = (2 * LANES + 2 * (n + LANES) + 5 * WIDTH) * F.itemsize
    run(compiled(build_scan, F), args, b * -(-e // WIDTH), scratch, threads=_threads(b * e * n))
    return y, new


def _threads(work: int) -> int:
    """Threads worth waking for `work` multiplications: one for each 50 microseconds or so."""
    return max(1, work // 50_000)
