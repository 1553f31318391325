import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from mambapy.errors import ShapeError
from mambapy.ops import ssd_chunked
from mambapy.ops.ssd import BACKENDS as REGISTERED
from tests.helpers import assert_near, outputs_and_grads

FAST = [b.name for b in REGISTERED if b.name not in ("official", "reference")]
BACKENDS = [*FAST, "reference"]
OPTIONAL = ["D", "z", "dt_bias", "state", "seq_idx"]
LIMIT = (0.1, 2.0)
BY_TOKEN = ("x", "dt", "B", "C", "z", "seq_idx")
every = pytest.mark.parametrize("backend", BACKENDS)
every_fast = pytest.mark.parametrize("backend", FAST)


def ssd_args(b=2, l=7, h=4, p=3, g=2, n=5, dtype=torch.float64, *, full=True, wide_D=False):
    """Random arguments of ssd, with or without the optional ones."""

    # Numbers that float32 holds exactly.
    def draw(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    args = {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h),
        "A": (-4 * torch.rand(h)).to(dtype).requires_grad_(),
        "B": draw(b, l, g, n),
        "C": draw(b, l, g, n),
    }
    if full:
        args |= {
            "D": draw(h, p) if wide_D else draw(h),
            "z": draw(b, l, h, p),
            "dt_bias": draw(h),
            "state": draw(b, h, p, n),
            "seq_idx": torch.randint(0, 4, (b, l)).sort(dim=1).values,
        }
    return args


def cast(args, dtype):
    return {
        k: v.detach().to(dtype).requires_grad_() if v.is_floating_point() else v
        for k, v in args.items()
    }


def run(backend="auto", **options):
    options = {"dt_softplus": True, "dt_limit": LIMIT, "return_state": True} | options
    return lambda **args: ops.ssd(**args, **options, backend=backend)


def written_out(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, seq_idx=None):
    """A sum over the earlier tokens of the document: no recurrence, no chunks, head by head."""
    b, l, h, p = x.shape
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*LIMIT)
    document = torch.zeros(b, l, dtype=torch.int64)
    if seq_idx is not None:
        document[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1)
    seen = (document[:, :, None] == document[:, None]) & torch.ones(l, l, dtype=torch.bool).tril()
    ys, lasts = [], []
    for i in range(h):
        group = i // (h // B.shape[2])  # trap 41
        Bi, Ci = B[:, :, group], C[:, :, group]
        cum = (dt[:, :, i] * A[i]).cumsum(1)
        gap = (cum[:, :, None] - cum[:, None]).masked_fill(~seen, -math.inf)
        counts = gap.exp() * dt[:, None, :, i]  # of token j for token t
        start = x.new_zeros(b, p, B.shape[3]) if state is None else state[:, i]
        left = cum.exp().masked_fill(document > 0, 0.0)
        y = torch.einsum("btj,btn,bjn,bjp->btp", counts, Ci, Bi, x[:, :, i])
        ys.append(y + torch.einsum("bt,btn,bpn->btp", left, Ci, start))
        last = torch.einsum("bj,bjp,bjn->bpn", counts[:, -1], x[:, :, i], Bi)
        lasts.append(last + left[:, -1, None, None] * start)
    y = torch.stack(ys, dim=2)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)), torch.stack(lasts, dim=1)


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("wide_D", [False, True])
def test_every_backend_equals_the_sum_written_out(g, wide_D):  # traps 9, 30, 41, 50
    args = ssd_args(l=30, g=g, wide_D=wide_D)
    expected = outputs_and_grads(written_out, args)
    for backend in BACKENDS:
        assert_near(outputs_and_grads(run(backend, chunk_size=8), args), expected, 1e-10)


