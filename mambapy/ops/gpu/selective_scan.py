"""Selective scan (Mamba-1) on an NVIDIA GPU, forward and backward, on plain tensors.

    forward     one launch; on request it keeps the state at each TILE steps
    backward    one launch
Where there are few rows and channels, both cut the length into segments that run at once, and a
launch before theirs finds what each hands to the next.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mambapy.ops.gpu.cuda import Kernel, launch, pointer
from mambapy.ops.gpu.lanes import FORMATS, PER_STATE, TILE, WARP, Lanes, chosen, shared_bytes

# What the sums of all blocks of channels may take where they must not be added in any order.
MOST_PARTS_BYTES = 1 << 30


def forward(
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
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    out: Tensor | None = None,
    lanes: Lanes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.cpu.selective_scan.forward`; the saved states are (b, tiles, e, n)."""
    b, l, e = x.shape
    n = A.shape[1]
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    if out is None or out.stride(2) != 1:
        y = torch.empty(b, l, e, dtype=x.dtype, device=x.device)
    else:
        y = out
    if b * e == 0:
        return y, empty(b, e, n), empty(saved_shape(b, l, e, n) if save else (0,))
    if lanes is None:
        lanes = chosen(
            "scan_forward", (b, l, e, n),
            lambda lanes: forward(
                x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, state=state,
                seq_idx=seq_idx, reverse=reverse, save=save, lanes=lanes,
            ),  # not to `out`, which may be one of the arguments
            X=x, DT=dt, B=B, C=C, Z=x if z is None else z, Y=y,
        )  # fmt: skip
    last = empty(b, e, n)
    starts = empty(saved_shape(b, l, e, n) if save else (0,))
    A, D, dt_bias, state = _weights(A, D, dt_bias, state)
    x, dt, B, C, z = _rowwise(x, dt, B, C, z)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int64)
    carried = None
    if lanes.segments > 1:
        carried = empty(2 * lanes.segments, b, e, n)
        _carry(
            lanes, carried, dt, A, B, x, None, dt_bias, seq_idx, dt_softplus, reverse, forward=True
        )
    rows = _Rows(lanes, reverse, x)
    args = [
        *rows.add("X", x), *rows.add("DT", dt), pointer(A), *rows.add("B", B), *rows.add("C", C),
        pointer(D), *rows.add("Z", z), pointer(dt_bias), pointer(state),
        *rows.documents(seq_idx), *rows.add("Y", y), pointer(carried),
        pointer(starts) if save else 0, pointer(last), b, l, e, n,
    ]  # fmt: skip
    kernel = rows.kernel("scan_forward", n, dt_softplus)
    launch(kernel, (lanes.blocks(b, e), lanes.segments), args, x.device)
    return y, last, starts


def backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    lanes: Lanes | None = None,
    grad_z: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of `forward` to (x, dt, A, B, C, D, z, dt_bias, state).

    That to z is written to `grad_z` (b, l, e), where it is given: half of a tensor (b, l, 2e).
    Those to x and dt are then halves of another.
    """
    b, l, e = x.shape
    n = A.shape[1]
    tensors = (x, dt, A, B, C, D, z, dt_bias, state)
    if b * e == 0:
        return [None if T is None else torch.zeros_like(T) for T in tensors]
    if lanes is None:
        lanes = chosen(
            "scan_backward", (b, l, e, n),
            lambda lanes: backward(
                grad_y, grad_last, starts, *tensors, seq_idx, dt_softplus, reverse, lanes=lanes
            ),
            X=x, DT=dt, B=B, C=C, Z=x if z is None else z, R=grad_y,
        )  # fmt: skip
    options = seq_idx, dt_softplus, reverse, lanes
    width = e
    if torch.are_deterministic_algorithms_enabled():
        width = lanes.channels * max(1, MOST_PARTS_BYTES // (2 * 4 * b * l * n))
    if width < e:
        grads = _backward_of_slices(width, grad_y, grad_last, starts, tensors, *options)
        if grad_z is not None:
            grads[6] = grad_z.copy_(grads[6])
    else:
        grads = _backward(grad_y, grad_last, starts, tensors, *options, grad_z)
    return [
        grad if grad is None or grad.dtype == tensor.dtype else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def _backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    starts: Tensor,
    tensors: Sequence[Any],
    seq_idx: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    lanes: Lanes,
    grad_z: Tensor | None = None,
) -> list[Any]:
    """`backward` in one launch, after that of `_carry`; sums over rows or channels in float32."""
    x, dt, A, B, C, D, z, dt_bias, state = tensors
    b, l, e = x.shape
    n = A.shape[1]
    deterministic = torch.are_deterministic_algorithms_enabled()
    # B and C: one sum that all blocks of channels add to, or one for each block. The others: one
    # for each segment and row.
    parts = -(-e // lanes.channels) if deterministic else 1
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    grad_x, grad_dt, grad_z = _room(x, dt, z, grad_z)
    grad_BC = empty(2, parts, b, l, n)
    grad_B, grad_C = grad_BC if deterministic else grad_BC.zero_()
    segments = lanes.segments
    grad_A = empty(segments * b, e, n)
    grad_D = None if D is None else empty(segments * b, e)
    grad_bias = None if dt_bias is None else empty(segments * b, e)
    grad_state = None if state is None else empty(b, e, n)

    A, D, dt_bias, grad_last = _weights(A, D, dt_bias, grad_last)
    x, dt, B, C, z, grad_y = _rowwise(x, dt, B, C, z, grad_y)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int64)
    carried = None
    if segments > 1:
        carried = empty(2 * segments, b, e, n)
        _carry(lanes, carried, dt, A, C, grad_y, z, dt_bias, seq_idx, dt_softplus, reverse)
    rows = _Rows(lanes, reverse, x)
    into = _Rows(lanes, reverse, grad_x)
    (to_x, *steps), (to_dt, *_), (to_z, *_) = (
        into.add(name, T) for name, T in (("X", grad_x), ("DT", grad_dt), ("Z", grad_z))
    )
    args = [
        *rows.add("X", x), *rows.add("DT", dt), pointer(A), *rows.add("B", B), *rows.add("C", C),
        pointer(D), *rows.add("Z", z), pointer(dt_bias), *rows.documents(seq_idx),
        *rows.add("R", grad_y), pointer(starts), pointer(grad_last), pointer(carried),
        to_x, to_dt, to_z, *steps, rows.first(grad_B[0]), rows.first(grad_C[0]),
        *rows.strides(grad_B[0]), pointer(grad_A), pointer(grad_D), pointer(grad_bias),
        pointer(grad_state), b, l, e, n,
    ]  # fmt: skip
    vector = min(vector for _, _, vector in into.layouts)
    more = (("G_VEC", vector), ("RUN", lanes.run), ("DETERMINISTIC", int(deterministic)))
    kernel = rows.kernel("scan_backward", n, dt_softplus, more)
    launch(kernel, (lanes.blocks(b, e), segments), args, x.device)

    sums = (grad_A, grad_B, grad_C, grad_D, grad_bias)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (
        T if T is None else T.sum(0) if T.shape[0] > 1 else T[0] for T in sums
    )
    return [grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state]


def _backward_of_slices(
    width: int,
    grad_y: Tensor,
    grad_last: Tensor | None,
    starts: Tensor,
    tensors: Sequence[Any],
    *options: Any,
) -> list[Any]:
    """`_backward` of `width` channels at a time, so that few blocks' sums exist at once."""
    # Where x, dt, A, B, C, D, z, dt_bias, state have their channels; B and C have none.
    dims: Any = (-1, -1, 0, None, None, -1, -1, -1, 1)
    found: list[list[Any]] = []
    sums: list[Tensor] = []
    for first in range(0, grad_y.shape[2], width):
        cut = partial(_cut, first=first, width=width)
        grads = _backward(
            cut(grad_y, -1), cut(grad_last, 1), cut(starts, 2).contiguous(),
            [cut(T, dim) for T, dim in zip(tensors, dims, strict=True)], *options,
        )  # fmt: skip
        more, grads[3:5] = grads[3:5], (None, None)
        sums = [a.add_(b) for a, b in zip(sums, more, strict=True)] if sums else more
        found.append(grads)
    whole: list[Any] = [
        None if parts[0] is None else torch.cat(parts, dim)
        for parts, dim in zip(zip(*found, strict=True), dims, strict=True)
    ]
    whole[3:5] = sums
    return whole


def _cut(T: Any, dim: int | None, *, first: int, width: int) -> Any:
    """The channels from `first` on of a tensor that has them in a dimension; others as they are."""
    if T is None or dim is None:
        return T
    return T.narrow(dim, first, min(width, T.shape[dim] - first))


