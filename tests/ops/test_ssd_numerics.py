"""`ops.ssd` at the edges: strong and weak decays, huge and no steps, dtypes, layouts."""

import math

import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from tests.helpers import assert_near, outputs_and_grads
from tests.ops.test_ssd import cast, every, every_fast, run, ssd_args


@every_fast
def test_long_strong_decay(backend):  # traps 1, 3, 4, 5
    l, h = 4096, 4
    args = ssd_args(b=1, l=l, h=h, p=2, n=3, dtype=torch.float32, full=False)
    args["dt"] = torch.ones(1, l, h, requires_grad=True)
    args["A"] = (-torch.linspace(16, 128, h)).requires_grad_()

    def nearest(x, dt, A, B, C):
        # What is older than a step counts less than exp(-32).
        B, C = (T.repeat_interleave(2, dim=2) for T in (B, C))
        drive = torch.einsum("blh,blhp,blhn->blhpn", dt, x, B)
        old = (dt[:, 1:] * A).exp()[..., None, None] * drive[:, :-1]
        return torch.einsum("blhpn,blhn->blhp", drive + F.pad(old, (0,) * 6 + (1, 0)), C)

    expected = outputs_and_grads(nearest, cast(args, torch.float64))
    assert_near(outputs_and_grads(lambda **a: ops.ssd(**a, backend=backend), args), expected, 1e-5)


@every
def test_a_decay_is_never_above_one(backend):  # trap 1
    l = 200 if backend == "reference" else 2000
    dt = 1e-8 * torch.rand(1, l, 3)
    dt[:, 5::100] = 30.0
    A, one = -torch.tensor([1e-6, 1e-2, 1.0]), torch.ones(1, l, 1, 1)
    state = torch.ones(1, 3, 1, 1)
    zero = torch.zeros(1, l, 3, 1)
    y, last = ops.ssd(zero, dt, A, one, one, state=state, return_state=True, backend=backend)
    assert y.max() <= 1
    assert y.diff(dim=1).max() <= 0
    expected = (dt.double() * A.double()).sum(1).exp()
    assert_near(last.flatten(), expected.flatten(), 1e-5)


@every
@pytest.mark.parametrize("dt", [-1e4, 0.0, 1e4])
def test_extreme_step_sizes_have_finite_gradients(backend, dt):  # traps 5, 16, 17
    args = ssd_args(l=5)
    args["dt"] = torch.full_like(args["dt"], dt).requires_grad_()
    function = run(backend, dt_limit=(0.0, math.inf))
    expected = outputs_and_grads(run("reference", dt_limit=(0.0, math.inf)), args)
    assert_near(outputs_and_grads(function, args), expected, 1e-10)
    if dt == -1e4:
        # No step at all: the state of a row that is one document stands still.
        args["seq_idx"] = torch.zeros_like(args["seq_idx"])
        _, last = function(**args)
        assert torch.equal(last, args["state"])


@every
def test_softplus_of_dt(backend):  # trap 8
    values = torch.tensor([-30.0, 0.0, 19.9, 20.1, 100.0], dtype=torch.float64)
    one = torch.ones(1, 5, 1, 1, dtype=torch.float64)
    A = torch.full((1,), -1e-30, dtype=torch.float64)
    # With A ~ 0 and B = C = x = 1, y is the running sum of the step sizes.
    y = ops.ssd(one, values.view(1, 5, 1), A, one, one, dt_softplus=True, backend=backend)
    assert_near(y.flatten(), F.softplus(values).cumsum(0), 1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_run_in_float32(backend, dtype):  # traps 11, 14
    args = ssd_args(l=130, dtype=torch.float32)
    low = {
        k: v.detach().to(dtype).requires_grad_() if k in ("x", "dt", "B", "C", "z") else v
        for k, v in args.items()
    }
    # What the recurrence makes of the rounded inputs, in float64 throughout.
    y, last = run(backend)(**low)
    y64, last64 = run("reference")(**cast(low, torch.float64))
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert_near(last, last64, 1e-5)
    assert_near(y, y64, 2**-8 if dtype == torch.bfloat16 else 2**-11)
    grads = torch.autograd.grad(y.float().sum(), [low["x"], low["A"]])
    assert grads[0].dtype == dtype
    assert grads[1].dtype == torch.float32


@every
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "state"])
def test_mixed_dtypes_promote_and_ignore_autocast(backend, name):  # traps 14, 15
    args = ssd_args(l=9, dtype=torch.float32)
    args[name] = args[name].detach().double().requires_grad_()

    def under_autocast(**args):
        with torch.autocast("cpu", torch.bfloat16):
            return run(backend)(**args)

    found = outputs_and_grads(under_autocast, args)
    assert found["output 0"].dtype == args["x"].dtype
    assert found["output 1"].dtype == torch.float64
    assert all(found[f"grad {k}"].dtype == v.dtype for k, v in args.items() if v.requires_grad)
    expected = outputs_and_grads(run("reference"), cast(args, torch.float64))
    assert_near(found, expected, 1e-6)


