"""A language model around a Jamba: all of it is `LM`, with Jamba's own words for some things."""

from pathlib import Path

import torch
from torch import Tensor

from mambapy.checkpoints import Architecture
from mambapy.config import JambaConfig
from mambapy.errors import CheckpointError, ConfigError
from mambapy.experts import LoadBalance, load_balancing_loss, router_z_loss
from mambapy.lm import LM

__all__ = [
    "JambaConfig",
    "JambaLM",
    "LoadBalance",
    "from_pretrained",
    "load_balancing_loss",
    "router_z_loss",
]


class JambaLM(LM):
    """A Jamba with an embedding before it and a head behind it; see `LM` for what it can do.

    Args:
        config: the stack.
        vocab_size: number of tokens, >= 1; without it, the configuration's.
        tie_embeddings: use the embedding's weight for the head too; without it, the
            configuration's.
        pad_vocab_size_multiple: see `LM`.

    Raises:
        ConfigError: the configuration is not Jamba's, or nobody says how many tokens there are.
    """

    config: JambaConfig

    def __init__(
        self,
        config: JambaConfig,
        vocab_size: int | None = None,
        *,
        tie_embeddings: bool | None = None,
        pad_vocab_size_multiple: int = 1,
    ) -> None:
        if not isinstance(config, JambaConfig):
            raise ConfigError(f"config must be a JambaConfig, got {type(config).__name__}")
        vocab_size = config.vocab_size if vocab_size is None else vocab_size
        if vocab_size is None:
            raise ConfigError("vocab_size must be given, here or in the configuration")
        super().__init__(
            config,
            vocab_size,
            tie_embeddings=config.tie_embeddings if tie_embeddings is None else tie_embeddings,
            pad_vocab_size_multiple=pad_vocab_size_multiple,
        )

    @classmethod
    def from_architecture(cls, architecture: Architecture) -> "JambaLM":
        """A new model of that architecture.

        Raises:
            CheckpointError: it is not a Jamba.
        """
        if not isinstance(architecture.config, JambaConfig):
            raise CheckpointError(
                f"this is a {architecture.model_type!r}, not a Jamba; mambapy.lm.from_pretrained "
                "loads it"
            )
        return super().from_architecture(architecture)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
        num_logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits of the next token; see `LM.forward`.

        Args:
            tokens: (b, l) int64.
            mask: (b, l) bool, True at real tokens; it reaches attention and Mamba.
            seq_idx: (b, l) integers, the document of each token.
            dt_scale: (b, l) >= 0, the time since the token before, in steps.
            num_logits_to_keep: 0 for all positions; n for each row's last n real tokens.

        Returns:
            (b, l or n, vocab_size).
        """
        if num_logits_to_keep == 0:
            return super().forward(tokens, mask, seq_idx, dt_scale)
        hidden, ragged = self._run(tokens, mask, seq_idx, dt_scale)
        self._check_keep(num_logits_to_keep, tokens)
        return self._head(ragged.last(hidden, num_logits_to_keep))


def from_pretrained(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> JambaLM:
    """A trained Jamba, from a folder or the Hugging Face hub; see `LM.from_pretrained`."""
    return JambaLM.from_pretrained(name_or_dir, dtype=dtype, device=device, revision=revision)
