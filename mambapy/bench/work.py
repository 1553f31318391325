"""What is measured: for each kind and pass, one run of a contestant on random inputs.

A contestant is a module of contestants/. It gives the library's own scan, block, experts, language
model or decoder; everything around them (inputs, gradients, the optimiser step, the greedy loop) is
here, the same for all. The floor gives `products` instead, and only those are run.

worker.py loads this file by path; nothing here may import mambapy.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Passes = dict[str, Callable[[], Any]]
Sizes = dict[str, int]

# What a tiny copy of a case may have at most; d_state stays, since kernels may depend on it.
TINY = {
    "batch": 1,
    "length": 4,
    "d_model": 32,
    "d_inner": 64,
    "d_mlp": 64,
    "n_layers": 1,
    "vocab_size": 64,
    "tokens": 2,
    "bandwidth_bytes": 1 << 16,
    "image": 32,
}
# Decoding starts after a prompt of this many tokens; its cost does not depend on how many.
DECODE_PROMPT = 8
# Outputs that are compared with those of others, of about this many places.
SHOWN = 1000


def shrink(sizes: Sizes) -> Sizes:
    """The same case, tiny."""
    return {name: min(size, TINY.get(name, size)) for name, size in sizes.items()}


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def build(
    contestant: Any, kind: str, sizes: Sizes, options: dict[str, Any], device: str
) -> tuple[Passes, dict[str, Any]]:
    """Each pass of a kind as a function without arguments, and facts about the contestant."""
    torch.manual_seed(0)
    with torch.device(device):
        if hasattr(contestant, "products"):
            return _floor(contestant, kind, sizes)
        return _KINDS[kind](contestant, sizes, options)


def _floor(contestant: Any, kind: str, sizes: Sizes) -> tuple[Passes, dict[str, Any]]:
    """The matrix products alone; with `decode` also a read of much memory."""
    groups = (_group_sizes(sizes),) if kind == "experts" else ()
    products = contestant.products(kind, sizes, *groups)

    def forward() -> None:
        for product in products:
            product.forward()

    def training() -> None:
        for product in products:
            product.training()

    if kind == "train":
        return {"step": training}, {}
    if kind in ("decode", "heads") and "tokens" in sizes:
        passes: Passes = {"prefill": forward, "bandwidth": contestant.memory_read(sizes)}
        return passes, {"read_bytes": sizes["bandwidth_bytes"]}
    return {"forward": forward, "training": training}, {}


def _scan(contestant: Any, sizes: Sizes, options: dict[str, Any]) -> tuple[Passes, dict[str, Any]]:
    """The selective scan alone, with its skip D and without gate, bias and softplus."""
    b, l, e, n = (sizes[name] for name in ("batch", "length", "d_inner", "d_state"))
    inputs = (
        torch.randn(b, l, e),
        # Step sizes as a trained block has them, log-uniform from 0.001 to 0.1.
        torch.exp(math.log(0.001) + torch.rand(b, l, e) * math.log(100.0)),
        -torch.arange(1.0, n + 1).repeat(e, 1),
        torch.randn(b, l, n),
        torch.randn(b, l, n),
        torch.randn(e),
    )
    for T in inputs:
        T.requires_grad_()
    scan = contestant.scan(sizes, options)
    facts = contestant.scan_facts(*inputs) if hasattr(contestant, "scan_facts") else {}
    return _forward_and_training(scan, inputs, (b, l, e)), facts


def _block(contestant: Any, sizes: Sizes, options: dict[str, Any]) -> tuple[Passes, dict[str, Any]]:
    """One block, (b, l, d) -> (b, l, d); training makes the gradients of input and weights."""
    shape = sizes["batch"], sizes["length"], sizes["d_model"]
    x = torch.randn(shape).requires_grad_()
    return _forward_and_training(contestant.block(sizes, options), (x,), shape), {}


def _experts(
    contestant: Any, sizes: Sizes, options: dict[str, Any]
) -> tuple[Passes, dict[str, Any]]:
    """A mixture of experts, (b, l, d) -> (b, l, d), with the same tokens and weights for all."""
    x, weights = _draw_experts(sizes)
    layer = contestant.experts(sizes, options, weights)
    facts = {}
    if options.get("model") != "dense":
        with torch.no_grad():
            y = layer(x).flatten()
        facts["outputs"] = y[:: -(-len(y) // SHOWN)].tolist()
    return _forward_and_training(layer, (x.requires_grad_(),), tuple(x.shape)), facts


def _draw_experts(sizes: Sizes) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens (b, l, d), and weights: `router` (E, d), `fc1` (E, 2f, d), `fc2` (E, d, f)."""
    d, f, E = (sizes[name] for name in ("d_model", "d_mlp", "n_experts"))
    torch.manual_seed(0)
    x = torch.randn(sizes["batch"], sizes["length"], d)
    shapes = {"router": (E, d), "fc1": (E, 2 * f, d), "fc2": (E, d, f)}
    return x, {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def _group_sizes(sizes: Sizes) -> list[int]:
    """How many rows the router gives to each expert."""
    x, weights = _draw_experts(sizes)
    chosen = F.linear(x, weights["router"]).topk(sizes["top_k"], dim=-1).indices
    groups: list[int] = chosen.flatten().bincount(minlength=sizes["n_experts"]).tolist()
    return groups


def _forward_and_training(
    function: Any, inputs: tuple[Tensor, ...], output_shape: tuple[int, ...]
) -> Passes:
    """A pass without gradients, and one with those of all inputs and weights."""
    parameters = [*function.parameters()] if isinstance(function, nn.Module) else []
    leaves = (*inputs, *parameters)
    gradient = torch.randn(output_shape)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def training() -> None:
        for T in leaves:
            T.grad = None
        torch.autograd.backward(function(*inputs), gradient)

    return {"forward": forward, "training": training}


def _train(contestant: Any, sizes: Sizes, options: dict[str, Any]) -> tuple[Passes, dict[str, Any]]:
    """One step as `mambapy train` does it: loss, gradients, clipping, AdamW."""
    model = contestant.language_model(sizes, options)
    if hasattr(contestant, "optimizer"):
        optimizer = contestant.optimizer(model)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
    tokens = torch.randint(sizes["vocab_size"], (sizes["batch"], sizes["length"] + 1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])  # (b, l, v)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"step": step}, {}


def _decode(
    contestant: Any, sizes: Sizes, options: dict[str, Any]
) -> tuple[Passes, dict[str, Any]]:
    """A prompt read at once, and tokens drawn greedily one after the other."""
    decoder = contestant.decoder(sizes, options)
    vocab_size = sizes["vocab_size"]
    prompt = torch.randint(vocab_size, (sizes["batch"], sizes["length"]))

    def prefill() -> None:
        with torch.no_grad():
            decoder.prefill(prompt)

    with torch.no_grad():
        logits, state = decoder.prefill(prompt[:, :DECODE_PROMPT])

    def decode() -> None:
        token, at = logits.argmax(dim=-1), state
        with torch.no_grad():
            for _ in range(sizes["tokens"]):
                # The weights may have rows beyond the vocabulary.
                step, at = decoder.step(token, at)
                token = step[:, :vocab_size].argmax(dim=-1)

    return {"prefill": prefill, "decode": decode}, {"weight_bytes": weight_bytes(decoder.model)}


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one token reads: every parameter and buffer once.

    Of an embedding a token reads one row, so its table counts only where the head shares it.
    """
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("Embedding"):
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            tensors.update((T.data_ptr(), T) for T in own)
    return sum(T.numel() * T.element_size() for T in tensors.values())


def _vision(
    contestant: Any, sizes: Sizes, options: dict[str, Any]
) -> tuple[Passes, dict[str, Any]]:
    """A classifier of images, (b, 3, image, image) -> (b, 1000)."""
    images = torch.randn(sizes["batch"], 3, sizes["image"], sizes["image"]).requires_grad_()
    model = contestant.vision(sizes, options)
    return _forward_and_training(model, (images,), (sizes["batch"], 1000)), {}


def _heads(contestant: Any, sizes: Sizes, options: dict[str, Any]) -> tuple[Passes, dict[str, Any]]:
    """A block of Mamba-2's shape, or a whole model of it."""
    return (_decode if "tokens" in sizes else _block)(contestant, sizes, options)


_KINDS = {
    "scan": _scan,
    "block": _block,
    "heads": _heads,
    "experts": _experts,
    "vision": _vision,
    "train": _train,
    "decode": _decode,
}
