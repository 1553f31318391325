"""The kernels of `step.py`, one token for each row of a batch: a handful a layer.

    _embed    rows of the embedding
    _matvec   y (+)= W norm(x) for few rows: multiply and sum, W read once for all rows
    _matmul   y (+)= W x for many rows, on the tensor cores
    _norm     a norm of its own, gated or in groups
    _conv     the convolution, and of few rows its share of the product behind it (x_proj)
    _scan     Mamba-1's recurrence, with the product that makes dt, inner norms, gate
    _ssd      Mamba-2's, with the gate

Activations are (b, width) rows, `pitch` numbers apart; all arithmetic is in float32. States are
changed in place: a program reads its part of one, waits for all its own threads, and writes it.

With PDL, a kernel starts while the one before it still runs, and even those before that: what no
kernel writes (weights) can be read at once, everything else only after `_wait`. States too are read
at once: only the kernel itself writes its own, and the first kernel of a step has no PDL, so the
last step is over. At one row that is most of the work: what is left behind `_wait` is a row.
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
def _put(total, y, at, n, mask, bias, scale, before, ADD: tl.constexpr):
    """Scale a product, add bias and residual, and write it."""
    if scale is not None:
        total *= _row(scale, n, mask)
    if bias is not None:
        total += _row(bias, n, mask)
    if ADD:
        total += before
    tl.store(y + at, total, mask=mask)


@triton.jit
def _matvec(x, x_pitch, w, bias, scale, norm, eps, y, y_pitch, out, rows,
            INNER: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr,
            N: tl.constexpr, J: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """J times N outputs of y = W x, of all rows; with NORM, x is normalised on the way.

    A warp has its own outputs, and no thread waits for another. To that end x has the shape of the
    weights, so that both lie in the same threads. AHEAD blocks of K weights are loaded before
    anything else, and as many are on their way always.
    """
    _start(PDL)
    b = tl.arange(0, B)[:, None, None]
    n = tl.arange(0, N)[None, :, None]
    k = tl.arange(0, K)[None, None, :]
    first = tl.program_id(0) * (N * J) + n
    COUNT: tl.constexpr = (INNER + K - 1) // K
    loaded, accs = (), ()
    for i in tl.static_range(0, min(AHEAD, COUNT)):
        for j in tl.static_range(0, J):
            loaded += (_weights(w, first + j * N, out, k + i * K, INNER, K),)
    for _ in tl.static_range(0, J):
        accs += (tl.zeros((B, N, K), tl.float32),)
    squares = tl.zeros((B, N, K), tl.float32)
    _wait(PDL)
    for i in tl.static_range(0, COUNT):
        at = k + i * K + 0 * n
        v = _row(x, b * x_pitch + at, (b < rows) & (at < INNER))
        if NORM:
            squares += v * v
            if norm is not None:
                v *= _row(norm, at + 0 * b, at + 0 * b < INNER)
        sums = ()
        for j in tl.static_range(0, J):
            sums += (accs[j] + loaded[i * J + j].to(tl.float32) * v,)
            if i + AHEAD < COUNT:
                loaded += (_weights(w, first + j * N, out, k + (i + AHEAD) * K, INNER, K),)
        accs = sums
    if NORM:
        factor = 1 / tl.sqrt_rn(tl.sum(squares, axis=2) / INNER + eps)
    b = tl.arange(0, B)[:, None]
    for j in tl.static_range(0, J):
        n = (tl.program_id(0) * (N * J) + j * N + tl.arange(0, N))[None, :]
        at, mask = b * y_pitch + n, (n < out) & (b < rows)
        total = tl.sum(accs[j], axis=2)  # (B, N)
        if NORM:
            total *= factor
        before = _row(y, at, mask) if ADD else 0.0
        _put(total, y, at, n, mask, bias, scale, before, ADD)


@triton.jit
def _weights(w, n, out, k, INNER: tl.constexpr, K: tl.constexpr):
    """Weights, which nobody reads again in this step; the last output's, where there is none."""
    at = w + tl.minimum(n, out - 1).to(tl.int64) * INNER + k
    if INNER % K == 0:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=k + 0 * n < INNER, other=0.0, eviction_policy="evict_first")


