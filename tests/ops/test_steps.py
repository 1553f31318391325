"""The one-step twins: every backend against the reference, and when the kernels stand back."""

import pytest
import torch

from mambapy import ops
from mambapy.errors import BackendError
from tests.helpers import assert_near, scan_args

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def step_args(dtype, n=17, k=4):
    args = scan_args(b=3, l=1, e=37, n=n, dtype=torch.float32)
    scan = {
        name: (T[:, 0] if name in ("x", "dt", "B", "C", "z") else T).detach()
        for name, T in args.items()
        if name != "seq_idx"
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = {"x", "dt", "B", "C", "z"}
    scan = {name: T.to(dtype if name in narrow else wide) for name, T in scan.items()}
    conv = {
        "x": scan["x"],
        "weight": torch.randn(37, k).to(dtype),
        "bias": torch.randn(37).to(dtype),
        "state": torch.randn(3, k - 1, 37).to(wide),
    }
    return scan, conv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 17, 64])
@pytest.mark.parametrize("k", [1, 4])
def test_equals_the_reference(dtype, n, k):
    scan, conv = step_args(dtype, n, k)
    before = scan["state"].clone(), conv["state"].clone()
    for function, args, options in (
        (ops.selective_scan_step, scan, {"dt_softplus": True}),
        (ops.causal_conv1d_step, conv, {"activation": "silu"}),
    ):
        found = function(**args, **options, backend="cpu")
        expected = function(**args, **options, backend="reference")
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == want.dtype
            if want.numel():
                assert_near(got, want, DTYPES[dtype])
    assert torch.equal(scan["state"], before[0])
    assert torch.equal(conv["state"], before[1])


def test_gradients_come_from_the_reference():
    scan, _ = step_args(torch.float32)
    scan["x"].requires_grad_()
    y, _ = ops.selective_scan_step(**scan)
    assert y.requires_grad
    with pytest.raises(BackendError, match="no gradient"):
        ops.selective_scan_step(**scan, backend="cpu")
    with torch.no_grad():
        ops.selective_scan_step(**scan, backend="cpu")
    chosen = [v.backend for v in ops.explain("selective_scan_step", **scan) if v.chosen]
    assert chosen == ["reference"]


def test_torch_func_sees_through():
    scan, _ = step_args(torch.float32)
    x = scan.pop("x")

    def one(x):
        return ops.selective_scan_step(x, **scan)[0].sum()

    assert_near(torch.func.grad(one)(x), torch.autograd.functional.jacobian(one, x), 1e-5)
