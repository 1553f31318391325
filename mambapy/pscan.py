"""Blelloch's parallel scan: H[t] = A[t] * H[t-1] + X[t] for every t, in 2 log2(l) steps.

Why a recurrence can be computed in parallel. Write one step as the pair (a, x), which stands for
the function h -> a * h + x. Two steps in a row are again such a pair:

    first (a1, x1), then (a2, x2):   h -> a2 * (a1 * h + x1) + x2   =   (a2 * a1,  a2 * x1 + x2)

This combination is associative, so the steps may be combined in any grouping, as one may add
1 + 2 + 3 + 4 as (1 + 2) + (3 + 4). Blelloch's algorithm groups them along a binary tree. Below, a
cell shows which steps it covers; l = 8, and every arrow of one row runs at the same time.

    up-sweep     0    1    2    3    4    5    6    7
      s = 1      0   0-1   2   2-3   4   4-5   6   6-7      cell s apart, every 2s-th: right += left
      s = 2      0   0-1   2   0-3   4   4-5   6   4-7
      s = 4      0   0-1   2   0-3   4   4-5   6   0-7      now 0, 1, 3 and 7 are finished
    down-sweep
      s = 2      0   0-1   2   0-3   4   0-5   6   0-7      finished cells fill in what they skipped
      s = 1      0   0-1  0-2  0-3  0-4  0-5  0-6  0-7      all finished

Each level touches half the cells of the one before, so the work is O(l), as in a plain loop, in
O(log l) steps. No level needs l to be a power of two: a cell without a partner is left alone until
the down-sweep reaches it, so nothing is padded. The reverse scan, which the gradient needs, is the
same picture in a mirror; it only counts its cells from the other end.

Source: Blelloch 1990, "Prefix sums and their applications", section 1.4.
"""

from typing import Any

import torch
from torch import Tensor

from mambapy.errors import ShapeError


def pscan(A: Tensor, X: Tensor) -> Tensor:
    """Scan along dimension 1: H[:, t] = A[:, t] * H[:, t-1] + X[:, t], with H[:, -1] = 0.

    Differentiable to any order; works under `torch.func`. Neither argument is written to.

    Args:
        A: (b, l, ...) decays, any floating dtype; for a Mamba (b, l, e, n).
        X: (b, l, ...) inputs, of A's shape.

    Returns:
        H, of X's shape and dtype. float16 and bfloat16 are scanned in float32.

    Raises:
        ShapeError: the shapes differ, have no dimension 1, or are not floating point.

    Source: Blelloch 1990, section 1.4.
    """
    _check(A, X)
    return _in_float32(A, X, reverse=False)


def pscan_reverse(A: Tensor, X: Tensor) -> Tensor:
    """Scan from the end: H[:, t] = A[:, t] * H[:, t+1] + X[:, t], with H[:, l] = 0.

    Args, returns, errors: those of `pscan`.
    """
    _check(A, X)
    return _in_float32(A, X, reverse=True)


def scan_in_place(A: Tensor, X: Tensor, *, reverse: bool = False) -> None:
    """The two sweeps themselves: overwrite X with the scan, and A with products on the way.

    Args:
        A: (b, l, ...) decays; garbage afterwards.
        X: (b, l, ...) inputs; the scan afterwards.
        reverse: run from the end to the start.
    """
    length = X.shape[1]
    strides = []
    s = 1
    while 2 * s <= length:
        a, a_left = _pairs(A, 2 * s - 1, s, reverse)
        x, x_left = _pairs(X, 2 * s - 1, s, reverse)
        x.addcmul_(a, x_left)
        a.mul_(a_left)
        strides.append(s)
        s *= 2
    for s in reversed(strides):
        if 3 * s <= length:
            a, _ = _pairs(A, 3 * s - 1, s, reverse)
            x, x_finished = _pairs(X, 3 * s - 1, s, reverse)
            x.addcmul_(a, x_finished)


def _pairs(T: Tensor, first: int, s: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Views of the cells first, first + 2s, ... and of the cells s before each of them.

    In reverse the cells are counted from the end, and "before" is to the right.
    """
    length = T.shape[1]
    count = (length - 1 - first) // (2 * s) + 1
    low, source = first, first - s
    if reverse:
        low = length - 1 - first - 2 * s * (count - 1)
        source = low + s
    span = 2 * s * (count - 1) + 1
    return T[:, low : low + span : 2 * s], T[:, source : source + span : 2 * s]


def _in_float32(A: Tensor, X: Tensor, reverse: bool) -> Tensor:
    """Scan in float32 at least, return in X's dtype."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, X.dtype), torch.float32)
    return _Scan.apply(A.to(dtype), X.to(dtype), reverse).to(X.dtype)  # type: ignore[no-untyped-call]


def _check(A: Tensor, X: Tensor) -> None:
    """Raise unless both are floating point, of one shape (b, l, ...) with l >= 1."""
    if A.shape != X.shape or A.dim() < 2 or A.shape[1] == 0:
        raise ShapeError(
            f"pscan needs A and X of one shape (b, l, ...) with l >= 1, "
            f"got {tuple(A.shape)} and {tuple(X.shape)}"
        )
    if not (A.is_floating_point() and X.is_floating_point()):
        raise ShapeError(f"pscan needs floating-point tensors, got {A.dtype} and {X.dtype}")


def _neighbour(T: Tensor, reverse: bool) -> Tensor:
    """What stood one step earlier in the scan's own direction, zero before its first step."""
    edge = torch.zeros_like(T[:, :1])
    if reverse:
        return torch.cat((T[:, 1:], edge), dim=1)
    return torch.cat((edge, T[:, :-1]), dim=1)


class _Scan(torch.autograd.Function):
    """The scan with its derivatives, each of which is again a scan.

    Forward: H[t] = A[t] H[t-1] + X[t]. With G[t] = dLoss/dX[t], the chain rule runs backwards:
    G[t] = grad[t] + A[t+1] G[t+1], a reverse scan over the decays shifted by one, and
    dLoss/dA[t] = G[t] H[t-1]. Tangents run forwards: H'[t] = A[t] H'[t-1] + (X'[t] + A'[t] H[t-1]).
    """

    @staticmethod
    def forward(A: Tensor, X: Tensor, reverse: bool) -> Tensor:
        H = X.clone(memory_format=torch.contiguous_format)
        scan_in_place(A.clone(memory_format=torch.contiguous_format), H, reverse=reverse)
        return H

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        A, _, ctx.reverse = inputs
        ctx.save_for_backward(A, output)
        ctx.save_for_forward(A, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        A, H = ctx.saved_tensors
        G = _Scan.apply(_neighbour(A, not ctx.reverse), grad, not ctx.reverse)  # type: ignore[no-untyped-call]
        return G * _neighbour(H, ctx.reverse), G, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, dX: Tensor | None, _: None) -> Tensor:
        A, H = ctx.saved_tensors
        drive = torch.zeros_like(H) if dX is None else dX
        if dA is not None:
            drive = drive + dA * _neighbour(H, ctx.reverse)
        return _Scan.apply(A, drive, ctx.reverse)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], A: Tensor, X: Tensor, reverse: bool
    ) -> tuple[Tensor, int]:
        """A mapped axis is one more trailing axis of the scan."""
        A, X = (
            T.unsqueeze(-1).expand(*T.shape, info.batch_size)
            if axis is None
            else T.movedim(axis, -1)
            for T, axis in zip((A, X), in_dims[:2], strict=True)
        )
        return _Scan.apply(A, X, reverse), -1  # type: ignore[no-untyped-call]
