"""Selective scan (Mamba-1) on an NVIDIA GPU, forward and backward, on plain tensors.

    forward     one launch; on request it keeps the state at each TILE steps
    backward    one launch
Where there are few rows and channels, both cut the length into segments that run at once, and a
launch before theirs finds what each hands to the next.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from mambapy.errors import BackendError
from mambapy.ops.gpu.cuda import Kernel, launch, pointer

TILE = 32
PITCH = TILE + 4
WARP = 32
# Names of number formats in the kernels.
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


# Of the tensors that have a row for each step, those with a number for each state.
PER_STATE = ("B", "C", "W")


@dataclass(frozen=True)
class Lanes:
    """How a kernel divides channels and states among threads.

    Args:
        S: states of a thread.
        SL: threads of a channel; S SL >= n.
        warps: of a block.
        run: steps whose states the backward pass keeps in registers at once.
        segments: parts of the length that are worked on at once.
        buffers: 2 where a tile of steps is fetched while the one before it is worked on, else 1.
    """

    S: int
    SL: int
    warps: int = 4
    run: int = 8
    segments: int = 1
    buffers: int = 2

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.warps * (WARP // self.SL)

    @property
    def states(self) -> int:
        """States that a block has room for: an equal part of B and C is staged by each warp."""
        return -(-self.S * self.SL // self.warps) * self.warps

    def blocks(self, b: int, e: int) -> int:
        """Blocks for all rows and channels."""
        return b * -(-e // self.channels)


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
        dtypes = _dtypes(X=x, DT=dt, B=B, C=C, Z=x if z is None else z, Y=y)
        lanes = _fitted("scan_forward", forward_lanes(b, l, e, n, x.device), dtypes, x.device)
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

    That to z is written to `grad_z` (b, l, e), where it is given, whose last stride is 1.
    """
    b, l, e = x.shape
    n = A.shape[1]
    if b * e == 0:
        tensors = (x, dt, A, B, C, D, z, dt_bias, state)
        return [None if T is None else torch.zeros_like(T) for T in tensors]
    if lanes is None:
        dtypes = _dtypes(X=x, DT=dt, B=B, C=C, Z=x if z is None else z, R=grad_y)
        lanes = _fitted("scan_backward", backward_lanes(b, l, e, n, x.device), dtypes, x.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    grad_x = torch.empty(b, l, e, dtype=x.dtype, device=x.device)
    grad_dt = torch.empty(b, l, e, dtype=dt.dtype, device=x.device)
    if z is not None and grad_z is None:
        grad_z = torch.empty(b, l, e, dtype=z.dtype, device=x.device)
    # B and C: one sum that all blocks of channels add to, or one for each block. The others: one
    # for each segment and row.
    parts = -(-e // lanes.channels) if deterministic else 1
    grad_B, grad_C = empty(parts, b, l, n), empty(parts, b, l, n)
    for T in () if deterministic else (grad_B, grad_C):
        T.zero_()
    segments = lanes.segments
    grad_A = empty(segments * b, e, n)
    grad_D = None if D is None else empty(segments * b, e)
    grad_bias = None if dt_bias is None else empty(segments * b, e)
    grad_state = None if state is None else empty(b, e, n)
    originals = [x, dt, A, B, C, D, z, dt_bias, state]

    A, D, dt_bias, grad_last = _weights(A, D, dt_bias, grad_last)
    x, dt, B, C, z, grad_y = _rowwise(x, dt, B, C, z, grad_y)
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int64)
    carried = None
    if segments > 1:
        carried = empty(2 * segments, b, e, n)
        _carry(lanes, carried, dt, A, C, grad_y, z, dt_bias, seq_idx, dt_softplus, reverse)
    rows = _Rows(lanes, reverse, x)
    into = _Rows(lanes, reverse, grad_x)
    (to_x, *steps), (to_dt, *_), (to_z, *z_steps) = (
        into.add(name, T) for name, T in (("X", grad_x), ("DT", grad_dt), ("Z", grad_z))
    )
    args = [
        *rows.add("X", x), *rows.add("DT", dt), pointer(A), *rows.add("B", B), *rows.add("C", C),
        pointer(D), *rows.add("Z", z), pointer(dt_bias), *rows.documents(seq_idx),
        *rows.add("R", grad_y), pointer(starts), pointer(grad_last), pointer(carried),
        to_x, to_dt, to_z, *steps, *z_steps, rows.first(grad_B[0]), rows.first(grad_C[0]),
        *rows.strides(grad_B[0]), pointer(grad_A), pointer(grad_D), pointer(grad_bias),
        pointer(grad_state), b, l, e, n,
    ]  # fmt: skip
    vector = min(vector for _, _, vector in into.layouts)
    more = (("G_VEC", vector), ("RUN", lanes.run), ("DETERMINISTIC", int(deterministic)))
    kernel = rows.kernel("scan_backward", n, dt_softplus, more)
    launch(kernel, (lanes.blocks(b, e), segments), args, x.device)

    sums = (grad_A, grad_B, grad_C, grad_D, grad_bias)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (
        T if T is None else T.sum(0) if len(T) > 1 else T[0] for T in sums
    )
    grads = [grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state]
    return [
        None if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, originals, strict=True)
    ]


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
    shared = _shared_bytes(name, lanes, layouts)
    settings |= {"S": S, "SL": SL, "WARPS": warps, "EXACT": int(n == S * SL)}
    settings |= {"SOFTPLUS": int(softplus), "SEQ": int(has_documents), "SHARED": shared}
    settings |= {"BUFFERS": lanes.buffers, "UNROLL": 4 if S <= 4 else 2}
    return Kernel(name, settings, warps * WARP, shared)


