"""What the backward pass computes again: the same numbers, less memory."""

import gc

import pytest
import torch

from mambapy.config import (
    RECOMPUTE,
    HybridConfig,
    JambaConfig,
    Mamba2Config,
    Mamba3Config,
    VimConfig,
)
from mambapy.errors import ConfigError
from mambapy.experts import load_balancing_loss
from mambapy.lm import LM
from mambapy.vim import VisionMamba
from tests.helpers import tiny

V = 21
HEADS = {"d_model": 16, "n_layers": 2, "d_state": 4, "d_head": 4}
JAMBA = {"d_model": 16, "n_layers": 4, "d_state": 4, "d_intermediate": 24, "n_heads": 2}
MODELS = {
    "mamba": tiny(d_model=16),
    "mamba2": Mamba2Config(**HEADS, learnable_init_states=True),
    "mamba3": Mamba3Config(**HEADS, mimo_rank=2),
    "hybrid": HybridConfig(
        d_model=16,
        layers=("mamba2", "attention", "mamba"),
        mamba2={"d_head": 4},
        attention={"n_heads": 2},
    ),
    "jamba": JambaConfig(**JAMBA, n_kv_heads=1, n_experts=3, top_k=2),
}
each = pytest.mark.parametrize("name", MODELS)


def make(name):
    torch.manual_seed(0)
    return LM(MODELS[name], V)


def loss_of(model, tokens, **options):
    if "moe" not in model.config.feed_forwards:
        return model.loss(tokens, **options)
    loss, routing = model.routed_loss(tokens, **options)
    return loss + 0.1 * load_balancing_loss(routing, 2).total


def grads(model, tokens, **options):
    model.zero_grad()
    loss = loss_of(model, tokens, **options)
    loss.backward()
    return [loss.detach(), *(P.grad.clone() for P in model.parameters() if P.grad is not None)]


@each
@pytest.mark.parametrize("how", ["plain", "packed", "autocast"])
def test_same_loss_and_gradients_to_the_bit(name, how):
    model = make(name)
    tokens = torch.randint(V, (2, 19))
    options = {}
    if how == "packed":
        options["seq_idx"] = torch.randint(-1, 3, (2, 19)).sort(dim=1).values
    found = {}
    for level in RECOMPUTE:
        model.recompute = level
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found[level] = grads(model, tokens, **options)
    for level in RECOMPUTE[1:]:
        pairs = zip(found[level], found["none"], strict=True)
        assert all(torch.equal(got, want) for got, want in pairs), level


def storages():
    """The memory of all tensors that Python knows: address -> bytes."""
    gc.collect()
    found = [T.untyped_storage() for T in gc.get_objects() if type(T) is torch.Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@each
def test_a_level_keeps_less_than_the_one_before(name):
    model = make(name)
    tokens = torch.randint(V, (2, 64))
    kept = []
    for level in RECOMPUTE:
        model.recompute = level
        # By address: a tensor that several operators keep is kept once.
        sizes: dict[int, int] = {}
        before = storages()

        def keep(T, sizes=sizes):
            storage = T.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return T

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda T: T):
            loss = loss_of(model, tokens)
        parameters = {P.untyped_storage().data_ptr() for P in model.parameters()}
        # What "conv" keeps is in no operator's context.
        sizes |= {at: size for at, size in storages().items() if at not in before}
        kept.append(sum(size for at, size in sizes.items() if at not in parameters))
        del loss
    none, conv, scan, block = kept
    assert block < scan <= conv < none
    assert scan < 0.8 * none


@pytest.mark.parametrize("level", RECOMPUTE)
def test_what_is_kept_goes_with_the_backward_pass(level):
    model = make("mamba")
    model.recompute = level
    tokens = torch.randint(V, (2, 64))

    def bytes_now():
        # Without looking for cycles: a step's tensors must not stay beside the next one's.
        found = [T.untyped_storage() for T in gc.get_objects() if type(T) is torch.Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())

    grads(model, tokens)
    gc.collect()
    gc.disable()
    try:
        before = bytes_now()
        loss_of(model, tokens).backward()
        assert bytes_now() <= before + 64
    finally:
        gc.enable()


def test_what_scan_keeps_of_a_block():
    config = tiny(d_model=16, n_layers=1)
    block = LM(config, V).backbone.layers[0]
    block.mixer.recompute = "scan"
    x = torch.randn(2, 50, 16, requires_grad=True)
    sizes = {}

    def keep(T):
        sizes[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
        return T

    from mambapy.ragged import Ragged

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda T: T):
        y = block(x, Ragged())
    parameters = {P.untyped_storage().data_ptr() for P in block.parameters()}
    kept = sum(size for at, size in sizes.items() if at not in parameters)
    assert y.shape == x.shape
    # The block's input, the norm's output, x and z.
    assert kept <= 1.05 * x.nbytes * (1 + 1 + 2 * config.expand)


@pytest.mark.parametrize("level", RECOMPUTE)
def test_random_numbers_are_drawn_once(level):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_classes": 3}
    model = VisionMamba(VimConfig(**sizes, drop_path_rate=0.5)).train()
    images = torch.randn(6, 3, 8, 8)

    def run(level):
        model.zero_grad()
        model.backbone.recompute = level
        torch.manual_seed(1)
        model(images).square().sum().backward()
        return [P.grad.clone() for P in model.parameters() if P.grad is not None]

    pairs = zip(run(level), run("none"), strict=True)
    assert all(torch.equal(got, want) for got, want in pairs)


def test_dropout_of_an_adapter_is_drawn_once():
    # Dropout between in_proj and out_proj, as an adapter of x_proj has it.
    def run(level):
        model = make("mamba")
        for layer in model.backbone.layers:
            layer.mixer.x_proj = torch.nn.Sequential(torch.nn.Dropout(0.3), layer.mixer.x_proj)
        model.recompute = level
        torch.manual_seed(3)
        return grads(model, torch.arange(18).view(2, 9))

    for level in RECOMPUTE[1:]:
        pairs = zip(run(level), run("none"), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)


def test_names():
    model = make("mamba")
    assert model.recompute == "none"
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = True
    assert model.recompute == model.backbone.recompute == "block"
    model.recompute = "scan"
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = False
    assert model.recompute == "none"
    with pytest.raises(ConfigError, match="recompute='all' must be one of none, conv, scan, block"):
        model.recompute = "all"


# torch's own, on the way into its compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("level", RECOMPUTE)
def test_compiles_whole(level):
    torch._dynamo.reset()
    model = make("mamba")
    model.recompute = level
    tokens = torch.randint(V, (2, 9))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(tokens), list(model.parameters()))
    expected = torch.autograd.grad(model.loss(tokens), list(model.parameters()))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", RECOMPUTE)
def test_more_than_one_backward_pass(level):
    model, plain = make("mamba"), make("mamba")
    model.recompute = level
    tokens = torch.arange(18).view(2, 9)

    def twice(model):
        loss = loss_of(model, tokens)
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(model.parameters()))
        return [*first, *again]

    def penalty(model):
        parameters = list(model.parameters())
        loss = loss_of(model, tokens)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    for what in (twice, penalty):
        pairs = zip(what(model), what(plain), strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)
