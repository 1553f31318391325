"""The GPU's plan of a step: every stage against the CPU's plan in float64, whole models op by op."""

import copy

import pytest
import torch
from torch import nn

from mambapy import ops
from mambapy.config import Mamba2Config, MambaConfig
from mambapy.lm import LM
from mambapy.ops.cpu.step import CpuPlan
from mambapy.ops.step_plan import Weights
from tests.helpers import assert_near

pytest.importorskip("triton")

from mambapy.ops.gpu import step
from mambapy.ops.gpu.step import GpuPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of 16-bit weights, what many rows are multiplied with is rounded too.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BATCHES = (1, 3, 9)


def compare(write, inputs, states=(), tolerance=3e-6):
    """Two steps of a plan that `write` puts together from rows of the inputs, on both."""
    expected = CpuPlan(len(next(iter(inputs.values()))), torch.float64)
    found = GpuPlan(expected.batch, DEVICE)
    results = []
    for plan in (expected, found):
        rows = [plan.input(name, T.shape[1]) for name, T in inputs.items()]
        on = {expected: torch.device("cpu"), found: DEVICE}[plan]
        y = write(plan, *rows, lambda T, on=on: None if T is None else T.to(on))
        new, given = [T.to(on) for T in states], [T.to(on) for T in inputs.values()]
        kept = [T.clone() for T in new]
        new = plan.run(given, plan.run(given, new))
        assert all(torch.equal(*pair) for pair in zip(kept, [T.to(on) for T in states]))
        results.append([plan.result(y).cpu(), *(T.cpu() for T in new)])
    for want, got in zip(*results, strict=True):
        assert_near(got, want.to(got.dtype), tolerance)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(step, "PROGRAMS", 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b", BATCHES)
def test_linear_and_norm(b, dtype):
    weight, bias, norm = torch.randn(37, 71).to(dtype), torch.randn(37), torch.rand(71).to(dtype)

    def write(plan, x, residual, on):
        y = plan.linear(plan.norm(x, on(norm), 1e-5), Weights(on(weight), on(bias)), "y")
        more = Weights(on(weight.T.contiguous()), None)
        plan.linear(y, more, add_to=residual)
        return residual

    compare(write, {"x": torch.randn(b, 71), "r": torch.randn(b, 71)}, (), TOLERANCE[dtype])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("inner", [1, 16, 1100])
def test_linear_in_other_sizes_and_int8(b, inner):
    weight, scale = torch.randint(-127, 128, (5, inner)).to(torch.int8), torch.rand(5)

    def write(plan, x, on):
        return plan.linear(x, Weights(on(weight), None, on(scale)), "y")

    compare(write, {"x": torch.randn(b, inner)})


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize(("k", "e", "silu"), [(1, 5, True), (2, 33, False), (4, 40, True)])
def test_conv(b, k, e, silu):
    weight, bias = torch.randn(e, 1, k), torch.randn(e) if silu else None

    def write(plan, x, on):
        return plan.conv(x, on(weight), on(bias), silu)

    compare(write, {"x": torch.randn(b, e)}, [torch.randn(b, k - 1, e)])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("n", [1, 17])
def test_scan(b, n):
    e = 21
    A, D, bias = torch.rand(e, n), torch.randn(e), torch.randn(e) if n > 1 else None

    def write(plan, x, dt, B, C, z, on):
        gate, skip = (z, on(D)) if n > 1 else (None, None)
        return plan.scan(
            x, dt, on(A), B, C, skip, gate, dt_bias=on(bias), dt_softplus=n > 1, A_is_log=n > 1
        )

    widths = {"x": e, "dt": e, "B": n, "C": n, "z": e}
    inputs = {name: torch.randn(b, width) for name, width in widths.items()}
    if n == 1:
        inputs["dt"] = -inputs["dt"].abs()
    compare(write, inputs, [torch.randn(b, e, n)])


def test_softplus_has_all_its_digits():
    dt = torch.tensor([-90.0, -20, -12, -7, -3, -1e-3, 0, 1, 5, 15, 21, 100]).expand(1, -1)

    def write(plan, x, dt, B, on):
        return plan.scan(x, dt, on(torch.zeros(12, 1)), B, B, None, None, dt_softplus=True)

    x = 1 / nn.functional.softplus(dt.double()).float().clamp(min=1e-30)
    compare(write, {"x": x, "dt": dt, "B": torch.ones(1, 1)}, [torch.zeros(1, 12, 1)])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("by_channel", [False, True])
def test_ssd_and_gated_norm(b, groups, by_channel):
    h, p, n = 6, 5, 7
    e = h * p
    A, bias, D = torch.rand(h), torch.randn(h), torch.randn(h, p) if by_channel else torch.randn(h)
    norm, out = torch.rand(e), torch.randn(9, e)

    def write(plan, x, dt, B, C, z, on):
        y = plan.ssd(
            x, dt, on(A), B, C, on(D), dt_bias=on(bias), dt_limit=(0.1, 0.9), d_head=p,
            n_groups=groups,
        )  # fmt: skip
        if by_channel:
            return y
        return plan.linear(plan.gated_norm(y, z, on(norm), groups, 1e-5), Weights(on(out)), "out")

    widths = {"x": e, "dt": h, "B": groups * n, "C": groups * n, "z": e}
    inputs = {name: torch.randn(b, width) for name, width in widths.items()}
    compare(write, inputs, [torch.randn(b, h, p, n)])


def test_norms_by_themselves():
    weight = torch.rand(12)

    def write(plan, x, z, on):
        y = plan.gated_norm(plan.norm(x, on(weight), 1e-5), z, on(weight), 2, 1e-5)
        return plan.norm(y, None, 1e-5, "again")

    compare(write, {"x": torch.randn(3, 12), "z": torch.randn(3, 12)})
