"""Our own format: a folder with `config.json` and `model.safetensors`, and nothing to execute."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambapy.checkpoints.files import atomic_write
from mambapy.errors import CheckpointError

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", "mambapy"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        config: the values of config.json, "format" apart.
        weights: every tensor by its name in our models.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]


def save(directory: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`, then `config.json`, each in one piece or not at all.

    Args:
        directory: made if it is missing.
        config: plain values for JSON.
        weights: tensors that share no memory; a tied one is saved once.

    Raises:
        CheckpointError: a file could not be written; the earlier one is still there.
    """
    directory = Path(directory)
    tensors = {name: T.detach().contiguous() for name, T in weights.items()}
    with atomic_write(directory / WEIGHTS) as path:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors wraps the system's error, "No space left on device" for instance.
            raise CheckpointError(f"cannot write {directory / WEIGHTS}: {error}") from error
    text = json.dumps({"format": FORMAT, **config}, indent=2)
    with atomic_write(directory / CONFIG) as path:
        path.write_text(text + "\n", encoding="utf-8")


def load(directory: str | Path, device: str = "cpu") -> Checkpoint:
    """Read what `save` wrote.

    Args:
        directory: the folder.
        device: where to put the weights.

    Raises:
        CheckpointError: the folder or a file is missing, damaged, or of another format.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if config.pop("format", None) != FORMAT:
        raise CheckpointError(
            f'{directory / CONFIG} is not of this library ("format" is not "{FORMAT}")'
        )
    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{directory} has a {CONFIG} but no {WEIGHTS}")
    try:
        with safe_open(path, "pt", device=device) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    return Checkpoint(config, weights)


def check_names(
    source: str | Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare the tensors of a checkpoint with those of a model.

    Args:
        source: what to name in the message.
        weights: what the checkpoint has.
        expected: what the model has.

    Raises:
        CheckpointError: a name is missing or unexpected, or the shapes of one differ.
    """
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(weights))]
    problems += [f"{name} is unexpected" for name in sorted(set(weights) - set(expected))]
    problems += [
        f"{name} is {tuple(weights[name].shape)} and should be {tuple(expected[name].shape)}"
        for name in sorted(set(weights) & set(expected))
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: {'; '.join(problems[:8])}{more}")


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict, or a CheckpointError that says what is wrong with it."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no checkpoint: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config
