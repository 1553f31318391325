"""What is measured: for each kind and pass, one run of a contestant on random inputs.

A contestant is a module of contestants/. It gives the library's own scan, block, experts, language
model or decoder; everything around them (inputs, gradients, the optimiser step, the greedy loop) is
here, the same for all. The floor gives `products` instead, and only those are run.

worker.py loads this file by path; nothing here may import mambapy.
"""

import functools
import math
import time
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
# Of a GPU: some 2 ms.
LEAD_CYCLES = 4_000_000
# Outputs that are compared with those of others, of about this many places.
SHOWN = 1000


def shrink(sizes: Sizes) -> Sizes:
    """The same case, tiny."""
    return {name: min(size, TINY.get(name, size)) for name, size in sizes.items()}


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Mean seconds of a run; on a GPU by its own clock, and never with what is in its cache.

    A GPU is kept waiting before each run, so that what Python launches in the first LEAD_CYCLES is
    timed as the GPU runs it. Longer runs that Python cannot launch as fast count as they are.
    """
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        return (time.perf_counter() - started) / repeats
    room = cache_room()
    pairs = []
    for _ in range(repeats):
        room.zero_()
        torch.cuda._sleep(LEAD_CYCLES)
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        run()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / repeats


def give_back() -> None:
    """Give the card all memory that torch holds and nobody uses."""
    torch.cuda.empty_cache()


@functools.cache
def cache_room() -> Tensor:
    """Twice as much memory as a GPU's cache has: to write it drives everything else out."""
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def card() -> dict[str, Any]:
    """What a GPU can do at most: bytes copied a second (read and written), bf16 products."""
    size, n = 1 << 30, 8192
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    A, B, C = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(3))

    def best(run: Callable[[], Any]) -> float:
        return min(timed(run, 10, "cuda") for _ in range(5))

    return {
        "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory,
        "copy_bytes_per_s": 2 * size / best(lambda: target.copy_(source)),
        "bf16_flops": 2 * n**3 / best(lambda: torch.mm(A, B, out=C)),
    }


def build(
    contestant: Any, kind: str, sizes: Sizes, options: dict[str, Any], device: str
) -> tuple[Passes, dict[str, Any]]:
    """Each pass of a kind as a function without arguments, and facts about the contestant."""
    torch.manual_seed(0)
    with torch.device(device):
        if hasattr(contestant, "products"):
            before = torch.get_default_dtype()
            torch.set_default_dtype(_dtype(options))
            try:
                return _floor(contestant, kind, sizes)
            finally:
                torch.set_default_dtype(before)
        return _KINDS[kind](contestant, sizes, options)


def _dtype(options: dict[str, Any]) -> torch.dtype:
    """Of activations."""
    dtype: torch.dtype = getattr(torch, options.get("dtype", "float32"))
    return dtype


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
    """The selective scan alone, with its skip D; gate, bias and softplus only where "fused" is."""
    b, l, e, n = (sizes[name] for name in ("batch", "length", "d_inner", "d_state"))
    inputs: tuple[Tensor, ...] = (
        torch.randn(b, l, e),
        # Step sizes as a trained block has them, log-uniform from 0.001 to 0.1.
        torch.exp(math.log(0.001) + torch.rand(b, l, e) * math.log(100.0)),
        -torch.arange(1.0, n + 1).repeat(e, 1),
        torch.randn(b, l, n),
        torch.randn(b, l, n),
        torch.randn(e),
    )
    if "fused" in sizes:
        x, dt, A, B, C, D = inputs
        bias = dt[0, 0].expm1().log()
        noise, z = 0.1 * torch.randn(b, l, e), torch.randn(b, l, e)
        x, noise, B, C, z = (T.to(_dtype(options)) for T in (x, noise, B, C, z))
        inputs = (x, noise, A, B, C, D, z, bias)
    if hasattr(contestant, "scan_inputs"):
        inputs = contestant.scan_inputs(*inputs)
    for T in inputs:
        T.requires_grad_()
    scan = contestant.scan(sizes, options)
    facts = contestant.scan_facts(*inputs) if hasattr(contestant, "scan_facts") else {}
    return _forward_and_training(scan, inputs, tuple(inputs[0].shape)), facts


def _block(contestant: Any, sizes: Sizes, options: dict[str, Any]) -> tuple[Passes, dict[str, Any]]:
    """One block, (b, l, d) -> (b, l, d); training makes the gradients of input and weights."""
    shape = sizes["batch"], sizes["length"], sizes["d_model"]
    x = torch.randn(shape, dtype=_dtype(options)).requires_grad_()
    block = contestant.block(sizes, options)
    if x.dtype != torch.float32 and hasattr(contestant, "UnderAutocast"):
        return _forward_and_training(contestant.UnderAutocast(block, x.dtype), (x,), shape), {}
    return _forward_and_training(block.to(x.dtype), (x,), shape), {}


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
    gradient = torch.randn(output_shape, dtype=inputs[0].dtype)

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
    tokens = torch.randint(sizes["vocab_size"], (sizes["batch"], sizes["length"] + 1))
    if hasattr(contestant, "training_step") and tokens.is_cuda:
        return {"step": contestant.training_step(sizes, options, tokens)}, {}
    model = contestant.language_model(sizes, options)
    if hasattr(contestant, "optimizer"):
        optimizer = contestant.optimizer(model)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
    dtype = _dtype(options)

    def from_logits(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = model(inputs)  # (b, l, v)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    # A library's own way to its loss, where it has one.
    loss_of = getattr(model, "loss", from_logits)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
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
    if _dtype(options) != torch.float32 and not getattr(decoder, "only_float32", False):
        decoder.model.to(_dtype(options))
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
            if hasattr(decoder, "greedy"):
                # A library's own way, where that is not just the steps.
                decoder.greedy(token, at, sizes["tokens"])
                return
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
