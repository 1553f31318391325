"""The table on the terminal: a line for each case and pass, a column for each contestant."""

from collections.abc import Callable, Sequence
from typing import Any

Write = Callable[[str], None]
_WIDTH = 21


class Table:
    """Writes lines as records come in.

    Args:
        contestants: the columns.
        write: takes each line.
    """

    def __init__(self, contestants: Sequence[str], write: Write) -> None:
        self.contestants = [*contestants]
        self.write = write
        self._first = 0

    def head(self, names: Sequence[str]) -> None:
        """The line above all others; `names` are those of the cases."""
        self._first = max(len(name) for name in names) + 10
        self._line("", self.contestants)

    def row(self, record: dict[str, Any]) -> None:
        """A record: time or tokens a second, and the ratio to the floor, or else to the best.

        Its memory is on a line of its own, where it was measured. A time of one run has a mark *.
        """
        found = record["contestants"]
        if not found:
            self._line(f"{record['name']} {record['pass']}", ["-"] * len(self.contestants))
            return
        best = found.get("floor") or min(found.values(), key=lambda one: one["median_s"])
        cells = []
        for name in self.contestants:
            one = found.get(name)
            cells.append(_cell(one, best["median_s"]) if one else "-")
        self._line(f"{record['name']} {record['pass']}", cells)
        peaks = [found.get(name, {}).get("peak_bytes") for name in self.contestants]
        if any(peak is not None for peak in peaks):
            self._line("memory", ["-" if peak is None else megabytes(peak) for peak in peaks])

    def _line(self, first: str, cells: Sequence[str]) -> None:
        """One line, its columns set to the right."""
        if first == "memory":
            first = first.rjust(self._first)
        self.write(first.ljust(self._first) + "".join(cell.rjust(_WIDTH) for cell in cells))


def _cell(one: dict[str, Any], best_s: float) -> str:
    """A time or a speed, and the ratio of its time to the best."""
    if "tokens_per_s" in one:
        shown = f"{one['tokens_per_s']:,.0f} tok/s"
    else:
        shown = duration(one["median_s"])
    mark = "*" if one["rounds"] == 1 else " "
    return f"{shown}{mark}{one['median_s'] / best_s:.2f}x"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def megabytes(count: float) -> str:
    """Bytes in MB."""
    return f"{count / 1e6:,.0f} MB"
