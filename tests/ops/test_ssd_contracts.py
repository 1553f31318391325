"""What `ops.ssd` promises beside its numbers: memory, errors, torch.func, operators, adapters."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
from mambapy.ops import custom_op, official, ssd_chunked
from tests.helpers import assert_near, outputs_and_grads
from tests.ops.test_ssd import BACKENDS, FAST, REGISTERED, cast, every, every_fast, run, ssd_args


@every_fast
def test_arguments_are_not_written_to(backend):  # trap 37
    args = ssd_args(l=40)
    before = {k: v.detach().clone() for k, v in args.items()}
    outputs_and_grads(run(backend, chunk_size=16), args)
    with torch.no_grad():
        run(backend, chunk_size=16)(**args)
    for name, tensor in args.items():
        assert torch.equal(tensor, before[name]), name


@every_fast
@pytest.mark.parametrize("full", [True, False])
def test_memory_that_is_not_zeroed_does_not_matter(backend, full):  # traps 7, 18
    args = ssd_args(l=70, full=full)
    function = run(backend, chunk_size=16)
    expected = outputs_and_grads(function, args)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = outputs_and_grads(function, args)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@every_fast
def test_two_runs_give_the_same_bits(backend):  # traps 18, 34
    args = ssd_args(l=300, dtype=torch.float32)
    first, second = (outputs_and_grads(run(backend, chunk_size=16), args) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_fast
def test_a_row_does_not_depend_on_the_batch_around_it(backend):  # trap 19
    args = ssd_args(b=5, l=90, dtype=torch.float32)
    shared = ("A", "D", "dt_bias")
    y, last = run(backend)(**args)
    for row in range(5):
        alone = {k: v if k in shared else v[row : row + 1] for k, v in args.items()}
        y1, last1 = run(backend)(**alone)
        assert_near(y1[0], y[row], 1e-6)
        assert_near(last1[0], last[row], 1e-6)


def saved_bytes(l, backend, chunk_size):
    args = ssd_args(b=1, l=l, h=4, p=8, n=8, dtype=torch.float32)
    saved = {}

    def pack(T):
        saved[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
        return T

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
        results = run(backend, chunk_size=chunk_size)(**args)
    assert all(r.requires_grad for r in results)
    return sum(saved.values())


@every_fast
@pytest.mark.parametrize("chunk_size", [None, 1, 16])
def test_saved_memory_is_linear_in_length(backend, chunk_size):  # trap 48
    base = saved_bytes(512, backend, chunk_size)
    assert saved_bytes(1024, backend, chunk_size) <= 2.05 * base
    assert saved_bytes(513, backend, chunk_size) < 1.05 * base


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for T in tree_leaves(result):
            if isinstance(T, torch.Tensor):
                self.numbers = max(self.numbers, T.untyped_storage().nbytes() // T.element_size())
        return result


@every_fast
def test_no_tensor_is_quadratic_in_length(backend, monkeypatch):
    # As it is without a mode that looks on: the kernel's own operators, not the operator it is.
    monkeypatch.setattr(custom_op, "is_traced", lambda: False)
    l = 2048
    args = ssd_args(b=1, l=l, h=2, p=2, g=1, n=2, dtype=torch.float32)
    with Largest() as seen:
        outputs_and_grads(run(backend), args)
    assert args["x"].numel() < seen.numbers <= ssd_chunked.TILE_CPU < l * l


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_bad_arguments_are_named(backend):
    good = ssd_args()
    bad = {
        "x": torch.zeros(2, 0, 4, 3),  # trap 47
        "dt": torch.zeros(2, 7, 3),
        "A": torch.zeros(4, 1),
        "B": torch.zeros(2, 6, 2, 5),
        "C": torch.zeros(2, 7, 2, 5, dtype=torch.int64),
        "D": torch.zeros(4, 2),
        "z": torch.zeros(2, 7, 3, 4),
        "dt_bias": torch.zeros(1),
        "state": torch.zeros(2, 4, 5, 3),
        "seq_idx": torch.zeros(2, 7),
    }
    for name, tensor in bad.items():
        with pytest.raises(ShapeError, match=name):
            run(backend)(**(good | {name: tensor}))
    for name, shape in (("x", (2, 7, 12)), ("B", (2, 7, 5)), ("seq_idx", (2, 6))):
        with pytest.raises(ShapeError, match=name):
            run(backend)(**(good | {name: torch.zeros(shape, dtype=good[name].dtype)}))
    three = torch.zeros(2, 7, 3, 5)
    with pytest.raises(ShapeError, match="the 3 groups of B must divide the 4 heads of x"):
        run(backend)(**(good | {"B": three, "C": three}))
    with pytest.raises(ShapeError, match="x must be floating point"):
        run(backend)(**(good | {"x": torch.zeros(2, 7, 4, 3, dtype=torch.int64)}))
    for chunk_size in (0, -1):
        with pytest.raises(ShapeError, match=f"chunk_size={chunk_size} must be >= 1"):
            run(backend, chunk_size=chunk_size)(**good)
    with pytest.raises(ShapeError, match=r"dt .* is on meta"):
        run(backend)(**(good | {"dt": good["dt"].to("meta")}))


def test_a_backend_that_cannot_run_says_why():
    args = ssd_args()
    with pytest.raises(BackendError, match="mamba_ssm is not installed"):
        run("official")(**args)
    with pytest.raises(BackendError, match=r"no backend 'pscan'; it has: auto, .*chunked, ref"):
        run("pscan")(**args)


def test_explain_names_the_choice_and_every_refusal():
    verdicts = {v.backend: v for v in ops.explain("ssd", **ssd_args(full=False))}
    assert list(verdicts) == [backend.name for backend in REGISTERED]
    assert [v.backend for v in verdicts.values() if v.chosen] == FAST[:1]
    assert "mamba_ssm" in verdicts["official"].reason
    assert "can run this" in str(verdicts["chunked"])


@pytest.mark.parametrize(("r", "fused"), [(2, False), (1, True)])
def test_operators_are_well_formed(r, fused):
    """torch's own checks: schema, fake tensors, autograd, dynamic shapes."""
    b, l, h, p, g, n = 2, 9, 4, 3, 2, 5
    shapes = {
        "x": (b, l, r, h, p),
        "log_decay": (b, l, h),
        "scale": (b, l, h),
        "K": (b, l, r, g, n),
        "Q": (b, l, r, g, n),
        "own": (b, l, h),
        "D": (h,),
        "state": (b, h, p, n),
    }
    args = [torch.rand(shape).requires_grad_() for shape in shapes.values()]
    args[1] = (-args[1].detach()).requires_grad_()
    if r == 1:
        args[5:] = [None, None, None]
    forward = torch.ops.mambapy.ssd_chunked.default
    torch.library.opcheck(forward, (*args, 4, fused))
    plain = [None if T is None else T.detach() for T in args]
    y, last, bounds = forward(*plain, 4, fused)
    grads = (torch.ones_like(y), torch.ones_like(last))
    backward = torch.ops.mambapy.ssd_chunked_backward.default
    torch.library.opcheck(backward, (*grads, bounds, *plain, 4, fused))


