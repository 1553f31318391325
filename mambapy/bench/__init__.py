"""Benchmarks: `mambapy bench scan | block | heads | experts | vision | train | decode | plot`.

options (the flags), cases (tables of what is measured), rivals (who is measured, and where from),
measure (rounds and statistics), process and worker (each contestant runs in a process of its own),
work and contestants/ (what runs there), memory, machine, records and run (the file of results),
table (the terminal), plots (curves, bars, style).
"""

from typing import TYPE_CHECKING, Any

from mambapy.bench.options import Options

if TYPE_CHECKING:
    from mambapy.bench.plots import plot
    from mambapy.bench.run import bench

__all__ = ["Options", "bench", "plot"]


def __getattr__(name: str) -> Any:
    """Import what measures and draws only when it is used."""
    if name == "bench":
        from mambapy.bench.run import bench

        return bench
    if name == "plot":
        from mambapy.bench.plots import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
