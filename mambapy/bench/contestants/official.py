"""The papers' own package, mamba_ssm, with its CUDA kernels.

Its language model decodes through its own inference cache, a step at a time; the CUDA graph that
its `generate(cg=True)` records around a step is not part of this.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Sizes = dict[str, int]
Options = dict[str, Any]


def scan_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs with the length last, as these kernels have them."""
    x, dt, A, B, C, D, z, dt_bias = inputs
    x, dt, B, C, z = (T.transpose(1, 2).contiguous() for T in (x, dt, B, C, z))
    return x, dt, A, B, C, D, z, dt_bias


def scan(sizes: Sizes, options: Options) -> Callable[..., Tensor]:
    """Their scan, with softplus inside."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    def run(*inputs: Tensor) -> Tensor:
        y: Tensor = interface.selective_scan_fn(*inputs, delta_softplus=True)
        return y

    return run


def block(sizes: Sizes, options: Options) -> nn.Module:
    """One mixer."""
    module = importlib.import_module("mamba_ssm.modules.mamba_simple")
    mixer: nn.Module = module.Mamba(sizes["d_model"], d_state=sizes["d_state"])
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
        config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
            d_model=sizes["d_model"],
            n_layer=sizes["n_layers"],
            vocab_size=sizes["vocab_size"],
            ssm_cfg={"d_state": sizes["d_state"]},
        )
        module = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        self.model = module.MambaLMHeadModel(config)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Tokens (b, l) to logits (b, l, v)."""
        logits: Tensor = self.model(tokens, **options).logits
        return logits


class Decoder:
    """The model with its inference cache, which each call writes to."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The last position's logits, and the cache."""
        module = importlib.import_module("mamba_ssm.utils.generation")
        cache = module.InferenceParams(max_seqlen=1 << 20, max_batch_size=len(tokens))
        logits = self.model(tokens, inference_params=cache, num_last_tokens=1)
        cache.seqlen_offset = tokens.shape[1]
        return logits[:, -1], cache

    def step(self, token: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The next logits, and the cache."""
        with torch.no_grad():
            return self.model(token[:, None], inference_params=cache)[:, -1], cache
