"""How the scan's kernels divide channels, states and length among threads.

chosen     the division for given tensors: as measured (tuning.py), else by rule
forward_lanes, backward_lanes    the rules
fitted     as near to a division as the card's shared memory allows
others     what could be faster on another card
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mambapy.errors import BackendError
from mambapy.ops.gpu import tuning

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


def chosen(
    kernel: str, sizes: tuple[int, int, int, int], run: Callable[[Lanes], Any], **tensors: Tensor
) -> Lanes:
    """The fastest lanes where they have been measured, else the rule's.

    Args:
        kernel: "scan_forward" or "scan_backward".
        sizes: b, l, e, n.
        run: runs the kernel, with these lanes.
        tensors: of which the kernel stages tiles, by letter.
    """
    x, (b, l, e, n) = tensors["X"], sizes
    # Of their layouts, what decides about shared memory.
    layouts = tuple((letter, T.dtype, 1) for letter, T in tensors.items())

    def run_whole(lanes: Lanes) -> None:
        if fitted(kernel, lanes, layouts, x.device) != lanes:
            raise BackendError("it does not fit the card")
        run(lanes)

    return tuning.best(
        kernel,
        # Lengths of about the same size are divided alike.
        (b, 1 << (l - 1).bit_length(), e, n, *(FORMATS[T.dtype] for T in tensors.values())),
        ruled(kernel, sizes, layouts, x.device),
        partial(others, length=l, backward=kernel == "scan_backward"),
        run_whole,
        x.device,
    )


def others(rule: Lanes, *, length: int, backward: bool) -> Iterator[Lanes]:
    """Lanes that may be faster than the rule's on some card; the most promising first."""
    for warps in (2 * rule.warps, rule.warps // 2):
        if 1 <= warps <= 16:
            yield replace(rule, warps=warps)
    for segments in (rule.segments // 2, 2 * rule.segments, 3 * rule.segments // 2):
        if 1 <= segments <= max(1, length // (4 * TILE)):
            yield replace(rule, segments=segments)
    for S, SL in ((2 * rule.S, rule.SL // 2), (rule.S // 2, 2 * rule.SL)):
        if 1 <= S <= 16 and 1 <= SL <= WARP:
            yield replace(rule, S=S, SL=SL)
    if backward and rule.run > 4:
        yield replace(rule, run=rule.run // 2)


@lru_cache(1024)
def fitted(
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
        if shared_bytes(name, less, layouts) <= room:
            return less
    raise BackendError(f"{name} needs more shared memory than the {room} bytes of this card")


def shared_memory(device: torch.device) -> int:
    """Bytes that a block can have on a card."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shared_bytes(name: str, lanes: Lanes, layouts: tuple[tuple[str, torch.dtype, int], ...]) -> int:
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


# Warps on each multiprocessor that keep it busy; and as many of larger threads, forward.
MANY_WARPS, MANY_LARGE_WARPS = 20, 11
# Steps and parts below which it is not worth another launch to cut the length.
SHORT = {"scan_forward": 1024, "scan_backward": 512}
FEWEST_PARTS = {"scan_forward": 3, "scan_backward": 2}
# A segment has that many steps at least; and that many are too few to fill the card a second time.
LEAST_STEPS, FEW_STEPS = 2 * TILE, 1024


@lru_cache(1024)
def ruled(
    kernel: str,
    sizes: tuple[int, int, int, int],
    layouts: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
) -> Lanes:
    """The division that was fastest where it was measured (an H100; benchmarks/results)."""
    b, l, e, n = sizes
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def warps(lanes: Lanes) -> float:
        return lanes.blocks(b, e) * lanes.warps / processors

    def cut(lanes: Lanes) -> Lanes:
        lanes = fitted(kernel, lanes, layouts, device)
        room = processors * _at_once(kernel, lanes, layouts, device)
        parts = 1
        if l >= SHORT[kernel]:
            parts = _segments(l, lanes.blocks(b, e), room, FEWEST_PARTS[kernel])
        return replace(lanes, segments=parts)

    padded = 1 << (n - 1).bit_length()
    S = min(4 if n <= 16 else 8, padded)
    lanes = Lanes(S, padded // S)
    if n > 128:
        # Shared memory is what there is least of.
        return cut(replace(lanes, warps=2, run=4, buffers=1))
    if kernel == "scan_backward":
        return cut(replace(lanes, warps=8 if 16 < n <= 64 and warps(lanes) >= MANY_WARPS else 4))
    # Larger threads have less to add across lanes, but there must be enough of them.
    large = replace(lanes, S=2 * S, SL=lanes.SL // 2)
    if n == 16 and (warps(large) >= MANY_LARGE_WARPS or _long(cut(large), l)):
        return cut(large)
    return cut(replace(lanes, warps=8 if n <= 16 and warps(lanes) >= MANY_WARPS else 4))


def _long(lanes: Lanes, l: int) -> bool:
    """Whether the length fills the card with many segments that are long themselves."""
    return lanes.segments >= 8 and l >= FEW_STEPS * lanes.segments


def _at_once(
    kernel: str,
    lanes: Lanes,
    layouts: tuple[tuple[str, torch.dtype, int], ...],
    device: torch.device,
) -> int:
    """Blocks that a multiprocessor has shared memory for; the card takes a kilobyte of each."""
    whole = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return whole // (shared_bytes(kernel, lanes, layouts) + 1024)


def _segments(l: int, blocks: int, room: int, fewest: int) -> int:
    """In how many parts the length is cut where a card runs `room` blocks at the same time.

    As many as fill it, so that none waits for a few that are left; of a long sequence, several
    times, so that all end at about the same time. Two are not worth the decays that both need,
    unless they fill it well.
    """
    cuts = [k * room // blocks for k in range(1, 4)]
    best = cuts[0]
    if best < fewest:
        return 1
    if best == 2 and 2 * blocks < 0.9 * room:
        best = cuts[1]
    best = max(best, *(cut for cut in cuts if cut * FEW_STEPS <= l), 1)
    return max(1, min(best, l // LEAST_STEPS))
