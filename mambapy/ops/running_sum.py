"""Sums over the length, from the start of each document: exact, and the same bits on each run."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapy.ops.custom_op import differentiable


def running_sum(T: Tensor, block: int = 64) -> Tensor:
    """Sums of T (b, l, m) over the length up to each step, in float64 where the device has it."""
    T = T.to(torch.float32 if T.device.type == "mps" else torch.float64)
    total: Tensor = _call(T, block, False)
    return total


# An operator, as it asks about the length, which torch.compile and torch.export leave open.
@torch.library.custom_op("mambapy::running_sum", mutates_args=())
def _running_sum(T: Tensor, block: int, backwards: bool) -> Tensor:
    """Sums of T (b, l, m) up to each step, or from it on."""
    # By products with matrices of ones: CUDA's cumsum is not deterministic.
    l = T.shape[1]
    if backwards:
        return _running_sum._init_fn(T.flip(1), block, False).flip(1)
    upto = torch.ones(min(l, block), min(l, block), dtype=T.dtype, device=T.device).tril_()
    if l <= block:
        return torch.einsum("ij,bjm->bim", upto, T).contiguous()
    T = F.pad(T, (0, 0, 0, -l % block)).unflatten(1, (-1, block))
    inside = torch.einsum("ij,bcjm->bcim", upto, T)
    ends = inside[:, :, -1]  # (b, c, m)
    before = _running_sum._init_fn(ends, block, False) - ends
    return (inside + before.unsqueeze(2)).flatten(1, 2)[:, :l].contiguous()


@_running_sum.register_fake
def _(T: Tensor, block: int, backwards: bool) -> Tensor:
    return T.new_empty(T.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.backwards = inputs


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Each number counts in all sums from it on."""
    return _call(grad, ctx.block, not ctx.backwards), None, None


_call = differentiable(_running_sum, _setup_context, _gradient, rows=(0,))


def since_start(T: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Sums of T (b, l, m) from the first step of each token's document up to it.

    Args:
        T: (b, l, m).
        starts: (b, l) bool, True where another document than the token before's starts; None
            where there is one document. The first token starts none.

    Returns:
        The sums (b, l, m), float64 where the device has it, and where starts are given, whether a
        token is still in the first document, (b, l, 1).
    """
    total = running_sum(T)
    if starts is None:
        return total, None
    index = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, index, 0).cummax(dim=1).values.unsqueeze(-1)  # (b, l, 1)
    goes_on = first == 0
    earlier = (total - T).gather(1, first.expand_as(total))
    return total - torch.where(goes_on, 0.0, earlier), goes_on


def until_end(T: Tensor, starts: Tensor | None) -> Tensor:
    """Sums of T (b, l, m) from each step to its document's last: the gradient of `since_start`."""
    total = running_sum(T)
    if starts is None:
        return total[:, -1:] - total + T
    l = starts.shape[1]
    index = torch.where(starts, torch.arange(l, device=starts.device), l)
    # The first start after each step, less one.
    after = F.pad(index[:, 1:], (0, 1), value=l)
    end = after.flip(1).cummin(dim=1).values.flip(1) - 1  # (b, l)
    return total.gather(1, end.unsqueeze(-1).expand_as(total)) - total + T
