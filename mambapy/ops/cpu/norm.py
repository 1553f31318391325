"""RMSNorm with an optional residual addition, forward and backward; autograd: `ops/kernel_ops.py`.

A task is ROWS rows, so that the parts of the weight's gradient do not depend on the number of
threads.
"""

import math

import torch
from torch import Tensor

from mambapy.ops.cpu.memory import accumulate, fetch_add, load, pointer, store, total
from mambapy.ops.cpu.rows import (
    NEXT_TASK,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    given,
    pack,
    rowwise,
    stage,
    unstage,
)
from mambapy.ops.cpu.simd import FOLDED, LANES, fma, splat, zeros
from mambapy.ops.cpu.threads import arithmetic, compiled, run

ROWS = 32
COUNT, CHANNELS, EPS_BITS = range(SIZES, SIZES + 3)
X, RESIDUAL, WEIGHT, Y, SUM, GRAD_Y, GRAD_SUM, GRAD_X, GRAD_WEIGHT = range(9)


def build_forward(F, size, stamp):
    """The forward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def norm_forward(args):
        stamp  # noqa: B018
        channels = args[CHANNELS]
        width = (channels + LANES - 1) // LANES * LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        square = LANES
        weight = square + FOLDED
        xs = weight + width
        other = xs + width
        eps = pointer(args[EPS_BITS], F)[0]
        stage(args, WEIGHT, 0, 0, 1, 0, channels, base, weight, width, F)
        while True:
            first = fetch_add(args, NEXT_TASK) * ROWS
            if first >= args[COUNT]:
                break
            for row in range(first, min(first + ROWS, args[COUNT])):
                stage(args, X, row, 0, 1, 0, channels, base, xs, width, F)
                if given(args, RESIDUAL):
                    stage(args, RESIDUAL, row, 0, 1, 0, channels, base, other, width, F)
                    for c in range(0, width, LANES):
                        store(w, xs + c, load(w, xs + c) + load(w, other + c))
                    unstage(args, SUM, row, 0, 1, 0, channels, base, xs, width, F)
                for i in range(FOLDED):
                    w[square + i] = F(0)
                for c in range(0, width, LANES):
                    accumulate(w, square, load(w, xs + c), load(w, xs + c))
                scale = splat(F(1) / F(math.sqrt(total(w, square) / F(channels) + eps)))
                for c in range(0, width, LANES):
                    store(w, xs + c, load(w, xs + c) * scale * load(w, weight + c))
                unstage(args, Y, row, 0, 1, 0, channels, base, xs, width, F)

    return norm_forward


def build_backward(F, size, stamp):
    """The backward kernel in the arithmetic of `F`; `stamp` keys the cache on disk.

    With r = 1 / rms(x), u = r x and p = w grad_y:  grad x = r (p - u mean(p u)),  grad w = sum_rows
    u grad_y.
    """

    def norm_backward(args):
        stamp  # noqa: B018
        channels = args[CHANNELS]
        width = (channels + LANES - 1) // LANES * LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        square = LANES
        weight = square + 2 * FOLDED
        xs = weight + width
        gy = xs + width
        extra = gy + width
        grad_weight = extra + width
        eps = pointer(args[EPS_BITS], F)[0]
        stage(args, WEIGHT, 0, 0, 1, 0, channels, base, weight, width, F)
        while True:
            task = fetch_add(args, NEXT_TASK)
            first = task * ROWS
            if first >= args[COUNT]:
                break
            for c in range(0, width, LANES):
                store(w, extra + c, zeros(F))
                store(w, grad_weight + c, zeros(F))
            for row in range(first, min(first + ROWS, args[COUNT])):
                stage(args, X, row, 0, 1, 0, channels, base, xs, width, F)
                stage(args, GRAD_Y, row, 0, 1, 0, channels, base, gy, width, F)
                if given(args, GRAD_SUM):
                    stage(args, GRAD_SUM, row, 0, 1, 0, channels, base, extra, width, F)
                for i in range(2 * FOLDED):
                    w[square + i] = F(0)
                for c in range(0, width, LANES):
                    x = load(w, xs + c)
                    accumulate(w, square, x, x)
                    accumulate(w, square + FOLDED, x, load(w, gy + c) * load(w, weight + c))
                scale = F(1) / F(math.sqrt(total(w, square) / F(channels) + eps))
                mean = total(w, square + FOLDED) / F(channels)
                r, back = splat(scale), splat(-scale * scale * scale * mean)
                for c in range(0, width, LANES):
                    x, grad = load(w, xs + c), load(w, gy + c)
                    part = fma(grad, x * r, load(w, grad_weight + c))
                    store(w, grad_weight + c, part)
                    into = fma(x, back, load(w, extra + c))
                    store(w, xs + c, fma(grad * load(w, weight + c), r, into))
                unstage(args, GRAD_X, row, 0, 1, 0, channels, base, xs, width, F)
            unstage(args, GRAD_WEIGHT, task, 0, 1, 0, channels, base, grad_weight, width, F)

    return norm_backward


def _rows(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(..., d) as (rows, d), without a copy where the strides allow it."""
    return None if tensor is None else rowwise(tensor.detach(), dtype).reshape(-1, tensor.shape[-1])


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """s = x + residual,  y = s / sqrt(mean(s^2) + eps) * weight.

    Args:
        x: (..., d).    weight: (d).
        residual: (..., d) or None for s = x.

    Returns:
        y in `dtype` (None: x's), and s in the dtype of a sum (None without a residual).

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
    """
    F = torch.float64 if x.dtype == torch.float64 else arithmetic(x.dtype)
    d = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype or x.dtype)
    s = None
    if residual is not None:
        s = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    tensors = [
        _rows(x, F),
        _rows(residual, F),
        rowwise(weight.detach(), F),
        _rows(y, F),
        _rows(s, F),
    ]
    rows = y.numel() // d
    constant = torch.tensor([eps], dtype=F)
    args = pack([rows, d, constant.data_ptr()], tensors)
    width = -(-d // LANES) * LANES
    scratch = (LANES + FOLDED + 3 * width) * F.itemsize
    run(compiled(build_forward, F), args, -(-rows // ROWS), scratch, 3 * rows * d)
    return y, s


def backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` to s (so to x and residual alike, in `dtype`) and to weight.

    That to s is written to `out` too, where it is given: for an x in another dtype.
    """
    F = arithmetic(s.dtype)
    d = s.shape[-1]
    rows = s.numel() // d
    tasks = -(-rows // ROWS)
    grad_x = torch.empty(s.shape, dtype=dtype)
    grad_weight = torch.empty(tasks, d, dtype=F)
    tensors = [
        _rows(s, F),
        None,
        rowwise(weight.detach(), F),
        None,
        None,
        _rows(grad_y, F),
        _rows(grad_s, F),
    ]
    tensors += [_rows(grad_x, F), grad_weight]
    constant = torch.tensor([eps], dtype=F)
    args = pack([rows, d, constant.data_ptr()], tensors)
    width = -(-d // LANES) * LANES
    scratch = (LANES + 2 * FOLDED + 5 * width) * F.itemsize
    run(compiled(build_backward, F), args, tasks, scratch, 6 * rows * d)
    if out is not None:
        out.copy_(grad_x)
    return grad_x, grad_weight.sum(0).to(weight.dtype)
