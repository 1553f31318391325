"""Checkpoints of Vision Mamba: our own folders, and the .pth files of hustvl/Vim.

A published file has no configuration: everything but the class token's place is in the shapes.

    cls_token (1, 1, d)   pos_embed (1, l, d)   patch_embed.proj.weight (d, c, p, p)   head.weight
    layers.{i}.norm.weight   layers.{i}.mixer.*   norm_f.weight

Source: hustvl/Vim, the names and shapes in its published files.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mambapy.checkpoints import tensors as files
from mambapy.checkpoints.files import atomic_write
from mambapy.checkpoints.formats import CONFIG
from mambapy.config import VimConfig
from mambapy.errors import CheckpointError, ConfigError

FORMAT, MODEL_TYPE, WEIGHTS = "mambapy", "vim", "model.safetensors"


def save_vision(directory: str | Path, config: VimConfig, weights: Mapping[str, Tensor]) -> None:
    """Write weights and config.json to a folder, each file in one piece or not at all.

    Raises:
        CheckpointError: a file could not be written; the earlier one is still there.
    """
    directory = Path(directory)
    files.write(directory, WEIGHTS, weights)
    values = {"format": FORMAT, "model_type": MODEL_TYPE, "config": config.to_dict()}
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def open_vision(path: Path, class_token: str, img_size: int) -> tuple[VimConfig, dict[str, Tensor]]:
    """The configuration, and the tensors by the names in our models.

    Args:
        path: our folder, a folder with one .pth file, or a .pth, .bin or .safetensors file.
        class_token: where it stands, for a published file that has one.
        img_size: what such a file was trained on; with it the patches' stride is known.

    Raises:
        CheckpointError: there is no such file, or none that is a Vision Mamba's.
    """
    if path.is_dir() and (path / CONFIG).is_file():
        return _own(path)
    if path.is_dir():
        found = sorted(path.glob("*.pth"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path} has no {CONFIG} and {len(found)} .pth files, where one is needed"
            )
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    weights = _read(path)
    try:
        return _guess(weights, class_token, img_size), {_ours(n): T for n, T in weights.items()}
    except KeyError as error:
        raise CheckpointError(f"{path} is no Vision Mamba: it has no {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own(path: Path) -> tuple[VimConfig, dict[str, Tensor]]:
    """What `save_vision` wrote."""
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if (values["format"], values["model_type"]) != (FORMAT, MODEL_TYPE):
            raise CheckpointError(f"{path / CONFIG} is not of a Vision Mamba of this library")
        config = VimConfig.from_dict(values["config"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path / CONFIG} does not fit: {error}") from error
    return config, dict(files.TensorFiles(path, (WEIGHTS,)))


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors; those of a training checkpoint are under "model"."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # The trainer's own options are beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no file of tensors: {reason}") from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(T, Tensor) for T in found.values()):
        raise CheckpointError(f"{path} holds no dict of tensors")
    return found


def _guess(weights: Mapping[str, Tensor], class_token: str, img_size: int) -> VimConfig:
    """The configuration that these shapes are of."""
    patch = weights["patch_embed.proj.weight"]
    has_token = "cls_token" in weights
    patches = weights["pos_embed"].shape[1] - has_token
    side = math.isqrt(patches)
    steps = max(1, side - 1)
    if side * side != patches or (img_size - patch.shape[2]) % steps:
        raise CheckpointError(
            f"{patches} patches of {patch.shape[2]} x {patch.shape[3]} do not cover an image of "
            f"{img_size} x {img_size}; give its img_size"
        )
    mixer = "layers.0.mixer"
    options: dict[str, Any] = {
        "d_state": weights[f"{mixer}.A_log"].shape[1],
        "d_conv": weights[f"{mixer}.conv1d.weight"].shape[2],
        "dt_rank": weights[f"{mixer}.dt_proj.weight"].shape[1],
        "expand": weights[f"{mixer}.A_log"].shape[0] / patch.shape[0],
    }
    return VimConfig(
        img_size=img_size,
        patch_size=(patch.shape[2], patch.shape[3]),
        stride=(img_size - patch.shape[2]) // steps if side > 1 else patch.shape[2],
        in_chans=patch.shape[1],
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        embed_dim=patch.shape[0],
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        class_token=class_token if has_token else "none",  # type: ignore[arg-type]
        mixer_options=options,
    )


def _ours(name: str) -> str:
    """A published name as it is in our models."""
    if name.startswith("layers."):
        return f"backbone.{name}"
    return name.replace("patch_embed.proj.", "patch_embed.", 1)
