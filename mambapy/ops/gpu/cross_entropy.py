"""Loss and gradient of a chunk of logits, in its place: one read, one write, one read from cache.

A program is a row. It finds the row's log-sum-exp on a first way through, and writes
softmax(L) - 1[target] over it on a second, while the row (100 KB) is still in the L2 cache. The
same with torch's operators moves the chunk through memory about four times, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MOST_COLUMNS = 8192


@triton.jit
def _row(
    L,
    target,
    losses,
    v: tl.constexpr,
    WIDTH: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # A constant, so that the compiler knows by what each row's address can be divided.
    L += row * WIDTH
    columns = tl.arange(0, BLOCK)
    # Each lane keeps its own: one reduction for a row instead of one for each block of it.
    high = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        x = tl.load(L + start + columns, mask=start + columns < v, other=float("-inf"))
        x = x.to(tl.float32) * LOG2_E
        higher = tl.maximum(high, x)
        total = total * tl.exp2(high - higher) + tl.exp2(x - higher)
        high = higher
    highest = tl.max(high, 0)
    lse = highest + tl.log2(tl.sum(total * tl.exp2(high - highest), 0))
    t = tl.load(target + row)
    # A label that there is not makes the loss NaN, which a training run notices.
    aim = tl.load(L + t, mask=(t >= 0) & (t < v), other=float("nan")).to(tl.float32)
    tl.store(losses + row, lse * LN_2 - aim)
    if WANTED:
        # No thread may write over L[t] before every one has read it.
        tl.debug_barrier()
        for start in range(0, WIDTH, BLOCK):
            here = start + columns
            # Beyond v, where the weight is padding, p is 0.
            x = tl.load(L + here, mask=here < v, other=float("-inf")).to(tl.float32)
            p = tl.exp2(x * LOG2_E - lse)
            p = tl.where(here == t, p - 1, p)
            tl.store(L + here, p.to(L.dtype.element_ty), mask=here < WIDTH)


def softmax_gradient(
    L: Tensor, target: Tensor, vocab_size: int, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss (c) in float32; and where it is wanted, L (c, v) is G afterwards.

    Args:
        L: (c, v) logits, contiguous.
        target: (c) int64 in [0, vocab_size).
        vocab_size: columns that are logits; those after them are padding.
        wanted: whether the gradient is.
    """
    losses = torch.empty(len(L), dtype=torch.float32, device=L.device)
    width = L.shape[1]
    block = min(triton.next_power_of_2(width), MOST_COLUMNS)
    warps = max(1, min(16, block // 256))
    with torch.cuda.device_of(L):
        _row[(len(L),)](L, target, losses, vocab_size, width, wanted, block, num_warps=warps)
    return losses, L
