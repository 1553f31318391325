"""Curves: a value of each contestant over each size that was swept, on logarithmic axes."""

from collections.abc import Callable, Sequence
from typing import Any

from mambapy.bench.style import BLUE, GREY, INK, PALE, STYLES, clean, frame, size
from mambapy.bench.table import duration

SWEEPS = ("length", "batch", "d_model", "d_inner", "d_state")
_SIZES = ("batch", "length", "d_model", "d_inner", "d_state")
_SUBJECTS = {"scan": "Selective scan", "block": "One Mamba block"}

# size, value, its quartiles, rounds
Point = tuple[float, float, float, float, int]
Lines = dict[str, list[Point]]


def curves(result: dict[str, Any], value: str) -> Any | None:
    """A figure with a row of panels for each pass, a column for each sweep.

    Args:
        result: what a file of results holds.
        value: "median_s" or "peak_bytes".

    Returns:
        The figure, or None where there is no curve of two points.
    """
    from matplotlib.figure import Figure

    passes = [*dict.fromkeys(record["pass"] for record in result["cases"])]
    panels = {(p, x): _lines(result, p, x, value) for p in passes for x in SWEEPS}
    drawn = [lines for lines in panels.values() if any(len(line) > 1 for line in lines.values())]
    passes = [p for p in passes if any(panels[p, x] in drawn for x in SWEEPS)]
    sweeps = [x for x in SWEEPS if any(panels[p, x] in drawn for p in passes)]
    if not drawn:
        return None
    figure = Figure(figsize=(max(10.4, 4.1 * len(sweeps) + 0.6), 3.1 * len(passes) + 1.1))
    grid = figure.subplots(len(passes), len(sweeps), squeeze=False, sharey="row")
    for row, pass_ in zip(grid, passes, strict=True):
        for axes, x in zip(row, sweeps, strict=True):
            for name, line in panels[pass_, x].items():
                _draw(axes, name, line)
            _scale(axes, panels[pass_, x], duration if value == "median_s" else size)
            axes.set_xlabel(_title(result, x))
            clean(axes)
        row[0].set_ylabel(pass_, color=INK, fontsize=11)
    what, notes = {
        "median_s": ("time", "median, band: quartiles; hollow: run once"),
        "peak_bytes": ("peak memory", "above what the process had at rest"),
    }[value]
    title = f"{_SUBJECTS[result['kind']]}: {what}"
    left = frame(figure, result, title, notes, legend=True)
    _legend(figure, {name for lines in drawn for name in lines}, left)
    return figure


def _lines(result: dict[str, Any], pass_: str, x: str, value: str) -> Lines:
    """Each contestant's points from left to right."""
    lines: Lines = {}
    records = [r for r in result["cases"] if r["pass"] == pass_ and x in r["sweeps"]]
    taken = {record.get("auto_takes") for record in records}
    for record in sorted(records, key=lambda record: record[x]):
        for name, one in record["contestants"].items():
            # Products alone are no floor of memory; and where `auto` runs one backend throughout,
            # that one needs no line of its own.
            if (name == "floor" and value != "median_s") or taken == {name}:
                continue
            point = (record[x], one["median_s"], one["q1_s"], one["q3_s"], one["rounds"])
            if value != "median_s":
                point = (record[x], *(one[value],) * 3, 0)
            if one[value]:
                lines.setdefault(name, []).append(point)
    return lines


def _draw(axes: Any, name: str, points: Sequence[Point]) -> None:
    """One contestant's curve; what was run only once is hollow."""
    color, marker, _ = STYLES[name]
    xs, values, lows, highs, rounds = zip(*points, strict=True)
    if name == "floor":
        axes.plot(xs, values, "--", color=color, linewidth=1.4, zorder=2)
        return
    ours = color == BLUE
    axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
    axes.plot(xs, values, color=color, linewidth=2.4 if ours else 1.6, zorder=3 + ours)
    for x, y, count in zip(xs, values, rounds, strict=True):
        face = "white" if count == 1 else color
        look = {"markerfacecolor": face, "markeredgecolor": color, "markersize": 5.5}
        axes.plot([x], [y], marker, zorder=4 + ours, **look)


def _scale(axes: Any, lines: Lines, show: Callable[[float], str]) -> None:
    """Logarithmic axes with the sizes themselves below, and values in their units at the side."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    sizes = sorted({point[0] for line in lines.values() for point in line})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    low, high = axes.get_ylim()
    steps = (1,) if high / low > 100 else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.06)
    axes.grid(axis="y", which="major", color=PALE, linewidth=0.8)


def _title(result: dict[str, Any], x: str) -> str:
    """What a panel shows: the size that changes, and the ones that do not."""
    records = [record for record in result["cases"] if x in record["sweeps"]]
    names = [name for name in _SIZES if name in records[0] and name != x]
    fixed = [f"{name} {records[0][name]}" for name in names]
    return f"{x}   ({', '.join(fixed)})"


def _legend(figure: Any, drawn: set[str], left: float) -> None:
    """One line above the panels."""
    from matplotlib.lines import Line2D

    names = [name for name in STYLES if name in drawn]
    samples = []
    for name in names:
        color, marker, _ = STYLES[name]
        style, width = ("--", 1.4) if name == "floor" else ("-", 2.4 if color == BLUE else 1.6)
        samples.append(Line2D([], [], color=color, marker=marker, ls=style, lw=width))
    figure.legend(
        samples,
        [STYLES[name][2] for name in names],
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.38 / figure.get_figheight()),
        ncols=len(names),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        columnspacing=1.4,
        handlelength=1.8,
        borderpad=0,
        edgecolor=GREY,
    )