def _room(
    x: Tensor, dt: Tensor, z: Tensor | None, grad_z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for the gradients to x, dt and z, (b, l, e) each; see `backward`.

    All in rows of one distance: with more of them the kernel was a fifth slower.
    """
    b, l, e = x.shape

    def make(width: int, like: Tensor) -> Tensor:
        return torch.empty(b, l, width, dtype=like.dtype, device=x.device)

    if grad_z is None:
        return make(e, x), make(e, dt), None if z is None else make(e, z)
    if dt.dtype != x.dtype:
        return make(2 * e, x)[..., :e], make(2 * e, dt)[..., :e], grad_z
    grad_x, grad_dt = make(2 * e, x).chunk(2, dim=-1)
    return grad_x, grad_dt, grad_z


def _carry(
    lanes: Lanes,
    carried: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    value: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    *,
    forward: bool = False,
) -> None:
    """Fill `carried` (2, segments, b, e, n) as scan_carry.cu says."""
    b, l, e = dt.shape
    n = A.shape[1]
    rows = _Rows(lanes, reverse, dt)
    args = [
        *rows.add("DT", dt), pointer(A), *rows.add("W", weight), *rows.add("Z", z),
        pointer(dt_bias), *rows.documents(seq_idx), *rows.add("V", value), pointer(carried),
        lanes.segments, b, l, e, n,
    ]  # fmt: skip
    kernel = rows.kernel("scan_carry", n, dt_softplus, (("FORWARD", int(forward)),))
    launch(kernel, (lanes.blocks(b, e), lanes.segments - 1), args, dt.device)


def saved_shape(b: int, l: int, e: int, n: int) -> tuple[int, ...]:
    """Shape of the saved states: those before each tile of steps."""
    return b, -(-l // TILE), e, n


class _Rows:
    """The arguments of a kernel that have a row for each step, and what follows from them."""

    def __init__(self, lanes: Lanes, reverse: bool, like: Tensor) -> None:
        self.lanes, self.reverse, self.like = lanes, reverse, like
        # Name, dtype, and how many neighbours one access takes.
        self.layouts: list[tuple[str, torch.dtype, int]] = []
        self._has_documents = False

    def add(self, name: str, T: Tensor | None) -> list[int]:
        """Declare a (b, l, ...) tensor under a name; its arguments: place and strides."""
        # Where there is none, the kernel is made as if there were one.
        shown = self.like if T is None else T
        columns = self.lanes.states if name in PER_STATE else self.lanes.channels
        self.layouts.append((name, shown.dtype, _vector(shown, columns)))
        return [0 if T is None else self.first(T), *self.strides(shown)]

    def documents(self, seq_idx: Tensor | None) -> list[int]:
        """The same of the documents' numbers, which may be missing."""
        self._has_documents = seq_idx is not None
        return [0, 0, 0] if seq_idx is None else [self.first(seq_idx), *self.strides(seq_idx)]

    def first(self, T: Tensor) -> int:
        """Where the first step in time stands."""
        last = (T.shape[1] - 1) * T.stride(1) * T.element_size() if self.reverse else 0
        return T.data_ptr() + last

    def strides(self, T: Tensor) -> tuple[int, int]:
        """Numbers from row to row, and from a step to the next in time."""
        return T.stride(0), -T.stride(1) if self.reverse else T.stride(1)

    def kernel(
        self, name: str, n: int, softplus: bool, more: tuple[tuple[str, int], ...] = ()
    ) -> Kernel:
        """The kernel for these tensors."""
        return _kernel(
            name,
            replace(self.lanes, segments=1),
            n,
            softplus,
            self._has_documents,
            tuple(self.layouts),
            more,
        )


def _vector(T: Tensor, columns: int) -> int:
    """How many neighbours one access can take: at most 16 bytes, aligned, a divisor of all."""
    size = T.element_size()
    return _divisor(16 // size, columns, T.shape[-1], *T.stride()[:-1], T.data_ptr() // size % 16)


@lru_cache(1024)
def _divisor(most: int, *counts: int) -> int:
    """The largest power of two, at most `most`, that divides all of `counts`."""
    while any(count % most for count in counts):
        most //= 2
    return most


@lru_cache(1024)
def _kernel(
    name: str,
    lanes: Lanes,
    n: int,
    softplus: bool,
    has_documents: bool,
    layouts: tuple[tuple[str, torch.dtype, int], ...],
    more: tuple[tuple[str, int], ...],
) -> Kernel:
    """A kernel for tensors of these layouts."""
    settings: dict[str, str | int] = dict(more)
    for letter, dtype, vector in layouts:
        settings |= {f"{letter}_T": FORMATS[dtype], f"{letter}_VEC": vector}
    S, SL, warps = lanes.S, lanes.SL, lanes.warps
    shared = shared_bytes(name, lanes, layouts)
    settings |= {"S": S, "SL": SL, "WARPS": warps, "EXACT": int(n == S * SL)}
    settings |= {"SOFTPLUS": int(softplus), "SEQ": int(has_documents), "SHARED": shared}
    settings |= {"BUFFERS": lanes.buffers, "UNROLL": 4 if S <= 4 else 2}
    return Kernel(name, settings, warps * WARP, shared)


def _weights(*tensors: Tensor | None) -> list[Any]:
    """Small tensors as contiguous float32 that starts at a multiple of 16 bytes."""
    small = [None if T is None else T.detach().float().contiguous() for T in tensors]
    return [T if T is None or T.data_ptr() % 16 == 0 else T.clone() for T in small]


def _rowwise(*tensors: Tensor | None) -> list[Any]:
    """Large tensors as the kernels take them: any strides but the last."""
    return [
        None if T is None else T.detach() if T.stride(-1) == 1 else T.detach().contiguous()
        for T in tensors
    ]
