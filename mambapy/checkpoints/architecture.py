"""What a language model is, apart from its numbers."""

from dataclasses import dataclass
from typing import Any

from mambapy.config import MODEL_TYPES, StackConfig
from mambapy.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """A language model's architecture; every format translates its config.json to and from this.

    Args:
        config: the stack of blocks.
        vocab_size: tokens that the model knows.
        tie_embeddings: whether the head's weight is the embedding's.
        pad_vocab_size_multiple: what the number of rows of both is rounded up to.
        quantized: how the matrices are stored, "int8" or "bfloat16", where not as they are.
    """

    config: StackConfig
    vocab_size: int
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    quantized: str | None = None

    @property
    def model_type(self) -> str:
        """What our config.json calls the kind of stack."""
        return next(name for name, kind in MODEL_TYPES.items() if type(self.config) is kind)

    @property
    def rows(self) -> int:
        """The rows of embedding and head."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def config_of(self, *kinds: str) -> Any:
        """The stack's configuration, which must be of one of these kinds.

        Raises:
            CheckpointError: it is of another.
        """
        if self.model_type not in kinds:
            raise CheckpointError(f"a model of kind {self.model_type!r} is none of {[*kinds]}")
        return self.config
