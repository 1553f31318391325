"""What runs inside a worker, here without one: the floor's products, and each kind's passes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mambapy.bench import cases, records, rivals, work
from mambapy.bench.contestants import floor, ours
from mambapy.experts import Experts
from mambapy.generation import generate_tokens
from mambapy.lm import LM
from mambapy.mamba import MambaBlock, MambaConfig
from mambapy.state import ModelState

SIZES = {"batch": 2, "length": 5, "d_model": 48, "d_state": 7}
EXPERTS = {"batch": 2, "length": 5, "d_model": 48, "d_mlp": 24, "n_experts": 6, "top_k": 2}
MODEL = {"n_layers": 3, "vocab_size": 40, "tokens": 3, "bandwidth_bytes": 1 << 16}


def products_flops(run) -> int:
    """Floating-point operations of matrix products with weights."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_floor_is_the_blocks_products(pass_):
    # The scan of the reference has products of its own, all of them batched.
    config = MambaConfig(d_model=48, n_layers=1, d_state=7, backend="reference")
    block = MambaBlock(config)
    x = torch.randn(2, 5, 48, requires_grad=True)

    def run():
        with torch.set_grad_enabled(pass_ == "training"):
            y = block(x)
        if pass_ == "training":
            y.sum().backward()

    passes, _ = work.build(floor, "block", SIZES, {}, "cpu")
    found = products_flops(passes[pass_])
    assert found == products_flops(run) > 0


@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_floor_is_the_experts_products(pass_):
    """All of a mixture's products but the router's."""
    floors, _ = work.build(floor, "experts", EXPERTS, {}, "cpu")
    passes, _ = work.build(ours, "experts", EXPERTS, {}, "cpu")
    router = 2 * 10 * 48 * 6 * (1 if pass_ == "forward" else 3)
    assert products_flops(floors[pass_]) + router == products_flops(passes[pass_])


@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_floor_is_the_products_of_a_vision_mamba(pass_):
    sizes = {"batch": 2, "length": 5, "d_model": 48, "d_state": 7, "n_layers": 2}
    sizes |= {"image": 32, "patch": 16}
    floors, _ = work.build(floor, "vision", sizes, {}, "cpu")
    passes, _ = work.build(ours, "vision", sizes, {"backend": "reference"}, "cpu")
    # In torch's counter the patches are a convolution.
    patches = 2 * (2 * 4) * (3 * 16 * 16) * 48 * (1 if pass_ == "forward" else 3)
    assert products_flops(floors[pass_]) == products_flops(passes[pass_]) + patches


def test_group_sizes_are_those_of_the_router():
    x, weights = work._draw_experts(EXPERTS)
    assert all(T.count_nonzero() == T.numel() for T in (x, *weights.values()))
    layer = Experts(48, 24, 6, 2)
    layer.router.weight.data = weights["router"]
    chosen = layer.routed(x)[1].topk(2).indices.flatten().tolist()
    assert work._group_sizes(EXPERTS) == [chosen.count(e) for e in range(6)]


def test_floor_of_a_model_is_its_products():
    config = MambaConfig(d_model=48, n_layers=3, d_state=7, backend="reference")
    model = LM(config, 40)
    tokens = torch.randint(40, (2, 5))
    training = work.build(floor, "train", SIZES | MODEL, {}, "cpu")[0]["step"]
    assert products_flops(training) == products_flops(lambda: model(tokens).sum().backward())
    prefill = work.build(floor, "decode", SIZES | MODEL, {}, "cpu")[0]["prefill"]
    with torch.no_grad():
        expected = products_flops(lambda: model.prefill(tokens, logits_to_keep=1))
    assert products_flops(prefill) == expected


def test_floor_reads_as_many_bytes_as_it_says():
    sizes = SIZES | MODEL | {"bandwidth_bytes": 1 << 20}
    read = floor.memory_read(sizes)
    assert read.__self__.numel() * 4 == 1 << 20
    assert read.__self__.count_nonzero() > (1 << 18) - 100
    assert work.build(floor, "decode", sizes, {}, "cpu")[1] == {"read_bytes": 1 << 20}


def test_training_makes_every_gradient_anew():
    block = ours.block(SIZES, {"backend": "auto"})
    x = torch.randn(2, 5, 48, requires_grad=True)
    passes = work._forward_and_training(block, (x,), (2, 5, 48))
    passes["training"]()
    first = [T.grad.clone() for T in (x, *block.parameters())]
    passes["training"]()
    assert all(torch.equal(a, T.grad) for a, T in zip(first, (x, *block.parameters()), strict=True))
    assert all(T.abs().max() > 0 for T in first)


def test_inputs_are_never_zeros():
    seen = []

    class Spy:
        @staticmethod
        def scan(sizes, options):
            return lambda *inputs: seen.extend(inputs)

    run = work.build(Spy, "scan", {"d_inner": 6, **SIZES}, {}, "cpu")[0]["forward"]
    run()
    x, dt, A, B, C, D = seen
    assert x.shape == dt.shape == (2, 5, 6)
    assert A.shape == (6, 7)
    assert B.shape == C.shape == (2, 5, 7)
    assert D.shape == (6,)
    assert all(T.count_nonzero() == T.numel() for T in seen)
    assert (dt > 0).all()
    assert (A < 0).all()


