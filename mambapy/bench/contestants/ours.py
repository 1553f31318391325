"""This library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import GatedMLP
from mambapy.config import MODEL_TYPES, StackConfig
from mambapy.experts import Experts
from mambapy.lm import LM, STACKS
from mambapy.optim import make_optimizer

Sizes = dict[str, int]
Options = dict[str, Any]


def scan(sizes: Sizes, options: Options) -> Callable[..., Tensor]:
    """The op on the backend of the options."""

    def run(*inputs: Tensor) -> Tensor:
        return ops.selective_scan(*inputs, backend=options["backend"])

    return run


def scan_facts(*inputs: Tensor) -> dict[str, str]:
    """Which backend "auto" takes for this call: without gradients, and with them."""
    with torch.no_grad():
        forward = ops.explain("selective_scan", *inputs)
    verdicts = {"forward": forward, "training": ops.explain("selective_scan", *inputs)}
    return {
        name: next(verdict.backend for verdict in found if verdict.chosen)
        for name, found in verdicts.items()
    }


def block(sizes: Sizes, options: Options) -> nn.Module:
    """One mixer."""
    config = _config(sizes, options)
    model = STACKS[type(config)](config)
    return model.layers[0].mixer


def experts(sizes: Sizes, options: Options, weights: dict[str, Tensor]) -> nn.Module:
    """A mixture of experts with these weights, or one MLP with as many active parameters."""
    d, f, k = sizes["d_model"], sizes["d_mlp"], sizes["top_k"]
    if options.get("model") == "dense":
        return GatedMLP(d, k * f)
    layer = Experts(d, f, sizes["n_experts"], k)
    own = {"router.weight": weights["router"], "fc1": weights["fc1"], "fc2": weights["fc2"]}
    layer.load_state_dict(own)
    return layer


def language_model(sizes: Sizes, options: Options) -> LM:
    """The whole model, with a tied head."""
    return LM(_config(sizes, options), sizes["vocab_size"]).train()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the library's parameter groups."""
    return make_optimizer(model, lr=1e-3)


class Decoder:
    """The model as generation uses it."""

    def __init__(self, model: LM) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The last position's logits, and the state."""
        logits, state = self.model.prefill(tokens, logits_to_keep=1)
        return logits[:, -1], state

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next logits, and the next state."""
        return self.model.step(token, state)


def decoder(sizes: Sizes, options: Options) -> Decoder:
    """A model with random weights, in the precision of the options."""
    model = language_model(sizes, options).eval()
    if options.get("weights", "float32") != "float32":
        model.quantize(options["weights"])
    return Decoder(model)


def _config(sizes: Sizes, options: Options) -> StackConfig:
    """The architecture of a case."""
    values: dict[str, Any] = {
        "d_model": sizes["d_model"],
        "d_state": sizes["d_state"],
        "n_layers": sizes.get("n_layers", 1),
        "backend": options.get("backend", "auto"),
    }
    if "d_head" in sizes:
        values["d_head"] = sizes["d_head"]
    return MODEL_TYPES[options.get("model", "mamba")](**values)
