from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from mambapy import ops
from mambapy.ops import joint_gradient, kernel_ops, reference
from mambapy.ops.direction import conv_from_the_end
from mambapy.ops.gpu import conv1d, selective_scan
from tests.helpers import assert_near
from tests.ops.gpu import emulator

CUDA = torch.cuda.is_available()
BATCH = 2 if CUDA else 1
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def small_programs(device, monkeypatch):
    """Several programs at sizes that the interpreter is quick enough for."""
    if device == "cpu":
        monkeypatch.setattr(conv1d, "SHORTEST", 4)
        monkeypatch.setattr(conv1d, "FORWARD", 2)
        monkeypatch.setattr(conv1d, "BACKWARD", 2)


def draw(
    device, l, b=1, e=20, k=4, *, bias=True, state=True, packed=True, dtype=torch.float32, wide=None
):
    """The tensors of a call; x is a half of a wider one, weights are of the dtype `wide`."""
    wide = wide or dtype
    tensors = {
        "x": torch.randn(b, l, 2 * e).to(dtype)[..., e:],
        "weight": torch.randn(e, k).to(wide),
        "bias": torch.randn(e).to(wide) if bias else None,
        "state": torch.randn(b, k - 1, e).to(dtype) if state else None,
        # A number may come back.
        "seq_idx": (torch.rand(b, l) < 0.3).cumsum(1) % 3 if packed else None,
    }
    return {name: None if T is None else T.to(device) for name, T in tensors.items()}


def ours(tensors, grad_y, silu, reverse):
    y = conv1d.forward(**tensors, activation=silu, reverse=reverse)
    grads = conv1d.backward(grad_y, *tensors.values(), silu, reverse)
    return [y, *[grad for grad in grads if grad is not None]]


def exact(tensors, grad_y, silu, reverse):
    """The reference's results in float64, on the CPU."""
    tensors = {name: None if T is None else T.cpu() for name, T in tensors.items()}
    seq_idx = tensors.pop("seq_idx")
    tensors = {n: None if T is None else T.double().requires_grad_() for n, T in tensors.items()}
    conv = reference.causal_conv1d
    conv = partial(conv_from_the_end, conv) if reverse else conv
    y = conv(**tensors, seq_idx=seq_idx, activation="silu" if silu else None)
    given = [T for T in tensors.values() if T is not None]
    grads = torch.autograd.grad(y, given, grad_y.cpu().double(), materialize_grads=True)
    return [y.detach(), *grads]


def check(tensors, silu=True, reverse=False):
    x = tensors["x"]
    grad_y = torch.randn(x.shape).to(x)
    found = ours(tensors, grad_y, silu, reverse)
    given = [T for name, T in tensors.items() if T is not None and name != "seq_idx"]
    assert [T.dtype for T in found] == [x.dtype, *[T.dtype for T in given]]
    for i, (got, want) in enumerate(zip(found, exact(tensors, grad_y, silu, reverse), strict=True)):
        assert_near({f"{i}": got.cpu()}, {f"{i}": want}, TOLERANCES[x.dtype])


@pytest.mark.parametrize("reverse", [False, True] if CUDA else [False])
@pytest.mark.parametrize("l", [1, 2, 3, 63, 64, 65, *([1000] if CUDA else [])])
def test_lengths(device, l, reverse, monkeypatch):
    if l > 3 and not CUDA:
        monkeypatch.setattr(conv1d, "SHORTEST", 32)
    check(draw(device, l, b=BATCH), reverse=reverse)


# Every pair of choices of any two options.
@pytest.mark.parametrize(
    ("bias", "state", "packed", "reverse", "silu"),
    [
        (False, False, False, False, False),
        (False, False, False, True, True),
        (False, True, True, False, False),
        (False, True, True, True, True),
        (True, False, True, False, True),
        (True, False, True, True, False),
        (True, True, False, False, True),
        (True, True, False, True, False),
    ],
)
def test_options(device, bias, state, packed, reverse, silu):
    tensors = draw(device, 300 if CUDA else 6, b=2, e=5, bias=bias, state=state, packed=packed)
    check(tensors, silu, reverse)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_widths(device, k):
    check(draw(device, 6, b=BATCH, e=5, k=k))


