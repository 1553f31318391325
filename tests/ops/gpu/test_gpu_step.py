"""The GPU's plan: every stage against the CPU's plan in float64, whole models op by op."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mambapy import fused, generation, ops
from mambapy.config import Mamba2Config, MambaConfig
from mambapy.generation import generate_tokens, stream_tokens
from mambapy.lm import LM
from mambapy.ops.cpu.step import CpuPlan
from mambapy.ops.step_plan import Weights
from tests.helpers import assert_near

pytest.importorskip("triton")

from mambapy.ops.gpu import choose, step
from mambapy.ops.gpu.launched_plan import MOST_CHOOSERS
from mambapy.ops.gpu.step import GpuPlan

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Of 16-bit weights, what many rows are multiplied with is rounded too.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BATCHES = (1, 3, 9)


def compare(write, inputs, states=(), tolerance=3e-6):
    """Two steps of a plan that `write` puts together from rows of the inputs, on both."""
    expected = CpuPlan(len(next(iter(inputs.values()))), torch.float64)
    found = GpuPlan(expected.batch, DEVICE)
    results, alive = [], []

    def on(plan, T):
        """A weight where the plan is; a plan knows addresses, it keeps nothing alive."""
        if T is not None:
            alive.append(T.to(DEVICE if plan is found else "cpu"))
        return None if T is None else alive[-1]

    for plan in (expected, found):
        rows = [plan.input(name, T.shape[1]) for name, T in inputs.items()]
        y = write(plan, *rows, partial(on, plan))
        first = [on(plan, T) for T in states]
        given = [on(plan, T) for T in inputs.values()]
        kept = [T.clone() for T in first]
        new = plan.run(given, plan.run(given, first))
        for T, before in zip(first, kept, strict=True):
            assert torch.equal(T, before)
        results.append([plan.result(y).cpu(), *(T.cpu() for T in new)])
    for want, got in zip(*results, strict=True):
        assert_near(got, want.to(got.dtype), tolerance)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Few programs, which run one after the other, and no work twice."""
    if DEVICE.type != "cpu":
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(step.tiles, "PROGRAMS", 2)
    # What a kernel calls need not prepare the language again, if the kernel has prepared all of it.
    monkeypatch.setattr(step.kernel, "core", step.tl.core, raising=False)
    call = lambda self, *args, **options: self.rewrite()(*args, **options)  # noqa: E731
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b", [*BATCHES, 2])
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
def test_conv(b, k, e, silu, monkeypatch):
    if b == 9:
        monkeypatch.setattr(step.tiles, "conv", lambda e, rows: (16, 2, 4))
    weight, bias = torch.randn(e, 1, k), torch.randn(e) if silu else None

    def write(plan, x, on):
        return plan.conv(x, on(weight), on(bias), silu)

    compare(write, {"x": torch.randn(b, e)}, [torch.randn(b, k - 1, e)])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("n", [1, 17])
def test_scan(b, n, monkeypatch):
    e = 21
    if b == 9:
        monkeypatch.setattr(step.tiles, "scan", lambda e, rows: (16, 4, 4))
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


