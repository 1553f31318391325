"""This library."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import GatedMLP
from mambapy.config import MODEL_TYPES, StackConfig, VimConfig
from mambapy.errors import BackendError
from mambapy.experts import Experts
from mambapy.generation import most_ahead, next_tokens
from mambapy.lm import LM, STACKS
from mambapy.optim import make_optimizer
from mambapy.sampling import Choice
from mambapy.train.config import TrainConfig
from mambapy.train.graph import WARM_UP, make_update
from mambapy.train.update import Update
from mambapy.vim import VisionMamba

Sizes = dict[str, int]
Options = dict[str, Any]


def scan(sizes: Sizes, options: Options) -> Callable[..., Tensor]:
    """The op on the backend of the options."""
    if "deterministic" in options:
        # Of the whole process, which is this contestant's own: the backward pass runs elsewhere.
        torch.use_deterministic_algorithms(True)

    def run(*inputs: Tensor) -> Tensor:
        given, more = _scan_call(inputs)
        return ops.selective_scan(*given, **more, backend=options["backend"])

    return run


def _scan_call(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The op's arguments; with a gate comes a bias, and softplus."""
    if len(inputs) == 6:
        return inputs, {}
    return inputs[:7], {"dt_bias": inputs[7], "dt_softplus": True}


def scan_facts(*inputs: Tensor) -> dict[str, str]:
    """Which backend "auto" takes for this call: without gradients, and with them."""
    given, more = _scan_call(inputs)
    with torch.no_grad():
        forward = ops.explain("selective_scan", *given, **more)
    training = ops.explain("selective_scan", *given, **more)
    verdicts = {"forward": forward, "training": training}
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


def vision(sizes: Sizes, options: Options) -> nn.Module:
    """A Vision Mamba, or a ViT of torch's own layers with half as many blocks."""
    d, layers, image = sizes["d_model"], sizes["n_layers"], sizes["image"]
    if options.get("model") == "vit":
        return ViT(d, layers // 2 or 1, image, sizes["patch"])
    config = VimConfig(
        img_size=image,
        patch_size=sizes["patch"],
        embed_dim=d,
        depth=layers,
        mixer_options={"d_state": sizes["d_state"]},
        backend=options.get("backend", "auto"),
    )
    return VisionMamba(config)


class ViT(nn.Module):
    """Patches, a class token and positions, through torch's own transformer, heads of 64."""

    def __init__(self, d: int, layers: int, image: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, d))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, d))
        block = nn.TransformerEncoderLayer(
            d, max(1, d // 64), 4 * d, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(d), False)
        self.head = nn.Linear(d, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, 1000)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.head(self.blocks(x)[:, 0])


def language_model(sizes: Sizes, options: Options) -> LM:
    """The whole model, with a tied head."""
    return LM(_config(sizes, options), sizes["vocab_size"]).train()


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with the library's parameter groups."""
    return make_optimizer(model, lr=1e-3)


def training_step(sizes: Sizes, options: Options, tokens: Tensor) -> Callable[[], None]:
    """A step on a GPU as `mambapy train` makes it: nothing is read back, and it is one graph."""
    settings = {name: options[name] for name in ("recompute", "cuda_graph") if name in options}
    config = TrainConfig(
        batch_size=sizes["batch"],
        length=sizes["length"],
        dtype=options.get("dtype", "float32"),
        **settings,
    )
    model = language_model(sizes, options)
    model.recompute = config.recompute
    update = make_update(Update(model, optimizer(model), config, None), config, _must_record)
    windows, done = tokens.cpu(), 0

    def step() -> None:
        nonlocal done
        # The first run is what comes before the recording, and the recording itself.
        for _ in range(1 if done else WARM_UP + 1):
            update(windows, 1e-3)
            done += 1

    return step


def _must_record(reason: str) -> None:
    """A step that is not a graph is not what the record says it is."""
    raise BackendError(f"no CUDA graph: {reason}")


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

    def greedy(self, token: Tensor, state: Any, n: int) -> list[Tensor]:
        """The n tokens after one, as `generate` chooses them."""
        tokens, most = [token], max(most_ahead(token.device), 1)
        with closing(self.model.decoder(state)) as decoder:
            while len(tokens) <= n:
                more = min(most, n + 1 - len(tokens))
                tokens += next_tokens(decoder, tokens[-1], more, Choice(sample=False), None)
        return tokens[1:]


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
