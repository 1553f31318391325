"""torch.func through every backend of the scan: grad, vmap, and vmap of grad."""

import pytest
import torch

from mambapy import ops
from tests.helpers import assert_near, scan_args

BACKENDS = ["cpu", "chunked", "pscan", "reference"]


def draw():
    args = scan_args(b=2, l=70, e=5, n=3)
    return {name: T.detach() for name, T in args.items() if name != "seq_idx"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad(backend):
    args = draw()

    def loss(args):
        y, last = ops.selective_scan(**args, dt_softplus=True, return_state=True, backend=backend)
        return y.square().sum() + last.sum()

    found = torch.func.grad(loss)(args)
    for T in args.values():
        T.requires_grad_()
    expected = torch.autograd.grad(loss(args), list(args.values()))
    assert_near(found, dict(zip(args, expected, strict=True)), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapped", [("x", "z"), ("x", "A", "D")])
def test_vmap_and_vmap_of_grad(backend, mapped):
    args, many = draw(), [draw() for _ in range(3)]
    stacked = {name: torch.stack([other[name] for other in many]) for name in mapped}

    def loss(some):
        y = ops.selective_scan(**args | some, dt_softplus=True, backend=backend)
        return y.square().sum()

    values = torch.func.vmap(loss)(stacked)
    grads = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i in range(3):
        one = {name: T[i].clone().requires_grad_() for name, T in stacked.items()}
        expected = loss(one)
        assert_near(values[i], expected.detach(), 1e-12)
        wanted = torch.autograd.grad(expected, list(one.values()))
        assert_near(
            {name: T[i] for name, T in grads.items()}, dict(zip(one, wanted, strict=True)), 1e-12
        )


# torch's own, at the first forward-mode derivative of a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_exact_or_refused(backend):
    args = draw()

    def y(x):
        return ops.selective_scan(**(args | {"x": x}), dt_softplus=True, backend=backend)

    x, way = args["x"], torch.randn_like(args["x"])
    if backend in ("cpu", "chunked"):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(y, (x,), (way,))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match="no forward-mode derivative"),
        ):
            y(torch.autograd.forward_ad.make_dual(x, way))
        return
    _, found = torch.func.jvp(y, (x,), (way,))
    step = 1e-6
    assert_near(found, (y(x + step * way) - y(x - step * way)) / (2 * step), 1e-6)
