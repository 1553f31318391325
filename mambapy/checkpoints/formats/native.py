"""Our own format: `config.json` with "format": "mambapy", weights by the names in our models."""

from typing import Any

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.formats.base import Format, Keys, Part
from mambapy.config import MODEL_TYPES
from mambapy.errors import CheckpointError


class Native(Format):
    """Our own format; nothing is translated."""

    name = "mambapy"

    def read(self, values: Keys) -> Architecture:
        """Read what `write` wrote."""
        values.must("format", self.name)
        model_type = values.take("model_type")
        if model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise CheckpointError(
                f"{values.source}: model_type={model_type!r} is not one of {known}"
            )
        config = MODEL_TYPES[model_type].from_dict(values.section("config").left)
        names = ("vocab_size", "tie_embeddings", "pad_vocab_size_multiple", "quantized")
        architecture = Architecture(config, **values.given(**{name: name for name in names}))
        values.finish()
        return architecture

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The architecture as plain values."""
        quantized = {"quantized": architecture.quantized} if architecture.quantized else {}
        return {
            "format": self.name,
            "model_type": architecture.model_type,
            "vocab_size": architecture.vocab_size,
            "tie_embeddings": architecture.tie_embeddings,
            "pad_vocab_size_multiple": architecture.pad_vocab_size_multiple,
            "config": architecture.config.to_dict(),
            **quantized,
        }

    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """The same name."""
        return [Part(name)]
