"""What machine this is, as far as a reader of the results needs to know: no names, no paths."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def facts(threads: int | None, gpu: str | None) -> dict[str, Any]:
    """CPU model, cores, threads used, memory in bytes, operating system, GPU."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
    }


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cores() -> int | None:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    return platform.processor() or platform.machine()
