"""`reverse=True` is what flips of every (b, l, ...) argument and of y give, and copies nothing."""

from functools import cache, partial

import pytest
import torch

from mambapy import ops
from mambapy.ops.cpu import conv1d, selective_scan
from tests.helpers import assert_near, outputs_and_grads, scan_args

SCANS = ["cpu", "chunked", "pscan", "reference"]
CONVS = ["cpu", "reference"]
LENGTHS = [1, 2, 3, 63, 64, 65, 1000]
STEPWISE = ("x", "dt", "B", "C", "z", "seq_idx")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Of outputs and gradients, relative to the largest; the arithmetic is float32 or wider.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.012}


def run(op, backend="auto", **options):
    if op is ops.selective_scan:
        options["dt_softplus"] = True
    return partial(op, reverse=True, return_state=True, backend=backend, **options)


def by_flips(op, backend="reference", **options):
    forward = partial(run(op, backend, **options), reverse=False)

    def function(**args):
        args = {k: v.flip(1) if k in STEPWISE else v for k, v in args.items()}
        y, last = forward(**args)
        return y.flip(1), last

    return function


def conv_args(b=2, l=7, e=5, k=4, dtype=torch.float64, *, full=True):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    args = {"x": draw(b, l, e), "weight": draw(e, k)}
    if full:
        seq_idx = torch.randint(0, 1 + l // 3, (b, l)).sort(dim=1).values
        args |= {"bias": draw(e), "state": draw(b, k - 1, e), "seq_idx": seq_idx}
    return args


def cast(args, dtype):
    """`args` in another dtype; weights and states in float32 at least, as models keep them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        k: v.detach().to(dtype if k in STEPWISE else wide).requires_grad_()
        if v.is_floating_point()
        else v
        for k, v in args.items()
    }


@cache
def a_scan(l, full, dtype=torch.float64):
    """Arguments, and what the reference makes of them in float64."""
    args = cast(scan_args(l=l, full=full), dtype)
    return args, outputs_and_grads(by_flips(ops.selective_scan), cast(args, torch.float64))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("backend", SCANS)
def test_a_scan_is_what_flips_give(backend, l, full):
    args, expected = a_scan(l, full)
    found = outputs_and_grads(run(ops.selective_scan, backend), args)
    assert_near(found, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("l", [1, 65, 200])
@pytest.mark.parametrize("backend", SCANS)
def test_a_scan_in_less_precision(backend, l, dtype):
    args, expected = a_scan(l, True, dtype)
    found = outputs_and_grads(run(ops.selective_scan, backend), args)
    assert found["output 0"].dtype == dtype
    assert_near(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("backend", CONVS)
def test_a_convolution_is_what_flips_give(backend, l, k, activation, full):
    args = conv_args(l=l, k=k, full=full)
    expected = outputs_and_grads(by_flips(ops.causal_conv1d, activation=activation), args)
    found = outputs_and_grads(run(ops.causal_conv1d, backend, activation=activation), args)
    assert_near(found, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", CONVS)
def test_a_convolution_in_less_precision(backend, dtype):
    args = cast(conv_args(l=65), dtype)
    expected = outputs_and_grads(by_flips(ops.causal_conv1d), cast(args, torch.float64))
    found = outputs_and_grads(run(ops.causal_conv1d, backend), args)
    assert found["output 0"].dtype == dtype
    assert_near(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias", "state", "seq_idx"])
def test_a_scan_without_one_of_its_optional_arguments(missing):
    args = scan_args(l=70)
    del args[missing]
    expected = outputs_and_grads(by_flips(ops.selective_scan), args)
    assert_near(outputs_and_grads(run(ops.selective_scan, "cpu"), args), expected, 1e-11)


@pytest.mark.parametrize("missing", ["bias", "state", "seq_idx"])
def test_a_convolution_without_one_of_its_optional_arguments(missing):
    args = conv_args(l=70)
    del args[missing]
    expected = outputs_and_grads(by_flips(ops.causal_conv1d), args)
    assert_near(outputs_and_grads(run(ops.causal_conv1d, "cpu"), args), expected, 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [ops.selective_scan, ops.causal_conv1d])
def test_kernels_give_the_bits_of_flips(op, dtype):
    # More than one block of channels. (Were b l n no multiple of 32, torch would add up the blocks
    # of the last few gradients of B in another order than the others.)
    if op is ops.selective_scan:
        args = scan_args(l=130, e=150, n=16, dtype=dtype)
    else:
        args = conv_args(l=130, e=150, dtype=dtype)
    expected = outputs_and_grads(by_flips(op, "cpu"), args)
    found = outputs_and_grads(run(op, "cpu"), args)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_document_starts_at_its_last_token():
    x, one = torch.arange(1.0, 6.0).view(1, 5, 1), torch.ones(1, 5, 1)
    seq_idx = torch.tensor([[3, 3, 3, 7, 7]])
    # With a decay of exp(-0) and dt = B = C = 1, y is the sum of the document from its end.
    A, state = torch.zeros(1, 1), torch.full((1, 1, 1), 10.0)
    y, last = ops.selective_scan(
        x, one, A, one, one, state=state, seq_idx=seq_idx, reverse=True, return_state=True
    )
    assert y.flatten().tolist() == [6, 5, 3, 19, 15]
    assert last.item() == 6
    y, last = ops.causal_conv1d(
        x,
        torch.tensor([[100.0, 10.0, 1.0]]),
        state=torch.tensor([[[7.0], [6.0]]]),
        seq_idx=seq_idx,
        reverse=True,
        return_state=True,
    )
    assert y.flatten().tolist() == [321, 32, 3, 654, 765]
    assert last.flatten().tolist() == [2, 1]


@pytest.mark.parametrize("backend", SCANS)
def test_any_split_gives_what_one_call_gives(backend):
    args = scan_args(l=150)
    del args["seq_idx"]
    scan = run(ops.selective_scan, backend)
    y, last = scan(**args)
    state, ys = args["state"], []
    for cut in (slice(70, 150), slice(1, 70), slice(0, 1)):
        part = {k: v[:, cut] if k in STEPWISE else v for k, v in args.items()}
        out, state = scan(**part | {"state": state})
        ys.insert(0, out)
    assert_near(torch.cat(ys, dim=1), y, 1e-12)
    assert_near(state, last, 1e-12)


@pytest.mark.parametrize("backend", CONVS)
def test_any_split_of_a_convolution(backend):
    args = conv_args(l=9)
    x, state = args.pop("x"), args.pop("state")
    del args["seq_idx"]
    conv = partial(run(ops.causal_conv1d, backend), **args)
    y, last = conv(x=x, state=state)
    ys = []
    for cut in (slice(3, 9), slice(1, 3), slice(0, 1)):
        out, state = conv(x=x[:, cut], state=state)
        ys.insert(0, out)
    assert_near(torch.cat(ys, dim=1), y, 1e-12)
    assert torch.equal(state, last)


def twisted(args):
    """Transposed, a slice, and expanded along the length and along the batch."""
    args = {k: v.detach() for k, v in args.items()}
    args["x"] = args["x"].transpose(1, 2).contiguous().transpose(1, 2)
    if "dt" in args:
        args["dt"] = torch.cat((args["dt"], args["z"]), dim=-1)[..., : args["x"].shape[2]]
        args["B"] = args["B"][:1].expand(2, -1, -1)
        args["C"] = args["C"][:, :1].expand(-1, 70, -1)
        args["z"] = args["z"].transpose(0, 1).contiguous().transpose(0, 1)
    else:
        args["state"] = args["state"][:, :1].expand(-1, 3, -1)
    args["seq_idx"] = args["seq_idx"].t().contiguous().t()
    return args


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("op", [ops.selective_scan, ops.causal_conv1d])
def test_transposed_and_expanded_arguments(op, dtype):
    args = twisted((scan_args if op is ops.selective_scan else conv_args)(l=70, dtype=dtype))
    strange = {k: v.requires_grad_(v.is_floating_point()) for k, v in args.items()}
    plain = {
        k: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_(v.requires_grad)
        for k, v in args.items()
    }
    expected = outputs_and_grads(by_flips(op), cast(plain, torch.float64))
    assert_near(outputs_and_grads(run(op, "cpu"), strange), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("over", ["x", "dt", "z"])
def test_a_scan_over_its_own_argument(backend, over):
    args = {k: v.detach() for k, v in scan_args(l=70, e=40, dtype=torch.float32).items()}
    # A slice, as a projection gives it: rows are apart.
    args[over] = torch.cat((args[over], args[over]), dim=-1)[..., :40]
    scan = run(ops.selective_scan, backend)
    expected, last = scan(**args)
    y, state = scan(**args, out=args[over])
    assert y is args[over]
    assert torch.equal(y, expected)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", CONVS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_convolution_over_its_own_input(backend, dtype):
    args = {k: v.detach() for k, v in cast(conv_args(l=70, e=40), dtype).items()}
    args["x"] = torch.cat((args["x"], args["x"]), dim=-1)[..., 20:60]
    conv = run(ops.causal_conv1d, backend, activation="silu")
    expected, last = conv(**args)
    y, after = conv(**args, out=args["x"])
    assert y is args["x"]
    assert torch.equal(y, expected)
    assert torch.equal(after, last)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_second_derivatives_of_a_scan(backend):
    args = scan_args(b=1, l=3, e=2, n=2)
    scan = run(ops.selective_scan, backend, seq_idx=torch.tensor([[0, 1, 1]]))
    del args["seq_idx"]

    def function(*tensors):
        return scan(**dict(zip(args, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(args.values()))
    assert torch.autograd.gradgradcheck(function, tuple(args.values()))


@pytest.mark.parametrize("backend", CONVS)
def test_second_derivatives_of_a_convolution(backend):
    args = conv_args(b=1, l=4, e=2, k=3)
    del args["seq_idx"]
    conv = run(ops.causal_conv1d, backend, activation="silu")

    def function(*tensors):
        return conv(**dict(zip(args, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(args.values()))
    assert torch.autograd.gradgradcheck(function, tuple(args.values()))


def total(op, backend):
    def loss(args):
        y, last = run(op, backend)(**args)
        return y.square().sum() + last.sum()

    return loss


CASES = [
    *[(ops.selective_scan, backend) for backend in SCANS],
    *[(ops.causal_conv1d, backend) for backend in CONVS],
]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_torch_func_grad_vmap_and_vmap_of_grad(op, backend):
    def draw():
        args = (scan_args if op is ops.selective_scan else conv_args)(l=20)
        return {k: v.detach() for k, v in args.items() if k != "seq_idx"}

    weight = "A" if op is ops.selective_scan else "weight"
    args, loss = draw(), total(op, backend)
    for mapped in (("x",), ("x", weight)):
        many = [draw() for _ in range(3)]
        stacked = {name: torch.stack([other[name] for other in many]) for name in mapped}
        values = torch.func.vmap(lambda some: loss(args | some))(stacked)
        grads = torch.func.vmap(torch.func.grad(lambda some: loss(args | some)))(stacked)
        for i in range(3):
            one = {name: T[i].clone().requires_grad_() for name, T in stacked.items()}
            expected = loss(args | one)
            assert_near(values[i], expected.detach(), 1e-12)
            wanted = torch.autograd.grad(expected, list(one.values()))
            wanted = dict(zip(one, wanted, strict=True))
            assert_near({name: T[i] for name, T in grads.items()}, wanted, 1e-12)
            alone = torch.func.grad(lambda some: loss(args | some))
            assert_near(alone({name: T[i] for name, T in stacked.items()}), wanted, 1e-12)


# torch's own, on the way into its compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "backend"), [*CASES[:2], *CASES[4:]])
def test_compiles_whole(op, backend):
    torch._dynamo.reset()

    def function(args):
        return run(op, backend)(**args)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, l in ((2, 70), (3, 9)):
        args = (scan_args if op is ops.selective_scan else conv_args)(b=b, l=l)
        expected = outputs_and_grads(lambda **args: function(args), args)
        found = outputs_and_grads(lambda **args: compiled(args), args)
        assert_near(found, expected, 1e-12)


def test_operators_are_well_formed():
    args = scan_args(l=70, e=24, dtype=torch.float32)
    positional = [args[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")]
    torch.library.opcheck(
        torch.ops.mambapy.selective_scan.default,
        (*positional, args["seq_idx"], True, True, True),
    )
    args = conv_args(l=70, e=24, dtype=torch.float32)
    torch.library.opcheck(torch.ops.mambapy.causal_conv1d.default, (*args.values(), True, True))


@pytest.mark.parametrize("op", [ops.selective_scan, ops.causal_conv1d])
def test_kernels_flip_nothing(op, monkeypatch):
    args = (scan_args if op is ops.selective_scan else conv_args)(l=70)
    expected = outputs_and_grads(by_flips(op), args)
    flip = torch.Tensor.flip

    def only_small(T, *dims):
        # Taps and the few inputs of a convolution's state are turned by torch.
        assert 70 not in T.shape, "a tensor with a row for each step was copied"
        return flip(T, *dims)

    monkeypatch.setattr(torch.Tensor, "flip", only_small)
    monkeypatch.setattr(torch, "flip", only_small)
    assert_near(outputs_and_grads(run(op, "cpu"), args), expected, 1e-11)


def test_kernels_read_and_write_the_callers_memory(monkeypatch):
    seen = []

    def spy(module):
        pack = module.pack
        monkeypatch.setattr(module, "pack", lambda *a: seen.append(pack(*a)) or pack(*a))

    spy(selective_scan)
    spy(conv1d)
    args = {k: v.detach() for k, v in scan_args(l=70, dtype=torch.float32).items()}
    args["x"] = torch.cat((args["x"], args["x"]), dim=-1)[..., :5]
    run(ops.selective_scan, "cpu")(**args, out=args["z"])
    places = {(int(a), int(s)) for a, s in zip(seen[0][16::4], seen[0][18::4], strict=True)}
    for name in STEPWISE:
        T = args[name]
        step = T.stride(1) * T.element_size()
        assert (T.data_ptr() + 69 * step, -step) in places, name
    x, weight = args["x"], torch.randn(5, 4)
    run(ops.causal_conv1d, "cpu")(x, weight, seq_idx=args["seq_idx"], out=x)
    slots = seen[1][16:].reshape(-1, 4).tolist()
    step = x.stride(1) * x.element_size()
    last = [x.data_ptr() + 69 * step, x.stride(0) * x.element_size(), -step, 4]
    assert slots[conv1d.X] == slots[conv1d.Y] == last