@pytest.mark.parametrize("l", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("full", [True, False])
def test_equals_the_reference_with_all_gradients(l, full):  # traps 2, 6, 9, 30, 48
    options = {} if full else {"dt_limit": (0.0, math.inf)}
    args = ssd_args(l=l, full=full)
    expected = outputs_and_grads(run("reference", **options), args)
    low = cast(args, torch.float32)
    for backend, chunk_size in itertools.product(FAST, (None, 1, 16, 64)):
        function = run(backend, chunk_size=chunk_size, **options)
        assert_near(outputs_and_grads(function, args), expected, 1e-10)
        assert_near(outputs_and_grads(function, low), expected, 1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_equals_the_reference_at_length_1000(full):
    # Several tiles (None and 64), several segments (1 and 16).
    args = ssd_args(b=1, l=1000, full=full, wide_D=True)
    low = cast(args, torch.float32)
    expected = outputs_and_grads(run("reference"), args)
    for backend, chunk_size in itertools.product(FAST, (None, 1, 16, 64)):
        function = run(backend, chunk_size=chunk_size)
        assert_near(outputs_and_grads(function, args), expected, 1e-10)
        assert_near(outputs_and_grads(function, low), expected, 1e-5)


@every_fast
@pytest.mark.parametrize("tile", [1, 200, 2**25])
def test_tiles_of_any_size_give_the_same(backend, tile, monkeypatch):
    args = ssd_args(b=3, l=150)
    expected = outputs_and_grads(run("reference"), args)
    monkeypatch.setattr(ssd_chunked, "TILE_CPU", tile)
    monkeypatch.setattr(ssd_chunked, "SEGMENT", 3)
    assert_near(outputs_and_grads(run(backend, chunk_size=7), args), expected, 1e-10)


@every_fast
@pytest.mark.parametrize("missing", OPTIONAL)
def test_each_optional_argument_alone(backend, missing):
    args = ssd_args(l=70)
    del args[missing]
    expected = outputs_and_grads(run("reference"), args)
    assert_near(outputs_and_grads(run(backend), args), expected, 1e-10)


@every_fast
def test_a_document_may_start_at_any_token(backend):  # trap 30
    for start in range(1, 9):
        args = ssd_args(b=1, l=9)
        args["seq_idx"] = (torch.arange(9) >= start).long()[None]
        y, last = run(backend, chunk_size=4)(**args)
        parts = [{k: v[:, :start] if k in BY_TOKEN else v for k, v in args.items()}]
        parts.append({k: v[:, start:] if k in BY_TOKEN else v for k, v in args.items()})
        del parts[1]["state"]
        (before, _), (after, alone) = (run("reference")(**part) for part in parts)
        assert_near(y, torch.cat((before, after), dim=1), 1e-12)
        assert_near(last, alone, 1e-12)


@every
@pytest.mark.parametrize(("l", "h"), [(3, 2), (2, 1)])
def test_first_and_second_derivatives(backend, l, h):
    args = ssd_args(b=1, l=l, h=h, p=2, g=1, n=2)
    seq_idx = args.pop("seq_idx")
    # No limit: where it begins there is no derivative.
    options = {"dt_limit": (0.0, math.inf), "chunk_size": 2, "seq_idx": seq_idx}

    def function(*tensors):
        return run(backend, **options)(**dict(zip(args, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(args.values()))
    if h == 1:
        assert torch.autograd.gradgradcheck(function, tuple(args.values()))


@every
def test_derivatives_where_arguments_depend_on_each_other(backend):
    args = ssd_args(b=1, l=3, h=2, p=2, g=1, n=2, full=False)
    A = args["A"].detach()

    def function(x):
        return ops.ssd(x, torch.sigmoid(x[..., 0]), A, x.sin(), x.cos(), backend=backend)

    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(function(x).square().sum(), x)[0]
    again = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
    assert_near(again, plain, 1e-12)
    assert torch.autograd.gradgradcheck(function, (x,))


@every
def test_any_split_gives_what_one_call_gives(backend):  # traps 28, 33
    args = ssd_args(l=150)
    y, last = run(backend)(**args)
    state, ys = args["state"], []
    for cut in (slice(0, 1), slice(1, 70), slice(70, 150)):
        part = {k: v[:, cut] if k in BY_TOKEN else v for k, v in args.items()}
        if cut.start:
            same = args["seq_idx"][:, cut.start] == args["seq_idx"][:, cut.start - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        out, state = run(backend)(**part | {"state": state})
        ys.append(out)
    assert_near(torch.cat(ys, dim=1), y, 1e-12)
    assert_near(state, last, 1e-12)


@pytest.mark.parametrize("wide_D", [False, True])
def test_step_is_one_step(wide_D):  # trap 9: the limit holds for the step, too
    args = ssd_args(l=5, wide_D=wide_D)
    del args["seq_idx"]
    y, last = run("chunked", chunk_size=2)(**args)
    state, before = args["state"], args["state"].detach().clone()
    for t in range(5):
        at = {k: v[:, t] if k in BY_TOKEN else v for k, v in args.items()}
        out, state = ops.ssd_step(**at | {"state": state}, dt_softplus=True, dt_limit=LIMIT)
        assert_near(out, y[:, t], 1e-12)
    assert_near(state, last, 1e-12)
    assert torch.equal(args["state"], before)
    with pytest.raises(ShapeError, match="state"):
        ops.ssd_step(**at | {"state": state[:1]})


@every
def test_limit_is_a_clamp_of_dt(backend):  # trap 9
    args = ssd_args(l=40)
    clamped = dict(args, dt=F.softplus(args["dt"] + args["dt_bias"]).clamp(*LIMIT))
    del clamped["dt_bias"]
    found = run(backend)(**args)
    expected = run(backend, dt_softplus=False, dt_limit=(0.0, math.inf))(**clamped)
    # Not bit for bit: softplus of a step's few numbers may be vectorised otherwise.
    for got, want in zip(found, expected, strict=True):
        assert_near(got, want, 1e-14)
    outside = (clamped["dt"] == LIMIT[0]) | (clamped["dt"] == LIMIT[1])
    assert outside.any()
    (grad,) = torch.autograd.grad(found[0].sum(), args["dt"])
    assert torch.equal(grad[outside], torch.zeros_like(grad[outside]))


def test_what_documents_add_that_start_from_a_given_state():
    args = ssd_args(l=20, g=2, full=False)
    dt, initial = args["dt"].detach().sigmoid(), torch.randn(4, 3, 5, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 6 + [1] * 7 + [0] * 7, [3] * 20])
    args |= {"dt": dt, "seq_idx": seq_idx}
    more, last_more = ops.ssd_from_start(initial, dt, args["A"], args["C"], seq_idx)
    y, last = ops.ssd(**args, return_state=True)
    start = initial.expand(2, -1, -1, -1)
    del args["seq_idx"]
    for cut, state in ((slice(0, 6), None), (slice(6, 13), start), (slice(13, 20), start)):
        part = {k: v[:1, cut] if k in BY_TOKEN else v for k, v in args.items()}
        state = None if state is None else state[:1]
        alone, end = ops.ssd(**part, state=state, return_state=True)
        assert_near((y + more)[:1, cut], alone, 1e-12)
    assert_near((last + last_more)[:1], end, 1e-12)
    # The first document's state is an argument of ssd.
    assert not more[1].any()
    assert not last_more[1].any()
