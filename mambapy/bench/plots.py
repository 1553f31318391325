"""Plots of the results: drawn from the files that `bench` writes, and from nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambapy.bench.bars import bars
from mambapy.bench.cases import KINDS
from mambapy.bench.curves import curves
from mambapy.errors import DataError

Draw = Callable[[dict[str, Any]], Any]

_CURVES: dict[str, Draw] = {
    "time": lambda result: curves(result, "median_s"),
    "memory": lambda result: curves(result, "peak_bytes"),
}
# kind -> picture -> what draws it; None where the results hold too little for it.
PICTURES: dict[str, dict[str, Draw]] = {
    "scan": _CURVES,
    "block": _CURVES,
    # Few points: README's tables say it all.
    "heads": {},
    "experts": {},
    "vision": {},
    "train": {"step": bars},
    "decode": {"speed": bars},
}


def plot(results: Path, out: Path) -> list[str]:
    """Draw every file of results in a folder.

    Args:
        results: the folder that `bench` wrote to.
        out: the folder for the pictures, PNG.

    Returns:
        The pictures' paths.

    Raises:
        DataError: there are no results, or a file is damaged.
        MissingExtraError: matplotlib is not installed.
        CheckpointError: a picture cannot be written.
    """
    from mambapy.checkpoints import atomic_write
    from mambapy.train.report import require_matplotlib

    require_matplotlib()
    written: list[str] = []
    for path, result in _read(results):
        for name, draw in PICTURES[result["kind"]].items():
            try:
                figure = draw(result)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is not as bench wrote it: {error!r}") from error
            if figure is None:
                continue
            picture = out / f"{path.stem}_{name}.png"
            with atomic_write(picture) as temporary:
                figure.savefig(temporary, format="png", dpi=144, facecolor="white")
            written.append(str(picture))
    if not written:
        raise DataError(
            f"{results} holds nothing to draw; `mambapy bench block` measures something"
        )
    return written


def _read(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of results in a folder, and what they hold."""
    if not folder.is_dir():
        raise DataError(f"--results {folder}: no such folder")
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        if isinstance(result, dict) and result.get("kind") in KINDS:
            found.append((path, result))
    return found
