"""Recording of CUDA graphs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# torch allows one recording at a time in a process.
_recording = threading.Lock()


@contextmanager
def recorded(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None
) -> Iterator[None]:
    """Record what is launched on the stream, instead of running it.

    The stream is the caller's own: torch's default one belongs to whichever device came first.
    Graphs that take turns, and leave nothing to each other, may share a pool of memory.
    """
    with _recording, torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        yield
