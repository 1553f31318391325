"""The contracts of the stack: whole == chunks == steps; padding and packing change nothing."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mambapy.config import MambaConfig
from mambapy.errors import BackendError, ShapeError
from mambapy.mamba import Mamba, MambaBlock
from tests.helpers import assert_near, tiny

property_test = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}
SMALL = {
    "d_conv": st.integers(1, 5),
    "d_state": st.sampled_from([1, 3, 16]),
    "d_model": st.sampled_from([1, 3, 8]),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
}


def make(dtype=torch.float64, **changes) -> Mamba:
    """A model whose parameters are all away from their special initial values."""
    model = Mamba(tiny(**changes))
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))
    return model.to(dtype)


def in_chunks(model, x, cuts, **options):
    """The output and state of x, given in chunks that end at `cuts`."""
    state, ys = None, []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if start < end:
            part = {name: T[:, start:end] for name, T in options.items()}
            y, state = model.prefill(x[:, start:end], state, **part)
            ys.append(y)
    return torch.cat(ys, dim=1), state


def assert_same_state(found, expected, tolerance):
    assert_near(found.tensors(), expected.tensors(), tolerance)


@property_test
@given(
    l=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    seed=st.integers(0, 99),
    **SMALL,
)
def test_whole_is_chunks_is_steps(l, cuts, seed, dtype, **sizes):  # traps 21, 22, 28, 29, 33
    torch.manual_seed(seed)
    model = make(dtype, **sizes)
    x = torch.randn(2, l, sizes["d_model"], dtype=dtype)
    whole = model(x)
    assert whole.dtype == dtype
    tolerance = TOLERANCE[dtype]
    y, last = model.prefill(x)
    assert torch.equal(y, whole)
    y, state = in_chunks(model, x, sorted(min(cut, l) for cut in cuts))
    assert_near(y, whole, tolerance)
    assert_same_state(state, last, tolerance)
    state, ys = model.init_state(2), []
    for t in range(l):
        y, state = model.step(x[:, t], state)
        ys.append(y)
    assert_near(torch.stack(ys, dim=1), whole, tolerance)
    assert_same_state(state, last, tolerance)


@property_test
@given(l=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99), **SMALL)
def test_padding_anywhere_changes_nothing(l, data, seed, dtype, **sizes):  # traps 23 to 27
    torch.manual_seed(seed)
    model = make(dtype, **sizes)
    rows = data.draw(st.sampled_from([1, 3]), label="rows")
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=rows * l, max_size=rows * l), label="mask")
    ).view(rows, l)
    x = torch.randn(rows, l, sizes["d_model"], dtype=dtype)
    # Padding may hold anything.
    x = torch.where(mask[:, :, None], x, float("nan"))
    y, state = model.prefill(x, mask=mask)
    assert torch.equal(model(x, mask=mask), y)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in range(rows):
        if not mask[row].any():
            assert_same_state(state[row], model.init_state(1), 0)
            continue
        alone, last = model.prefill(x[row : row + 1, mask[row]])
        assert_near(y[row, mask[row]], alone[0], TOLERANCE[dtype])
        assert_same_state(state[row], last, TOLERANCE[dtype])


@property_test
@given(
    l=st.integers(1, 40), cut=st.integers(0, 40), data=st.data(), seed=st.integers(0, 99), **SMALL
)
def test_packed_documents_are_as_if_alone(l, cut, data, seed, dtype, **sizes):  # traps 30 to 32
    torch.manual_seed(seed)
    model = make(dtype, **sizes)
    marks = data.draw(st.lists(st.integers(-1, 4), min_size=2 * l, max_size=2 * l), label="seq_idx")
    # Documents one after the other, in any numbering, with padding (-1) anywhere.
    seq_idx = torch.tensor(marks).view(2, l)
    x = torch.randn(2, l, sizes["d_model"], dtype=dtype)
    y, last = in_chunks(model, x, [min(cut, l)], seq_idx=seq_idx)
    for row in range(2):
        real = seq_idx[row] >= 0
        assert torch.equal(y[row, ~real], torch.zeros_like(y[row, ~real]))
        tokens, numbers = x[row, real], seq_idx[row, real]
        if not len(numbers):
            continue
        ends = [*(torch.nonzero(numbers.diff())[:, 0] + 1).tolist(), len(numbers)]
        found, start = y[row, real], 0
        for end in ends:
            alone, state = model.prefill(tokens[None, start:end])
            assert_near(found[start:end], alone[0], TOLERANCE[dtype])
            start = end
        assert_near(last[row].layers[0].tensors(), state.layers[0].tensors(), TOLERANCE[dtype])
        assert last.seq_idx[row] == numbers[-1]


def grads_of(model, loss):
    return dict(
        zip(
            [name for name, _ in model.named_parameters()],
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


def test_gradients_with_padding_and_documents():  # traps 7, 31
    model = make()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    weight = torch.randn(1, 12, 8, dtype=torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, -1, 0, 0, 1, 1, 1, 1, -1, 1]])
    x_packed = x.clone().requires_grad_()
    packed_loss = (model(x_packed, seq_idx=seq_idx) * weight).sum()
    (gx,) = torch.autograd.grad(packed_loss, x_packed, retain_graph=True)
    assert torch.equal(gx[seq_idx < 0], torch.zeros(2, 8, dtype=torch.float64))
    alone_loss = sum(
        (model(x[:, seq_idx[0] == d]) * weight[:, seq_idx[0] == d]).sum() for d in (0, 1)
    )
    assert_near(grads_of(model, packed_loss), grads_of(model, alone_loss), 1e-11)


def test_gradients_through_the_state():
    """Truncated back-propagation, not truncated: chunks that stay connected."""
    model = make()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    whole = grads_of(model, model(x).square().sum())
    y, _ = in_chunks(model, x, [2, 3])
    assert_near(grads_of(model, y.square().sum()), whole, 1e-11)
    state, loss = model.init_state(2), 0.0
    for t in range(9):  # trap 36
        y, state = model.step(x[:, t], state)
        loss = loss + y.square().sum()
    assert_near(grads_of(model, loss), whole, 1e-11)
    _, state = model.prefill(x[:, :4])
    y, _ = model.prefill(x[:, 4:], state.detach())
    cut = grads_of(model, y.square().sum())
    assert not torch.allclose(cut["layers.0.mixer.A_log"], whole["layers.0.mixer.A_log"])


@pytest.mark.parametrize("backend", ["pscan", "chunked", "cpu"])
def test_second_derivatives_of_a_model(backend):
    model = make(backend=backend, n_layers=1)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    again = torch.autograd.grad(
        model(x).square().sum(), [x, *model.parameters()], create_graph=True
    )
    for got, want in zip(again, plain, strict=True):
        assert_near(got, want, 1e-11)
    assert torch.autograd.gradgradcheck(model, (x,))


def test_gradient_of_the_initial_state():
    model = make(n_layers=1)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    start = model.init_state(1)
    conv = torch.randn_like(start.layers[0].conv).requires_grad_()
    ssm = torch.randn_like(start.layers[0].ssm).requires_grad_()

    def function(conv, ssm):
        layer = dataclasses.replace(start.layers[0], conv=conv, ssm=ssm)
        y, last = model.prefill(x, dataclasses.replace(start, layers=(layer,)))
        return y, last.layers[0].conv, last.layers[0].ssm

    assert torch.autograd.gradcheck(function, (conv, ssm))


@pytest.mark.parametrize("backend", ["reference", "pscan", "chunked", "cpu"])
def test_backends_agree(backend):
    model = make()
    same = Mamba(dataclasses.replace(model.config, backend=backend)).double()
    same.load_state_dict(model.state_dict())
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    seq_idx = torch.randint(0, 2, (2, 70)).sort(dim=1).values
    assert_near(same(x, seq_idx=seq_idx), model(x, seq_idx=seq_idx), 1e-12)


def test_named_backend_that_cannot_run():
    with pytest.raises(BackendError, match="mamba_ssm"):
        Mamba(tiny(use_cuda=True))(torch.randn(1, 2, 8))


def test_all_ones_mask_is_no_op():  # trap 27
    model = make(torch.float32)
    x = torch.randn(2, 9, 8)
    assert torch.equal(model(x, mask=torch.ones(2, 9, dtype=torch.bool)), model(x))


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_at_any_scale(scale, dtype):
    model = Mamba(tiny(d_model=32, d_state=16)).to(dtype)
    x = (scale * torch.randn(2, 40, 32)).to(dtype).requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    for T in (y, x.grad, *(P.grad for P in model.parameters())):
        assert torch.isfinite(T).all()


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_under_autocast(scale, dtype):
    model = Mamba(tiny(d_model=32, d_state=16))
    x = scale * torch.randn(2, 40, 32)
    with torch.autocast("cpu", dtype):
        y, state = model.prefill(x)
        step, _ = model.step(x[:, 0], state)
        y.square().mean().backward()
    assert state.layers[0].ssm.dtype == torch.float32  # trap 11
    for T in (y, step, *(P.grad for P in model.parameters())):
        assert torch.isfinite(T).all()
    exact = model(x)
    assert float((y - exact).detach().norm() / exact.detach().norm()) < 0.02


def test_sensitive_parameters_stay_in_float32():  # trap 10
    model = Mamba(tiny())
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for cast in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("cpu")):
        cast()
        for name, P in model.named_parameters():
            if name.endswith(("A_log", "mixer.D", "dt_proj.bias")):
                assert P.dtype == torch.float32
                assert torch.equal(P, expected[name])
            else:
                assert P.dtype in (torch.bfloat16, torch.float16)
    model.float()
    assert {P.dtype for P in model.parameters()} == {torch.float32}
    model.double()
    assert {P.dtype for P in model.parameters()} == {torch.float64}


def test_bfloat16_does_not_drift_with_length():  # trap 10
    torch.manual_seed(0)
    model = Mamba(MambaConfig(d_model=32, n_layers=2))
    low = Mamba(model.config).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    x = torch.randn(1, 2000, 32).bfloat16()
    error = (low(x).float() - model(x.float())).detach().square()
    early, late = error[:, 100:500].mean(), error[:, -400:].mean()
    assert late < 1.5 * early


def test_residual_stream():  # trap 12
    model = Mamba(tiny()).to(torch.bfloat16)
    inputs, streams = [], []
    for layer in model.layers:
        layer.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
    model(torch.randn(1, 3, 8).bfloat16())
    assert inputs == [torch.bfloat16] * 2
    assert streams == [torch.float32] * 2
    model.config = dataclasses.replace(model.config, residual_in_fp32=False)
    model(torch.randn(1, 3, 8).bfloat16())
    assert streams[2:] == [torch.bfloat16] * 2


def test_every_linear_layer_is_called():  # trap 63
    model = make(torch.float32)
    counts = {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = model(torch.ones(1, 3, 8))
    handles = [
        m.register_forward_hook(lambda *_, n=n: counts.__setitem__(n, counts.get(n, 0) + 1))
        for n, m in linear.items()
    ]
    x = torch.ones(1, 3, 8)
    y, state = model.prefill(x[:, :2])
    step, _ = model.step(x[:, 2], state)
    assert counts == dict.fromkeys(linear, 2)
    assert len(linear) == 2 * 4
    for handle in handles:
        handle.remove()
    assert_near(torch.cat((y, step[:, None]), dim=1), plain, 1e-5)


class LoRA(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT builds it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.1 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapters_train_and_merge():  # trap 63
    model = make(torch.float32)
    merged = Mamba(model.config)
    merged.load_state_dict(model.state_dict())
    for layer, other in zip(model.layers, merged.layers, strict=True):
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            adapter = LoRA(getattr(layer.mixer, name))
            setattr(layer.mixer, name, adapter)
            getattr(other.mixer, name).weight.data += (adapter.up @ adapter.down).detach()
    x = torch.randn(2, 5, 8)
    y, state = model.prefill(x[:, :4])
    step, _ = model.step(x[:, 4], state)
    assert_near(torch.cat((y, step[:, None]), dim=1), merged(x), 1e-5)
    model(x).square().sum().backward()
    for name, P in model.named_parameters():
        if name.endswith((".up", ".down")):
            assert float(P.grad.abs().max()) > 0, name


def test_gradient_checkpointing_under_autocast():  # trap 15
    model = Mamba(tiny(d_model=32))
    x = torch.randn(2, 30, 32)

    def grads(checkpointing):
        model.gradient_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        return grads_of(model, loss)

    plain, recomputed = grads(False), grads(True)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_training_and_evaluation_mode_agree():  # trap 44
    model = make(torch.float32)
    x = torch.randn(2, 9, 8)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_steps_do_not_change_the_callers_state():  # traps 34, 36
    model = make(torch.float32)
    x = torch.randn(2, 6, 8)
    _, state = model.prefill(x)
    before = state.clone()
    first = model.step(x[:, 0], state)
    model.prefill(x, state)
    second = model.step(x[:, 0], state)
    assert torch.equal(first[0], second[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.tensors().values(), before.tensors().values(), strict=True)
    )


def block_bytes(n, l, backend):
    """What one block keeps for its backward pass."""
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(d_model=64, n_layers=1, d_state=n, backend=backend))
    weights = {P.untyped_storage().data_ptr() for P in block.parameters()}
    saved = {}

    def pack(T):
        if T.untyped_storage().data_ptr() not in weights:
            saved[T.untyped_storage().data_ptr()] = T.untyped_storage().nbytes()
        return T

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda T: T):
        block(torch.randn(1, l, 64))
    return sum(saved.values())


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_training_memory_of_a_block(backend):  # trap 48
    base = block_bytes(16, 512, backend)
    assert block_bytes(64, 512, backend) <= 1.3 * base
    assert block_bytes(16, 2048, backend) <= 4.05 * base
    assert block_bytes(16, 513, backend) <= 1.02 * base


@pytest.mark.parametrize(
    "x",
    [
        [[1.0] * 8],
        torch.zeros(2, 8),
        torch.zeros(2, 3, 7),
        torch.zeros(2, 0, 8),  # trap 47
        torch.zeros(0, 3, 8),
        torch.zeros(2, 3, 8, dtype=torch.int64),
    ],
)
def test_bad_inputs(x):
    model = Mamba(tiny())
    with pytest.raises(ShapeError, match="x must be"):
        model(x)
    with pytest.raises(ShapeError, match="x must be"):
        model.prefill(x)


def test_bad_masks_and_documents():
    model, x = Mamba(tiny()), torch.zeros(2, 3, 8)
    for bad in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="mask must be bool"):
            model(x, mask=bad)
    with pytest.raises(ShapeError, match="seq_idx"):
        model(x, seq_idx=torch.zeros(2, 3))
    with pytest.raises(TypeError, match="attention_mask"):  # trap 60
        model(x, attention_mask=None)


def test_a_foreign_state_is_refused():  # traps 35, 39
    model, x = Mamba(tiny()), torch.zeros(2, 3, 8)
    other = {
        "batch": model.init_state(3),
        "layers": Mamba(tiny(n_layers=3)).init_state(2),
        "width": Mamba(tiny(d_state=4)).init_state(2),
        "dtype": model.init_state(2).to(dtype=torch.float64),
        "device": model.init_state(2).to("meta"),
        "kind": "a state",
        "seq_idx": dataclasses.replace(model.init_state(2), seq_idx=torch.zeros(7).long()),
    }
    for state in other.values():
        with pytest.raises(ShapeError, match=r"state"):
            model.prefill(x, state)
        with pytest.raises(ShapeError, match=r"state"):
            model.step(x[:, 0], state)


def test_bfloat16_by_default_keeps_wide_states():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, x = Mamba(tiny()), torch.randn(1, 4, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.layers[0].mixer.A_log.dtype == torch.float32
    assert model.layers[0].mixer.dt_proj.bias.dtype == torch.float32
    y, state = model.prefill(x)
    y2, _ = model.prefill(x, state)
    assert y.dtype == y2.dtype == torch.bfloat16
    # A checkpoint may hold A_log in bfloat16; states are float32 all the same.
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    _, state = model.prefill(x)
    assert state.layers[0].ssm.dtype == torch.float32
    model.step(x[:, 0], state)


def test_shapes_on_the_meta_device():
    model = Mamba(tiny()).to("meta")
    x = torch.zeros(2, 5, 8, device="meta")
    y, state = model.prefill(x)
    assert y.shape == (2, 5, 8)
    assert model.step(x[:, 0], state)[0].shape == (2, 8)


def test_long_stream_in_constant_memory():  # trap 33
    model = make(n_layers=1, d_model=3)
    x = torch.randn(1, 3000, 3, dtype=torch.float64)
    whole = model(x)
    y, _ = in_chunks(model, x, list(range(137, 3000, 137)))
    assert_near(y, whole, 1e-12)
