"""The CUDA C++ scan: on a GPU where there is one, else its threads run one after the other on the
CPU (emulator.py). Both against the reference in float64."""

import contextlib
import ctypes
import dataclasses
import errno
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambapy import ops
from mambapy.errors import BackendError, ConfigError
from mambapy.ops import reference
from mambapy.ops.gpu import backend, cuda, disk, selective_scan, tuning
from mambapy.ops.gpu import lanes as divisions
from mambapy.ops.gpu.lanes import Lanes
from tests.helpers import assert_near, scan_args
from tests.ops.gpu import emulator

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
STEPWISE = ("x", "dt", "B", "C", "z", "seq_idx")
INPUTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Relative to the largest number of each tensor: rounding of float32, or of what is read and
# written in 16 bits.
TOLERANCES = {F32: 5e-6, F16: 2e-3, BF16: 1.2e-2}
LENGTHS = [1, 2, 3, 31, 32, 33, 63, 64, 65]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    # Tests have cards of their own.
    divisions.ruled.cache_clear()
    divisions.fitted.cache_clear()
    if not HAS_GPU:
        monkeypatch.setattr(selective_scan, "launch", emulator.launch)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: emulator.H100)


def drawn(l, n, dtype=F32, *, full=True, e=10, weights=F32):
    """Arguments of a scan in a dtype; x and z are halves of one tensor, as in a model."""
    args = {name: T.detach() for name, T in scan_args(l=l, n=n, e=e, full=full).items()}
    if full:
        both = torch.cat((args["x"], args["z"]), dim=-1).to(dtype)
        args |= dict(zip("xz", both.chunk(2, dim=-1), strict=True))
    for name, T in args.items():
        if name != "seq_idx":
            args[name] = T.to(dtype if name in STEPWISE else weights).to(DEVICE)
    return {name: T.to(DEVICE) for name, T in args.items()}


def expected_of(args, grad_y, grad_last, *, softplus=True, reverse=False):
    """y, the last state and all gradients, by the reference in float64 on the CPU."""
    wide = {k: v.cpu() if k == "seq_idx" else v.cpu().double() for k, v in args.items()}
    leaves = {k: v.requires_grad_() for k, v in wide.items() if k != "seq_idx"}

    def flip(T):
        return T.flip(1) if reverse else T

    turned = {k: flip(v) if k in STEPWISE else v for k, v in wide.items()}
    y, last = reference.selective_scan(**turned, dt_softplus=softplus)
    y = flip(y)
    grads = torch.autograd.grad(
        (y, last), list(leaves.values()), (grad_y.cpu().double(), grad_last.cpu().double())
    )
    return {"y": y.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}


def actual_of(args, grad_y, grad_last, lanes, *, softplus=True, reverse=False):
    """The same by the kernels."""
    options = {"dt_softplus": softplus, "reverse": reverse}
    y, last, starts = selective_scan.forward(**args, **options, save=True, lanes=lanes)
    tensors = [args.get(name) for name in (*INPUTS, "seq_idx")]
    grads = selective_scan.backward(
        grad_y, grad_last, starts, *tensors, softplus, reverse, lanes=lanes
    )
    found = {name: grad for name, grad in zip(INPUTS, grads, strict=True) if grad is not None}
    for name, grad in found.items():
        assert grad.dtype == args[name].dtype
    return {name: T.cpu() for name, T in {"y": y, "last": last, **found}.items()}


def check(args, lanes, **options):
    dtype = args["x"].dtype
    b, l, e = args["x"].shape
    n = args["A"].shape[1]
    grad_y = torch.randn(b, l, e, device=DEVICE).to(dtype)
    grad_last = torch.randn(b, e, n, device=DEVICE)
    expected = expected_of(args, grad_y, grad_last, **options)
    assert_near(actual_of(args, grad_y, grad_last, lanes, **options), expected, TOLERANCES[dtype])


