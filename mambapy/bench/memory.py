"""How much memory a piece of work took, at its highest.

On a CPU: the high-water mark of the process's resident set during the first run of the work, less
the resident set just before it, when the libraries, the inputs and the weights were there and every
kernel had run once on something tiny. So it is what the work itself allocates: activations,
gradients, buffers. (Over later runs the resident set grows by what the C library keeps of freed
memory, by different amounts each time. The mark of the whole process is given too, and has that.)

    Linux    /proc/self/status has the mark, and it can be set back before each piece of work.
             (ru_maxrss will not do: a child inherits its parent's mark through fork and exec.)
    macOS    ru_maxrss has the mark and nothing sets it back, so what is given is by how much the
             work raised it: too little, where something before the work had gone higher.
    Windows  neither exists, and there is no figure.

Before the rest is taken, memory that was freed but that the C library holds on to is given back
where it can be (glibc), so that the work cannot hide in it.

On CUDA: torch's own count of allocated bytes, in the same two places.

worker.py loads this file by path; nothing here may import mambapy.
"""

import contextlib
import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """Measures the peak memory of pieces of work on one device."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._rest: int | None = None
        self.rest()

    def rest(self) -> None:
        """Note what is taken up just before a piece of work begins."""
        if self.device == "cuda":
            _cuda().reset_peak_memory_stats()
            self._rest = _cuda().memory_allocated()
        else:
            _trim()
            self._rest = resident() if reset() else high_water()

    def peak(self) -> tuple[int | None, int | None]:
        """Bytes at the highest point since `rest`: above what was taken then, and altogether."""
        top = _cuda().max_memory_allocated() if self.device == "cuda" else high_water()
        if top is None or self._rest is None:
            return None, None
        return max(0, top - self._rest), top


def resident() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say."""
    return _status("VmRSS")


def high_water() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say."""
    value = _status("VmHWM")
    if value is not None:
        return value
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return None
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def reset() -> bool:
    """Bring the high-water mark down to what is in memory now; whether the system can."""
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return resident() is not None


def _trim() -> None:
    """Give freed memory back to the system, where the C library is glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    """A field of /proc/self/status, in bytes."""
    try:
        text = STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def _cuda() -> Any:
    """torch.cuda, imported only where it is measured."""
    return importlib.import_module("torch").cuda
