"""How the plots look: colours, markers, axes, the title above and the small print below."""

from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ as well.
BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PINK = "#009E73", "#CC79A7"
INK, GREY, PALE = "#333333", "#8A8A8A", "#E6E6E6"

# contestant -> colour, marker, name in the legend; in the legend's order.
STYLES = {
    "floor": (INK, "", "floor (matrix products)"),
    "mambapy": (BLUE, "o", "mambapy"),
    "auto": (BLUE, "o", "mambapy (auto)"),
    "mambapy float32": (BLUE, "o", "mambapy, float32"),
    "mambapy bfloat16": (BLUE, "o", "mambapy, bfloat16"),
    "mambapy int8": (BLUE, "o", "mambapy, int8"),
    "mambapy conv": (SKY, "v", "mambapy, recompute conv"),
    "mambapy scan": (ORANGE, "^", "mambapy, recompute scan"),
    "mambapy block": (GREEN, "P", "mambapy, recompute block"),
    "mambapy eager": (PINK, "D", "mambapy, without a graph"),
    "cpu": (INK, "x", "mambapy (cpu)"),
    "chunked": (SKY, "v", "mambapy (chunked)"),
    "deterministic": (INK, "x", "mambapy (auto), deterministic"),
    "pscan": (ORANGE, "^", "mambapy (pscan)"),
    "reference": (PINK, "D", "mambapy (reference)"),
    "official": (GREEN, "P", "mamba_ssm"),
    "mamba.py": (RED, "s", "mamba.py"),
    "transformers": (GREEN, "P", "transformers"),
    "mamba2": (BLUE, "o", "mambapy, Mamba-2"),
    "mamba3": (SKY, "v", "mambapy, Mamba-3"),
    "transformers mamba2": (GREEN, "P", "transformers, Mamba-2"),
    "dense": (SKY, "v", "one MLP of as many active parameters"),
    "vit": (GREEN, "P", "ViT, torch's layers"),
    "transformers loop": (GREEN, "P", "transformers, loop over experts"),
    "transformers grouped": (ORANGE, "^", "transformers, grouped_mm"),
}


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.3g} B"


def clean(axes: Any) -> None:
    """No frame where there is nothing to read."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=8.5)
    axes.xaxis.label.set_color(INK)
    axes.set_axisbelow(True)


def frame(figure: Any, result: dict[str, Any], title: str, notes: str, *, legend: bool) -> float:
    """Lay the panels out, with the title above and the small print below them.

    Returns:
        The panels' left edge, as a share of the width.
    """
    height = figure.get_figheight()
    top = 0.8 if legend else 0.5
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1 - top / height))
    left: float = figure.axes[0].get_position().x0
    up = 1 - 0.12 / height
    figure.text(left, up, title, va="top", fontsize=13, weight="bold", color=INK)
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = f"{where}; torch {versions['torch']}; {result['date']}; {notes}"
    figure.text(left, 0.1 / height, text, fontsize=8, color=GREY)
    return left
