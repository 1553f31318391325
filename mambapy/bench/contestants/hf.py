"""transformers' Mamba, Mamba-2 and Jamba's experts, without the CUDA kernels: in plain PyTorch.

Mamba scans a step at a time, Mamba-2 works in chunks.
"""

import importlib
import inspect
from typing import Any

from torch import Tensor, nn

Sizes = dict[str, int]
Options = dict[str, Any]

theirs: Any = importlib.import_module("transformers")


def block(sizes: Sizes, options: Options) -> nn.Module:
    """One mixer."""
    kind, name = ("mamba2", "Mamba2Mixer") if "d_head" in sizes else ("mamba", "MambaMixer")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    mixer: nn.Module = getattr(module, name)(_config(sizes), layer_idx=0)
    return mixer


def experts(sizes: Sizes, options: Options, weights: dict[str, Tensor]) -> nn.Module:
    """Jamba's experts with these weights, in the implementation of the options."""
    config = theirs.JambaConfig(
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_mlp"],
        num_experts=sizes["n_experts"],
        num_experts_per_tok=sizes["top_k"],
        experts_implementation=options["experts"],
    )
    module = importlib.import_module("transformers.models.jamba.modeling_jamba")
    layer: nn.Module = module.JambaSparseMoeBlock(config)
    own = {
        "router.weight": weights["router"],
        "experts.gate_up_proj": weights["fc1"],
        "experts.down_proj": weights["fc2"],
    }
    layer.load_state_dict(own)
    return layer


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
        kind = theirs.Mamba2ForCausalLM if "d_head" in sizes else theirs.MambaForCausalLM
        self.model = kind(_config(sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) to logits (b, l, v)."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


class Decoder:
    """The model with its cache, which each call writes to."""

    def __init__(self, model: Model) -> None:
        self.model = model
        # Older versions call it cache_params.
        known = inspect.signature(model.model.forward).parameters
        self.cache = "cache" if "cache" in known else "cache_params"

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The last position's logits, and the cache."""
        found = self.model.model(tokens, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found[self.cache]

    def step(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next logits, and the cache."""
        found = self.model.model(token[:, None], use_cache=True, **{self.cache: cache})
        return found.logits[:, -1], found[self.cache]


def _config(sizes: Sizes) -> Any:
    """The architecture of a case."""
    common = {
        "hidden_size": sizes["d_model"],
        "state_size": sizes["d_state"],
        "num_hidden_layers": sizes.get("n_layers", 1),
        "vocab_size": -(-sizes.get("vocab_size", 8) // 8) * 8,
    }
    if "d_head" not in sizes:
        return theirs.MambaConfig(**common)
    heads = 2 * sizes["d_model"] // sizes["d_head"]
    return theirs.Mamba2Config(
        **common, num_heads=heads, head_dim=sizes["d_head"], n_groups=1, tie_word_embeddings=True
    )
