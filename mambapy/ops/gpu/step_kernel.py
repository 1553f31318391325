"""The kernels of `step.py`, one token for each row of a batch: a handful a layer.

    _embed    rows of the embedding
    _matvec   y (+)= W norm(x) for few rows: multiply and sum, W read once for all rows
    _matmul   the same for many rows, on the tensor cores
    _norm     a norm of its own, gated or in groups
    _conv     the convolution, and its share of the product behind it (x_proj)
    _scan     Mamba-1's recurrence, with the product that makes dt, inner norms, gate
    _ssd      Mamba-2's, with the gate

Activations are (b, width) rows, `pitch` numbers apart; all arithmetic is in float32. States are
changed in place: a program reads its part of one, waits for all its own threads, and writes it.

With PDL, a kernel starts while the one before it still runs: what no kernel writes (weights) can
be read at once, everything else only after `_wait`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for what the kernels before have written."""
    if PDL:
        gdc_wait()


@triton.jit
def _silu(x):
    return x / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last digits where it is small too."""
    t = tl.exp2(tl.minimum(x, 20.0) * LOG2E)
    u = 1 + t
    # What u lost of t, log(u) lost too, in proportion.
    exact = tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1))
    return tl.where(x > 20, x, tl.where(u == 1, t, exact))


@triton.jit
def _row(x, at, mask):
    """Some numbers as float32, 0 outside; everything, where there is no x, is 0."""
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _embed(tokens, table, scale, y, pitch, count, D: tl.constexpr, BLOCK: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """y = table[token], NaN where there is no such row."""
    _start(PDL)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    _wait(PDL)
    token = tl.load(tokens + row)
    known = (token >= 0) & (token < count)
    value = _row(table, token.to(tl.int64) * D + at, (at < D) & known)
    if scale is not None:
        value *= _row(scale, token, known)
    value = tl.where(known, value, float("nan"))
    tl.store(y + row * pitch + at, value, mask=at < D)


@triton.jit
def _put(total, y, at, n, mask, bias, scale, ADD: tl.constexpr):
    """Scale a product, add bias and residual, and write it."""
    inside = mask & (n >= 0)
    if scale is not None:
        total *= _row(scale, n, mask)
    if bias is not None:
        total += _row(bias, n, mask)
    if ADD:
        total += _row(y, at, inside)
    tl.store(y + at, total, mask=inside)


@triton.jit
def _matvec(x, x_pitch, w, bias, scale, norm, eps, y, y_pitch, out, rows,
            INNER: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """N outputs of y = W x, of all rows; with NORM, x is normalised on the way."""
    _start(PDL)
    b = tl.arange(0, B)[:, None, None]
    n = (tl.program_id(0) * N + tl.arange(0, N))[None, :, None]
    acc = tl.zeros((B, N, K), tl.float32)
    squares = tl.zeros((B, 1, K), tl.float32)
    for start in tl.static_range(0, INNER, K):
        k = start + tl.arange(0, K)[None, None, :]
        a = _row(w, n.to(tl.int64) * INNER + k, (n < out) & (k < INNER))
        if start == 0:
            _wait(PDL)
        v = _row(x, b * x_pitch + k, (b < rows) & (k < INNER))
        if NORM:
            squares += v * v
            if norm is not None:
                v *= _row(norm, k, k < INNER)
        acc += a * v
    total = tl.sum(acc, axis=2)  # (B, N)
    if NORM:
        total *= 1 / tl.sqrt_rn(tl.sum(squares, axis=2) / INNER + eps)
    b = tl.arange(0, B)[:, None]
    n = (tl.program_id(0) * N + tl.arange(0, N))[None, :]
    _put(total, y, b * y_pitch + n, n, (n < out) & (b < rows), bias, scale, ADD)


@triton.jit
def _matmul(x, x_pitch, w, bias, scale, norm, eps, y, y_pitch, out, rows,
            INNER: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, IN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """`_matvec` for B rows of many, in products of numbers of type IN."""
    _start(PDL)
    n = tl.program_id(0) * N + tl.arange(0, N)
    b = tl.program_id(1) * B + tl.arange(0, B)
    acc = tl.zeros((N, B), tl.float32)
    squares = tl.zeros((B,), tl.float32)
    _wait(PDL)
    for start in range(0, INNER, K):
        k = start + tl.arange(0, K)
        at = n.to(tl.int64)[:, None] * INNER + k[None, :]
        a = tl.load(w + at, mask=(n < out)[:, None] & (k < INNER)[None, :], other=0.0)
        v = tl.load(x + b[None, :] * x_pitch + k[:, None],
                    mask=(b < rows)[None, :] & (k < INNER)[:, None], other=0.0)  # fmt: skip
        if NORM:
            v = v.to(tl.float32)
            squares += tl.sum(v * v, axis=0)
            if norm is not None:
                v *= _row(norm, k, k < INNER)[:, None]
        acc = tl.dot(a.to(IN), v.to(IN), acc, input_precision="ieee")
    if NORM:
        acc *= (1 / tl.sqrt_rn(squares / INNER + eps))[None, :]
    n, b = n[:, None], b[None, :]
    _put(acc, y, b * y_pitch + n, n, (n < out) & (b < rows), bias, scale, ADD)


@triton.jit
def _norm(x, x_pitch, z, z_pitch, weight, eps, y, y_pitch,
          WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A norm of one group of WIDTH channels of one row, of x silu(z) where there is a z."""
    _start(PDL)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < WIDTH
    at += tl.program_id(1) * WIDTH
    _wait(PDL)
    v = _row(x, row * x_pitch + at, inside)
    if z is not None:
        v *= _silu(_row(z, row * z_pitch + at, inside))
    v *= 1 / tl.sqrt_rn(tl.sum(v * v) / WIDTH + eps)
    if weight is not None:
        v *= _row(weight, at, inside)
    tl.store(y + row * y_pitch + at, v, mask=inside)