def _shared_bytes(
    name: str, lanes: Lanes, layouts: tuple[tuple[str, torch.dtype, int], ...]
) -> int:
    """At most the size of a kernel's `Shared`; the kernel checks it when it is compiled."""
    channels, states = lanes.channels, lanes.states
    # Rows of a tile in float32, of each channel and of each state, and what else there is.
    per_channel, per_state = {"scan_forward": (2, 2), "scan_backward": (3, 2)}.get(name, (2, 1))
    numbers = channels * (per_channel * PITCH + 2) + per_state * states * PITCH + TILE
    if name == "scan_backward":
        numbers += 4 * channels * TILE + (TILE // lanes.run - 1) * lanes.S * lanes.warps * WARP
        numbers += 2 * lanes.warps * lanes.run * 2 * lanes.S * lanes.SL
    raw = 0
    for letter, dtype, _ in layouts:
        columns = states if letter in PER_STATE else channels
        # Each row of a tile has 16 bytes of padding.
        tile = -(-TILE * (columns * dtype.itemsize + 16) // 16) * 16
        raw += tile * (1 if letter == "Y" else lanes.buffers)
    return 4 * numbers + raw + 64


def _dtypes(**tensors: Tensor) -> tuple[tuple[str, torch.dtype, int], ...]:
    """Layouts of which only what decides their size is known."""
    return tuple((letter, T.dtype, 1) for letter, T in tensors.items())


@lru_cache(1024)
def _fitted(
    name: str,
    lanes: Lanes,
    layouts: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
) -> Lanes:
    """The lanes, or as near to them as the card's shared memory allows.

    Raises:
        BackendError: nothing fits.
    """
    room = shared_memory(device)
    for run, buffers, warps in itertools.product(
        sorted({lanes.run, 4}, reverse=True), (lanes.buffers, 1), (lanes.warps, 4, 2, 1)
    ):
        less = replace(lanes, run=run, buffers=buffers, warps=min(warps, lanes.warps))
        if _shared_bytes(name, less, layouts) <= room:
            return less
    raise BackendError(f"{name} needs more shared memory than the {room} bytes of this card")


def shared_memory(device: torch.device) -> int:
    """Bytes that a block can have on a card."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _weights(*tensors: Tensor | None) -> list[Tensor | None]:
    """Small tensors as contiguous float32 that starts at a multiple of 16 bytes."""
    small = [None if T is None else T.detach().float().contiguous() for T in tensors]
    return [T if T is None or T.data_ptr() % 16 == 0 else T.clone() for T in small]


def _rowwise(*tensors: Tensor | None) -> list[Tensor | None]:
    """Large tensors as the kernels take them: any strides but the last."""
    return [
        None if T is None else T.detach() if T.stride(-1) == 1 else T.detach().contiguous()
        for T in tensors
    ]


# Warps on each multiprocessor below which the length is cut into segments, and with them.
FEW_WARPS, MANY_WARPS = 6, 20


@lru_cache(1024)
def forward_lanes(b: int, l: int, e: int, n: int, device: torch.device) -> Lanes:
    """The division that was fastest where it was measured (an H100; benchmarks/results)."""
    lanes = _division(b, l, e, n, device)
    if n > 16:
        return lanes
    return replace(lanes, warps=4 if _warps(lanes, b, e, device) < MANY_WARPS else 8)


@lru_cache(1024)
def backward_lanes(b: int, l: int, e: int, n: int, device: torch.device) -> Lanes:
    """The same of the backward pass, whose blocks must be large: each adds to B's and C's sums."""
    return _division(b, l, e, n, device)


def _division(b: int, l: int, e: int, n: int, device: torch.device) -> Lanes:
    """States and channels over lanes, the length over segments."""
    padded = 1 << (n - 1).bit_length()
    S = min(4 if n <= 16 else 8, padded)
    lanes = Lanes(S, padded // S)
    if n > 128:
        # Shared memory is what there is least of.
        lanes = replace(lanes, warps=2, run=4, buffers=1)
    warps = _warps(lanes, b, e, device)
    if warps >= FEW_WARPS:
        return lanes
    return replace(lanes, segments=max(1, min(round(MANY_WARPS / warps), l // (8 * TILE))))


def _warps(lanes: Lanes, b: int, e: int, device: torch.device) -> float:
    """Warps for each multiprocessor of the card."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return lanes.blocks(b, e) * lanes.warps / processors
