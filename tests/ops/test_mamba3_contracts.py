"""`ops.mamba3_scan` at the edges, and what it promises beside its numbers."""

import math

import pytest
import torch

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
from tests.helpers import assert_near, outputs_and_grads
from tests.ops.test_mamba3_scan import (
    BACKENDS,
    FAST,
    PARTS,
    cast,
    every,
    every_fast,
    plain,
    run,
    scan,
    scan_args,
)


@every
def test_without_its_news_it_is_ssd(backend):
    """With Euler's rule and no turn, X is x and the recurrence is Mamba-2's."""
    args = scan_args(l=40, full=False)
    args |= {"trap": torch.ones_like(args["trap"]), "omega": torch.zeros_like(args["omega"])}
    args["A"] = args["A"].detach()[:1, :1].expand(2, 40, -1)
    y, parts = scan(args, backend)
    B, C = args["B"][:, :, 0], args["C"][:, :, 0]
    expected, last = ops.ssd(
        args["x"], args["dt"], args["A"][0, 0], B, C, return_state=True, backend="reference"
    )
    assert_near(y[:, :, 0], expected, 1e-12)
    assert_near(parts.ssm, last, 1e-12)


@every
def test_pairs_and_halves_differ_in_the_order_of_channels(backend):
    args = scan_args(l=20, n=8, s=4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    pairs, after = scan(args, backend)
    moved = dict(args)
    for name in ("B", "C", "B_bias", "C_bias", "ssm", "key"):
        moved[name] = args[name][..., order]
    halves, other = scan(moved, backend, rotate="halves")
    assert_near(halves, pairs, 1e-12)
    assert_near(other.ssm, after.ssm[..., order], 1e-12)
    assert_near(other.key, after.key[..., order], 1e-12)


def test_a_row_of_rank_two_is_the_sum_of_its_inputs():
    """What is written is a sum over the rows; what is read is one row each."""
    args = scan_args(l=20, r=2, full=False)
    y, parts = scan(args, "chunked")
    found, ssm = 0.0, 0.0
    for i in (0, 1):
        one = dict(args, B=args["B"][:, :, i : i + 1], mimo_x=args["mimo_x"][:, i : i + 1])
        rows = [scan(one | {"C": args["C"][:, :, j : j + 1]}, "chunked") for j in (0, 1)]
        found = found + torch.cat([out for out, _ in rows], dim=2)
        ssm = ssm + rows[0][1].ssm
    assert_near(y, found, 1e-12)
    assert_near(parts.ssm, ssm, 1e-12)


@every_fast
@pytest.mark.parametrize("turning", ["slow", "fast"])
def test_phases_stay_exact_over_20000_steps(backend, turning):
    l = 20_000
    args = scan_args(b=1, l=l, h=2, p=1, g=1, n=4, s=2, dtype=torch.float32, full=False)
    args["dt"] = torch.rand(1, l, 2) * (0.01 if turning == "slow" else 1.0)
    args["A"] = torch.full((1, l, 2), -0.1)
    # All one way: the sum grows to thousands of turns.
    args["omega"] = args["omega"].detach().abs()
    low = {k: v.detach() for k, v in args.items()}
    found = run(backend)(**low)
    expected = run(backend)(**{k: v.double() for k, v in low.items()})
    for got, want in zip(found, expected, strict=True):
        assert_near(got, want, 1e-5)
    phase = scan(low, backend)[1].phase
    assert phase.min() >= -math.pi
    assert phase.max() <= math.pi
    turns = (low["omega"].double()[:, :, None] * low["dt"].double()[..., None]).sum(1)
    assert turns.max() > (100 if turning == "slow" else 10_000)
    assert_near(phase.cos(), turns.cos(), 1e-5)
    assert_near(phase.sin(), turns.sin(), 1e-5)


@every
def test_without_a_step_nothing_moves(backend):  # trap 24
    args = scan_args(l=6)
    del args["seq_idx"]
    args["dt"] = torch.zeros_like(args["dt"]).requires_grad_()
    _, parts = scan(args, backend)
    assert torch.equal(parts.ssm, args["ssm"])
    assert_near(parts.phase.cos(), args["phase"].cos(), 1e-12)
    assert_near(parts.phase.sin(), args["phase"].sin(), 1e-12)
    found = outputs_and_grads(run(backend), args)
    assert_near(found, outputs_and_grads(run("reference"), args), 1e-10)


@every_fast
@pytest.mark.parametrize("trap", [0.0, 0.5, 1.0])
def test_long_strong_decay(backend, trap):  # traps 1, 3, 4, 5
    l = 4096
    args = scan_args(b=1, l=l, h=2, p=2, g=1, n=4, dtype=torch.float32, full=False)
    args["dt"] = torch.ones(1, l, 2, requires_grad=True)
    args["A"] = torch.tensor([-16.0, -128.0]).expand(1, l, 2).clone().requires_grad_()
    args["trap"] = torch.full((1, l, 2), trap, requires_grad=True)
    found = outputs_and_grads(run(backend), args)
    for name, T in found.items():
        assert torch.isfinite(T).all(), name
    last = {k: v.detach()[:, -6:].double() for k, v in args.items()}
    # What is older than five steps counts less than exp(-80); the phase apart, which does not fade.
    angle = (args["omega"].detach().double()[:, :-6].sum(1)).expand(1, 2, 2)
    last |= {"phase": angle, "ssm": torch.zeros(1, 2, 2, 4).double()}
    last |= {"key": torch.zeros(1, 1, 2, 4).double(), "value": torch.zeros(1, 2, 2).double()}
    y, parts = scan(last, "reference")
    assert_near(found["output 0"][:, -4:], y[:, -4:], 1e-5)
    assert_near(found["output 3"], parts.ssm, 1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_run_in_float32(backend, dtype):  # traps 11, 14
    args = scan_args(l=70, r=2, dtype=torch.float32)
    names = ("x", "dt", "A", "trap", "omega", "B", "C", "mimo_x")
    low = {k: v.detach().to(dtype).requires_grad_() if k in names else v for k, v in args.items()}
    y, parts = scan(low, backend)
    y64, parts64 = scan(cast(low, torch.float64), "reference")
    assert y.dtype == dtype
    assert {T.dtype for T in parts} == {torch.float32}
    for got, want in zip(plain(y, parts)[1:], plain(y64, parts64)[1:], strict=True):
        assert_near(got, want, 1e-5)
    assert_near(y, y64, 2**-8 if dtype == torch.bfloat16 else 2**-11)
    grads = torch.autograd.grad(y.float().sum(), [low["x"], low["D"]])
    assert [g.dtype for g in grads] == [dtype, torch.float32]


@every
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "ssm"])
def test_mixed_dtypes_promote_and_ignore_autocast(backend, name):  # traps 14, 15
    args = scan_args(l=9, r=2, dtype=torch.float32)
    args[name] = args[name].detach().double().requires_grad_()

    def under_autocast(**args):
        with torch.autocast("cpu", torch.bfloat16):
            return run(backend)(**args)

    found = outputs_and_grads(under_autocast, args)
    assert found["output 0"].dtype == args["x"].dtype
    assert found["output 3"].dtype == torch.float64
    assert all(found[f"grad {k}"].dtype == v.dtype for k, v in args.items() if v.requires_grad)
    assert_near(found, outputs_and_grads(run("reference"), cast(args, torch.float64)), 3e-6)