@triton.jit
def _matmul(x, x_pitch, w, bias, scale, y, y_pitch, out, rows,
            INNER: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
            K: tl.constexpr, PART: tl.constexpr, IN: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """N outputs of y = W x for B rows of many, in products of numbers of type IN.

    Of PART inputs: the next as many go to the next y.
    """
    _start(PDL)
    n = tl.program_id(0) * N + tl.arange(0, N)
    b = tl.program_id(1) * B + tl.arange(0, B)
    # What is not there is read as the last, and not written.
    from_here = tl.minimum(n, out - 1).to(tl.int64)[:, None] * INNER
    first = tl.program_id(2) * PART
    y += tl.program_id(2) * rows * y_pitch
    if PDL:
        _prefetch(w, from_here, first, INNER, PART)
    read = tl.minimum(b, rows - 1)[None, :] * x_pitch
    acc = tl.zeros((N, B), tl.float32)
    _wait(PDL)
    for start in range(0, PART, K):
        k = first + start + tl.arange(0, K)
        if INNER % PART == 0 and PART % K == 0:
            a = tl.load(w + from_here + k[None, :])
            v = tl.load(x + read + k[:, None])
        else:
            mine = k < tl.minimum(first + PART, INNER)
            a = tl.load(w + from_here + k[None, :], mask=mine[None, :], other=0.0)
            v = tl.load(x + read + k[:, None], mask=mine[:, None], other=0.0)
        acc = tl.dot(a.to(IN), v.to(IN), acc, input_precision="ieee")
    n, b = n[:, None], b[None, :]
    at, mask = b * y_pitch + n, (n < out) & (b < rows)
    before = _row(y, at, mask) if ADD else 0.0
    _put(acc, y, at, n, mask, bias, scale, before, ADD)


@triton.jit
def _prefetch(w, rows, first, INNER: tl.constexpr, PART: tl.constexpr):
    """Bring PART columns of rows of w into the second cache: once for all rows of x."""
    # A line has 128 bytes.
    LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
    if tl.program_id(1) == 0:
        for start in range(0, PART, 8 * LINE):
            k = first + tl.minimum(start + tl.arange(0, 8) * LINE, PART - 1)
            at = w + rows + tl.minimum(k, INNER - 1)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


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
          TAPS: tl.constexpr, SILU: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr,
          E: tl.constexpr, R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """E channels of R rows through the convolution; of one, what they add to proj (OUT, e) y.

    Part i of that, row r begins at parts + (i * rows + r) * OUT.
    """
    _start(PDL)
    block, p = tl.program_id(0), tl.arange(0, P)
    c = (block * E + tl.arange(0, E))[None, :]
    row = (tl.program_id(1) * R + tl.arange(0, R))[:, None]
    here = (c < e) & (row < rows)
    old = state + row.to(tl.int64) * ((TAPS - 1) * e) + c
    # The state is this kernel's alone, and what the last step left.
    taps, window = (), ()
    for j in tl.static_range(0, TAPS - 1):
        window += (_row(old + j * e, 0, here),)
    for j in tl.static_range(0, TAPS):
        taps += (_row(weight, c * TAPS + j, c < e),)
    if bias is not None:
        more = _row(bias, c, c < e)
    if proj is not None:
        a = tl.load(proj + p[:, None] * e + c, mask=(p < OUT)[:, None] & (c < e), other=0.0)
    _wait(PDL)
    window += (_row(x, row * x_pitch + c, here),)
    value = tl.zeros((R, E), tl.float32)
    for j in tl.static_range(0, TAPS):
        value += taps[j] * window[j]
    if bias is not None:
        value += more
    if SILU:
        value = _silu(value)
    tl.debug_barrier()
    for j in tl.static_range(0, TAPS - 1):
        tl.store(old + j * e, window[j + 1], mask=here)
    tl.store(y + row * y_pitch + c, value, mask=here)
    if proj is not None:
        part = tl.sum(a.to(tl.float32) * value, axis=1)[None, :]
        p = p[None, :]
        if scale is not None:
            part *= _row(scale, p, p < OUT)
        tl.store(parts + (block * rows + row) * OUT + p, part, mask=(p < OUT) & (row < rows))


@triton.jit
def _gather(x, at, distance, WIDTH: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
            G: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """(G, R, WIDTH) numbers, whose sum is that of PARTS that are `distance` apart."""
    i, w = tl.arange(0, G)[:, None, None], tl.arange(0, W)[None, None, :]
    acc = tl.zeros((G, R, W), tl.float32)
    for first in tl.static_range(0, PARTS, G):
        part = first + i
        acc += _row(x, at[None, :, None] + part * distance + w, (part < PARTS) & (w < WIDTH))
    return acc


@triton.jit
def _piece(acc, WIDTH: tl.constexpr, W: tl.constexpr, norm, eps, NORM: tl.constexpr):
    """(R, WIDTH) numbers, perhaps normalised, from what was gathered; always in the same order."""
    value = tl.sum(acc, axis=0)
    if NORM:
        value *= 1 / tl.sqrt_rn(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
        if norm is not None:
            w = tl.arange(0, W)
            value *= _row(norm, w, w < WIDTH)[None, :]
    return value


@triton.jit
def _scan(x, x_pitch, dt, dt_pitch, dt_weight, dt_bias, A, B, C, bc_pitch,
          distance, dt_norm, b_norm, c_norm, dt_eps, b_eps, c_eps, D, z, z_pitch, state, y,
          y_pitch, rows, e,
          STATES: tl.constexpr, S: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr,
          PARTS: tl.constexpr, NORM: tl.constexpr, SOFTPLUS: tl.constexpr,
          IS_LOG: tl.constexpr, E: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
          IN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """E channels of R rows through the recurrence.

    With a dt_weight (e, RANK), `dt` is what it is applied to, of several rows in products of IN;
    else dt itself. G parts are added up at a time.
    """
    _start(PDL)
    c, n, r = tl.program_id(0) * E + tl.arange(0, E), tl.arange(0, S), tl.arange(0, W)
    row = tl.program_id(1) * R + tl.arange(0, R)
    inside = c < e
    both = inside[:, None] & (n < STATES)[None, :]
    # A row that is not there reads the last one, and writes nothing.
    read = tl.minimum(row, rows - 1)
    # The state is this kernel's alone, and what the last step left.
    at = (read.to(tl.int64) * e)[:, None, None] * STATES + (c[:, None] * STATES + n[None, :])[None]
    h = _row(state, at, both[None])  # (R, E, S)
    rates = _row(A, c[:, None] * STATES + n[None, :], both)
    if IS_LOG:
        rates = -tl.exp2(rates * LOG2E)
    if dt_weight is not None:
        up = tl.load(dt_weight + c[:, None] * RANK + r[None, :],
                     mask=inside[:, None] & (r < RANK)[None, :], other=0.0)  # fmt: skip
    if D is not None:
        skip = _row(D, c[None, :] + 0 * read[:, None], inside[None, :])
    if dt_bias is not None:
        bias = _row(dt_bias, c[None, :] + 0 * read[:, None], inside[None, :])
    _wait(PDL)
    # All loads come first; what is calculated waits for other threads.
    if dt_weight is not None:
        low = _gather(dt, read * dt_pitch, distance, RANK, W, PARTS, G, R)
    b = _gather(B, read * bc_pitch, distance, STATES, S, PARTS, G, R)
    c_row = _gather(C, read * bc_pitch, distance, STATES, S, PARTS, G, R)
    value = _row(x, read[:, None] * x_pitch + c[None, :], inside[None, :])  # (R, E)
    if z is not None:
        gate = _silu(_row(z, read[:, None] * z_pitch + c[None, :], inside[None, :]))
    if dt_weight is not None:
        low = _piece(low, RANK, W, dt_norm, dt_eps, NORM)
        if R == 1:
            step = tl.sum(up.to(tl.float32) * low, axis=1)[None, :]
        else:
            tl.static_assert(W >= 16, "a product on the tensor cores sums over 16 numbers")
            step = tl.dot(low.to(IN), tl.trans(up.to(IN)), input_precision="ieee")
    else:
        step = _row(dt, read[:, None] * dt_pitch + c[None, :], inside[None, :])
    if dt_bias is not None:
        step += bias
    if SOFTPLUS:
        step = _softplus(step)
    b = _piece(b, STATES, S, b_norm, b_eps, NORM)
    c_row = _piece(c_row, STATES, S, c_norm, c_eps, NORM)
    h *= tl.exp2(rates[None] * (step * LOG2E)[:, :, None])
    h += (step * value)[:, :, None] * b[:, None, :]
    out = tl.sum(h * c_row[:, None, :], axis=2)
    if D is not None:
        out += skip * value
    if z is not None:
        out *= gate
    tl.debug_barrier()
    here = (row < rows)[:, None]
    tl.store(state + at, h, mask=both[None] & here[:, :, None])
    tl.store(y + row[:, None] * y_pitch + c[None, :], out, mask=inside[None, :] & here)


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
    # The state is this kernel's alone, and what the last step left.
    at = state + ((row.to(tl.int64) * heads + head) * HEAD + p)[:, None] * STATES + n[None, :]
    h = _row(at, 0, both)
    _wait(PDL)
    step = _softplus(tl.load(dt + row * dt_pitch + head).to(tl.float32) + bias)
    step = tl.minimum(tl.maximum(step, low), high)
    group = row * bc_pitch + head // heads_of_group * STATES
    value = _row(x, row * x_pitch + c, inside)
    h *= tl.exp2(-step * rate * LOG2E)
    h += (step * value)[:, None] * _row(B, group + n, wide)[None, :]
    out = tl.sum(h * _row(C, group + n, wide)[None, :], axis=1) + skip * value
    if z is not None:
        out *= _silu(_row(z, row * z_pitch + c, inside))
    tl.debug_barrier()
    tl.store(at, h, mask=both)
    tl.store(y + row * y_pitch + c, out, mask=inside)