def draw():
    args = ssd_args(b=2, l=20, h=4, p=2, n=3)
    return {name: T.detach() for name, T in args.items() if name != "seq_idx"}


@every
def test_torch_func_grad(backend):
    args = draw()

    def loss(args):
        y, last = run(backend)(**args)
        return y.square().sum() + last.sum()

    found = torch.func.grad(loss)(args)
    for T in args.values():
        T.requires_grad_()
    expected = torch.autograd.grad(loss(args), list(args.values()))
    assert_near(found, dict(zip(args, expected, strict=True)), 1e-12)


@every
@pytest.mark.parametrize("mapped", [("x", "z"), ("dt", "B", "C", "state"), ("x", "A", "D")])
def test_torch_func_vmap_and_vmap_of_grad(backend, mapped):
    args, many = draw(), [draw() for _ in range(3)]
    stacked = {name: torch.stack([other[name] for other in many]) for name in mapped}

    def loss(some):
        y, last = run(backend)(**args | some)
        return y.square().sum() + last.sum()

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


@pytest.mark.parametrize("chunk_size", [None, 32])
def test_official_adapter_gives_the_kernel_what_it_wants(chunk_size, monkeypatch):
    """The kernel itself needs a GPU; a stand-in with its signature shows what it is given."""
    args = cast(ssd_args(dtype=torch.float32), torch.float32)
    del args["seq_idx"]
    low = {k: v.detach().bfloat16() if k in ("x", "z") else v.detach() for k, v in args.items()}

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, *, D, z, initial_states, return_final_states, **options
    ):
        assert chunk_size == (wanted or 256)
        assert {T.dtype for T in (x, dt, B, C, z)} == {torch.bfloat16}
        assert {T.dtype for T in (A, D, options["dt_bias"], initial_states)} == {torch.float32}
        assert return_final_states
        options |= {"state": initial_states, "return_state": True, "backend": "reference"}
        y, last = ops.ssd(x, dt, A, B, C, D, z, **options)
        return y, last.to(x.dtype)

    def import_module(name):
        assert name == "mamba_ssm.ops.triton.ssd_combined"
        return SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)

    wanted = chunk_size
    monkeypatch.setattr(official, "importlib", SimpleNamespace(import_module=import_module))
    options = {"dt_softplus": True, "dt_limit": (0.1, 2.0)}
    y, last = official.ssd(**low, **options, chunk_size=chunk_size)
    low |= {k: low[k].bfloat16() for k in ("dt", "B", "C")}
    expected = ops.ssd(**low, **options, return_state=True, backend="reference")
    assert torch.equal(y, expected[0])
    assert last.dtype == torch.float32
    assert_near(last, expected[1], 2**-8)


def test_official_adapter_without_what_is_optional(monkeypatch):
    args = {k: v.detach() for k, v in ssd_args(dtype=torch.float32, full=False).items()}
    given = {}

    def kernel(x, dt, A, B, C, chunk_size, **options):
        given.update(options)
        return x, x.new_zeros(2, 4, 3, 5)

    stand_in = SimpleNamespace(
        import_module=lambda _: SimpleNamespace(mamba_chunk_scan_combined=kernel)
    )
    monkeypatch.setattr(official, "importlib", stand_in)
    official.ssd(**args)
    assert given["dt_limit"] == (0.0, math.inf)
    assert given["dt_softplus"] is False
    assert {given[k] for k in ("D", "z", "dt_bias", "initial_states")} == {None}


def test_official_adapter_refuses_what_it_cannot_do(monkeypatch):
    args = ssd_args(full=False)
    assert "not installed" in official.refuses_ssd(**args)
    monkeypatch.setattr(official, "HAS_SCAN", True)
    assert "needs a CUDA device, the tensors are on cpu" in official.refuses_ssd(**args)
    on_gpu = {k: v.to("meta") for k, v in args.items()}
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert "float64" in official.refuses_ssd(**on_gpu)
    assert "seq_idx" in official.refuses_ssd(**on_gpu, seq_idx=on_gpu["x"])
    assert official.refuses_ssd(**{k: v.float() for k, v in on_gpu.items()}) is None
