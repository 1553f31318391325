from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
from mambapy.ops import chunked, official
from mambapy.ops.cpu import backend as cpu
from tests.helpers import assert_near, outputs_and_grads, scan_args

BACKENDS = ["pscan", "chunked", "cpu"]
OPTIONAL = ["D", "z", "dt_bias", "state", "seq_idx"]


def run(backend="auto", **options):
    return lambda **args: ops.selective_scan(
        **args, **options, dt_softplus=True, return_state=True, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l", [1, 2, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("full", [True, False])
def test_equals_the_reference_with_all_gradients(backend, l, full):  # traps 2, 6, 48
    args = scan_args(l=l, full=full)
    expected = outputs_and_grads(run("reference"), args)
    assert_near(outputs_and_grads(run(backend), args), expected, 1e-11)


@pytest.mark.parametrize("length", [1, 7, 128])
def test_chunks_of_any_length(length, monkeypatch):
    args = scan_args(l=130)
    expected = outputs_and_grads(run("reference"), args)
    monkeypatch.setattr(chunked, "chunk_length", lambda x, n: length)
    assert_near(outputs_and_grads(run("chunked"), args), expected, 1e-11)


def test_an_accelerator_has_longer_chunks():
    x = torch.empty(8, 4096, 1536, device="meta")
    assert [chunked.chunk_length(x, n) for n in (1, 16, 64, 256)] == [2048, 512, 128, 64]
    assert chunked.chunk_length(torch.empty(1, 1, 1), 16) == 64


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference_at_length_1000(backend):
    args = scan_args(l=1000)
    expected = outputs_and_grads(run("reference"), args)
    assert_near(outputs_and_grads(run(backend), args), expected, 1e-11)
    low = {k: v.detach().to(torch.float32) if v.is_floating_point() else v for k, v in args.items()}
    low = {k: v.requires_grad_(v.is_floating_point()) for k, v in low.items()}
    assert_near(outputs_and_grads(run(backend), low), expected, 2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("missing", OPTIONAL)
def test_each_optional_argument_alone(backend, missing):
    args = scan_args(l=70)
    del args[missing]
    expected = outputs_and_grads(run("reference"), args)
    assert_near(outputs_and_grads(run(backend), args), expected, 1e-11)


def test_reference_is_the_papers_equation():  # trap 50: B is discretised by Euler, A exactly
    args = scan_args(b=1, l=2, e=1, n=1)
    dt = F.softplus(args["dt"] + args["dt_bias"])[0, :, 0]
    A, D = args["A"][0, 0], args["D"][0]
    x, z = args["x"][0, :, 0], args["z"][0, :, 0]
    B, C = args["B"][0, :, 0], args["C"][0, :, 0]
    h = args["state"][0, 0, 0]
    args["seq_idx"] = torch.zeros(1, 2, dtype=torch.int64)
    y, _ = run("reference")(**args)
    for t in range(2):
        h = torch.exp(dt[t] * A) * h + dt[t] * B[t] * x[t]
        assert_near(y[0, t, 0], (C[t] * h + D * x[t]) * F.silu(z[t]), 1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("l", [1, 3])
def test_first_and_second_derivatives(backend, l):
    args = scan_args(b=1, l=l, e=2, n=2)
    seq_idx = args.pop("seq_idx")

    def function(*tensors):
        return run(backend, seq_idx=seq_idx)(**dict(zip(args, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(args.values()))
    assert torch.autograd.gradgradcheck(function, tuple(args.values()))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_derivatives_where_arguments_depend_on_each_other(backend):
    args = scan_args(b=1, l=3, e=2, n=2, full=False)
    A, weight = args["A"].detach(), torch.randn(2, 2, dtype=torch.float64)

    def function(x):
        B = x @ weight
        return ops.selective_scan(x, torch.sigmoid(x), A, B, B.cos(), backend=backend)

    x = args["x"]
    plain = torch.autograd.grad(function(x).square().sum(), x)[0]
    again = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
    assert_near(again, plain, 1e-12)
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_gives_what_one_call_gives(backend):  # trap 28
    args = scan_args(l=150)
    y, last = run(backend)(**args)
    state, ys = args["state"], []
    for cut in (slice(0, 1), slice(1, 70), slice(70, 150)):
        part = {
            k: v[:, cut] if k in ("x", "dt", "B", "C", "z", "seq_idx") else v
            for k, v in args.items()
        }
        if cut.start:
            same = args["seq_idx"][:, cut.start] == args["seq_idx"][:, cut.start - 1]
            state = torch.where(same[:, None, None], state, 0.0)
        part["state"] = state
        out, state = run(backend)(**part)
        ys.append(out)
    assert_near(torch.cat(ys, dim=1), y, 1e-12)
    assert_near(state, last, 1e-12)


def test_step_is_one_step():
    args = scan_args(l=4)
    del args["seq_idx"]
    y, last = run("reference")(**args)
    state = args["state"]
    for t in range(4):
        at = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in args.items()}
        at["state"] = state
        out, state = ops.selective_scan_step(**at, dt_softplus=True)
        assert_near(out, y[:, t], 1e-12)
    assert_near(state, last, 1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_long_strong_decay(backend):  # trap 4
    l, e, n = 4096 if backend != "reference" else 512, 2, 4
    A = -torch.linspace(16, 128, e * n).view(e, n)
    x, dt = torch.randn(1, l, e), torch.ones(1, l, e)
    B, C = torch.randn(1, l, n), torch.randn(1, l, n)
    args = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    args = {k: v.requires_grad_() for k, v in args.items()}
    found = outputs_and_grads(lambda **a: ops.selective_scan(**a, backend=backend), args)
    # exp(-16) is all that is left of a step, so y is what a step puts in, to 1e-6.
    expected = torch.einsum("bln,ble,bln->ble", B, x, C)
    assert_near(found["output 0"], expected.detach(), 1e-5)
    assert all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dt", [-1e4, 0.0, 1e4])
def test_extreme_step_sizes_have_finite_gradients(backend, dt):  # trap 16
    args = scan_args(l=5)
    args["dt"] = torch.full_like(args["dt"], dt).requires_grad_()
    found = outputs_and_grads(run(backend), args)
    assert all(torch.isfinite(v).all() for v in found.values())
    if dt == -1e4:
        # No step at all: the state of a row that is one document stands still.
        args["seq_idx"] = torch.zeros_like(args["seq_idx"])
        _, last = run(backend)(**args)
        assert torch.equal(last, args["state"])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_softplus_of_dt(backend):  # trap 8
    values = torch.tensor([-30.0, 0.0, 19.9, 20.1, 100.0], dtype=torch.float64)
    one = torch.ones(1, 5, 1, dtype=torch.float64)
    A = torch.full((1, 1), -1e-30, dtype=torch.float64)
    # With A ~ 0 and B = C = x = 1, y is the running sum of the step sizes.
    y = ops.selective_scan(
        one, values.view(1, 5, 1), A, one, one, dt_softplus=True, backend=backend
    )
    assert_near(y.flatten(), F.softplus(values).cumsum(0), 1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_run_in_float32(backend, dtype):  # traps 11, 14
    args = scan_args(l=130, dtype=torch.float32)
    low = {
        k: v.detach().to(dtype).requires_grad_() if k in ("x", "dt", "B", "C", "z") else v
        for k, v in args.items()
    }
    # What the recurrence makes of the rounded inputs, in float64 throughout.
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in low.items()}
    y, last = run(backend)(**low)
    y64, last64 = run("reference")(**exact)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert_near(last, last64, 1e-5)
    assert_near(y, y64, 2**-8 if dtype == torch.bfloat16 else 2**-11)
    grads = torch.autograd.grad(y.float().sum(), [low["x"], low["A"]])
    assert grads[0].dtype == dtype
    assert grads[1].dtype == torch.float32


def test_mixed_dtypes_under_autocast():  # trap 14
    args = scan_args(l=9, dtype=torch.float32)
    args["dt"] = args["dt"].detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, last = run()(**args)
    expected, _ = run()(**args)
    assert last.dtype == torch.float64
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_and_expanded_arguments(backend):  # trap 46
    args = scan_args(l=20)
    twisted = dict(args)
    twisted["x"] = args["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    twisted["B"] = args["B"].detach()[:1].expand(2, -1, -1).requires_grad_()
    plain = dict(args, B=twisted["B"].detach().clone().requires_grad_())
    expected = outputs_and_grads(run("reference"), plain)
    assert_near(outputs_and_grads(run(backend), twisted), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_not_written_to(backend):  # trap 37
    args = scan_args(l=20)
    before = {k: v.detach().clone() for k, v in args.items()}
    outputs_and_grads(run(backend), args)
    for name, tensor in args.items():
        assert torch.equal(tensor, before[name]), name


def test_memory_that_is_not_zeroed_does_not_matter():  # trap 7
    args = scan_args(l=70)
    expected = outputs_and_grads(run("chunked"), args)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = outputs_and_grads(run("chunked"), args)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name  # trap 18: and nothing raised


def test_two_runs_give_the_same_bits():
    args = scan_args(l=130, dtype=torch.float32)
    first, second = (outputs_and_grads(run("chunked"), args) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_does_not_depend_on_the_batch_around_it():  # trap 19
    args = scan_args(b=5, l=90, dtype=torch.float32)
    y, _ = run()(**args)
    for row in range(5):
        alone = {
            k: v if v.dim() < 3 and k != "seq_idx" else v[row : row + 1] for k, v in args.items()
        }
        y1, _ = run()(**alone)
        assert_near(y1[0], y[row], 1e-6)


def saved_bytes(n, l, backend="chunked"):
    args = scan_args(b=1, l=l, e=64, n=n, dtype=torch.float32)
    saved = {}

    def pack(T):
        saved[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
        return T

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
        run(backend)(**args)
    return sum(saved.values())


def test_saved_memory_is_linear_in_length():  # trap 48
    base = saved_bytes(16, 512)
    assert saved_bytes(16, 1024) < 2.01 * base
    assert saved_bytes(16, 513) < 1.05 * base


@pytest.mark.parametrize("backend", ["reference", *BACKENDS, "auto"])
def test_bad_shapes_name_the_argument(backend):
    good = scan_args()
    bad = {
        "x": torch.zeros(2, 0, 5),  # trap 47
        "dt": torch.zeros(2, 7, 4),
        "A": torch.zeros(5),
        "B": torch.zeros(2, 6, 3),
        "C": torch.zeros(2, 7, 3, dtype=torch.int64),
        "D": torch.zeros(4),
        "z": torch.zeros(2, 5, 7),
        "dt_bias": torch.zeros(1),
        "state": torch.zeros(3, 5, 3),
        "seq_idx": torch.zeros(2, 7),
    }
    for name, tensor in bad.items():
        with pytest.raises(ShapeError, match=name):
            run(backend)(**(good | {name: tensor}))


def test_a_device_that_differs_is_named():
    args = scan_args(full=False)
    with pytest.raises(ShapeError, match=r"dt .* is on meta"):
        run()(**(args | {"dt": args["dt"].to("meta")}))


def test_a_backend_that_cannot_run_says_why():
    args = scan_args()
    with pytest.raises(BackendError, match="mamba_ssm"):
        run("official")(**args)
    with pytest.raises(BackendError, match=r"no backend 'fastest'.*chunked"):
        run("fastest")(**args)


def test_explain_names_the_choice_and_every_refusal():
    args = scan_args(full=False)
    verdicts = ops.explain("selective_scan", *args.values())
    assert [v.backend for v in verdicts if v.chosen] == ["cpu"]
    assert "mamba_ssm" in next(v.reason for v in verdicts if v.backend == "official")
    assert "can run this" in str(next(v for v in verdicts if v.chosen))
    with pytest.raises(BackendError, match="there is no op"):
        ops.explain("scan")


def test_official_adapter_converts_the_layout(monkeypatch):
    """The kernel itself needs a GPU; a stand-in with its layout shows what it is given."""
    args = scan_args(full=False)
    args |= {"D": torch.randn(5), "z": torch.randn(2, 7, 5), "dt_bias": torch.randn(5)}
    args = {k: v.detach().float() for k, v in args.items()}

    class Interface:
        @staticmethod
        def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options):
            assert options == {"return_last_state": True}
            assert u.is_contiguous()
            x, dt, B, C, z = (T.transpose(1, 2) for T in (u, delta, B, C, z))
            y, last = run("reference")(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=delta_bias)
            assert delta_softplus
            return y.transpose(1, 2), last

    stand_in = SimpleNamespace(import_module=lambda _: Interface)
    monkeypatch.setattr(official, "importlib", stand_in)
    y, last = official.selective_scan(**args, dt_softplus=True)
    expected = run("reference")(**args)
    assert_near(y, expected[0], 1e-6)
    assert_near(last, expected[1], 1e-6)


def test_cpu_refuses_what_it_cannot_do(monkeypatch):
    args = scan_args(full=False)
    elsewhere = {k: v.to("meta") for k, v in args.items()}
    assert "needs CPU tensors" in cpu.refuses(**elsewhere)
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    assert "numba is not installed" in cpu.refuses(**args)
    verdicts = ops.explain("selective_scan", **args)
    assert [v.backend for v in verdicts if v.chosen] == ["chunked"]


def test_official_adapter_refuses_what_it_cannot_do(monkeypatch):
    args = scan_args(full=False)
    monkeypatch.setattr(official, "HAS_SCAN", True)
    assert "needs a CUDA device" in official.refuses_scan(**args)
    on_gpu = {k: v.to("meta") for k, v in args.items()}
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert "float64" in official.refuses_scan(**on_gpu)
    assert "initial state" in official.refuses_scan(**on_gpu, state=on_gpu["x"])
