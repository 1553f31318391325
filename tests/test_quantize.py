"""Weights in fewer bits: what is stored, what the layers compute, what a model does with them."""

import pytest
import torch
from torch import nn

from mambapy.config import MambaConfig
from mambapy.errors import ConfigError
from mambapy.layers import QUANTIZED, QuantizedLinear, quantize
from mambapy.lm import LM
from tests.helpers import assert_near
from tests.test_fused import check


def model(**options) -> LM:
    torch.manual_seed(0)
    return LM(MambaConfig(d_model=48, n_layers=2), 50, **options).eval()


def test_int8_rounds_each_row_to_nearest():
    weight = torch.randn(7, 33)
    weight[2] = 0
    weight[3] *= 1e-30
    integers, scale = quantize(weight, "int8")
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert integers.abs().max() == 127
    assert torch.equal(integers[2], torch.zeros(33, dtype=torch.int8))
    error = (integers * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_a_product_with_the_rounded_matrix(kind, bias):
    linear = nn.Linear(20, 9, bias=bias)
    layer = QuantizedLinear(linear, kind)
    x = torch.randn(2, 3, 20, requires_grad=True)
    matrix = layer.weight.float() * (1 if layer.scale is None else layer.scale[:, None])
    expected = nn.functional.linear(x, matrix, linear.bias)
    assert_near(layer(x).detach(), expected.detach(), 1e-6)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert_near(grad, torch.autograd.grad(expected.sum(), x)[0], 1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("tie", [True, False])
def test_model_is_near_and_small(kind, tie):
    lm = model(tie_embeddings=tie)
    tokens = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        expected = lm(tokens)
        size = sum(P.numel() * P.element_size() for P in lm.parameters())
        assert lm.quantize(kind) is lm
        found = lm(tokens)
    assert_near(found, expected, 0.03)
    assert not torch.equal(found, expected)
    small = sum(P.numel() * P.element_size() for P in lm.parameters())
    assert small < {"int8": 0.5, "bfloat16": 0.65}[kind] * size
    assert (lm.lm_head.weight is lm.embedding.weight) == tie
    check(lm)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(kind, tie, tmp_path):
    lm = model(tie_embeddings=tie).quantize(kind)
    lm.save_pretrained(tmp_path)
    again = LM.from_pretrained(tmp_path)
    assert again.quantized == kind
    tokens = torch.randint(0, 50, (1, 5))
    with torch.no_grad():
        assert torch.equal(again(tokens), lm(tokens))
    assert (again.lm_head.weight is again.embedding.weight) == tie


def test_scales_stay_float32_when_a_model_is_cast():
    lm = model().quantize("int8").to(torch.bfloat16)
    assert lm.lm_head.scale.dtype == torch.float32
    assert lm.lm_head.weight.dtype == torch.int8
    check(lm, tolerance=0.03)


def test_mistakes():
    with pytest.raises(ConfigError, match="int8, bfloat16"):
        model().quantize("int4")
    with pytest.raises(ConfigError, match="in int8 already"):
        model().quantize("int8").quantize("bfloat16")