@every_fast
def test_transposed_and_expanded_arguments_are_read_and_not_written_to(backend):  # traps 37, 46
    args = scan_args(l=20, r=2)
    twisted = dict(args)
    twisted["x"] = args["x"].detach().transpose(1, 3).contiguous().transpose(1, 3)
    for name in ("B", "dt", "omega", "ssm"):
        twisted[name] = args[name].detach()[:1].expand_as(args[name])
    assert not any(twisted[k].is_contiguous() for k in ("x", "B", "dt", "omega", "ssm"))
    straight = cast({k: v.contiguous() for k, v in twisted.items()}, torch.float64)
    twisted = {k: v.requires_grad_(v.is_floating_point()) for k, v in twisted.items()}
    expected = outputs_and_grads(run("reference"), straight)
    assert_near(outputs_and_grads(run(backend, chunk_size=6), twisted), expected, 1e-10)
    for name, tensor in straight.items():
        assert torch.equal(twisted[name], tensor), name


@every_fast
def test_deterministic_and_memory_that_is_not_zeroed(backend):  # traps 7, 18, 34
    args = scan_args(l=70, r=2, dtype=torch.float32)
    expected = outputs_and_grads(run(backend, chunk_size=16), args)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    try:
        found = outputs_and_grads(run(backend, chunk_size=16), args)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def saved_bytes(l, backend):
    args = scan_args(b=1, l=l, h=2, p=8, r=2, n=8, dtype=torch.float32)
    saved = {}

    def pack(T):
        saved[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
        return T

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
        results = run(backend)(**args)
    assert all(r.requires_grad for r in results)
    return sum(saved.values())


@every_fast
def test_saved_memory_is_linear_in_length(backend):  # trap 48
    base = saved_bytes(512, backend)
    assert saved_bytes(1024, backend) <= 2.05 * base
    assert saved_bytes(513, backend) < 1.05 * base


@every_fast
def test_the_state_does_not_keep_the_sequence_alive(backend):
    args = {k: v.detach() for k, v in scan_args(l=500).items()}
    for part in scan(args, backend)[1]:
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


@every
def test_torch_func(backend):
    args = {k: v.detach() for k, v in scan_args(l=6, r=2).items() if k != "seq_idx"}
    many = [{k: v.detach() for k, v in scan_args(l=6, r=2).items()} for _ in range(2)]
    stacked = {k: torch.stack([other[k] for other in many]) for k in ("x", "omega", "D")}

    def loss(some):
        y, cos, _, ssm, *_ = run(backend, chunk_size=4)(**args | some)
        return y.square().sum() + ssm.sum() + cos.sum()

    values = torch.func.vmap(loss)(stacked)
    grads = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i in range(2):
        one = {name: T[i].clone().requires_grad_() for name, T in stacked.items()}
        expected = loss(one)
        assert_near(values[i], expected.detach(), 1e-12)
        wanted = torch.autograd.grad(expected, list(one.values()))
        found = {name: T[i] for name, T in grads.items()}
        assert_near(found, dict(zip(one, wanted, strict=True)), 1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_bad_arguments_are_named(backend):
    good = scan_args(r=2)
    zeros = torch.zeros
    bad = {
        "x": zeros(2, 0, 4, 3),  # trap 47
        "dt": zeros(2, 7, 3),
        "A": zeros(4),
        "trap": zeros(2, 7),
        "omega": zeros(2, 6, 2),
        "B": zeros(2, 7, 2, 6),
        "C": zeros(2, 7, 2, 2, 6, dtype=torch.int64),
        "D": zeros(4, 3),
        "B_bias": zeros(2, 4, 6),
        "C_bias": zeros(4, 2, 5),
        "mimo_x": zeros(4, 3, 2),
        "phase": zeros(2, 4, 3),
        "ssm": zeros(2, 4, 6, 3),
        "key": zeros(2, 4, 2, 6),
        "value": zeros(3, 4, 3),
        "seq_idx": zeros(2, 7),
    }
    for name, tensor in bad.items():
        word = f"state's {name}" if name in PARTS else name
        with pytest.raises(ShapeError, match=word):
            scan(good | {name: tensor}, backend)
    three = zeros(2, 7, 2, 3, 6)
    changes = {
        "the 3 groups of B must divide the 4 heads of x": {"B": three, "C": three},
        "4 angles need n >= 8": {"omega": zeros(2, 7, 4)},
        "mimo_x .* is needed": {"mimo_x": None},
        "rotate must be 'pairs' or 'halves', got 'thirds'": {"rotate": "thirds"},
        "chunk_size=0 must be >= 1": {"chunk_size": 0},
        "dt .* is on meta": {"dt": good["dt"].to("meta")},
    }
    for words, change in changes.items():
        with pytest.raises(ShapeError, match=words):
            scan(good | change, backend)
    odd = scan_args(n=5)
    with pytest.raises(ShapeError, match="even for 'halves'; n is 5"):
        scan(odd, backend, rotate="halves")
    with pytest.raises(BackendError, match=r"no backend 'official'; it has: auto, .*chunked, ref"):
        scan(good, "official")


def test_explain_names_the_choice():
    verdicts = ops.explain("mamba3_scan", **scan_args(full=False))
    assert [v.backend for v in verdicts] == BACKENDS
    assert [v.backend for v in verdicts if v.chosen] == FAST[:1]


@every_fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_of_few_bits_is_widened_first(backend, dtype):  # traps 11, 14
    args = scan_args(l=9, r=2)
    args |= {part: args[part].detach().to(dtype) for part in PARTS}
    y, parts = scan(args, backend)
    expected, last = scan(args, "reference")
    assert {T.dtype for T in parts} == {torch.float64}
    for got, want in zip(plain(y, parts), plain(expected, last), strict=True):
        assert_near(got, want, 1e-12)


@every
@pytest.mark.parametrize("name", ["trap", "omega"])
def test_each_argument_of_each_step_may_be_the_widest(backend, name):  # trap 14
    args = scan_args(l=9, full=False, dtype=torch.float32)
    args[name] = args[name].detach().double()
    _, parts = scan(args, backend)
    assert {T.dtype for T in parts} == {torch.float64}
    state = ops.Mamba3Parts(*(T.float() for T in parts))
    at = {k: v[:, 0] for k, v in args.items()}
    _, parts = ops.mamba3_step(**at, state=state)
    assert {T.dtype for T in parts} == {torch.float64}


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_bad_lengths_and_no_groups(backend):
    good = scan_args()
    none = torch.zeros(2, 7, 1, 0, 6)
    with pytest.raises(ShapeError, match="the 0 groups of B must divide the 4 heads of x"):
        scan(good | {"B": none, "C": none}, backend)
    for lengths in (torch.tensor([7]), torch.tensor([1.0, 2.0]), torch.tensor([[7, 7]])):
        with pytest.raises(ShapeError, match="lengths"):
            scan(good, backend, lengths=lengths)
