"""transformers' Mamba; without the CUDA kernels it scans a step at a time, in plain PyTorch."""

import importlib
from typing import Any

from torch import Tensor, nn

Sizes = dict[str, int]
Options = dict[str, Any]

theirs: Any = importlib.import_module("transformers")


def block(sizes: Sizes, options: Options) -> nn.Module:
    """One mixer."""
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    mixer: nn.Module = module.MambaMixer(_config(sizes), layer_idx=0)
    return mixer


def language_model(sizes: Sizes, options: Options) -> "Model":
    """The whole model, with a tied head."""
    return Model(sizes).train()


def decoder(sizes: Sizes, options: Options) -> "Decoder":
    """A model with random weights."""
    return Decoder(Model(sizes).eval())


class Model(nn.Module):
    """Their model, returning logits alone."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.model = theirs.MambaForCausalLM(_config(sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) to logits (b, l, v)."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


class Decoder:
    """The model with its cache, which each call writes to."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The last position's logits, and the cache."""
        found = self.model.model(tokens, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.cache_params

    def step(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next logits, and the cache."""
        found = self.model.model(token[:, None], cache_params=cache, use_cache=True)
        return found.logits[:, -1], found.cache_params


def _config(sizes: Sizes) -> Any:
    """The architecture of a case."""
    return theirs.MambaConfig(
        hidden_size=sizes["d_model"],
        state_size=sizes["d_state"],
        num_hidden_layers=sizes.get("n_layers", 1),
        vocab_size=-(-sizes.get("vocab_size", 8) // 8) * 8,
    )
