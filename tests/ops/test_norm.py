import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
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


def add_args(*shape, dtype=torch.float64):
    x, residual = torch.randn(2, *shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    return {"x": x, "residual": residual, "weight": weight}


def leaves(args):
    return {name: T.detach().requires_grad_() for name, T in args.items()}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("shape", [(1,), (3, 1, 8), (2, 65, 24)])
def test_an_addition_and_its_norm(backend, shape):
    args = leaves(add_args(*shape))

    def two(x, residual, weight):
        s = residual + x
        return F.rms_norm(s, shape[-1:], weight, 1e-3), s

    expected = outputs_and_grads(two, args)
    found = outputs_and_grads(lambda **a: ops.add_rms_norm(**a, eps=1e-3, backend=backend), args)
    assert_near(found, expected, 1e-12)


def test_the_sum_is_in_the_wider_dtype_and_gradients_in_their_own():
    args = add_args(5, 40, dtype=torch.float32)
    args = leaves(args | {"x": args["x"].bfloat16()})
    y, s = ops.add_rms_norm(**args)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(s, args["x"] + args["residual"])
    assert ops.add_rms_norm(**args, dtype=torch.float32)[0].dtype == torch.float32
    grads = torch.autograd.grad((y.sum(), s.sum()), list(args.values()))
    assert [T.dtype for T in grads] == [torch.bfloat16, torch.float32, torch.float32]
    narrow_stream = args | {"x": args["x"].float(), "residual": args["residual"].bfloat16()}
    assert ops.add_rms_norm(**narrow_stream)[1].dtype == torch.float32
    # Without a weight there is the definition.
    y, s = ops.add_rms_norm(args["x"], args["residual"])
    assert torch.equal(y, ops.rms_norm(s, dtype=torch.bfloat16))


def test_an_addition_and_its_norm_through_torchs_machinery():
    args = add_args(3, 8)
    function = lambda *a: ops.add_rms_norm(*a, eps=1e-3)  # noqa: E731
    given = list(leaves(args).values())
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)

    def loss(x, residual, weight):
        y, s = function(x, residual, weight)
        return (y.sin() * s).sum()

    expected = torch.autograd.grad(loss(*given), given)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*args.values())
    for got, want in zip(found, expected, strict=True):
        assert_near(got, want, 1e-12)
    xs = torch.randn(4, 3, 8, dtype=torch.float64)
    mapped = torch.func.vmap(loss, in_dims=(0, None, None))(xs, *list(args.values())[1:])
    assert_near(mapped, torch.stack([loss(x, *list(args.values())[1:]) for x in xs]), 1e-12)


def test_bad_additions():
    x = torch.zeros(2, 8)
    with pytest.raises(ShapeError, match="residual must be"):
        ops.add_rms_norm(x, torch.zeros(8), torch.ones(8))
    with pytest.raises(ShapeError, match="residual must be floating"):
        ops.add_rms_norm(x, torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ShapeError, match="residual is on meta"):
        ops.add_rms_norm(x, torch.zeros(2, 8, device="meta"))
    with pytest.raises(ShapeError, match="weight"):
        ops.add_rms_norm(x, x, torch.ones(7))
    with pytest.raises(BackendError, match="gpu"):
        ops.add_rms_norm(x, x, torch.ones(8), backend="gpu")