@pytest.mark.parametrize("e", [1, 64, 70, *([256, 300, 1536] if CUDA else [])])
def test_channels(device, e):
    check(draw(device, 5, e=e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [None, torch.float32])
def test_dtypes(device, dtype, wide):
    check(draw(device, 6, e=8, dtype=dtype, wide=wide))


def test_layouts(device):
    tensors = draw(device, 4, b=2, e=6)
    by_channel = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    check(tensors | {"x": by_channel})
    check(tensors | {"x": tensors["x"][:1].expand(2, -1, -1)})
    check(tensors | {"seq_idx": tensors["seq_idx"].to(torch.int32)})


def test_two_calls_give_the_same_bits(device):
    tensors = draw(device, 3000 if CUDA else 4, e=5)
    grad_y = torch.randn_like(tensors["x"])
    first, second = (ours(tensors, grad_y, True, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_out(device):
    tensors = draw(device, 4, e=5)
    before = tensors["x"].clone()
    out = torch.empty_like(before)
    y = conv1d.forward(**tensors, out=out)
    assert y is out
    # Other programs still read what stands there.
    again = conv1d.forward(**tensors, out=tensors["x"])
    assert torch.equal(again, y)
    assert torch.equal(tensors["x"], before)


def test_nothing(device):
    found = ours(draw(device, 4, b=0, e=5), torch.empty(0, 4, 5, device=device), True, False)
    assert [T.shape for T in found] == [(0, 4, 5), (0, 4, 5), (5, 4), (5,), (0, 3, 5)]
    assert not any(T.any() for T in found)


def test_a_row_does_not_depend_on_the_batch_around_it(device):
    tensors = draw(device, 6, b=3, e=5)
    y = conv1d.forward(**tensors)
    alone = {n: T if n in ("weight", "bias") else T[1:2] for n, T in tensors.items()}
    assert torch.equal(conv1d.forward(**alone), y[1:2])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
@pytest.mark.parametrize("reverse", [False, True])
def test_large(device, reverse):
    check(draw(device, 2048, b=8, e=1536, dtype=torch.bfloat16), reverse=reverse)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="there is no GPU")
@pytest.mark.parametrize("reverse", [False, True])
def test_more_than_two_to_the_31_elements(device, reverse):
    l, e = 2**20 + 100, 2056
    x = torch.randn(1, l, e, device=device, dtype=torch.bfloat16)
    weight = torch.randn(e, 4, device=device)
    y = conv1d.forward(x, weight, reverse=reverse)
    grad_x, grad_weight, _, _ = conv1d.backward(y, x, weight, None, None, None, False, reverse)
    for part in (slice(0, 90), slice(l - 90, l)):
        tensors = {"x": x[:, part], "weight": weight, "bias": None, "state": None, "seq_idx": None}
        want, want_grad, *_ = exact(tensors, y[:, part], False, reverse)
        inner = slice(3, 87)
        assert_near(y[:, part][:, inner].cpu(), want[:, inner], 1e-2)
        assert_near(grad_x[:, part][:, inner].cpu(), want_grad[:, inner], 1e-2)
    chunks = zip(x[0].split(2**16), y[0].split(2**16), strict=True)
    last = sum(torch.einsum("le,le->e", a.double(), b.double()) for a, b in chunks)
    assert_near(grad_weight[:, 3], last, 1e-4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_two_parts(device, reverse, dtype):
    tensors = draw(device, 9, e=6, dtype=dtype)
    grad_y, wide = torch.randn(1, 9, 6, device=device), torch.randn(1, 9, 12, device=device)
    grad_y, more = grad_y.to(dtype), wide.to(dtype)[..., 6:]
    found = conv1d.backward(grad_y, *tensors.values(), True, reverse, more=more)
    both = (grad_y.float() + more.float()).contiguous()
    expected = conv1d.backward(both, *tensors.values(), True, reverse)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_a_gradient_written_into_half_of_a_tensor(device):
    tensors = draw(device, 9, e=6)
    grad_y = torch.randn(1, 9, 6, device=device)
    whole = torch.zeros(1, 9, 12, device=device)
    found = conv1d.backward(grad_y, *tensors.values(), True, False, grad_x=whole[..., :6])
    expected = conv1d.backward(grad_y, *tensors.values(), True, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(whole[..., :6], expected[0])
    assert not whole[..., 6:].any()


@pytest.fixture
def on_gpu(device, monkeypatch):
    """Without a GPU: its kernels for the CPU's tensors, those of the scan in the emulator."""
    if CUDA:
        return
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: emulator.H100)
    monkeypatch.setattr(selective_scan, "launch", emulator.launch)
    monkeypatch.setattr(kernel_ops, "is_on_gpu", lambda T: True)
    kernels = {"conv1d": conv1d, "selective_scan": selective_scan}
    monkeypatch.setattr(kernel_ops, "kernels", lambda name, x: kernels[name])


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("how", ["once", "twice", "hook", "alone", "no scan"])
def test_one_gradient_for_a_mixers_halves(device, how):
    """Of x and z: written by the scan and the convolution, whatever else happens to them."""
    b, l, e, n = (2, 33, 16, 8) if CUDA else (1, 5, 8, 4)
    xz, dt = torch.randn(b, l, 2 * e, device=device), torch.randn(b, l, e, device=device)
    xz.requires_grad_()
    weight, bias = torch.randn(e, 4, device=device), torch.randn(e, device=device)
    weight.requires_grad_()
    A, (B, C) = -torch.rand(e, n, device=device), torch.randn(2, b, l, n, device=device)
    seen, copies = [], []

    def loss(joint):
        inputs = xz * 1.5
        inputs.register_hook(lambda grad: seen.append(grad.is_contiguous()))
        if joint:
            run = ops.conv_and_gate if CUDA else joint_gradient.conv_and_gate
            x, again, z = run(inputs, weight, bias, activation="silu")
            assert "ConvAndGate" in type(x.grad_fn).__name__
            z.register_hook(lambda grad: copies.append(not hasattr(grad, "mambapy_whole")))
        else:
            x, z = inputs.chunk(2, dim=-1)
            again = x = ops.causal_conv1d(x, weight, bias, activation="silu")
        if how == "hook":
            z.register_hook(lambda grad: 2 * grad)
        if how == "no scan":
            return x.square().sum() + again.cos().sum()
        y = ops.selective_scan(x, dt, A, B, C, None, z, dt_softplus=True)
        y = y.square().sum() + again.cos().sum()
        return y + z.sin().sum() if how == "twice" else z.sin().sum() if how == "alone" else y

    wanted = (xz, weight)
    expected = torch.autograd.grad(loss(joint=False), wanted, materialize_grads=True)
    value = loss(joint=True)
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    kept = first[0].clone()
    again = torch.autograd.grad(value, wanted)
    for want, *found in zip(expected, first, again, strict=True):
        for got in found:
            assert_near(got, want, 1e-5)
    assert torch.equal(first[0], kept)
    assert all(seen)
    # The scan alone makes no room that nobody fills.
    x, z = (T.detach().requires_grad_() for T in xz.chunk(2, dim=-1))
    room = []
    z.register_hook(lambda grad: room.append(grad.untyped_storage().nbytes()))
    ops.selective_scan(x, dt, A, B, C, None, z, dt_softplus=True).sum().backward()
    assert room == [z.nelement() * 4]
    # A gradient that somebody has added to, or that is none of the scan's, is copied.
    assert copies == [how in ("twice", "alone", "no scan")] * 2