@every_fast
def test_a_backward_pass_knows_no_autocast(backend):  # trap 15
    args = ssd_args(l=70, dtype=torch.float32)
    leaves = [v for v in args.values() if v.requires_grad]
    losses = [sum(T.square().sum() for T in run(backend)(**args)) for _ in range(2)]
    expected = torch.autograd.grad(losses[0], leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(losses[1], leaves)
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


@every_fast
def test_transposed_and_expanded_arguments(backend):  # trap 46
    args = ssd_args(l=20)
    twisted = dict(args)
    for name in ("x", "z"):
        T = args[name].detach().transpose(1, 3).contiguous().transpose(1, 3)
        twisted[name] = T.requires_grad_()
    for name in ("B", "dt", "state"):
        twisted[name] = args[name].detach()[:1].expand_as(args[name]).requires_grad_()
    twisted["A"] = args["A"].detach()[:1].expand(4).requires_grad_()
    assert not any(twisted[k].is_contiguous() for k in ("x", "z", "B", "dt", "state", "A"))
    plain = {k: v.detach().clone().contiguous() for k, v in twisted.items()}
    plain = {k: v.requires_grad_(v.is_floating_point()) for k, v in plain.items()}
    expected = outputs_and_grads(run("reference"), plain)
    assert_near(outputs_and_grads(run(backend, chunk_size=6), twisted), expected, 1e-10)


@every_fast
@pytest.mark.parametrize("part", [0, 1])
def test_gradients_of_one_output_alone(backend, part):
    args = ssd_args(l=20)
    leaves = [v for v in args.values() if v.requires_grad]

    def grads(backend):
        loss = run(backend)(**args)[part].sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for got, want in zip(grads(backend), grads("reference"), strict=True):
        assert_near(got, want, 1e-10)


@every_fast
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e16, 1e30])
def test_a_long_step_forgets_all_and_disturbs_nothing(backend, size):  # traps 1, 3, 16
    args = ssd_args(l=70, full=False)
    dt = args["dt"].detach().abs()
    dt[:, ::7] *= size
    args["dt"] = dt.float().to(torch.float64).requires_grad_()
    options = {"dt_softplus": False, "dt_limit": (0.0, math.inf)}
    expected = outputs_and_grads(run("reference", **options), args)
    assert_near(outputs_and_grads(run(backend, **options), args), expected, 1e-10)
    low = cast(args, torch.float32)
    assert_near(outputs_and_grads(run(backend, **options), low), expected, 1e-5)


def test_what_documents_add_under_autocast():  # trap 15
    args = ssd_args(l=20, n=64, dtype=torch.float32, full=False)
    seq_idx = (torch.arange(20) // 7).expand(2, -1)
    inputs = (torch.randn(4, 3, 64), args["dt"].detach().sigmoid(), args["A"], args["C"], seq_idx)
    expected = ops.ssd_from_start(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.ssd_from_start(*inputs)
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
