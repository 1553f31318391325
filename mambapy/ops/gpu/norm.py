"""RMSNorm with an optional residual addition on the GPU, forward and backward.

A program holds R whole rows in registers, so that each tensor is read once. Backward it takes
REPEAT times R rows, one after the other, and adds up what they give the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program holds of one tensor, and a thread.
TILE = 2048
PER_THREAD = 16
MOST_WARPS = 16
# Backward: enough programs for a large card, and few parts of the weight's gradient.
PROGRAMS = 512
MOST_REPEATS = 32


@triton.jit
def _place(rows, row):
    """Pointers to rows of a tensor, which comes as (pointer, elements from row to row)."""
    pointer, per_row = rows
    return pointer + row * per_row


@triton.jit
def _forward(
    x, residual, weight, y, s, rows, d, eps,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < d)
    value = tl.load(_place(x, row) + column, mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(_place(residual, row) + column, mask, other=0.0).to(tl.float32)
        # The norm is that of the sum as the next layers see it.
        stored = value.to(s[0].dtype.element_ty)
        tl.store(_place(s, row) + column, stored, mask)
        value = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
    gain = tl.load(weight + column, column < d, other=0.0).to(tl.float32)
    tl.store(_place(y, row) + column, value * scale * gain, mask)


@triton.jit
def _backward(
    grad_y, grad_s, s, weight, grad_x, narrow, parts, rows, d, eps,
    REPEAT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With r = 1 / rms(s), u = r s and p = w grad_y:  grad s = r (p - u mean(p u)),  grad w =
    sum_rows u grad_y."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + column, column < d, other=0.0).to(tl.float32)
    total = tl.zeros((R, BLOCK), tl.float32)
    for i in range(REPEAT):
        row = (program * REPEAT + i) * R + tl.arange(0, R)[:, None]
        mask = (row < rows) & (column < d)
        value = tl.load(_place(s, row) + column, mask, other=0.0).to(tl.float32)
        grad = tl.load(_place(grad_y, row) + column, mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
        mean = scale * (tl.sum(value * grad * gain, 1) / d)[:, None]
        value *= scale
        total += grad * value
        into = scale * (grad * gain - value * mean)
        if grad_s is not None:
            into += tl.load(_place(grad_s, row) + column, mask, other=0.0).to(tl.float32)
        tl.store(_place(grad_x, row) + column, into, mask)
        if narrow is not None:
            tl.store(_place(narrow, row) + column, into, mask)
    tl.store(parts + program * d + column, tl.sum(total, 0)[None, :], column < d)


def tile(rows: int, d: int) -> dict[str, int]:
    """The sizes of a program, and how many threads it gets."""
    block = triton.next_power_of_2(d)
    per_program = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    warps = min(max(per_program * block // (32 * PER_THREAD), 1), MOST_WARPS)
    return {"R": per_program, "BLOCK": block, "num_warps": warps}


def repeats(rows: int, per_program: int) -> int:
    """How many times R rows a program takes, backward."""
    fair = max(1, rows // (per_program * PROGRAMS))
    return min(MOST_REPEATS, triton.next_power_of_2(fair))


def _rows(T: Tensor | None) -> tuple[Tensor, int] | None:
    """A tensor (..., d) as a kernel takes it; None for none."""
    if T is None:
        return None
    T = T.detach().reshape(-1, T.shape[-1])  # (rows, d)
    T = T if T.stride(1) == 1 else T.contiguous()
    return T, T.stride(0)


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
    d = x.shape[-1]
    rows = x.numel() // d
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    s = None
    if residual is not None:
        s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    sizes = tile(rows, d)
    tensors = [_rows(x), _rows(residual), weight.detach().contiguous(), _rows(y), _rows(s)]
    if rows:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, sizes["R"]),)](*tensors, rows, d, eps, **sizes)
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
    d = s.shape[-1]
    rows = s.numel() // d
    sizes = tile(rows, d)
    repeat = repeats(rows, sizes["R"])
    programs = triton.cdiv(rows, sizes["R"] * repeat)
    grad_x = torch.empty(s.shape, dtype=dtype, device=s.device)
    parts = torch.empty(programs, d, dtype=torch.float32, device=s.device)
    tensors = [_rows(grad_y), _rows(grad_s), _rows(s), weight.detach().contiguous()]
    tensors += [_rows(grad_x), _rows(out)]
    if rows:
        with torch.cuda.device_of(s):
            _backward[(programs,)](*tensors, parts, rows, d, eps, REPEAT=repeat, **sizes)
    return grad_x, parts.sum(0).to(weight.dtype)
