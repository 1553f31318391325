"""Bars: tokens a second of each contestant, beside the floor, and the memory of training."""

from collections.abc import Sequence
from typing import Any

from mambapy.bench.style import GREY, INK, STYLES, clean, frame, size

Record = dict[str, Any]


def bars(result: dict[str, Any]) -> Any | None:
    """A figure with a panel for each pass, a row of them for each case.

    Args:
        result: what a file of results holds.

    Returns:
        The figure, or None where no contestant has a figure.
    """
    from matplotlib.figure import Figure

    records = result["cases"]
    names = [n for n in STYLES if n != "floor" and _any_has(records, n)]
    if not names:
        return None
    rows = [_panels(records, name, names[0]) for name in dict.fromkeys(r["name"] for r in records)]
    width, height = len(rows[0]), 0.42 * len(names) + 1.1
    figure = Figure(figsize=(4.4 * max(2, width) + 1.2, height * len(rows) + 0.8))
    grid = figure.subplots(len(rows), width, squeeze=False, sharey=True)
    for line, panels in zip(grid, rows, strict=True):
        for axes, (label, draw, record) in zip(line, panels, strict=True):
            draw(axes, names, record)
            axes.set_xlabel(label if len(rows) == 1 else f"{label}\n{_model(record)}")
            axes.set_yticks(range(len(names)), [STYLES[name][2] for name in names])
            axes.set_ylim(len(names) - 0.4, -0.9)
            clean(axes)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0, labelsize=9.5)
    decoded = any(record["pass"] == "decode" for record in records)
    share = "of the floor, or of the memory's bandwidth" if decoded else "of the floor"
    notes = f"median, whiskers: quartiles; in brackets: share {share}"
    title = _what(result, records[0])
    if len(rows) == 1:
        title += f": {_model(records[0])}"
    frame(figure, result, title, notes, legend=False)
    return figure


def _panels(records: Sequence[Record], case: str, first: str) -> list[tuple[str, Any, Record]]:
    """What is drawn of a case: label, function and record of each panel."""
    mine = [record for record in records if record["name"] == case]
    panels: list[tuple[str, Any, Record]] = []
    panels += [(f"{record['pass']}: tokens a second", _speed, record) for record in mine]
    steps = [record for record in mine if record["pass"] == "step"]
    if _any_has(steps, first, "process_bytes"):
        panels += [("memory of the process", _memory, record) for record in steps]
    return panels


def _any_has(records: Any, name: str, field: str = "median_s") -> bool:
    """Whether a contestant has a figure in any record."""
    return any(record["contestants"].get(name, {}).get(field) for record in records)


def _what(result: dict[str, Any], record: Record) -> str:
    """What was done."""
    batch, length = record["batch"], record["length"]
    if result["kind"] == "train":
        return f"Training on {batch} x {length} tokens a step"
    return f"Reading {length} tokens, then writing {record.get('tokens')}"


def _model(record: Record) -> str:
    """With what model, and how many rows where that is not one."""
    batch = f"batch {record['batch']}, " if record["batch"] > 1 and "tokens" in record else ""
    return f"{batch}{record['n_layers']} layers, d_model {record['d_model']}"


def _speed(axes: Any, names: Sequence[str], record: Record) -> None:
    """Bars from the top down, each with its figure, and the floor as a line."""
    found = record["contestants"]
    floor = found.get("floor", {}).get("tokens_per_s")
    for place, name in enumerate(names):
        one = found.get(name)
        if one is None:
            axes.text(0, place, " not measured", va="center", fontsize=8.5, color=GREY)
            continue
        speed = one["tokens_per_s"]
        tokens = speed * one["median_s"]
        slow, fast = tokens / one["q3_s"], tokens / one["q1_s"]
        axes.barh(place, speed, height=0.62, color=STYLES[name][0])
        axes.errorbar(
            speed, place, xerr=[[speed - slow], [fast - speed]], color=INK, linewidth=1, capsize=2
        )
        share = one.get("bandwidth_fraction") or (speed / floor if floor else None)
        text = f"{speed:,.0f}" + (f"  ({100 * share:.0f} %)" if share else "")
        _label(axes, fast, place, text)
    if floor:
        axes.axvline(floor, color=INK, linestyle="--", linewidth=1.4, zorder=1)
        dtype = record.get("dtype", "float32")
        name = f"floor, {dtype}" if record["pass"] == "decode" else "floor"
        axes.text(floor, -0.62, f"{name}: {floor:,.0f} ", ha="right", fontsize=8.5, color=INK)
    axes.set_xlim(0, 1.25 * max(one["tokens_per_s"] for one in found.values()))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)


def _memory(axes: Any, names: Sequence[str], record: Record) -> None:
    """Bars of the most memory that a process had."""
    values = [record["contestants"].get(name, {}).get("process_bytes") for name in names]
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None:
            axes.text(0, place, " not measured", va="center", fontsize=8.5, color=GREY)
        else:
            axes.barh(place, value, height=0.62, color=STYLES[name][0])
            _label(axes, value, place, size(value))
    axes.set_xlim(0, 1.25 * max(value or 0 for value in values))
    axes.xaxis.set_major_formatter(lambda x, _: size(x) if x else "0")
    axes.locator_params(axis="x", nbins=5)


def _label(axes: Any, x: float, y: float, text: str) -> None:
    """A bar's figure, to its right, legible across a line."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    at = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), fontsize=8.5, color=INK, bbox=box, **at)
