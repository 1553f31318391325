"""Selective scan (Mamba-1) on an NVIDIA GPU, forward and backward, on plain tensors.

    forward     one launch; on request it keeps the state at each TILE steps
    backward    one launch
Where there are few rows and channels, both cut the length into segments that run at once, and a
launch before theirs finds what each hands to the next.
"""

from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from mambapy.ops.gpu.cuda import Launch, launch, pointer

TILE = 32
PITCH = TILE + 4
WARP = 32
# Names of number formats in the kernels.
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


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
    lanes = lanes or forward_lanes(b, l, e, n, x.device)
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    y = torch.empty(b, l, e, dtype=x.dtype, device=x.device) if out is None else out
    last = empty(b, e, n)
    starts = empty(saved_shape(b, l, e, n) if save else (0,))
    A, D, dt_bias, state = _weights(A, D, dt_bias, state)
    x, dt, B, C, z = _rowwise(x, dt, B, C, z)
    carried = None
    if lanes.segments > 1:
        carried = empty(2 * lanes.segments, b, e, n)
        _carry(
            lanes, carried, dt, A, B, x, None, dt_bias, seq_idx, dt_softplus, reverse, forward=True
        )
    rows = _Rows(reverse)
    columns = lanes.channels
    args = [
        *rows.add("X", x, columns), *rows.add("DT", dt, columns), pointer(A),
        *rows.add("B", B, lanes.states), *rows.add("C", C, lanes.states), pointer(D),
        *rows.add("Z", x if z is None else z, columns, given=z is not None),
        pointer(dt_bias), pointer(state), *rows.documents(seq_idx), *rows.add("Y", y, columns),
        pointer(carried), pointer(starts) if save else 0, pointer(last), b, l, e, n,
    ]  # fmt: skip
    shared = _shared_bytes(lanes, rows, staged=2, b_c=2)
    settings = _settings(lanes, n, rows, dt_softplus, seq_idx, shared)
    grid, threads = (lanes.blocks(b, e), lanes.segments), lanes.warps * WARP
    settings["UNROLL"] = 4 if lanes.S <= 4 else 2
    launch(Launch("scan_forward", settings, grid, threads, shared, args), x.device)
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
) -> list[Tensor | None]:
    """Gradients of `forward` to (x, dt, A, B, C, D, z, dt_bias, state)."""
    b, l, e = x.shape
    n = A.shape[1]
    lanes = lanes or backward_lanes(b, l, e, n, x.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    grad_x, grad_dt = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(b, l, e, dtype=dt.dtype, device=x.device),
    )
    grad_z = None if z is None else torch.empty(b, l, e, dtype=z.dtype, device=x.device)
    # B and C: one sum that all blocks of channels add to, or one for each block. The others: one
    # for each segment and row.
    parts = -(-e // lanes.channels) if deterministic else 1
    make = empty if deterministic else partial(torch.zeros, dtype=torch.float32, device=x.device)
    grad_B, grad_C = make(parts, b, l, n), make(parts, b, l, n)
    segments = lanes.segments
    grad_A = empty(segments * b, e, n)
    grad_D = None if D is None else empty(segments * b, e)
    grad_bias = None if dt_bias is None else empty(segments * b, e)
    grad_state = None if state is None else empty(b, e, n)
    originals = [x, dt, A, B, C, D, z, dt_bias, state]

    A, D, dt_bias, grad_last = _weights(A, D, dt_bias, grad_last)
    x, dt, B, C, z, grad_y = _rowwise(x, dt, B, C, z, grad_y)
    columns = lanes.channels
    carried = None
    if segments > 1:
        carried = empty(2 * segments, b, e, n)
        _carry(lanes, carried, dt, A, C, grad_y, z, dt_bias, seq_idx, dt_softplus, reverse)
    rows = _Rows(reverse)
    args = [
        *rows.add("X", x, columns), *rows.add("DT", dt, columns), pointer(A),
        *rows.add("B", B, lanes.states), *rows.add("C", C, lanes.states), pointer(D),
        *rows.add("Z", x if z is None else z, columns, given=z is not None),
        pointer(dt_bias), *rows.documents(seq_idx), *rows.add("R", grad_y, columns),
        pointer(starts), pointer(grad_last), pointer(carried),
    ]  # fmt: skip
    gradients = [T for T in (grad_x, grad_dt, grad_z) if T is not None]
    places = [rows.first(T) for T in gradients]
    vector = min(_vector(T, columns) for T in gradients)
    rows.settings["G_VEC"] = vector
    args += [*places, *([0] if grad_z is None else []), *rows.strides(grad_x)]
    args += [rows.first(grad_B[0]), rows.first(grad_C[0]), *rows.strides(grad_B[0])]
    args += [pointer(grad_A), pointer(grad_D), pointer(grad_bias), pointer(grad_state), b, l, e, n]
    runs, threads = TILE // lanes.run, lanes.warps * WARP
    extra = runs * lanes.S * threads + 2 * lanes.warps * lanes.run * 2 * lanes.S * lanes.SL
    extra += 4 * lanes.channels * TILE
    shared = _shared_bytes(lanes, rows, staged=3, b_c=2, more=extra)
    settings = _settings(lanes, n, rows, dt_softplus, seq_idx, shared)
    settings |= {"RUN": lanes.run, "DETERMINISTIC": int(deterministic)}
    grid = (lanes.blocks(b, e), segments)
    launch(Launch("scan_backward", settings, grid, threads, shared, args), x.device)

    sums = [grad_A, grad_B, grad_C, grad_D, grad_bias]
    grad_A, grad_B, grad_C, grad_D, grad_bias = [None if T is None else _sum(T) for T in sums]
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
    rows = _Rows(reverse)
    columns = lanes.channels
    args = [
        *rows.add("DT", dt, columns), pointer(A), *rows.add("W", weight, lanes.states),
        *rows.add("Z", dt if z is None else z, columns, given=z is not None),
        pointer(dt_bias), *rows.documents(seq_idx), *rows.add("V", value, columns),
        pointer(carried), lanes.segments, b, l, e, n,
    ]  # fmt: skip
    shared = _shared_bytes(lanes, rows, staged=2, b_c=1)
    settings = _settings(lanes, n, rows, dt_softplus, seq_idx, shared) | {"FORWARD": int(forward)}
    grid = (lanes.blocks(b, e), lanes.segments - 1)
    launch(Launch("scan_carry", settings, grid, lanes.warps * WARP, shared, args), dt.device)


def saved_shape(b: int, l: int, e: int, n: int) -> tuple[int, ...]:
    """Shape of the saved states: those before each tile of steps."""
    return b, -(-l // TILE), e, n


class _Rows:
    """Arguments and compile-time settings of tensors that have a row for each step."""

    def __init__(self, reverse: bool) -> None:
        self.reverse = reverse
        self.settings: dict[str, str | int] = {}
        self._sizes: dict[str, int] = {}

    def add(self, name: str, T: Tensor, columns: int, *, given: bool = True) -> list[int]:
        """Declare a (b, l, ...) tensor under a name; its arguments: place and strides."""
        self.settings |= {f"{name}_T": FORMATS[T.dtype], f"{name}_VEC": _vector(T, columns)}
        self._sizes[name] = T.element_size()
        return [self.first(T) if given else 0, *self.strides(T)]

    def raw_bytes(self, lanes: Lanes) -> int:
        """Shared memory of their tiles; each row of a tile has 16 bytes of padding."""
        total = 0
        for name, size in self._sizes.items():
            columns = lanes.states if name in "BCW" else lanes.channels
            tile = -(-TILE * (columns * size + 16) // 16) * 16
            total += tile * (1 if name == "Y" else lanes.buffers)
        return total

    def documents(self, seq_idx: Tensor | None) -> list[int]:
        """The same of the documents' numbers, which may be missing."""
        return [0, 0, 0] if seq_idx is None else [self.first(seq_idx), *self.strides(seq_idx)]

    def first(self, T: Tensor) -> int:
        """Where the first step in time stands."""
        last = (T.shape[1] - 1) * T.stride(1) * T.element_size() if self.reverse else 0
        return T.data_ptr() + last

    def strides(self, T: Tensor) -> list[int]:
        """Numbers from row to row, and from a step to the next in time."""
        return [T.stride(0), -T.stride(1) if self.reverse else T.stride(1)]


def _vector(T: Tensor, columns: int) -> int:
    """How many neighbours one access can take: at most 16 bytes, aligned, a divisor of all."""
    vector = 16 // T.element_size()
    steps = (columns, T.shape[-1], *T.stride()[:-1], T.data_ptr() // T.element_size())
    while any(step % vector for step in steps):
        vector //= 2
    return vector


def _settings(
    lanes: Lanes, n: int, rows: _Rows, softplus: bool, seq_idx: Tensor | None, shared: int
) -> dict[str, str | int]:
    """What every kernel is compiled with."""
    sizes = {
        "S": lanes.S,
        "SL": lanes.SL,
        "WARPS": lanes.warps,
        "EXACT": int(n == lanes.S * lanes.SL),
    }
    sizes |= {"BUFFERS": lanes.buffers, "SHARED": shared, "SEQ": int(seq_idx is not None)}
    return sizes | {"SOFTPLUS": int(softplus)} | rows.settings


def _shared_bytes(lanes: Lanes, rows: _Rows, *, staged: int, b_c: int, more: int = 0) -> int:
    """Shared memory: `staged` float32 rows a channel, `b_c` a state, `more` numbers; raw tiles."""
    floats = lanes.channels * (staged * PITCH + 2) + b_c * lanes.states * PITCH + TILE + more
    return 4 * floats + rows.raw_bytes(lanes) + 64


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


def _sum(parts: Tensor) -> Tensor:
    """The sum over the first axis."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


# Warps on each multiprocessor below which the length is cut into segments, and with them.
FEW_WARPS, MANY_WARPS = 6, 20


@cache
def forward_lanes(b: int, l: int, e: int, n: int, device: torch.device) -> Lanes:
    """The division that was fastest where it was measured (an H100; benchmarks/results)."""
    lanes = _division(b, l, e, n, device)
    if n > 16:
        return lanes
    return replace(lanes, warps=4 if _warps(lanes, b, e, device) < MANY_WARPS else 8)


@cache
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
