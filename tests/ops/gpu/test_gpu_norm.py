import pytest
import torch

pytest.importorskip("triton")

from mambapy import ops
from mambapy.ops import kernel_ops, reference
from mambapy.ops.gpu import norm
from tests.helpers import assert_near

CUDA = torch.cuda.is_available()
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


def check(x, weight, residual, grad_s=None):
    """Against the reference in float64, on the CPU, from what the kernel keeps."""
    y, s = norm.forward(x, weight, residual, EPS)
    kept = x if s is None else s
    grad_y = torch.randn(x.shape).to(x)
    grads = norm.backward(grad_y, grad_s, kept, weight, EPS, kept.dtype)
    added = x.cpu().double() if residual is None else x.cpu().double() + residual.cpu().double()
    exact_y = reference.rms_norm(added, weight.cpu().double(), EPS)
    given = [T.cpu().double().requires_grad_() for T in (kept, weight)]
    exact = list(torch.autograd.grad(reference.rms_norm(*given, EPS), given, grad_y.cpu().double()))
    if grad_s is not None:
        exact[0] += grad_s.cpu().double()
    assert [T.dtype for T in (y, *grads)] == [x.dtype, kept.dtype, weight.dtype]
    tolerance = TOLERANCES[x.dtype]
    assert_near(y.cpu(), exact_y, tolerance)
    assert_near(grads[0].cpu(), exact[0], max(tolerance, TOLERANCES[kept.dtype]))
    assert_near(grads[1].cpu(), exact[1], TOLERANCES[weight.dtype])
    if s is None:
        assert residual is None
    else:
        assert s.dtype == residual.dtype
        assert_near(s.cpu(), added, TOLERANCES[residual.dtype])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 63, 64, 65, *([1000] if CUDA else [])])
@pytest.mark.parametrize("d", [2, 100, *([24, 768, 1536, 4096, 16384] if CUDA else [])])
def test_sizes(device, rows, d, fused):
    x, residual = torch.randn(2, rows, d, device=device)
    check(x, torch.randn(d, device=device), residual if fused else None, x if fused else None)


def test_many_rows(device, monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 4)
    x = torch.randn(50, 3, 300, device=device)
    check(x, torch.randn(300, device=device), None)


def test_one_channel(device):
    # The gradient is eps / s^3, the difference of two numbers 1 / s that nearly are equal.
    x, weight = torch.randn(4, 1, device=device), torch.ones(1, device=device)
    grad, _ = norm.backward(torch.ones_like(x), None, x, weight, EPS, x.dtype)
    assert_near(norm.forward(x, weight)[0], reference.rms_norm(x, weight), 3e-6)
    s = (x.double() ** 2 + EPS).sqrt()
    assert ((grad - EPS / s**3).abs() * s).max() < 1e-6


def test_many_channels(device):
    x = torch.randn(3, 16384, device=device)
    check(x, torch.randn(16384, device=device), x.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [None, torch.float32])
@pytest.mark.parametrize("wide", [None, torch.float32])
def test_dtypes(device, dtype, stream, wide):
    x, residual, grad_s = torch.randn(3, 7, 5, 24, device=device).to(dtype)
    weight = torch.randn(24, device=device).to(wide or dtype)
    check(x, weight, residual.to(stream or dtype), grad_s.to(stream or dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_in_a_second_dtype(device, dtype):
    s, grad_y, grad_s = torch.randn(3, 7, 40, device=device)
    weight = torch.randn(40, device=device)
    out = torch.empty(7, 40, dtype=dtype, device=device)
    grads = norm.backward(grad_y, grad_s, s, weight, EPS, s.dtype, out)
    expected = norm.backward(grad_y, grad_s, s, weight, EPS, s.dtype)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    # The interpreter cuts digits off.
    assert_near(out.float(), grads[0].to(dtype).float(), 0 if CUDA else 2**-7)


def test_a_narrow_stream_is_rounded_before_its_norm(device):
    x, residual = torch.randn(2, 5, 24, device=device).bfloat16()
    weight = torch.randn(24, device=device)
    y, s = norm.forward(x, weight, residual, EPS, torch.float32)
    assert_near(s.float(), (x + residual).float(), 0 if CUDA else 2**-7)
    assert torch.equal(y, norm.forward(s, weight, None, EPS, torch.float32)[0])


def test_layouts(device):
    weight = torch.randn(24, device=device)
    wide = torch.randn(3, 5, 2 * 24, device=device)
    check(wide[..., 24:], weight, wide[..., :24])
    check(wide[:, ::2, :24], weight, wide[:, :3, 24:])
    check(wide.transpose(0, 2)[:24].transpose(0, 2), weight, None)
    check(wide[:1, :, :24].expand(3, -1, -1), weight, None, wide[:, :1, :24].expand(-1, 5, -1))


def test_two_calls_give_the_same_bits(device):
    x, residual, grad_y, grad_s = torch.randn(4, 3000 if CUDA else 70, 100, device=device)
    weight = torch.randn(100, device=device)

    def results():
        y, s = norm.forward(x, weight, residual, EPS)
        return y, s, *norm.backward(grad_y, grad_s, s, weight, EPS, s.dtype)

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_nothing(device):
    x, weight = torch.empty(2, 0, 24, device=device), torch.ones(24, device=device)
    y, s = norm.forward(x, weight, x)
    grad, grad_weight = norm.backward(y, None, s, weight, EPS, x.dtype)
    assert [T.shape for T in (y, s, grad)] == [x.shape] * 3
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_large(device):
    x, residual, grad_s = torch.randn(3, 16384, 768, device=device)
    check(x.bfloat16(), torch.randn(768, device=device), residual, grad_s)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_more_than_two_to_the_31_elements(device):
    rows, d = 2**20 + 100, 2056
    x = torch.randn(rows, d, device=device, dtype=torch.bfloat16)
    weight = torch.randn(d, device=device)
    y, _ = norm.forward(x, weight)
    grad, _ = norm.backward(y, None, x, weight, EPS, x.dtype)
    for part in (slice(0, 90), slice(rows - 90, rows)):
        given = x[part].cpu().double().requires_grad_()
        want = reference.rms_norm(given, weight.cpu().double(), EPS)
        assert_near(y[part].cpu(), want, 1e-2)
        want_grad = torch.autograd.grad(want, given, y[part].cpu().double())[0]
        assert_near(grad[part].cpu(), want_grad, 1e-2)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_op_and_its_gradients(device, narrow, monkeypatch):
    if not CUDA:
        monkeypatch.setattr(kernel_ops, "kernels", lambda name, x: norm)
    l, d = (65, 768) if CUDA else (7, 40)
    x, residual = torch.randn(2, 3, l, d, device=device)
    x = x.bfloat16() if narrow else x
    given = [T.requires_grad_() for T in (x, residual, torch.randn(d, device=device))]

    def results(backend):
        y, s = ops.add_rms_norm(*given, backend=backend)
        grads = torch.autograd.grad((y.float().sin() * s).sum(), given)
        return [y, s, *grads]

    for found, expected in zip(results("gpu"), results("reference"), strict=True):
        assert found.dtype == expected.dtype
        # The interpreter cuts digits off.
        rounding = 1e-2 if CUDA else 5e-2
        assert_near(found.float(), expected.float(), rounding if narrow else 5e-6)
    (grad,) = torch.autograd.grad(
        ops.add_rms_norm(*given)[0].float().square().sum(), given[0], create_graph=True
    )
    grad.float().sum().backward()
    assert torch.isfinite(given[1].grad).all()
