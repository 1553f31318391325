import pytest
import torch

from mambapy.ops.kernel_ops import causal_conv1d, rms_norm, selective_scan
from tests.ops.cpu.test_cpu_scan import NAMES, inputs


def block(x, w, dt, A, B, C, norm):
    x, _ = rms_norm(x, norm)
    x = causal_conv1d(x, w, activation="silu")
    return selective_scan(x, dt, A, B, C, dt_softplus=True)[0]


def example(b, l):
    v = inputs(b, l, 40, 4)
    return [
        v["x"].float(),
        torch.randn(40, 4),
        *[v[k].float() for k in ("dt", "A", "B", "C")],
        torch.ones(40),
    ]


def test_compile_with_dynamic_sizes():
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, l in ((2, 70), (3, 129), (5, 10)):
        args = [a.requires_grad_() for a in example(b, l)]
        y, y0 = compiled(*args), block(*args)
        grads = torch.autograd.grad(y.sum(), args)
        grads0 = torch.autograd.grad(y0.sum(), args)
        assert all(torch.equal(a, c) for a, c in zip([y, *grads], [y0, *grads0], strict=True))


@pytest.mark.parametrize("weights", [False, True])
def test_vmap(weights):
    args = [torch.stack(p) for p in zip(*[example(2, 70) for _ in range(3)], strict=True)]
    dims = (0, None, 0, None, 0, 0, None)
    if weights:
        dims = (0,) * 7
    given = [a if d == 0 else a[0] for a, d in zip(args, dims, strict=True)]
    y = torch.func.vmap(block, in_dims=dims)(*given)
    for i in range(3):
        assert torch.equal(
            y[i], block(*[a[i] if d == 0 else a for a, d in zip(given, dims, strict=True)])
        )


def test_vmap_of_grad():
    args = example(2, 70)
    xs = torch.randn(3, *args[0].shape)
    loss = lambda x, w: block(x, w, *args[2:]).square().sum()  # noqa: E731
    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(xs, args[1])
    for i in range(3):
        x, w = xs[i].clone().requires_grad_(), args[1].clone().requires_grad_()
        want = torch.autograd.grad(loss(x, w), (x, w))
        assert all(
            torch.allclose(a[i], c, rtol=1e-5, atol=1e-5) for a, c in zip(got, want, strict=True)
        )


def test_second_derivatives_of_the_norm():
    x, weight = (torch.randn(*s).double().requires_grad_() for s in ((2, 8), (8,)))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a)[0], (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: rms_norm(*a)[0], (x, weight))
    residual = torch.randn(2, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(rms_norm, (x, weight, residual))
    assert torch.autograd.gradgradcheck(rms_norm, (x, weight, residual))


def test_second_derivatives_of_the_convolution():
    args = [torch.randn(1, 5, 2), torch.randn(2, 3), torch.randn(2), torch.randn(1, 2, 2)]
    args = [a.double().requires_grad_() for a in args]

    def conv(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, activation="silu", state=state)

    assert torch.autograd.gradcheck(conv, args)
    assert torch.autograd.gradgradcheck(conv, args)


def test_a_second_derivative_under_torch_func_raises():
    v = inputs(1, 10, 8, 2)

    def loss(x):
        y = selective_scan(x, *[v[k] for k in NAMES[1:5]], dt_softplus=True)[0]
        return y.square().sum()

    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(v["x"])


@pytest.mark.parametrize("op", ["scan", "conv", "norm"])
def test_opcheck(op):
    v = {k: t.float().requires_grad_() for k, t in inputs(2, 70, 24, 3).items()}
    ops = torch.ops.mambapy
    if op == "scan":
        tail = [v[k] for k in ("D", "z", "dt_bias", "state")]
        args = (*[v[k] for k in NAMES[:5]], *tail, None, True, True)
        torch.library.opcheck(ops.selective_scan.default, args)
    elif op == "conv":
        args = (v["x"], torch.randn(24, 4, requires_grad=True), v["D"], None, None, True)
        torch.library.opcheck(ops.causal_conv1d.default, args)
    else:
        torch.library.opcheck(ops.rms_norm.default, (v["x"], v["D"], v["z"], 1e-5, torch.bfloat16))
        narrow = v["x"].detach().bfloat16().requires_grad_()
        torch.library.opcheck(ops.rms_norm.default, (narrow, v["D"], v["z"], 1e-5, torch.float32))
