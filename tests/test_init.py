import math

import pytest
import torch
import torch.nn.functional as F

from mambapy.config import MambaConfig
from mambapy.lm import LM
from mambapy.mamba import Mamba, MambaBlock

CONFIG = MambaConfig(d_model=256, n_layers=4, dt_min=2e-3, dt_max=0.05)


def bare():
    return Mamba(CONFIG)


def language_model():
    return LM(CONFIG, vocab_size=300).backbone


def after_to_empty():
    with torch.device("meta"):
        model = LM(CONFIG, vocab_size=300)
    model.to_empty(device="cpu")
    for P in model.parameters():
        torch.nn.init.constant_(P, float("nan"))
    model.reset_parameters()
    assert model.lm_head.weight is model.embedding.weight
    return model.backbone


def after_reset():
    model = Mamba(CONFIG)
    model.reset_parameters()
    return model


@pytest.fixture(
    params=[bare, language_model, after_to_empty, after_reset],
    ids=lambda make: make.__name__,
)
def model(request):
    torch.manual_seed(1)
    return request.param()


def uniform_bounds(weight, bound):
    """Numbers look uniform in +-bound."""
    weight = weight.detach()
    assert weight.abs().max() <= bound
    assert weight.abs().max() >= 0.98 * bound
    assert abs(float(weight.std()) / (bound / math.sqrt(3)) - 1) < 0.03
    assert abs(float(weight.mean())) < 0.03 * bound


def test_statistics(model):  # traps 52, 54, 55
    R, e, n = 16, 512, 16
    for layer in model.layers:
        mixer = layer.mixer
        A = -torch.exp(mixer.A_log)
        assert torch.allclose(A, -torch.arange(1.0, n + 1).expand(e, n))
        assert torch.equal(mixer.D, torch.ones(e))
        assert torch.equal(layer.norm.weight, torch.ones(256))
        uniform_bounds(mixer.dt_proj.weight, R**-0.5)
        uniform_bounds(mixer.in_proj.weight, 256**-0.5)
        uniform_bounds(mixer.x_proj.weight, e**-0.5)
        uniform_bounds(mixer.conv1d.weight, 4**-0.5)
        # The rescale by 1 / sqrt(n_layers), once.
        uniform_bounds(mixer.out_proj.weight, e**-0.5 / math.sqrt(4))
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 2e-3 * 0.999
        assert dt.max() <= 0.05 * 1.001
        # Log-uniform: the quartiles of log dt divide its range evenly.
        low, high = math.log(2e-3), math.log(0.05)
        quartiles = torch.quantile(dt.log(), torch.tensor([0.25, 0.5, 0.75]))
        expected = low + torch.tensor([0.25, 0.5, 0.75]) * (high - low)
        assert torch.allclose(quartiles, expected, atol=0.12 * (high - low))


def test_language_model_embeddings():
    torch.manual_seed(0)
    model = LM(CONFIG, vocab_size=300, tie_embeddings=False)
    assert abs(float(model.embedding.weight.detach().std()) - 0.02) < 1e-3
    uniform_bounds(model.lm_head.weight, 256**-0.5)
    assert torch.equal(model.norm_f.weight, torch.ones(256))


def test_floor_and_constant():
    block = MambaBlock(
        MambaConfig(d_model=64, n_layers=1, dt_min=1e-5, dt_init_floor=1e-3, dt_init="constant")
    )
    dt = F.softplus(block.dt_proj.bias).detach()
    assert abs(float(dt.min()) - 1e-3) < 1e-6
    assert torch.equal(block.dt_proj.weight, torch.full((128, 4), 0.5))


def test_one_block_alone_is_not_rescaled():
    torch.manual_seed(0)
    uniform_bounds(MambaBlock(CONFIG).out_proj.weight, 512**-0.5)


def test_the_same_seed_gives_the_same_model():
    def draw():
        torch.manual_seed(3)
        return LM(CONFIG, vocab_size=300).state_dict()

    first, second = draw(), draw()
    assert all(torch.equal(first[name], second[name]) for name in first)