def test_scan_says_what_auto_takes():
    inputs = {"d_inner": 6, **SIZES}
    _, facts = work.build(ours, "scan", inputs, {"backend": "auto"}, "cpu")
    assert {*facts} == {"forward", "training"}
    assert {*facts.values()} <= {"cpu", "official", "chunked", "pscan", "reference"}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_weight_bytes_of_ours(weights):
    passes, facts = work.build(ours, "decode", SIZES | MODEL, {"weights": weights}, "cpu")
    assert {*passes} == {"prefill", "decode"}
    model = LM(MambaConfig(d_model=48, n_layers=3, d_state=7), 40)
    # The tied head is read whole, the embedding is the same memory.
    full = sum(4 * P.numel() for P in model.parameters())
    if weights == "float32":
        assert facts["weight_bytes"] == full
    else:
        least = {"bfloat16": 0.5, "int8": 0.25}[weights]
        assert least * full < facts["weight_bytes"] < 0.75 * full


def test_an_untied_embedding_is_not_counted():
    model = LM(MambaConfig(d_model=8, n_layers=1), 40, tie_embeddings=False)
    total = sum(4 * P.numel() for P in model.parameters())
    assert work.weight_bytes(model) == total - 4 * 40 * 8


def test_greedy_loop_steps_from_the_prompts_state():
    calls = []

    class Decoder:
        model = torch.nn.Linear(1, 1)

        def prefill(self, tokens):
            calls.append(("prefill", tokens.shape[1]))
            return torch.eye(40)[[9]], "state"

        def step(self, token, state):
            calls.append((token.item(), state))
            # A padding row of the head is the largest, and must not be drawn.
            return torch.eye(48)[[(token.item() + 1) % 40]] + 2 * torch.eye(48)[[44]], "next"

    class Contestant:
        @staticmethod
        def decoder(sizes, options):
            return Decoder()

    passes, _ = work.build(Contestant, "decode", SIZES | MODEL | {"batch": 1}, {}, "cpu")
    assert calls == [("prefill", 5)]
    passes["decode"]()
    assert calls[1:] == [(9, "state"), (10, "next"), (11, "next")]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_tiny_copies_are_tiny(kind):
    for case in cases.select(kind):
        tiny = work.shrink(dict(case.sizes))
        assert tiny.keys() == case.sizes.keys()
        assert tiny.get("d_state") == case.sizes.get("d_state")
        assert all(size <= 256 or key == "bandwidth_bytes" for key, size in tiny.items())


def test_transformers_builds_every_kind():
    pytest.importorskip("transformers")
    from mambapy.bench.contestants import hf

    for kind in ("block", "train", "decode"):
        passes, _ = work.build(hf, kind, SIZES | MODEL, {}, "cpu")
        for run in passes.values():
            run()
    decoder = hf.decoder(SIZES | MODEL, {})
    with torch.no_grad():
        logits, cache = decoder.prefill(torch.randint(40, (2, 5)))
        logits, cache = decoder.step(logits.argmax(-1), cache)
    assert logits.shape == (2, 40)


def test_experts_of_all_are_the_same():
    """Ours and both of transformers', with gradients; the dense MLP has as many products."""
    pytest.importorskip("transformers")
    from mambapy.bench.contestants import hf

    facts, gradients = {}, {}
    for name in ("mambapy", "transformers loop", "transformers grouped"):
        who = rivals.WHO[name]
        module = {"ours.py": ours, "hf.py": hf}[who.file]
        _, facts[name] = work.build(module, "experts", EXPERTS, {**who.options}, "cpu")
        x, weights = work._draw_experts(EXPERTS)
        module.experts(EXPERTS, who.options, weights)(x.requires_grad_()).square().sum().backward()
        gradients[name] = {"outputs": x.grad.flatten().tolist()}
    assert len(facts["mambapy"]["outputs"]) == 2 * 5 * 48
    assert records.differing(facts) == records.differing(gradients) == {}
    dense, shown = work.build(ours, "experts", EXPERTS, {**rivals.WHO["dense"].options}, "cpu")
    assert shown == {}
    least, _ = work.build(floor, "experts", EXPERTS, {}, "cpu")
    assert products_flops(dense["forward"]) == products_flops(least["forward"])


def test_ours_decodes_with_a_state():
    decoder = ours.decoder(SIZES | MODEL, {"weights": "float32"})
    prompt = torch.randint(40, (2, 5))
    with torch.no_grad():
        logits, state = decoder.prefill(prompt)
        first = logits.argmax(-1)
        tokens = torch.stack([first, *decoder.greedy(first, state, 6)], dim=1)
        logits, state = decoder.step(first, state)
    assert logits.shape == (2, 40)
    assert isinstance(state, ModelState)
    assert torch.equal(tokens, generate_tokens(decoder.model, prompt, num_tokens=7, sample=False))
