"""norm(y silu(z)) over groups of channels, forward and backward, in one pass each.

A task is ROWS rows, so that the parts of the weight's gradient do not depend on the number of
threads. With u = y silu(z), r = 1 / rms(u) and p = w grad:  grad u = r (p - u r^2 mean(p u)).
"""

import math

import torch
from torch import Tensor

from mambapy.ops.cpu.exp import silu, silu_and_slope
from mambapy.ops.cpu.memory import fetch_add, lanes_total, load, pointer, store
from mambapy.ops.cpu.rows import (
    NEXT_TASK,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    WORKER,
    pack,
    result_like,
    rowwise,
    stage,
    unstage,
)
from mambapy.ops.cpu.scan_forward import whole_vectors
from mambapy.ops.cpu.simd import LANES, fma, splat, zeros
from mambapy.ops.cpu.threads import arithmetic, compiled, run

ROWS = 32
COUNT, GROUPS, WIDTH, EPS_BITS = range(SIZES, SIZES + 4)
Y, Z, WEIGHT, OUT, GRAD, GRAD_Y, GRAD_Z, GRAD_WEIGHT = range(8)


def build_forward(F, size, stamp):
    """The forward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def gated_norm_forward(args):
        stamp  # noqa: B018
        width = args[WIDTH]
        room = (width + LANES - 1) // LANES * LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        ys, zs, weight = LANES, LANES + room, LANES + 2 * room
        eps = pointer(args[EPS_BITS], F)[0]
        while True:
            first = fetch_add(args, NEXT_TASK) * ROWS
            if first >= args[COUNT]:
                break
            for group in range(args[GROUPS]):
                at = group * width
                stage(args, WEIGHT, 0, 0, 1, at, width, base, weight, 0, F)
                for row in range(first, min(first + ROWS, args[COUNT])):
                    stage(args, Y, row, 0, 1, at, width, base, ys, 0, F)
                    stage(args, Z, row, 0, 1, at, width, base, zs, 0, F)
                    squares = zeros(F)
                    for c in range(0, width, LANES):
                        u = load(w, ys + c) * silu(load(w, zs + c))
                        store(w, ys + c, u)
                        squares = fma(u, u, squares)
                    r = splat(F(1) / F(math.sqrt(lanes_total(squares) / F(width) + eps)))
                    for c in range(0, width, LANES):
                        store(w, ys + c, load(w, ys + c) * r * load(w, weight + c))
                    unstage(args, OUT, row, 0, 1, at, width, base, ys, 0, F)

    return gated_norm_forward


def build_backward(F, size, stamp):
    """The backward kernel in the arithmetic of `F`; `stamp` keys the cache on disk."""

    def gated_norm_backward(args):
        stamp  # noqa: B018
        width = args[WIDTH]
        room = (width + LANES - 1) // LANES * LANES
        base = args[SCRATCH] + fetch_add(args, WORKER) * args[SCRATCH_BYTES]
        w = pointer(base, F)
        ys, gate, slope, grad = LANES, LANES + room, LANES + 2 * room, LANES + 3 * room
        weight, grad_weight = LANES + 4 * room, LANES + 5 * room
        eps = pointer(args[EPS_BITS], F)[0]
        while True:
            task = fetch_add(args, NEXT_TASK)
            first = task * ROWS
            if first >= args[COUNT]:
                break
            for group in range(args[GROUPS]):
                at = group * width
                stage(args, WEIGHT, 0, 0, 1, at, width, base, weight, 0, F)
                for c in range(0, width, LANES):
                    store(w, grad_weight + c, zeros(F))
                for row in range(first, min(first + ROWS, args[COUNT])):
                    stage(args, Y, row, 0, 1, at, width, base, ys, 0, F)
                    stage(args, Z, row, 0, 1, at, width, base, gate, 0, F)
                    stage(args, GRAD, row, 0, 1, at, width, base, grad, 0, F)
                    squares, products = zeros(F), zeros(F)
                    for c in range(0, width, LANES):
                        y = load(w, ys + c)
                        open_, rise = silu_and_slope(load(w, gate + c))
                        u, p = y * open_, load(w, grad + c) * load(w, weight + c)
                        store(w, gate + c, open_)
                        store(w, slope + c, y * rise)
                        squares, products = fma(u, u, squares), fma(p, u, products)
                    scale = F(1) / F(math.sqrt(lanes_total(squares) / F(width) + eps))
                    mean = lanes_total(products) / F(width)
                    r, back = splat(scale), splat(-scale * scale * scale * mean)
                    for c in range(0, width, LANES):
                        g, open_ = load(w, grad + c), load(w, gate + c)
                        u = load(w, ys + c) * open_
                        part = fma(g, u * r, load(w, grad_weight + c))
                        store(w, grad_weight + c, part)
                        into = fma(u, back, g * load(w, weight + c) * r)
                        store(w, ys + c, into * open_)
                        store(w, slope + c, into * load(w, slope + c))
                    unstage(args, GRAD_Y, row, 0, 1, at, width, base, ys, 0, F)
                    unstage(args, GRAD_Z, row, 0, 1, at, width, base, slope, 0, F)
                unstage(args, GRAD_WEIGHT, task, 0, 1, at, width, base, grad_weight, 0, F)

    return gated_norm_backward


def _rows(T: Tensor, F: torch.dtype) -> Tensor:
    """(..., d) as (rows, d), without a copy where the strides allow it."""
    return rowwise(T.detach(), F).reshape(-1, T.shape[-1])


def forward(
    y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float, out: Tensor | None = None
) -> Tensor:
    """norm(y silu(z)) weight, (..., d) in the dtype of y; `out` may be y or z."""
    F, d = arithmetic(y.dtype), y.shape[-1]
    found = result_like(y, out)
    rows = _rows(found, F)
    if rows.data_ptr() != found.data_ptr():
        # Its rows are not evenly apart.
        found = torch.empty(y.shape, dtype=y.dtype)
        rows = found.view(-1, d)
    constant = torch.tensor([eps], dtype=F)
    tensors = [_rows(y, F), _rows(z, F), weight.detach().to(F).contiguous(), rows]
    count, width = y.numel() // d, d // n_groups
    args = pack([count, n_groups, width, constant.data_ptr()], list(tensors))
    scratch = (LANES + 3 * whole_vectors(width)) * F.itemsize
    run(compiled(build_forward, F), args, -(-count // ROWS), scratch, 12 * count * d)
    return found


def backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` to y, z and weight."""
    F, d = arithmetic(y.dtype), y.shape[-1]
    grad_y, grad_z = torch.empty(y.shape, dtype=y.dtype), torch.empty(z.shape, dtype=z.dtype)
    count, width = y.numel() // d, d // n_groups
    tasks = -(-count // ROWS)
    parts = torch.empty(tasks, d, dtype=F)
    constant = torch.tensor([eps], dtype=F)
    tensors = [_rows(y, F), _rows(z, F), weight.detach().to(F).contiguous(), None, _rows(grad, F)]
    tensors += [grad_y.view(-1, d), grad_z.view(-1, d), parts]
    args = pack([count, n_groups, width, constant.data_ptr()], tensors)
    scratch = (LANES + 6 * whole_vectors(width)) * F.itemsize
    run(compiled(build_backward, F), args, tasks, scratch, 25 * count * d)
    return grad_y, grad_z, parts.sum(0).to(weight.dtype)
