"""Numbers that a device has worked out, read some steps later, so that nobody waits for them."""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# How many steps the host may be ahead of a GPU. It must never be idle, and never far behind.
LAG = 2


class _Pending(NamedTuple):
    """Numbers on their way: what the host knows of them, where they arrive, and when."""

    known: Any
    numbers: Tensor
    arrived: Any


class Readback:
    """A queue of numbers, copied to the host while the device goes on.

    Args:
        device: where the numbers are.
        lag: how many entries may be on their way; 0 to read each at once.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self._on_gpu, self._lag = device.type == "cuda", lag
        self._queue: deque[_Pending] = deque()

    def push(self, known: Any, numbers: Tensor) -> None:
        """Queue numbers (n,), which may be overwritten afterwards, with something known of them."""
        arrived = None
        if self._on_gpu:
            # The stream of that device, which need not be the current one.
            stream = torch.cuda.current_stream(numbers.device)
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            arrived = stream.record_event()
        elif self._lag:
            numbers = numbers.clone()
        self._queue.append(_Pending(known, numbers, arrived))

    def pop(self, *, everything: bool = False) -> Iterator[tuple[Any, list[float]]]:
        """The oldest entries, until no more than `lag`, or none, are left."""
        while len(self._queue) > (0 if everything else self._lag):
            known, numbers, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield known, numbers.tolist()
