"""The formats of checkpoints, and how one is recognised by what is in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambapy.checkpoints.formats.bamba import HFBamba
from mambapy.checkpoints.formats.base import Format, Keys, Part
from mambapy.checkpoints.formats.huggingface import (
    HFFalconMamba,
    HFMamba,
    HFMamba2,
    HuggingFace,
)
from mambapy.checkpoints.formats.jamba import HFJamba
from mambapy.checkpoints.formats.mistral import Mistral
from mambapy.checkpoints.formats.native import Native
from mambapy.checkpoints.formats.official import Official
from mambapy.errors import CheckpointError

__all__ = ["CONFIG", "WRITTEN", "Format", "Keys", "Part", "recognise", "to_write"]

TRANSFORMERS: dict[str, HuggingFace] = {
    each.model_type: each for each in (HFMamba(), HFFalconMamba(), HFMamba2(), HFBamba(), HFJamba())
}
CONFIG, PARAMS = "config.json", "params.json"
# What can be written, by the name that users give.
WRITTEN = ("mambapy", "official", "hf")


def recognise(directory: Path) -> tuple[Format, dict[str, Any]]:
    """A checkpoint's format and the values of its config.json.

    Raises:
        CheckpointError: there is no such folder, no configuration in it, or none that is known.
    """
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    mistral = Mistral()
    files = {path.name for path in directory.iterdir()}
    # Codestral's folder has Mistral's files and transformers' side by side, or one of the two.
    if PARAMS in files and (CONFIG not in files or not _has(files, *TRANSFORMERS["mamba2"].stems)):
        return mistral, _read_json(directory / PARAMS)
    if CONFIG not in files:
        raise CheckpointError(f"{directory} holds no checkpoint: it has no {CONFIG}")
    values = _read_json(directory / CONFIG)
    if "format" in values:
        if values["format"] != Native.name:
            raise CheckpointError(
                f'{directory / CONFIG} is not of this library ("format" is not "{Native.name}")'
            )
        return Native(), values
    if values.get("model_type") in TRANSFORMERS:
        return TRANSFORMERS[values["model_type"]], values
    if {"d_model", "n_layer"} <= set(values) and "model_type" not in values:
        return Official(), values
    known = ", ".join(TRANSFORMERS)
    raise CheckpointError(
        f'{directory / CONFIG} is of no known format: it has neither "format": '
        f'"{Native.name}", nor a "model_type" of {known} '
        f"(it is {values.get('model_type')!r}), nor the papers' d_model and n_layer"
    )


def to_write(name: str, model_type: str, values: Mapping[str, Any]) -> Format:
    """The format that a user names: "mambapy", "official" or "hf".

    Args:
        name: what to write.
        model_type: the architecture's.
        values: the stack's configuration as plain values.

    Raises:
        CheckpointError: the name is unknown, or transformers has no such model.
    """
    if name not in WRITTEN:
        raise CheckpointError(f"format={name!r} must be one of {', '.join(WRITTEN)}")
    if name == "mambapy":
        return Native()
    if name == "official":
        return Official()
    if model_type == "mamba":
        plain = values.get("inner_norm") == "plain"
        return TRANSFORMERS["falcon_mamba" if plain else "mamba"]
    theirs = {"mamba2": "mamba2", "hybrid": "bamba", "jamba": "jamba"}
    if model_type not in theirs:
        raise CheckpointError(f"transformers has no model for {model_type!r}; take 'official'")
    return TRANSFORMERS[theirs[model_type]]


def _has(files: set[str], *stems: str) -> bool:
    """Whether weights in one of these files, or an index of its shards, are there."""
    return any(stem in files or f"{stem}.index.json" in files for stem in stems)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that says what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values
