"""How a kernel divides its work: by rule at once, or, where that was asked for, as measured.

    tune    the context in which candidates are measured
    best    the division for a kernel and its sizes: measured earlier, or now, or the rule's

What was measured is kept on disk, a file for each kind of card, kernel and sizes, and used from
then on. Another division adds in another order: results may differ in their last digits.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from mambapy.errors import BackendError, ConfigError
from mambapy.ops.gpu import cuda, disk

D = TypeVar("D", bound=Any)  # a dataclass
# Timed runs of a candidate, after one that compiles it.
RUNS = 5
# What is known of a kernel, sizes and device; None: nothing was measured.
_choices: dict[tuple[Any, ...], Any] = {}
# Until when candidates are measured, seconds of `time.monotonic`.
_until = 0.0


@contextmanager
def tune(seconds: float = 20.0) -> Iterator[None]:
    """Measure how the kernels of the GPU best divide their work, for the sizes they now get.

    Each size is measured once, when it first comes; then it is known, in later processes too
    (on disk: see MAMBAPY_CACHE in the README). Without it, rules decide. Where a CUDA graph is
    recorded nothing is measured.

    Args:
        seconds: most of them that all measurements together may take, compilation included; a
            kernel that is being compiled then is waited for.

    Raises:
        ConfigError: `seconds` is not positive.
    """
    global _until
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds} must be positive")
    before, _until = _until, time.monotonic() + seconds
    try:
        yield
    finally:
        _until = before


def best(
    kernel: str,
    sizes: tuple[Any, ...],
    default: D,
    candidates: Callable[[D], Iterable[D]],
    run: Callable[[D], Any],
    device: torch.device,
) -> D:
    """The division for these sizes.

    Args:
        kernel: its name.
        sizes: everything that what is fastest depends on.
        default: the rule's.
        candidates: what else there could be, from the rule's on; the most promising first.
        run: runs the kernel so divided; a BackendError says that it cannot be.
        device: where.
    """
    key = (kernel, sizes, device)
    if key not in _choices:
        kept = disk.read(_file(*key))
        _choices[key] = None if kept is None else type(default)(**json.loads(kept))
    known: D | None = _choices[key]
    if known is not None:
        return known
    if time.monotonic() >= _until or torch.cuda.is_current_stream_capturing():
        return default
    found, all_were_tried = _fastest(default, candidates, run, device)
    if all_were_tried:
        _choices[key] = found
        disk.write(_file(*key), json.dumps(asdict(found)).encode())
    return found


def _fastest(
    default: D,
    candidates: Callable[[D], Iterable[D]],
    run: Callable[[D], Any],
    device: torch.device,
) -> tuple[D, bool]:
    """The fastest of those that fit into half of the time that is left; whether all did."""
    now = time.monotonic()
    end = now + (_until - now) / 2
    times = {default: _milliseconds(default, run, device)}
    others = [candidate for candidate in candidates(default) if candidate != default]
    for candidate in others:
        if time.monotonic() >= end:
            break
        times[candidate] = _milliseconds(candidate, run, device)
    return min(times, key=lambda candidate: times[candidate]), len(times) > len(others)


def _milliseconds(candidate: D, run: Callable[[D], Any], device: torch.device) -> float:
    """The median of some runs."""
    try:
        run(candidate)
    except BackendError:
        return float("inf")
    times = []
    with torch.cuda.device(device):
        for _ in range(RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(candidate)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def _file(kernel: str, sizes: tuple[Any, ...], device: torch.device) -> str:
    """Where the choice is kept; what was chosen for other kernels is elsewhere."""
    card = torch.cuda.get_device_properties(device).name
    readable = "".join(c if c.isalnum() else "-" for c in card)
    key = hashlib.sha256(f"{_sources()} {kernel} {sizes}".encode()).hexdigest()
    return f"tuned-{readable}-{kernel}-{key[:16]}.json"


@cache
def _sources() -> str:
    """What the kernels are, and how their work can be divided."""
    files = [*sorted(cuda.SOURCES.iterdir()), Path(__file__).with_name("lanes.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