@triton.jit
def _conv(x, x_pitch, state, weight, bias, y, y_pitch, proj, scale, parts, rows, e,
          TAPS: tl.constexpr, T: tl.constexpr, SILU: tl.constexpr, OUT: tl.constexpr,
          P: tl.constexpr, E: tl.constexpr, R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """E channels of R rows through the convolution; what they add to proj (OUT, e) y, in parts.

    Part i, row r begins at parts + (i * rows + r) * OUT.
    """
    _start(PDL)
    block, c, j = tl.program_id(0), tl.program_id(0) * E + tl.arange(0, E), tl.arange(0, T)
    p = tl.arange(0, P)
    inside = c < e
    taps = _row(weight, c[None, :] * TAPS + j[:, None], inside[None, :] & (j < TAPS)[:, None])
    if proj is not None:
        a = _row(proj, p[:, None] * e + c[None, :], (p < OUT)[:, None] & inside[None, :])
    _wait(PDL)
    for i in range(R):
        row = tl.program_id(1) * R + i
        here = inside & (row < rows)
        old = state + (row.to(tl.int64) * (TAPS - 1) + j)[:, None] * e + c[None, :]
        last = here[None, :] & (j == TAPS - 1)[:, None]
        now = _row(x, row * x_pitch + c[None, :] + 0 * j[:, None], last)
        window = now + _row(old, 0, here[None, :] & (j < TAPS - 1)[:, None])  # (T, E)
        value = tl.sum(taps * window, axis=0)
        if bias is not None:
            value += _row(bias, c, inside)
        if SILU:
            value = _silu(value)
        tl.debug_barrier()
        tl.store(old - e, window, mask=here[None, :] & ((j > 0) & (j < TAPS))[:, None])
        tl.store(y + row * y_pitch + c, value, mask=here)
        if proj is not None:
            part = tl.sum(a * value[None, :], axis=1)
            if scale is not None:
                part *= _row(scale, p, p < OUT)
            tl.store(parts + (block * rows + row) * OUT + p, part, mask=(p < OUT) & (row < rows))


@triton.jit
def _piece(x, at, distance, WIDTH: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
           norm, eps, NORM: tl.constexpr):  # fmt: skip
    """WIDTH numbers, the sum of PARTS that are `distance` apart, always in the same order."""
    i, w = tl.arange(0, 8)[:, None], tl.arange(0, W)
    acc = tl.zeros((8, W), tl.float32)
    for first in tl.static_range(0, PARTS, 8):
        part = first + i
        acc += _row(x, at + part * distance + w[None, :], (part < PARTS) & (w < WIDTH)[None, :])
    value = tl.sum(acc, axis=0)
    if NORM:
        value *= 1 / tl.sqrt_rn(tl.sum(value * value) / WIDTH + eps)
        if norm is not None:
            value *= _row(norm, w, w < WIDTH)
    return value


@triton.jit
def _scan(x, x_pitch, dt, dt_pitch, dt_weight, dt_bias, A, B, C, bc_pitch,
          distance, dt_norm, b_norm, c_norm, dt_eps, b_eps, c_eps, D, z, z_pitch, state, y,
          y_pitch, rows, e,
          STATES: tl.constexpr, S: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr,
          PARTS: tl.constexpr, NORM: tl.constexpr, SOFTPLUS: tl.constexpr,
          IS_LOG: tl.constexpr, E: tl.constexpr, R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """E channels of R rows through the recurrence.

    With a dt_weight (e, RANK), `dt` is what it is applied to; else dt itself.
    """
    _start(PDL)
    c, n, r = tl.program_id(0) * E + tl.arange(0, E), tl.arange(0, S), tl.arange(0, W)
    inside = c < e
    both = inside[:, None] & (n < STATES)[None, :]
    rates = _row(A, c[:, None] * STATES + n[None, :], both)
    if IS_LOG:
        rates = -tl.exp2(rates * LOG2E)
    if dt_weight is not None:
        up = _row(dt_weight, c[:, None] * RANK + r[None, :],
                  inside[:, None] & (r < RANK)[None, :])  # fmt: skip
    _wait(PDL)
    for i in range(R):
        row = tl.program_id(1) * R + i
        here = inside & (row < rows)
        # A row that is not there reads the last one, and writes nothing.
        read = tl.minimum(row, rows - 1)
        if dt_weight is not None:
            low = _piece(dt, read * dt_pitch, distance, RANK, W, PARTS, dt_norm, dt_eps, NORM)
            step = tl.sum(up * low[None, :], axis=1)
        else:
            step = _row(dt, read * dt_pitch + c, inside)
        if dt_bias is not None:
            step += _row(dt_bias, c, inside)
        if SOFTPLUS:
            step = _softplus(step)
        b = _piece(B, read * bc_pitch, distance, STATES, S, PARTS, b_norm, b_eps, NORM)
        c_row = _piece(C, read * bc_pitch, distance, STATES, S, PARTS, c_norm, c_eps, NORM)
        value = _row(x, read * x_pitch + c, inside)
        at = state + (read.to(tl.int64) * e + c)[:, None] * STATES + n[None, :]
        h = _row(at, 0, both) * tl.exp2(rates * (step * LOG2E)[:, None])
        h += (step * value)[:, None] * b[None, :]
        out = tl.sum(h * c_row[None, :], axis=1)
        if D is not None:
            out += _row(D, c, inside) * value
        if z is not None:
            out *= _silu(_row(z, read * z_pitch + c, inside))
        tl.debug_barrier()
        tl.store(at, h, mask=both & (row < rows))
        tl.store(y + row * y_pitch + c, out, mask=here)


@triton.jit
def _ssd(x, x_pitch, dt, dt_pitch, dt_bias, A_log, B, C, bc_pitch, D, z, z_pitch, state, y,
         y_pitch, low, high, heads, heads_of_group,
         STATES: tl.constexpr, S: tl.constexpr, HEAD: tl.constexpr, BY_CHANNEL: tl.constexpr,
         E: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """E channels of one head of one row through the recurrence of Mamba-2."""
    _start(PDL)
    head, row, n = tl.program_id(1), tl.program_id(2), tl.arange(0, S)
    p = tl.program_id(0) * E + tl.arange(0, E)
    inside, wide = p < HEAD, n < STATES
    both = inside[:, None] & wide[None, :]
    c = head * HEAD + p
    rate = tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = _row(D, c, inside) if BY_CHANNEL else tl.load(D + head).to(tl.float32)
    _wait(PDL)
    step = _softplus(tl.load(dt + row * dt_pitch + head).to(tl.float32) + bias)
    step = tl.minimum(tl.maximum(step, low), high)
    group = row * bc_pitch + head // heads_of_group * STATES
    value = _row(x, row * x_pitch + c, inside)
    at = state + ((row.to(tl.int64) * heads + head) * HEAD + p)[:, None] * STATES + n[None, :]
    h = _row(at, 0, both) * tl.exp2(-step * rate * LOG2E)
    h += (step * value)[:, None] * _row(B, group + n, wide)[None, :]
    out = tl.sum(h * _row(C, group + n, wide)[None, :], axis=1) + skip * value
    if z is not None:
        out *= _silu(_row(z, row * z_pitch + c, inside))
    tl.debug_barrier()
    tl.store(at, h, mask=both)
    tl.store(y + row * y_pitch + c, out, mask=inside)