@pytest.fixture
def planned_on_gpu(monkeypatch):
    """Models that are planned as on a GPU, wherever they are."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(ops, "plan_looks_up", lambda token: True)
        monkeypatch.setattr(ops, "step_plan", lambda x, *_: GpuPlan(x.shape[0], x.device))
        monkeypatch.setattr(
            ops, "refuses_fused_step", lambda *_: "grad" if torch.is_grad_enabled() else None
        )


def mamba(**changes):
    sizes = {"d_model": 12, "n_layers": 1, "d_state": 5, "dt_rank": 3}
    return LM(MambaConfig(**{**sizes, **changes}), 50)


def mamba2(**changes):
    sizes = {"d_model": 12, "n_layers": 1, "d_state": 5, "d_head": 8, "n_groups": 1}
    return LM(Mamba2Config(**{**sizes, **changes}), 50)


def away_from_the_start(lm):
    for P in lm.parameters():
        if P.is_floating_point():
            nn.init.normal_(P, std=0.3)
    return lm.to(DEVICE).eval()


def op_by_op(lm, token, state):
    """A step where gradients are enabled."""
    logits, state = lm.step(token, state)
    assert logits.requires_grad
    return logits.detach(), state.detach()


def check(lm, b=2, tolerance=1e-5, *, kernels=None):
    """A step beside one op by op, from a state that stays as it is."""
    state = lm.prefill(torch.randint(0, 50, (b, 5), device=DEVICE))[1].detach()
    token, before = torch.randint(0, 50, (b,), device=DEVICE), state.map(torch.clone)
    with torch.no_grad():
        logits, new = lm.step(token, state)
    expected, after = op_by_op(lm, token, state)
    assert logits.dtype == expected.dtype
    assert_near(logits, expected, tolerance)
    assert_near(new.tensors(), after.tensors(), tolerance)
    assert_near(state.tensors(), before.tensors(), 0.0)
    (planned,) = lm._plans.values()
    assert planned.output is not None
    assert planned.plan.kernels == kernels


def test_decoder_keeps_its_state(planned_on_gpu):
    lm = away_from_the_start(mamba(n_layers=2))
    state = lm.prefill(torch.randint(0, 50, (1, 5), device=DEVICE))[1].detach()
    decode, before, expected = lm.decoder(state), state.map(torch.clone), state
    for i, token in enumerate(torch.randint(0, 50, (3, 1), device=DEVICE)):
        wanted, expected = op_by_op(lm, token, expected)
        if i == 2:
            # Found out, and planned anew from the last state.
            lm.norm_f.weight = nn.Parameter(lm.norm_f.weight * 2)
            wanted = wanted * 2
        with torch.no_grad():
            assert_near(decode(token), wanted, 1e-5)
    assert_near(decode.state.tensors(), expected.tensors(), 1e-5)
    assert_near(state.tensors(), before.tensors(), 0.0)
    assert not lm._plans
    decode.close()
    assert len(lm._plans) == 1


WAYS = [
    {"sample": False},
    {"sample": False, "eos": 7},
    {"seed": 1, "eos": 7},
    {"seed": 2, "top_k": None, "top_p": 0.8, "temperature": 0.7},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_plan_chooses_what_is_chosen_op_by_op(planned_on_gpu, monkeypatch, options):
    lm = away_from_the_start(mamba())
    ids = torch.randint(0, 50, (3, 5), device=DEVICE)
    monkeypatch.setattr(generation, "most_ahead", lambda device: 3)
    found = [generate_tokens(lm, ids, num_tokens=9, **options) for _ in range(2)]
    (planned,) = lm._plans.values()
    assert len(planned.plan._choosers) == 1
    with monkeypatch.context() as patch:
        patch.setattr(ops, "refuses_fused_step", lambda *_: "to compare")
        expected = generate_tokens(lm, ids, num_tokens=9, **options)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def test_a_stream_notices_that_its_model_has_changed(planned_on_gpu, monkeypatch):
    monkeypatch.setattr(generation, "most_ahead", lambda device: 0)
    lm = away_from_the_start(mamba())
    ids, weight = torch.randint(0, 50, (2, 5), device=DEVICE), lm.norm_f.weight

    def texts():
        lm.norm_f.weight = weight
        tokens = []
        for i, token in enumerate(stream_tokens(lm, ids, num_tokens=6, sample=False)):
            tokens.append(token)
            if i == 2:
                lm.norm_f.weight = nn.Parameter(-weight)
        return torch.stack(tokens)

    found = texts()
    monkeypatch.setattr(ops, "refuses_fused_step", lambda *_: "to compare")
    assert torch.equal(found, texts())


def test_a_plan_keeps_few_ways_to_choose(planned_on_gpu):
    lm = away_from_the_start(mamba())
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for k in range(1, MOST_CHOOSERS + 3):
        generate_tokens(lm, ids, num_tokens=2, top_k=k)
    (planned,) = lm._plans.values()
    assert [choice.top_k for choice in planned.plan._choosers] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("dtype", "b", "tolerance"),
    [
        (torch.float32, 1, 1e-5),
        (torch.bfloat16, 3, 0.03),
        (torch.bfloat16, 9, 0.03),
        (torch.float16, 9, 5e-3),
    ],
)
def test_a_model(planned_on_gpu, dtype, b, tolerance):
    # The embedding, four kernels a layer, and the head; of many rows, norms by themselves and
    # the product behind the convolution.
    kernels = 9 if b > 2 else 6
    check(away_from_the_start(mamba()).to(dtype), b, tolerance, kernels=kernels)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "conv_bias": False, "d_conv": 1, "residual_in_fp32": False},
        {"inner_norm": "learned"},
        {"inner_norm": "plain", "d_state": 1, "dt_rank": 20, "d_model": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize(("b", "parts"), [(2, 0), (2, 1), (3, 3)])
def test_mamba_in_other_shapes(planned_on_gpu, changes, b, parts, monkeypatch):
    monkeypatch.setattr(step.tiles, "apart", lambda *_: parts > 0)
    monkeypatch.setattr(step.tiles, "parts", lambda *_: parts)
    kernels = 9 if b > 2 else 6 + parts
    check(away_from_the_start(mamba(**changes)), b, kernels=kernels)


@pytest.mark.parametrize(
    ("changes", "b", "kernels"),
    [
        ({}, 1, 6),
        ({"n_groups": 3}, 3, 9),
        ({"D_has_hdim": True, "dt_limit": (0.3, 0.9), "conv_bias": False}, 9, 9),
    ],
    ids=str,
)
def test_mamba2(planned_on_gpu, changes, b, kernels):
    check(away_from_the_start(mamba2(**changes)), b, kernels=kernels)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("b", [1, 9])
def test_quantised(planned_on_gpu, kind, b):
    check(away_from_the_start(mamba()).quantize(kind), b, kernels=9 if b > 2 else 6)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
@pytest.mark.parametrize("overlap", [False, True])
def test_fifty_tokens_of_a_graph_are_those_op_by_op(monkeypatch, overlap):
    monkeypatch.setattr(step, "OVERLAP", overlap)
    lm = away_from_the_start(mamba(d_model=256, n_layers=4, d_state=16))
    ids = torch.randint(0, 50, (3, 5), device=DEVICE)
    for options in ({"sample": False}, {"seed": 1}, {"seed": 1, "eos": 7}):
        found = generate_tokens(lm, ids, num_tokens=50, **options)
        (planned,) = lm._plans.values()
        assert planned.plan._graph is not None
        with monkeypatch.context() as patch:
            patch.setattr(ops, "refuses_fused_step", lambda *_: "to compare")
            assert torch.equal(found, generate_tokens(lm, ids, num_tokens=50, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_recorded_choice_is_the_same(monkeypatch, options, dtype):
    lm = away_from_the_start(mamba(d_model=64, n_layers=2)).to(dtype)
    ids = torch.randint(0, 50, (3, 5), device=DEVICE)
    with torch.inference_mode():
        first = generate_tokens(lm, ids, num_tokens=50, **options)
    later = generate_tokens(lm, ids, num_tokens=50, **options)
    kept = list(stream_tokens(lm, ids, num_tokens=50, **options))
    (planned,) = lm._plans.values()
    (chooser,) = planned.plan._choosers.values()
    assert chooser._graph is not None
    lm._plans.clear()
    monkeypatch.setattr(choose, "FIRST", 1000)
    expected = generate_tokens(lm, ids, num_tokens=50, **options)
    for found in (first, later, torch.stack(kept, dim=1)):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_repeats_are_equal_bit_for_bit_and_graphs_are_few():
    lm = away_from_the_start(mamba(d_model=256, n_layers=2)).to(torch.bfloat16)
    for b in (1, 2, 4, 16, 64, 3):
        state, token = lm.init_state(b), torch.arange(b, device=DEVICE) % 50
        with torch.no_grad():
            results = [lm.step(token, state) for _ in range(3)]
        for logits, new in results[1:]:
            assert torch.equal(logits, results[0][0])
            assert_near(new.tensors(), results[0][1].tensors(), 0.0)
    assert len(lm._plans) == fused.MOST_PLANS
    lm.step(token, state)
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        for b in (5, 6, 7, 8, 5, 6, 7, 8):
            lm.step(torch.zeros(b, dtype=torch.int64, device=DEVICE), lm.init_state(b))
    assert torch.cuda.memory_allocated() < before + 20e6


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_streams_take_turns():
    lm = away_from_the_start(mamba(d_model=256, n_layers=2))
    state, (first, second) = lm.init_state(3), torch.randint(0, 50, (2, 3), device=DEVICE)
    expected = [op_by_op(lm, token, state) for token in (first, second)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.no_grad():
        lm.step(first, state)
        torch.cuda.synchronize()
        found = []
        for stream, token in zip(streams, (first, second), strict=True):
            with torch.cuda.stream(stream):
                # The first is late, and its plan is given to the second meanwhile.
                torch.cuda._sleep(100_000_000 if token is first else 0)
                found.append(lm.step(token, state))
    torch.cuda.synchronize()
    assert len(lm._plans) == 1
    for (logits, new), (wanted, after) in zip(found, expected, strict=True):
        assert_near(logits, wanted, 1e-5)
        assert_near(new.tensors(), after.tensors(), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
def test_a_model_that_moves_away_is_not_kept():
    lm = away_from_the_start(mamba(d_model=1024))
    with torch.no_grad():
        lm.step(torch.zeros(1, dtype=torch.int64, device=DEVICE), lm.init_state(1))
    size = sum(P.numel() * P.element_size() for P in lm.parameters())
    before = torch.cuda.memory_allocated()
    lm.to("cpu")
    assert torch.cuda.memory_allocated() < before - 0.9 * size
