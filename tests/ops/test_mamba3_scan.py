import itertools

import pytest
import torch

from mambapy import ops
from mambapy.errors import ShapeError
from mambapy.ops.mamba3_scan import BACKENDS as REGISTERED
from tests.helpers import assert_near, outputs_and_grads

BACKENDS = [b.name for b in REGISTERED]
FAST = BACKENDS[:-1]
BY_TOKEN = ("x", "dt", "A", "trap", "omega", "B", "C", "seq_idx")
PARTS = ("phase", "ssm", "key", "value")
every = pytest.mark.parametrize("backend", BACKENDS)
every_fast = pytest.mark.parametrize("backend", FAST)
# SISO and MIMO, pairs and halves, all channels turned and some, and groups.
VARIANTS = {
    "siso": {},
    "siso halves": {"s": 3, "g": 4, "rotate": "halves"},
    "mimo": {"r": 3, "rotate": "halves"},
    "mimo pairs": {"r": 2, "s": 3, "g": 1},
}
each = pytest.mark.parametrize("name", [*VARIANTS])


def scan_args(b=2, l=7, h=4, p=3, r=1, g=2, n=6, s=2, dtype=torch.float64, *, full=True):
    """Random arguments of mamba3_scan; the parts of the state by their names."""

    # Numbers that float32 holds exactly.
    def draw(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    def unit(*shape):
        return torch.rand(*shape).to(dtype)

    args = {
        "x": draw(b, l, h, p),
        "dt": unit(b, l, h).requires_grad_(),
        "A": (-2 * unit(b, l, h)).requires_grad_(),
        "trap": unit(b, l, h).requires_grad_(),
        "omega": (3 - 6 * torch.rand(b, l, s)).to(dtype).requires_grad_(),
        "B": draw(b, l, r, g, n),
        "C": draw(b, l, r, g, n),
    }
    if r > 1:
        args["mimo_x"] = draw(h, r, p)
    if full:
        args |= {
            "D": draw(h),
            "B_bias": draw(h, r, n),
            "C_bias": draw(h, r, n),
            "mimo_x": draw(h, r, p),
            "phase": draw(b, h, s),
            "ssm": draw(b, h, p, n),
            "key": draw(b, r, h, n),
            "value": draw(b, h, p),
            "seq_idx": torch.randint(0, 4, (b, l)).sort(dim=1).values,
        }
    return args


def sizes(name):
    return {k: v for k, v in VARIANTS[name].items() if k != "rotate"}


def rotation(name):
    return VARIANTS[name].get("rotate", "pairs")


def plain(y, parts):
    """The outputs; the phase by its cosine and sine, as 2 pi is nothing."""
    return y, torch.cos(parts.phase), torch.sin(parts.phase), parts.ssm, parts.key, parts.value


def scan(args, backend="auto", **options):
    """y, and the state that comes after the one in args."""
    args = dict(args)
    state = [args.pop(part) for part in PARTS if part in args]
    options |= {"state": ops.Mamba3Parts(*state) if state else None, "backend": backend}
    return ops.mamba3_scan(**args, **options, return_state=True)


def run(backend="auto", **options):
    return lambda **args: plain(*scan(args, backend, **options))


def cast(args, dtype):
    return {
        k: v.detach().to(dtype).requires_grad_() if v.is_floating_point() else v
        for k, v in args.items()
    }


def written_out(rotate):
    """The specification, one number of alpha, beta and gamma a head and step, turns as matrices."""

    def turn(B, phase):
        R = torch.eye(B.shape[1], dtype=B.dtype).repeat(B.shape[0], 1, 1)
        for i in range(phase.shape[1]):
            first, second = (2 * i, 2 * i + 1) if rotate == "pairs" else (i, i + B.shape[1] // 2)
            R[:, first, first] = R[:, second, second] = phase[:, i].cos()
            R[:, first, second] = -phase[:, i].sin()
            R[:, second, first] = phase[:, i].sin()
        return torch.einsum("bmn,bn->bm", R, B)

    def function(x, dt, A, trap, omega, B, C, D=None, **rest):
        seq_idx = rest.get("seq_idx")
        (b, l, h, p), (r, g, n), s = x.shape, B.shape[2:], omega.shape[2]
        shapes = {"phase": (b, h, s), "ssm": (b, h, p, n), "key": (b, r, h, n), "value": (b, h, p)}
        start = {name: rest.get(name, x.new_zeros(shape)) for name, shape in shapes.items()}
        mimo_x = rest.get("mimo_x", x.new_ones(h, r, p))
        ys, ends = [], []
        for head in range(h):
            group = head // (h // g)  # trap 41
            phi, state = start["phase"][:, head], start["ssm"][:, head]
            keys = [start["key"][:, i, head] for i in range(r)]
            value, y = start["value"][:, head], []
            for t in range(l):
                if seq_idx is not None and t:
                    same = (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
                    phi, value = (torch.where(same, T, 0.0) for T in (phi, value))
                    state = torch.where(same[:, :, None], state, 0.0)
                    keys = [torch.where(same, key, 0.0) for key in keys]
                delta, lam = dt[:, t, head], trap[:, t, head]
                alpha = torch.exp(delta * A[:, t, head])
                beta, gamma = (1 - lam) * delta * alpha, lam * delta
                phi = phi + omega[:, t] * delta[:, None]
                state = alpha[:, None, None] * state
                for i in range(r):
                    old = torch.einsum("bp,bn->bpn", mimo_x[head, i] * value, keys[i])
                    state = state + beta[:, None, None] * old
                value, keys = x[:, t, head], []
                for i in range(r):
                    bias = rest["B_bias"][head, i] if "B_bias" in rest else 0.0
                    keys.append(turn(B[:, t, i, group] + bias, phi))
                    new = torch.einsum("bp,bn->bpn", mimo_x[head, i] * value, keys[i])
                    state = state + gamma[:, None, None] * new
                for i in range(r):
                    bias = rest["C_bias"][head, i] if "C_bias" in rest else 0.0
                    query = turn(C[:, t, i, group] + bias, phi)
                    out = torch.einsum("bpn,bn->bp", state, query)
                    y.append(out if D is None else out + D[head] * mimo_x[head, i] * value)
            ys.append(torch.stack(y, dim=1).unflatten(1, (l, r)))
            ends.append((phi, state, torch.stack(keys, dim=1), value))
        phase, ssm, key, value = (torch.stack(T, dim=1) for T in zip(*ends, strict=True))
        last = ops.Mamba3Parts(phase, ssm, key.transpose(1, 2), value)
        return plain(torch.stack(ys, dim=3), last)

    return function


@each
@pytest.mark.parametrize("full", [True, False])
def test_every_backend_equals_the_specification(name, full):  # traps 30, 41
    args = scan_args(l=9, full=full, **sizes(name))
    rotate = rotation(name)
    expected = outputs_and_grads(written_out(rotate), args)
    for backend, chunk_size in itertools.product(BACKENDS, (None, 4)):
        function = run(backend, rotate=rotate, chunk_size=chunk_size)
        assert_near(outputs_and_grads(function, args), expected, 1e-10)


@pytest.mark.parametrize(
    ("name", "l"),
    [("siso", l) for l in (1, 2, 3, 16, 17, 63, 64, 65)]
    + [(name, l) for name in VARIANTS if name != "siso" for l in (1, 17, 65)],
)
def test_equals_the_reference_with_all_gradients(name, l):  # traps 2, 6, 48
    args = scan_args(l=l, full=l != 63, **sizes(name))
    rotate = rotation(name)
    expected = outputs_and_grads(run("reference", rotate=rotate), args)
    low = cast(args, torch.float32)
    for backend, chunk_size in itertools.product(FAST, (None, 1, 16)):
        function = run(backend, rotate=rotate, chunk_size=chunk_size)
        assert_near(outputs_and_grads(function, args), expected, 1e-10)
        assert_near(outputs_and_grads(function, low), expected, 1e-5)


def test_equals_the_reference_at_length_1000():
    args = scan_args(b=1, l=1000, **sizes("mimo"))
    expected = outputs_and_grads(run("reference", rotate="halves"), args)
    low = cast(args, torch.float32)
    # Its gradient is a sum over all tokens that cancels: as exact as a part in 2**24 of the terms.
    low["phase"].requires_grad_(False)
    rounded = {name: T for name, T in expected.items() if name != "grad phase"}
    for backend, chunk_size in itertools.product(FAST, (None, 16)):
        function = run(backend, rotate="halves", chunk_size=chunk_size)
        assert_near(outputs_and_grads(function, args), expected, 1e-10)
        assert_near(outputs_and_grads(function, low), rounded, 1e-5)


@every_fast
@pytest.mark.parametrize("missing", ["D", "B_bias", "C_bias", "mimo_x", "state", "seq_idx"])
def test_each_optional_argument_alone(backend, missing):
    args = scan_args(l=40)
    for name in PARTS if missing == "state" else (missing,):
        del args[name]
    expected = outputs_and_grads(run("reference"), args)
    assert_near(outputs_and_grads(run(backend, chunk_size=16), args), expected, 1e-10)


@every_fast
@pytest.mark.parametrize(("l", "h"), [(3, 2), (2, 1)])
def test_first_and_second_derivatives(backend, l, h):
    args = scan_args(b=1, l=l, h=h, p=1, r=2, g=1, n=2, s=1)
    seq_idx = args.pop("seq_idx")

    def function(*tensors):
        named = dict(zip(args, tensors, strict=True))
        return run(backend, seq_idx=seq_idx, chunk_size=2)(**named)

    assert torch.autograd.gradcheck(function, tuple(args.values()))
    if h == 1:
        assert torch.autograd.gradgradcheck(function, tuple(args.values()))


@every
@each
def test_any_split_gives_what_one_call_gives(backend, name):  # traps 28, 33
    args = scan_args(l=21, **sizes(name))
    options = {"rotate": rotation(name), "backend": backend, "chunk_size": 4}
    y, last = scan(args, **options)
    parts, ys = [args[part] for part in PARTS], []
    for cut in (slice(0, 1), slice(1, 8), slice(8, 21)):
        if cut.start:
            same = args["seq_idx"][:, cut.start] == args["seq_idx"][:, cut.start - 1]
            parts = [torch.where(same.view(-1, *[1] * (T.dim() - 1)), T, 0.0) for T in parts]
        part = {k: v[:, cut] if k in BY_TOKEN else v for k, v in args.items()}
        out, parts = scan(part | dict(zip(PARTS, parts, strict=True)), **options)
        ys.append(out)
    for got, want in zip(plain(torch.cat(ys, dim=1), parts), plain(y, last), strict=True):
        assert_near(got, want, 1e-12)


@each
def test_step_is_one_step(name):
    args = scan_args(l=5, **sizes(name))
    del args["seq_idx"]
    y, last = scan(args, "chunked", rotate=rotation(name), chunk_size=2)
    state = ops.Mamba3Parts(*(args.pop(part) for part in PARTS))
    first, before = state, [T.detach().clone() for T in state]
    for t in range(5):
        at = {k: v[:, t] if k in BY_TOKEN else v for k, v in args.items()}
        out, state = ops.mamba3_step(**at, state=state, rotate=rotation(name))
        assert_near(out, y[:, t], 1e-12)
    for got, want in zip(plain(y, state), plain(y, last), strict=True):
        assert_near(got, want, 1e-12)
    assert all(torch.equal(T, old) for T, old in zip(first, before, strict=True))  # trap 37
    with pytest.raises(ShapeError, match="state's key"):
        ops.mamba3_step(**at, state=state._replace(key=state.key[:1]), rotate=rotation(name))


@every
@each
@pytest.mark.parametrize("packed", [True, False])
def test_the_state_stands_after_the_last_real_token(backend, name, packed):  # traps 23, 24, 33
    args = scan_args(b=4, l=12, **sizes(name))
    if not packed:
        del args["seq_idx"]
    lengths = torch.tensor([0, 1, 7, 12])
    options = {"rotate": rotation(name), "backend": backend, "chunk_size": 5}
    y, last = scan(args, lengths=lengths, **options)
    shared = ("D", "B_bias", "C_bias", "mimo_x")
    for row, length in enumerate(lengths.tolist()):
        found = plain(y[row, :length], ops.Mamba3Parts(*(T[row] for T in last)))
        alone = {k: v if k in shared else v[row : row + 1] for k, v in args.items()}
        if length == 0:
            kept = ops.Mamba3Parts(*(alone[part][0] for part in PARTS))
            expected = plain(y[row, :0], kept)
        else:
            part = {k: v[:, :length] if k in BY_TOKEN else v for k, v in alone.items()}
            expected = [T[0] for T in plain(*scan(part, **options))]
        for got, want in zip(found, expected, strict=True):
            assert_near(got, want, 1e-12)
