"""mamba.py 1.2.0, the package that this library succeeds, with its parallel scan.

Its `LM` takes einops along for Mamba-2 and does not tie the head, so the language model here is its
stack and its norm between an embedding and the same weights as head, as in this library.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sizes = dict[str, int]
Options = dict[str, Any]

# The process's `mambapy`: not this library, so nothing is known of its types.
theirs: Any = importlib.import_module("mambapy.mamba")


def scan(sizes: Sizes, options: Options) -> Callable[..., Tensor]:
    """The method of a block that scans; it uses nothing of the block."""
    run: Callable[..., Tensor] = theirs.MambaBlock(_config({"d_model": 8})).selective_scan
    if "fused" not in sizes:
        return run

    def around(*inputs: Tensor) -> Tensor:
        # What their block does around its scan, which needs all in one dtype: A is in float32.
        x, dt, A, B, C, D, z, bias = (T.float() for T in inputs)
        y = run(x, F.softplus(dt + bias), A, B, C, D)
        return (y * F.silu(z)).to(inputs[0].dtype)

    return around


def block(sizes: Sizes, options: Options) -> nn.Module:
    """One mixer."""
    mixer: nn.Module = theirs.MambaBlock(_config(sizes))
    return mixer


class UnderAutocast(nn.Module):
    """A block with its weights in float32, as theirs have to be, and products in 16 bits."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        with torch.autocast(x.device.type, self.dtype):
            y: Tensor = self.block(x)
        return y.to(x.dtype)


def language_model(sizes: Sizes, options: Options) -> "Model":
    """The whole model."""
    return Model(sizes).train()


def decoder(sizes: Sizes, options: Options) -> "Decoder":
    """A model with random weights."""
    return Decoder(Model(sizes).eval())


class Model(nn.Module):
    """Embedding, their stack, their norm, the tied head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d, rows = sizes["d_model"], -(-sizes["vocab_size"] // 8) * 8
        self.config = _config(sizes)
        self.embedding = nn.Embedding(rows, d)
        self.mamba = theirs.Mamba(self.config)
        self.norm_f = theirs.RMSNorm(d)
        self.lm_head = nn.Linear(d, rows, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.lm_head.weight = self.embedding.weight
        self.vocab_size = sizes["vocab_size"]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) to logits (b, l, v)."""
        logits: Tensor = self.lm_head(self.norm_f(self.mamba(self.embedding(tokens))))
        return logits[..., : self.vocab_size]

    def step(self, token: Tensor, caches: Any) -> tuple[Tensor, Any]:
        """A token (b) of each row to logits (b, v)."""
        hidden, caches = self.mamba.step(self.embedding(token), caches)
        logits: Tensor = self.lm_head(self.norm_f(hidden))
        return logits[..., : self.vocab_size], caches


class Decoder:
    """The model as its `generate` uses it: a prompt, too, goes in a token at a time."""

    # Its step multiplies float32 states with whatever the weights give.
    only_float32 = True

    def __init__(self, model: Model) -> None:
        self.model = model

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """The last position's logits, and the caches."""
        config = self.model.config
        inputs = torch.zeros(len(tokens), config.d_inner, config.d_conv - 1, device=tokens.device)
        caches: Any = [(None, inputs)] * config.n_layers
        for token in tokens.unbind(dim=1):
            logits, caches = self.step(token, caches)
        return logits, caches

    def step(self, token: Tensor, caches: Any) -> tuple[Tensor, Any]:
        """The next logits, and the next caches, in a list of their own: theirs is written to."""
        return self.model.step(token, [*caches])


def _config(sizes: Sizes) -> Any:
    """The architecture of a case."""
    return theirs.MambaConfig(
        d_model=sizes["d_model"],
        d_state=sizes.get("d_state", 16),
        n_layers=sizes.get("n_layers", 1),
    )
