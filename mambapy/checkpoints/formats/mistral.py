"""Mistral's own files of Codestral Mamba: `params.json` and `consolidated.safetensors`.

Their weights have the official names behind "model.", their mixers the official defaults.

Source: the files' own keys, and transformers' `convert_mamba2_ssm_checkpoint_to_pytorch.py`.
"""

from typing import Any

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part
from mambapy.checkpoints.formats.official import Official, read_model
from mambapy.config import Mamba2Config
from mambapy.errors import CheckpointError


class Mistral(Format):
    """Codestral Mamba as Mistral has published it."""

    name = "mistral"
    stems = ("consolidated.safetensors",)

    def read(self, values: Keys) -> Architecture:
        """Translate params.json."""
        values.must("model_type", "mamba")
        values.left |= values.given(d_model="dim", n_layer="n_layers")
        groups = values.take("n_groups", 8)
        stack, model = read_model(values)
        values.finish()
        return Architecture(Mamba2Config(**stack, n_groups=groups), **model)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """It is only read."""
        raise CheckpointError("nothing is written in Mistral's format; take 'hf' or 'official'")

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """The official name."""
        return Official().parts(name, architecture)

    def canonical(self, name: str) -> str:
        """The name without "model."."""
        return name.removeprefix("model.")
