import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from mambapy.errors import ShapeError
from tests.helpers import assert_near, outputs_and_grads


def test_equals_torchs_norm():
    args = {
        "x": torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True),
        "weight": torch.randn(8, dtype=torch.float64, requires_grad=True),
    }
    expected = outputs_and_grads(lambda x, weight: F.rms_norm(x, (8,), weight, 1e-3), args)
    found = outputs_and_grads(lambda x, weight: ops.rms_norm(x, weight, 1e-3), args)
    assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_float16_does_not_overflow(scale):  # trap 12: the squares are taken in float32
    x = (scale * torch.randn(4, 64)).half()
    y = ops.rms_norm(x, torch.ones(64).half())
    assert y.dtype == torch.float16
    assert_near(y, ops.rms_norm(x.double()), 2**-10)


def test_bad_arguments():
    with pytest.raises(ShapeError, match="weight"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(7))
    with pytest.raises(ShapeError, match="floating"):
        ops.rms_norm(torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_y_may_have_another_dtype(backend):
    args = {"x": torch.randn(5, 40).requires_grad_(), "weight": torch.randn(40).requires_grad_()}
    exact = {name: T.detach().double().requires_grad_() for name, T in args.items()}
    y = ops.rms_norm(**args, dtype=torch.bfloat16, backend=backend)
    assert y.dtype == torch.bfloat16
    expected = ops.rms_norm(**exact)
    assert_near(y, expected, 2**-8)
    grad = torch.randn(5, 40).bfloat16()
    found = torch.autograd.grad(y, list(args.values()), grad)
    wanted = torch.autograd.grad(expected, list(exact.values()), grad.double())
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, want, 1e-6)
