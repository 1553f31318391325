"""The residual stream: an addition and the norm after it are one op, wherever nobody looks on."""

import pytest
import torch
from torch import nn

from mambapy import ops
from mambapy.block import ResidualBlock
from mambapy.config import HybridConfig, Mamba2Config, MambaConfig
from mambapy.hybrid import Hybrid
from mambapy.layers import RMSNorm
from mambapy.lm import LM
from mambapy.mamba import Mamba
from mambapy.mamba2 import Mamba2
from mambapy.ragged import Ragged
from mambapy.vim import VMamba
from tests.helpers import assert_near, tiny

MODELS = {
    "mamba": lambda: Mamba(tiny(d_model=16, n_layers=3)),
    "mlp": lambda: Mamba2(
        Mamba2Config(d_model=16, n_layers=2, d_state=4, d_head=4, d_intermediate=12)
    ),
    "fp32": lambda: Mamba(tiny(d_model=16, n_layers=3, residual_in_fp32=True)),
    "vim": lambda: VMamba(tiny(d_model=16, n_layers=3), 0.0),
    "hybrid": lambda: Hybrid(
        HybridConfig(d_model=16, layers=("mamba", "attention"), attention={"n_heads": 2})
    ),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.1 * torch.randn_like(P))
    return model


@pytest.fixture
def fused(monkeypatch):
    """How often the op was called."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = ops.add_rms_norm
    monkeypatch.setattr(ops, "add_rms_norm", counted)
    return calls


def block_by_block(model, x):
    """x + mixer(norm(x)) as it is written."""
    x = model.to_residual(x)
    for layer in model.layers:
        x = x + layer.mixer(layer.norm(x))
        if layer.mlp is not None:
            x = x + layer.mlp(layer.norm2(x))
    return x


def results(model, function, x):
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_bits_as_block_by_block(name, autocast, fused):
    model, x = make(name), torch.randn(2, 19, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(model, model, x)
        joined = len(fused)
        expected = results(model, lambda x: block_by_block(model, x), x)
    # But for the first, each norm has an addition before it.
    norms = sum(1 + (layer.norm2 is not None) for layer in model.layers)
    assert joined == norms - 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Scaled(nn.Module):
    def forward(self, x):
        return 0.5 * x


class Block(ResidualBlock):
    def forward(self, x, ragged):
        return x + 2 * self.mixer(self.norm(x), ragged)


def test_hooks_and_replaced_parts_are_called(fused):
    x, seen = torch.randn(2, 5, 16), []

    def note(module, args, result):
        seen.append((args[0], result))

    model = make("mamba")
    plain = model(x)
    model.layers[1].norm.register_forward_hook(note)
    model.layers[2].register_forward_hook(note)
    fused.clear()
    assert torch.equal(model(x), plain)
    assert [result.shape for _, result in seen] == [x.shape] * 2
    assert torch.equal(seen[1][1], plain)
    assert not fused

    model = make("mamba")
    model.layers[1].norm = Scaled()
    assert torch.equal(model(x), block_by_block(model, x))

    model = make("mamba")
    first, second, third = model.layers
    second.__class__ = Block
    third.forward = lambda x, ragged: -x
    s = first(x, Ragged())
    expected = -(s + 2 * second.mixer(second.norm(s)))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [RMSNorm, ResidualBlock])
def test_a_patched_class_is_called(kind, monkeypatch):
    """As libraries do that bring kernels of their own."""
    x, calls = torch.randn(2, 5, 16), []
    model = make("mamba")
    expected, original = model(x), kind.forward

    def theirs(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(kind, "forward", theirs)
    assert torch.equal(model(x), expected)
    assert len(calls) == len(model.layers)


def test_a_compiled_block_is_called():
    model = make("mamba")
    calls = []
    model.layers[1]._compiled_call_impl = lambda x, ragged: calls.append(x) or x
    model(torch.randn(1, 3, 16))
    assert len(calls) == 1


def test_branches_add_up_to_the_block():
    layer = make("mlp").layers[0]
    x, added = torch.randn(2, 2, 7, 16)
    total = torch.add(*layer.go_on(x, added, Ragged()))
    assert torch.equal(total, layer(x + added, Ragged()))


@pytest.mark.parametrize("name", ["mamba", "mlp", "hybrid"])
def test_sequences_chunks_and_steps_agree(name):
    model, x = make(name), torch.randn(2, 9, 16)
    y = model(x)
    first, state = model.prefill(x[:, :4])
    second, state = model.prefill(x[:, 4:8], state)
    with torch.enable_grad():
        last, _ = model.step(x[:, 8], state)
    assert_near(torch.cat((first, second, last[:, None]), dim=1), y, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# torch's own.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("level", ["none", "conv", "scan", "block"])
def test_a_gpu_adds_on_the_way(level):
    """Loss and gradients as of the plain way, fewer kernels, and no copy of two halves."""
    from torch.profiler import ProfilerActivity, profile

    model = LM(MambaConfig(d_model=128, n_layers=3), 300).cuda()
    model.recompute = level
    tokens = torch.randint(300, (2, 130), device="cuda")

    def run():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens)
        loss.backward()
        return [loss.detach(), *(P.grad.clone() for P in model.parameters())]

    found = run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
    names = {event.key: event.count for event in seen.key_averages()}
    # The splits of x_proj's output.
    assert names.get("aten::cat", 0) == 3
    # Somebody who looks on has the blocks called one by one, and no gradient joined.
    for layer in model.backbone.layers:
        layer.norm.register_forward_hook(lambda *_: None)
    expected = run()
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert float((got - want).norm() / want.norm()) < 1e-2
    assert isinstance(model.backbone.layers[0].norm, RMSNorm)
