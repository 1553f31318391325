"""Causal depthwise convolution with bias and SiLU on the GPU, forward and backward.

A program, one warp, has a stretch of STEPS steps of C channels. It walks along it with the last K
inputs in registers, so that an input is read once, and again only by the K - 1 steps at the border
of two stretches. UNROLL rows are asked for before the first of them is used: memory answers late,
but many at a time.

`step` counts in the order of processing. `reach` of a step is how many steps back its taps may
look: K - 1, or less where its document has just begun. A tensor that has a row for each step comes
as (pointer to step 0, elements from batch row to batch row, from step to step): time runs backwards
where the last is negative.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many channels a thread has, and how many rows it asks for at once: 16 bytes of bfloat16, or,
# where three times as much stays in registers, 8.
FORWARD, BACKWARD = 8, 4
# As many threads as keep a large card busy; short stretches read their borders more often. STEPS is
# a multiple of UNROLL.
THREADS = 1 << 16
LONGEST, SHORTEST = 64, 16


@triton.jit
def _stretch(length, channels, STEPS: tl.constexpr, C: tl.constexpr):
    """A program's number among those of its channels, its first step, and where it is in a row."""
    blocks = tl.cdiv(channels, C)
    stretches = tl.cdiv(length, STEPS)
    part = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    return part, part % stretches * STEPS, (part // stretches, channel, channel < channels)


@triton.jit
def _place(rows, batch, step):
    """A pointer to a row of a tensor."""
    pointer, per_batch, per_step = rows
    return pointer + batch.to(tl.int64) * per_batch + step.to(tl.int64) * per_step


@triton.jit
def _read(rows, where, step, length):
    """A row (C) of a tensor, zero outside 0 <= step < length."""
    batch, channel, inside = where
    mask = (step >= 0) & (step < length) & inside
    return tl.load(_place(rows, batch, step) + channel, mask, other=0.0)


@triton.jit
def _begins(seq, where, step, length):
    """Whether a document begins at a step; nowhere without `seq`."""
    begins = False
    if seq is not None:
        inside = (step > 0) & (step < length)
        at = _place(seq, where[0], step)
        begins = tl.load(at, inside, other=0) != tl.load(at - seq[2], inside, other=0)
    return begins


@triton.jit
def _start(x, weight, bias, state, seq, where, first, length, K: tl.constexpr, C: tl.constexpr):
    """Taps (C), the current step's last; the bias (C); the K - 1 inputs before the first step, and
    the reach there."""
    _, channel, inside = where
    tap = tl.arange(0, triton.next_power_of_2(K))[None, :]
    mask = inside[:, None] & (tap < K)
    matrix = tl.load(weight + channel[:, None] * K + tap, mask, other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.sum(tl.where(tap == j, matrix, 0.0), 1),)
    offset = tl.zeros((C,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    window = ()
    reach = tl.full((), K - 1, tl.int32)
    for j in tl.static_range(K - 1):
        step = first + (j - K + 1)
        row = _read(x, where, step, length).to(tl.float32)
        if state is not None:
            row += _read(state, where, step + (K - 1), K - 1).to(tl.float32)
        window = window + (row,)
        if seq is not None:
            reach = tl.where(_begins(seq, where, step, length), 0, tl.minimum(reach + 1, K - 1))
    return taps, offset, window, reach


@triton.jit
def _convolve(taps, offset, window, reach, K: tl.constexpr, PACKED: tl.constexpr):
    """offset + sum_j taps[j] window[j], (C)."""
    y = offset + taps[K - 1] * window[K - 1]
    for j in tl.static_range(K - 1):
        y += taps[j] * (tl.where(reach >= K - 1 - j, window[j], 0.0) if PACKED else window[j])
    return y


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); a reciprocal root is one instruction, a division seven."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _forward(
    x, weight, bias, state, seq, y, length, channels,
    K: tl.constexpr, SILU: tl.constexpr,
    STEPS: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    _, first, where = _stretch(length, channels, STEPS, C)
    batch, channel, inside = where
    taps, offset, window, reach = _start(x, weight, bias, state, seq, where, first, length, K, C)
    for i in range(0, STEPS, UNROLL):
        rows = ()
        begins = ()
        for u in tl.static_range(UNROLL):
            rows = rows + (_read(x, where, first + i + u, length),)
            begins = begins + (_begins(seq, where, first + i + u, length),)
        for u in tl.static_range(UNROLL):
            step = first + i + u
            if seq is not None:
                reach = tl.where(begins[u], 0, tl.minimum(reach + 1, K - 1))
            window = window + (rows[u].to(tl.float32),)
            value = _convolve(taps, offset, window, reach, K, seq is not None)
            window = window[1:]
            if SILU:
                value *= _sigmoid(value)
            tl.store(_place(y, batch, step) + channel, value, (step < length) & inside)


@triton.jit
def _backward_rows(
    grad_y, more, x, seq, grad_x, grad_state, taps, offset, walk, where, first, length, start,
    COUNT: tl.constexpr, OWN: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """COUNT steps on from first + start.

    `walk` is what changes: the inputs in the window, their gradients so far, the gradients of taps
    and bias, to which a stretch's OWN steps add, and the reach.
    """
    PACKED: tl.constexpr = seq is not None
    batch, channel, inside = where
    window, pending, sums, reach = walk
    rows = ()
    grads = ()
    begins = ()
    for u in tl.static_range(COUNT):
        step = first + start + u
        rows = rows + (_read(x, where, step, length),)
        grads = grads + (_read(grad_y, where, step, length),)
        begins = begins + (_begins(seq, where, step, length),)
    others = ()
    if more is not None:
        for u in tl.static_range(COUNT):
            others = others + (_read(more, where, first + start + u, length),)
    for u in tl.static_range(COUNT):
        if PACKED:
            reach = tl.where(begins[u], 0, tl.minimum(reach + 1, K - 1))
        window = window + (rows[u].to(tl.float32),)
        grad = grads[u].to(tl.float32)
        if more is not None:
            grad += others[u].to(tl.float32)
        if SILU:
            value = _convolve(taps, offset, window, reach, K, PACKED)
            gate = _sigmoid(value)
            grad *= gate * (1.0 + value * (1.0 - gate))
        totals = ()
        pending = pending + (tl.zeros_like(grad),)
        after = ()
        for j in tl.static_range(K):
            seen = tl.where(reach >= K - 1 - j, grad, 0.0) if PACKED else grad
            after = after + (pending[j] + taps[j] * seen,)
            if OWN:
                totals = totals + (sums[j] + window[j] * seen,)
        if OWN:
            sums = totals + (sums[K] + grad,)
        # The step K - 1 back has now had all its gradient.
        step = first + start + (u - K + 1)
        at = _place(grad_x, batch, step) + channel
        tl.store(at, after[0], (step >= first) & (step < length) & inside)
        if grad_state is not None:
            at = _place(grad_state, batch, step + (K - 1)) + channel
            tl.store(at, after[0], (step < 0) & (first == 0) & inside)
        window = window[1:]
        pending = after[1:]
    return window, pending, sums, reach


@triton.jit
def _backward(
    grad_y, more, x, weight, bias, state, seq, grad_x, grad_state, parts, length, channels,
    K: tl.constexpr, SILU: tl.constexpr,
    STEPS: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    part, first, where = _stretch(length, channels, STEPS, C)
    taps, offset, window, reach = _start(x, weight, bias, state, seq, where, first, length, K, C)
    pending = ()
    for _ in tl.static_range(K - 1):
        pending = pending + (tl.zeros((C,), tl.float32),)
    sums = ()
    for _ in tl.static_range(K + 1):
        sums = sums + (tl.zeros((C,), tl.float32),)
    walk = (window, pending, sums, reach)
    for i in range(0, STEPS, UNROLL):
        walk = _backward_rows(
            grad_y, more, x, seq, grad_x, grad_state, taps, offset, walk, where, first, length, i,
            UNROLL, True, K, SILU,
        )  # fmt: skip
    walk = _backward_rows(
        grad_y, more, x, seq, grad_x, grad_state, taps, offset, walk, where, first, length, STEPS,
        K - 1, False, K, SILU,
    )  # fmt: skip
    channel, inside = where[1:]
    for j in tl.static_range(K + 1):
        at = parts + (part.to(tl.int64) * (K + 1) + j) * channels + channel
        tl.store(at, walk[2][j], inside)


def tile(b: int, l: int, e: int, vector: int) -> dict[str, int]:
    """The sizes of a program whose threads have `vector` channels each."""
    steps = LONGEST
    while steps > SHORTEST and b * l * e < THREADS * vector * steps:
        steps //= 2
    width = min(32 * vector, triton.next_power_of_2(e))
    return {"STEPS": steps, "C": width, "UNROLL": vector, "num_warps": 1}


def _launch(
    kernel: Any, x: Tensor, tensors: list[Any], k: int, silu: bool, sizes: dict[str, int]
) -> None:
    """Run a kernel over all of x (b, l, e)."""
    b, l, e = x.shape
    programs = b * triton.cdiv(l, sizes["STEPS"]) * triton.cdiv(e, sizes["C"])
    if programs:
        with torch.cuda.device_of(x):
            kernel[(programs,)](*tensors, l, e, K=k, SILU=silu, **sizes)


def _rows(T: Tensor | None, reverse: bool = False) -> tuple[Tensor, int, int] | None:
    """A tensor (b, l, ...) as a kernel takes it; None for none."""
    if T is None or T.numel() == 0:
        return None
    T = T.detach()
    if T.dim() == 3 and T.stride(2) != 1:
        T = T.contiguous()
    per_batch, per_step = T.stride()[:2]
    return (T[:, -1:], per_batch, -per_step) if reverse else (T, per_batch, per_step)


def _vector(T: Tensor | None) -> Tensor | None:
    """A weight as a kernel takes it."""
    return None if T is None else T.detach().contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y_t = act(bias + sum_j weight[:, j] x_{t-k+1+j}).

    Args:
        x: (b, l, e).    weight: (e, k).    bias: (e).
        activation: SiLU if true.
        state: (b, k-1, e) inputs before the first step; of the first step's document. Zeros if
            missing.
        seq_idx: (b, l) integers; taps do not reach back over a step where it changes.
        reverse: whether steps are taken from the last to the first.
        out: where to write y, if the kernel can: not over x, which other programs still read.

    Returns:
        y (b, l, e) in the dtype of x.
    """
    b, l, e = x.shape
    if out is None or out.stride(2) != 1 or _share_memory(out, x):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = [_rows(x, reverse), _vector(weight), _vector(bias), _rows(state)]
    tensors += [_rows(seq_idx, reverse), _rows(out, reverse)]
    _launch(_forward, x, tensors, weight.shape[1], activation, tile(b, l, e, FORWARD))
    return out


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    activation: bool,
    reverse: bool,
    more: Tensor | None = None,
    grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward` to (x, weight, bias, state); the pre-activation is computed again.

    The gradient of y is grad_y + more, where that is given; that to x is written to `grad_x`
    (b, l, e), where it is given, whose last stride is 1.
    """
    b, l, e = x.shape
    k = weight.shape[1]
    sizes = tile(b, l, e, BACKWARD)
    if grad_x is None:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_state = None if state is None else state.new_empty(state.shape)
    stretches = b * triton.cdiv(l, sizes["STEPS"])
    parts = torch.empty(stretches, k + 1, e, dtype=torch.float32, device=x.device)
    tensors: list[Any] = [_rows(grad_y, reverse), _rows(more, reverse)]
    tensors += [_rows(x, reverse), _vector(weight), _vector(bias)]
    tensors += [_rows(state), _rows(seq_idx, reverse), _rows(grad_x, reverse), _rows(grad_state)]
    _launch(_backward, x, [*tensors, parts], k, activation, sizes)
    total = parts.sum(0)  # (k+1, e)
    grad_weight = total[:k].t().to(weight.dtype)
    # A copy: an operator's results may not share memory.
    grad_bias = None if bias is None else total[k].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias, grad_state


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may overlap."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