# A block has 8 channels here, e has 10: the second block is not full.
USUAL = Lanes(4, 4, warps=1)


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("full", [True, False])
def test_equals_the_reference_with_all_gradients(l, full):
    check(drawn(l, 16, full=full), USUAL)


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_of_the_length_hand_on_what_passes_through(segments, reverse):
    lanes = dataclasses.replace(USUAL, segments=segments)
    check(drawn(130, 16), lanes, reverse=reverse)
    # More segments than tiles: some have nothing to do.
    check(drawn(40, 16), lanes, reverse=reverse)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_narrow_inputs_with_wide_arithmetic(dtype):
    check(drawn(70, 16, dtype), USUAL)


@pytest.mark.parametrize("n", [1, 5, 16, 40, 64, 256])
def test_any_number_of_states(n):
    padded = 1 << (n - 1).bit_length()
    S = min(4 if n <= 16 else 8, padded)
    few = {"warps": 2, "run": 4, "buffers": 1} if n > 128 else {"warps": 2}
    check(drawn(40, n, e=5), Lanes(S, padded // S, **few))


@pytest.mark.parametrize(
    "lanes", [Lanes(2, 8, warps=2, run=16), Lanes(8, 2, warps=2, run=4)], ids=str
)
def test_any_division_of_the_work(lanes):
    check(drawn(70, 16, e=35), lanes)


def test_no_softplus():
    args = drawn(40, 16)
    args["dt"] = args["dt"].abs()
    args["dt_bias"] = args["dt_bias"].abs()
    check(args, USUAL, softplus=False)


def test_dtypes_may_differ():
    args = drawn(40, 16, BF16)
    args |= {"dt": args["dt"].float(), "B": args["B"].half()}
    check(args, USUAL)


def test_rows_may_be_far_apart_and_anywhere():
    args = drawn(40, 16, e=8)
    for name in ("x", "dt", "B", "C", "z"):
        T = args[name]
        room = torch.randn(*T.shape[:2], T.shape[2] + 3, device=DEVICE)
        room[..., 1:-2] = T
        args[name] = room[..., 1:-2]
    args["A"] = torch.cat((args["A"].new_zeros(1), args["A"].flatten()))[1:].view_as(args["A"])
    check(args, USUAL)


def test_deterministic_sums_are_the_same_bits_and_near_the_others():
    args = drawn(70, 16, e=35)
    b, l, e = args["x"].shape
    grads = torch.randn(b, l, e, device=DEVICE), torch.randn(b, e, 16, device=DEVICE)
    free = actual_of(args, *grads, USUAL)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (actual_of(args, *grads, USUAL) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_near(first, free, 1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_deterministic_sums_have_a_limit(dtype, monkeypatch):
    # 35 channels in blocks of 8: two blocks' sums at once, so three slices of the channels.
    args = drawn(40, 16, dtype, e=35)
    b, l, e = args["x"].shape
    monkeypatch.setattr(selective_scan, "MOST_PARTS_BYTES", 2 * 2 * 4 * b * l * 16)
    grads = torch.randn(b, l, e, device=DEVICE).to(dtype), torch.randn(b, e, 16, device=DEVICE)
    widths = []
    cut = selective_scan._cut
    monkeypatch.setattr(selective_scan, "_cut", lambda *a, **o: (widths.append(o), cut(*a, **o))[1])
    torch.use_deterministic_algorithms(True)
    try:
        found = actual_of(args, *grads, USUAL)
        _, _, starts = selective_scan.forward(**args, dt_softplus=True, save=True, lanes=USUAL)
        tensors = [args.get(name) for name in (*INPUTS, "seq_idx")]
        grad_z = torch.zeros(b, l, 2 * e, dtype=dtype, device=DEVICE)[..., e:]
        again = selective_scan.backward(
            *grads, starts, *tensors, True, False, lanes=USUAL, grad_z=grad_z
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert {one["first"] for one in widths} == {0, 16, 32}
    assert_near(found, expected_of(args, *grads), TOLERANCES[dtype])
    assert again[6] is grad_z
    assert torch.equal(grad_z.cpu(), found["z"])
    assert torch.equal(again[3].cpu(), found["B"])


def test_y_may_be_written_over_an_input():
    for name in ("x", "dt", "z"):
        args = drawn(70, 16)
        y, _, _ = selective_scan.forward(**args, dt_softplus=True, lanes=USUAL)
        out, _, _ = selective_scan.forward(**args, dt_softplus=True, lanes=USUAL, out=args[name])
        assert out is args[name]
        assert torch.equal(out, y)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gates_gradient_may_be_half_of_a_tensor(reverse, dtype):
    # dt may be in another dtype than x and z.
    args = drawn(70, 16) | {"dt": drawn(70, 16)["dt"].to(dtype)}
    grads = torch.randn(2, 70, 10, device=DEVICE), torch.randn(2, 10, 16, device=DEVICE)
    expected = actual_of(args, *grads, USUAL, reverse=reverse)
    _, _, starts = selective_scan.forward(
        **args, dt_softplus=True, reverse=reverse, save=True, lanes=USUAL
    )
    tensors = [args.get(name) for name in (*INPUTS, "seq_idx")]
    whole = torch.zeros(2, 70, 20, device=DEVICE)
    found = selective_scan.backward(
        *grads, starts, *tensors, True, reverse, lanes=USUAL, grad_z=whole[..., 10:]
    )
    found = {name: grad.cpu() for name, grad in zip(INPUTS, found, strict=True)}
    assert_near(found, {name: expected[name] for name in INPUTS}, 1e-6)
    assert torch.equal(whole[..., 10:].cpu(), found["z"])
    assert not whole[..., :10].any()


def test_small_steps_keep_their_precision():  # log(1 + u) near 1
    args = drawn(8, 16)
    args["dt"] = torch.linspace(-40, 30, 2 * 8 * 10, device=DEVICE).view(2, 8, 10)
    args["dt_bias"] = torch.zeros(10, device=DEVICE)
    # With A = 0, B = C = 1 and no skip or gate, y is x dt for the first step.
    args |= {"A": 0 * args["A"], "B": torch.ones_like(args["B"]), "C": torch.ones_like(args["C"])}
    bare = {name: args[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")}
    for t in range(8):
        one = {k: v[:, t : t + 1] if k in STEPWISE else v for k, v in bare.items()}
        y, _, _ = selective_scan.forward(**one, dt_softplus=True, lanes=USUAL)
        step = torch.nn.functional.softplus(one["dt"].double())
        # e^-40 is 2^-57.7, and that exponent is rounded: 57.7 ln(2) 2^-24 = 2.4e-6.
        torch.testing.assert_close(y.double(), 16 * step * one["x"].double(), rtol=3e-6, atol=0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_for_every_card(arch, monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBAPY_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(selective_scan, "launch", lambda kernel, *_: calls.append(kernel))
    for n, dtype, seq_idx in ((16, BF16, False), (64, BF16, False), (256, F32, True)):
        args = drawn(70, n, dtype, e=64)
        if not seq_idx:
            del args["seq_idx"]
        lanes = Lanes(8, n // 8, warps=2, run=4, buffers=1, segments=2) if n > 16 else USUAL
        b, l, e = args["x"].shape
        actual_of(args, torch.randn(b, l, e, device=DEVICE).to(dtype), None, lanes)
    for call in calls:
        code = cuda.compiled(call.name, call.settings, arch)
        assert code[:4] == b"\x7fELF"
    # From disk the second time.
    monkeypatch.setattr(cuda, "_nvrtc", None)
    assert cuda.compiled(calls[0].name, calls[0].settings, arch)[:4] == b"\x7fELF"


def test_a_source_that_cannot_be_compiled_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBAPY_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match="NVRTC cannot compile scan_forward"):
        cuda.compiled("scan_forward", {"S": 4}, "sm_90")
    with pytest.raises(BackendError, match="invalid value for --gpu-architecture"):
        cuda.compiled("scan_forward", {"S": 4}, "sm_1")


def test_refusals_name_the_reason(monkeypatch):
    args = drawn(4, 16)
    cpu = {name: T.cpu() for name, T in args.items()}
    assert "x is on cpu" in backend.refuses_scan(**cpu)
    with pytest.raises(BackendError, match="x is on cpu"):
        ops.selective_scan(**cpu, backend="gpu")
    monkeypatch.setattr(backend, "HAS_CUDA_BINDINGS", False)
    monkeypatch.setattr(backend, "why_not_this_card", lambda x: None)
    assert "pip install mambapy[gpu]" in backend.refuses_scan(**cpu)
    monkeypatch.setattr(backend, "HAS_CUDA_BINDINGS", True)
    assert backend.refuses_scan(**cpu) is None
    double = {name: T if name == "seq_idx" else T.double() for name, T in cpu.items()}
    assert "float64" in backend.refuses_scan(**double)
    wide = {name: T.cpu() for name, T in drawn(2, 257).items()}
    assert "256" in backend.refuses_scan(**wide)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_auto_takes_the_kernels_with_autograd(dtype):
    for l, seq_idx in itertools.product((1, 65, 1000), (True, False)):
        args = drawn(l, 16, dtype, e=200)
        if not seq_idx:
            del args["seq_idx"]
        grad = torch.randn_like(args["x"]), torch.randn_like(args["state"])
        leaves = {k: v.detach().requires_grad_() for k, v in args.items() if k != "seq_idx"}
        verdicts = ops.explain("selective_scan", **args)
        assert [v.backend for v in verdicts if v.chosen] == ["gpu"]
        results = ops.selective_scan(**(args | leaves), dt_softplus=True, return_state=True)
        grads = torch.autograd.grad(results, list(leaves.values()), grad)
        found = dict(zip(("y", "last", *leaves), (*results, *grads), strict=True))
        assert_near(
            {k: v.cpu() for k, v in found.items()}, expected_of(args, *grad), TOLERANCES[dtype]
        )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
def test_more_than_two_to_the_31_numbers():
    b, l, e, n = 2, 2**19, 2**11 + 64, 1
    x = torch.empty(b, l, e, dtype=BF16, device="cuda").normal_()
    B = torch.ones(b, l, n, dtype=BF16, device="cuda")
    A = -torch.ones(e, n, device="cuda")
    assert x.numel() > 2**31
    y, last, starts = selective_scan.forward(
        x, x, A, B, B, dt_softplus=True, save=True, out=x.clone()
    )
    nothing = (None,) * 5
    grads = selective_scan.backward(x, None, starts, x, x, A, B, B, *nothing, True, False)
    # The state forgets what is 150 steps old.
    tail = slice(l - 200, l)
    near = {name: x[:, tail].double().requires_grad_() for name in ("x", "dt")}
    near |= {name: B[:, tail].double().requires_grad_() for name in ("B", "C")}
    exact, state = reference.selective_scan(A=A.double(), **near, dt_softplus=True)
    exact_grads = torch.autograd.grad(exact, list(near.values()), x[:, tail].double())
    assert_near(last, state, 1e-5)
    assert_near(y[:, -50:], exact[:, -50:], 1.2e-2)
    for found, expected in zip((*grads[:2], *grads[3:5]), exact_grads, strict=True):
        assert_near(found[:, -50:], expected[:, -50:], 1.2e-2)


def test_a_launch_hands_over_every_argument(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    seen = []

    def launched(function, *rest):
        *sizes, stream, places, extra = rest
        values = (ctypes.c_void_p * 3).from_address(places)
        numbers = [ctypes.c_int64.from_address(place).value for place in values]
        seen.append((function, sizes, stream, numbers, extra))
        return (driver.CUresult.CUDA_SUCCESS,)

    loads = []
    monkeypatch.setattr(driver, "cuLaunchKernel", launched)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (driver.CUresult.CUDA_SUCCESS, 5))
    monkeypatch.setattr(cuda, "_load", lambda kernel, device: loads.append(device) or "function")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    kernel = cuda.Kernel("scan_forward", {}, 128, 4096)
    for _ in range(2):
        cuda.launch(kernel, (5, 2), [2**40, -3, 0], torch.device("cuda", 0))
    assert seen == 2 * [("function", [5, 2, 1, 128, 1, 1, 4096], 7, [2**40, -3, 0], 0)]
    assert loads == [torch.device("cuda", 0)]
    failed = (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *_: failed)
    with pytest.raises(BackendError, match="CUDA_ERROR_INVALID_VALUE"):
        cuda.launch(kernel, (5, 2), [], torch.device("cuda", 0))


def test_documents_may_have_any_integers():
    args = drawn(40, 16)
    expected = selective_scan.forward(**args, dt_softplus=True, lanes=USUAL)[0]
    args["seq_idx"] = args["seq_idx"].to(torch.int32)
    assert torch.equal(selective_scan.forward(**args, dt_softplus=True, lanes=USUAL)[0], expected)
    check(args, USUAL)


def test_a_transposed_result_is_made_elsewhere():
    args = drawn(40, 16)
    expected = selective_scan.forward(**args, dt_softplus=True, lanes=USUAL)[0]
    out = torch.full((2, 10, 40), torch.nan, device=DEVICE).transpose(1, 2)
    y, _, _ = selective_scan.forward(**args, dt_softplus=True, lanes=USUAL, out=out)
    assert y is not out
    assert torch.equal(y, expected)


def test_an_empty_batch():
    args = {k: v if k in ("A", "D", "dt_bias") else v[:0] for k, v in drawn(5, 16).items()}
    found = actual_of(args, args["x"], args["state"], None)
    assert found.pop("y").shape == args["x"].shape
    assert found.pop("last").shape == args["state"].shape
    for name, grad in found.items():
        assert grad.shape == args[name].shape
        assert not grad.any()


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("room", [232448, 166912, 101376])
def test_every_plan_fits_its_card(n, dtype, room, monkeypatch):
    sizes = {"shared_memory_per_block_optin": room, "shared_memory_per_multiprocessor": room + 1024}
    card = SimpleNamespace(**vars(emulator.H100) | sizes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cpu = torch.device("cpu")
    if room < backend.ROOM and n > 128:
        # `refuses_scan` does not let it come to that.
        lanes = Lanes(8, 32, warps=2, run=4, buffers=1)
        with pytest.raises(BackendError, match="shared memory"):
            divisions.fitted("scan_backward", lanes, layouts(F32), cpu)
        return
    for kernel, b, l in itertools.product(
        ("scan_forward", "scan_backward"), (1, 8, 4096), (7, 32768)
    ):
        lanes = divisions.ruled(kernel, (b, l, 1536, n), layouts(dtype), cpu)
        assert divisions.shared_bytes(kernel, lanes, layouts(dtype)) <= room
        assert n <= lanes.S * lanes.SL
        assert 1 <= lanes.segments <= max(1, l // 64)
        assert lanes.segments == 1 or b < 4096


@pytest.mark.parametrize(
    ("b", "e", "l", "segments"),
    [
        (1, 1536, 32768, (16, 24)), (1, 1536, 512, (1, 8)), (8, 1536, 2048, (1, 1)),
        (1, 5120, 2048, (4, 4)), (4, 1536, 256, (1, 1)),
    ],
)  # fmt: skip
def test_segments_fill_an_h100(b, e, l, segments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: emulator.H100)
    given = layouts(BF16)
    for kernel, expected in zip(("scan_forward", "scan_backward"), segments, strict=True):
        used = (*given[:-1], ("Y", BF16, 1)) if kernel == "scan_forward" else given
        lanes = divisions.ruled(kernel, (b, l, e, 16), used, torch.device("cpu"))
        assert lanes.segments == expected


def layouts(dtype):
    return tuple((letter, dtype, 1) for letter in ("X", "DT", "B", "C", "Z", "R"))


def test_four_states_with_the_planner_s_own_lanes():
    args = drawn(33, 4, e=40)
    check(args, None)


@pytest.fixture
def untuned(monkeypatch, tmp_path):
    """A machine on which nothing was measured."""
    monkeypatch.setenv("MAMBAPY_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def tried(monkeypatch, cost):
    """The divisions that are measured from now on; cost(lanes) stands in for the clock."""
    seen = []

    def milliseconds(lanes, run, device):
        seen.append(lanes)
        run(lanes)
        return cost(lanes)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return seen


def test_tuned_lanes_are_the_fastest_and_are_kept(untuned, monkeypatch):
    args = drawn(130, 16)
    more = {"S": 2, "SL": 8}, {"warps": 2}
    others = lambda rule, **_: [dataclasses.replace(rule, **each) for each in more]  # noqa: E731
    monkeypatch.setattr(divisions, "others", others)
    seen = tried(monkeypatch, lambda lanes: lanes.S)
    check(args, None)
    assert not seen
    used = []
    launch = selective_scan.launch
    monkeypatch.setattr(selective_scan, "launch", lambda *a: used.append(a[0]) or launch(*a))
    with ops.tune(1000):
        check(args, None)
    # Forward and backward, each by rule first.
    assert [(lanes.S, lanes.warps) for lanes in seen] == 2 * [(4, 4), (2, 4), (4, 2)]
    # A new process, which measures nothing.
    monkeypatch.setattr(tuning, "_choices", {})
    used.clear()
    check(args, None)
    assert {kernel.settings["S"] for kernel in used} == {2}
    with ops.tune():
        check(args, None)
    assert len(seen) == 6


@pytest.mark.parametrize("rule", [Lanes(4, 4), Lanes(1, 1, warps=1), Lanes(8, 32, warps=16, run=4)])
def test_what_is_tried_holds_as_many_states(rule):
    rule = dataclasses.replace(rule, segments=3)
    for lanes in divisions.others(rule, length=1000, backward=True):
        assert lanes != rule
        assert lanes.S * lanes.SL == rule.S * rule.SL
        assert lanes.SL <= 32
        assert lanes.warps in (1, 2, 4, 8, 16)
        assert lanes.run in (4, 8)
        assert 1 <= lanes.segments <= 7


def test_what_is_tuned_may_write_over_its_arguments(untuned, monkeypatch):
    args = drawn(40, 16)
    expected, *_ = selective_scan.forward(**args, dt_softplus=True)
    tried(monkeypatch, lambda lanes: lanes.warps)
    with ops.tune(1000):
        y, *_ = selective_scan.forward(**args, dt_softplus=True, out=args["dt"])
    assert y is args["dt"]
    assert_near(y, expected, 1e-6)


def test_processes_that_tune_at_once_keep_what_each_has_found(untuned, monkeypatch):
    tried(monkeypatch, lambda lanes: lanes.warps)
    monkeypatch.setattr(divisions, "others", lambda rule, **_: [])
    lengths = 40, 300
    for length in lengths:
        with ops.tune():
            selective_scan.forward(**drawn(length, 16))
    monkeypatch.setattr(tuning, "_choices", {})
    seen = tried(monkeypatch, lambda lanes: lanes.warps)
    for length in lengths:
        with ops.tune():
            selective_scan.forward(**drawn(length, 16))
    assert not seen


def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBAPY_CACHE", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "replace", full)
    disk.write("name", b"data")
    assert [*(tmp_path / "mambapy").iterdir()] == []
    assert disk.read("name") is None


def test_tuning_ends_in_time(untuned, monkeypatch):
    args = drawn(40, 16)
    clock = [100.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])
    seen = tried(monkeypatch, lambda lanes: clock.append(clock.pop() + 3) or 1.0)
    with ops.tune(20):
        selective_scan.forward(**args)
    # Half of the time is for others.
    assert len(seen) == 4
    # Not all were tried, so it is not taken for the fastest another time.
    with ops.tune(20):
        selective_scan.forward(**args)
    assert len(seen) == 8
    with pytest.raises(ConfigError, match="positive"), ops.tune(0):
        pass


def test_what_does_not_fit_is_not_chosen(monkeypatch):
    def run(lanes):
        raise BackendError("it does not fit the card")

    assert tuning._milliseconds(USUAL, run, torch.device("cpu")) == float("inf")


def test_a_broken_file_in_the_cache_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBAPY_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(cuda, "_nvrtc", lambda *_: made.append(1) or b"code")
    for _ in range(2):
        assert cuda.compiled("scan_forward", {"S": 4}, "sm_90") == b"code"
    assert len(made) == 1
    (kept,) = (tmp_path / "mambapy").iterdir()
    kept.write_bytes(b"")
    assert cuda.compiled("scan_forward", {"S": 4}, "sm_90") == b"code"
    assert len(made) == 2
    monkeypatch.setattr(disk, "folder", lambda: None)
    assert cuda.compiled("scan_forward", {"S": 4}, "sm_90") == b"code"
    assert len(made) == 3
