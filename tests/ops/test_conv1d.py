from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mambapy import ops
from mambapy.errors import BackendError, ShapeError
from mambapy.ops import joint_gradient, official
from tests.helpers import assert_near, outputs_and_grads


def conv_args(b=2, l=7, e=5, k=4, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return {"x": draw(b, l, e), "weight": draw(e, k), "bias": draw(e), "state": draw(b, k - 1, e)}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("l", [1, 2, 3, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_torchs_convolution(k, l, activation):  # trap 21: l < k too
    args = conv_args(l=l, k=k)

    def torchs(x, weight, bias, state):
        y = F.conv1d(
            torch.cat((state, x), dim=1).transpose(1, 2), weight[:, None], bias, groups=5
        ).transpose(1, 2)
        return F.silu(y) if activation else y

    def ours(**args):
        return ops.causal_conv1d(**args, activation=activation)

    assert_near(outputs_and_grads(ours, args), outputs_and_grads(torchs, args), 1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_any_split_gives_what_one_call_gives(k):  # trap 49
    args = conv_args(l=9, k=k)
    x, state = args.pop("x"), args.pop("state")
    y, last = ops.causal_conv1d(x, **args, state=state, return_state=True)
    ys = []
    for cut in (slice(0, 1), slice(1, 3), slice(3, 9)):
        out, state = ops.causal_conv1d(x[:, cut], **args, state=state, return_state=True)
        ys.append(out)
    assert_near(torch.cat(ys, dim=1), y, 1e-12)
    assert torch.equal(state, last)
    assert last.shape == (2, k - 1, 5)


@pytest.mark.parametrize("k", [1, 4])
def test_step_is_one_step(k):
    args = conv_args(l=6, k=k)
    x, state = args.pop("x"), args.pop("state")
    y, last = ops.causal_conv1d(x, **args, state=state, activation="silu", return_state=True)
    for t in range(6):
        out, state = ops.causal_conv1d_step(x[:, t], **args, state=state, activation="silu")
        assert_near(out, y[:, t], 1e-12)
    assert torch.equal(state, last)


def test_taps_do_not_reach_into_other_documents():  # trap 31
    args = conv_args(b=1, l=9)
    seq_idx = torch.tensor([[4, 4, 4, 5, 5, 5, 5, 4, 4]])
    args["state"] = args["state"][:1]

    def packed(**args):
        return ops.causal_conv1d(**args, seq_idx=seq_idx, activation="silu", return_state=True)

    def one_by_one(x, weight, bias, state):
        first, _ = ops.causal_conv1d(
            x[:, :3], weight, bias, state=state, activation="silu", return_state=True
        )
        second = ops.causal_conv1d(x[:, 3:7], weight, bias, activation="silu")
        third, last = ops.causal_conv1d(
            x[:, 7:], weight, bias, activation="silu", return_state=True
        )
        return torch.cat((first, second, third), dim=1), last

    assert_near(outputs_and_grads(packed, args), outputs_and_grads(one_by_one, args), 1e-12)


def test_state_of_rows_that_end_earlier():  # trap 23
    x = torch.arange(1.0, 13.0).view(2, 6, 1)
    lengths = torch.tensor([2, 6])
    state = torch.tensor([[-3.0, -2.0, -1.0], [-3.0, -2.0, -1.0]])[..., None]
    last = ops.conv_state(x, 3, state=state, lengths=lengths)
    assert last[..., 0].tolist() == [[-1, 1, 2], [10, 11, 12]]
    nothing = ops.conv_state(x, 3, state=state, lengths=torch.tensor([0, 0]))
    assert torch.equal(nothing, state)


def test_float16_runs_in_float32():
    args = conv_args(dtype=torch.float16)
    found = ops.causal_conv1d(**args)
    expected = ops.causal_conv1d(**{k: v.double() for k, v in args.items()})
    assert found.dtype == torch.float16
    assert_near(found, expected, 2**-11)


def test_bad_arguments_are_named():
    good = conv_args()
    bad = {
        "x": torch.zeros(2, 0, 5),
        "weight": torch.zeros(4, 4),
        "bias": torch.zeros(4),
        "state": torch.zeros(2, 4, 5),
    }
    for name, tensor in bad.items():
        with pytest.raises(ShapeError, match=name):
            ops.causal_conv1d(**(good | {name: tensor}))
    with pytest.raises(ShapeError, match="activation"):
        ops.causal_conv1d(**good, activation="relu")
    with pytest.raises(ShapeError, match="seq_idx"):
        ops.causal_conv1d(**good, seq_idx=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(BackendError, match="causal_conv1d is not installed"):
        ops.causal_conv1d(**good, backend="official")


def test_official_adapter_converts_the_layout(monkeypatch):
    args = conv_args(dtype=torch.float32)
    del args["state"]

    class Interface:
        @staticmethod
        def causal_conv1d_fn(x, weight, bias, activation):
            assert x.is_contiguous()
            y = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation)
            return y.transpose(1, 2)

    stand_in = SimpleNamespace(import_module=lambda _: Interface)
    monkeypatch.setattr(official, "importlib", stand_in)
    found = official.causal_conv1d(**args, activation="silu")
    assert_near(found, ops.causal_conv1d(**args, activation="silu"), 1e-6)


def gate_args(l=7, e=5):
    args = {name: T for name, T in conv_args(l=l, e=e).items() if name != "x"}
    return {"xz": torch.randn(2, l, 2 * e, dtype=torch.float64).requires_grad_(), **args}


def apart(xz, weight, bias, state=None, seq_idx=None):
    x, z = xz.chunk(2, dim=-1)
    y = ops.causal_conv1d(x, weight, bias, activation="silu", state=state, seq_idx=seq_idx)
    return y, 1 * y, z


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_convolution_and_gate(backend):
    def together(**args):
        return ops.conv_and_gate(**args, activation="silu", backend=backend)

    args = gate_args()
    assert_near(outputs_and_grads(together, args), outputs_and_grads(apart, args), 1e-12)
    with torch.no_grad():
        y, again, z = together(**args, overwrite=False)
        assert torch.equal(y, again)
        assert z.data_ptr() == args["xz"].chunk(2, -1)[1].data_ptr()
        assert_near(together(**args, overwrite=True)[0], y, 1e-12)
    with pytest.raises(ShapeError, match="2e"):
        ops.conv_and_gate(torch.zeros(1, 2, 3), args["weight"])


@pytest.mark.parametrize("packed", [False, True])
def test_one_gradient_for_convolution_and_gate(packed):
    """What a GPU does, by the CPU's kernels."""
    args = gate_args(l=9)
    del args["state"]
    seq_idx = torch.randint(2, (2, 9)) if packed else None

    def together(xz, weight, bias):
        return joint_gradient.conv_and_gate(xz, weight, bias, activation="silu", seq_idx=seq_idx)

    expected = outputs_and_grads(lambda **a: apart(**a, seq_idx=seq_idx), args)
    assert_near(outputs_and_grads(together, args), expected, 1e-12)
    assert torch.autograd.gradcheck(together, tuple(args.values()))
    assert torch.autograd.gradgradcheck(together, tuple(args.values()))
    # One of both is not used.
    for i in (0, 1, 2):
        pair = [torch.autograd.grad(f(**args)[i].sum(), args["xz"])[0] for f in (together, apart)]
        if not packed:
            assert_near(*pair, 1e-12)
    # The gradient of the gate, where it comes with room for the other half, is not copied.
    y, _, z = together(**args)
    whole = torch.randn_like(args["xz"])
    grad_z = whole[..., 5:]
    grad_z.mambapy_whole = whole
    found = torch.autograd.grad((y, z), args["xz"], (torch.zeros_like(y), grad_z))[0]
    assert found.data_ptr() == whole.data_ptr()
    # Once: another convolution must not write there too.
    assert not hasattr(grad_z, "mambapy_whole")
    assert not found[..., :5].any()
