"""Mamba-2, Mamba-3 and hybrids keep the contracts of test_mamba.py: whole == chunks == steps.

Sizes are drawn so that heads, groups, ranks, chunks and what is optional all vary.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mambapy.config import (
    HybridConfig,
    JambaConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
)
from mambapy.errors import ShapeError
from mambapy.hybrid import Hybrid
from mambapy.jamba import Jamba
from mambapy.lm import LM
from mambapy.mamba import Mamba
from mambapy.mamba2 import Mamba2
from mambapy.mamba3 import Mamba3, heavy_tail
from mambapy.state import AttentionState, ModelState
from tests.helpers import assert_near

property_test = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-5}
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
BASE = {"d_model": 8, "n_layers": 2, "d_state": 4, "d_head": 4}
# Every option at least once, and what published models have.
VARIANTS = {
    "mamba2": Mamba2Config(**BASE),
    "groups": Mamba2Config(**BASE, n_groups=2, D_has_hdim=True, chunk_size=3, conv_bias=False),
    "limits": Mamba2Config(**BASE, dt_limit=(0.05, 0.5), rmsnorm=False, d_conv=1, bias=True),
    "slice": Mamba2Config(**BASE, d_ssm=8, norm_before_gate=True, d_intermediate=5, n_groups=2),
    "learned": Mamba2Config(**BASE, learnable_init_states=True, chunk_size=5, rmsnorm=False),
    "siso": Mamba3Config(**BASE),
    "mimo": Mamba3Config(**BASE, mimo_rank=3, n_groups=2, chunk_size=2, outproj_norm=True),
    "halves": Mamba3Config(
        **BASE, rotate="halves", rope_fraction=1, d_intermediate=5, a_activation="softplus"
    ),
    "mimo pairs": Mamba3Config(**BASE, mimo_rank=2, rotate="pairs", chunk_size=4),
    "inner norms": MambaConfig(d_model=8, n_layers=2, d_state=4, inner_norm="plain"),
    "hybrid": HybridConfig(
        d_model=8,
        layers=("attention+mlp", "mamba2"),
        d_intermediate=5,
        attention={"n_heads": 4, "n_kv_heads": 2, "d_head": 6, "rotary_dim": 4, "d_conv": 3},
        mamba2={"d_head": 4, "d_state": 4},
    ),
    "no positions": HybridConfig(
        d_model=8,
        layers=("attention", "mamba", "mamba3"),
        attention={"n_heads": 2, "bias": True, "out_bias": True},
        mamba={"d_state": 4, "inner_norm": "learned"},
        mamba3={"d_head": 4, "d_state": 4},
    ),
    "jamba": JambaConfig(
        d_model=8,
        n_layers=3,
        d_intermediate=6,
        d_state=4,
        n_heads=2,
        n_kv_heads=1,
        n_experts=4,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_offset=0,
    ),
}
ALL = st.sampled_from([*VARIANTS])
each = pytest.mark.parametrize("name", [*VARIANTS])
heads = pytest.mark.parametrize("name", [*VARIANTS][:9])
STACKS = {
    MambaConfig: Mamba,
    Mamba2Config: Mamba2,
    Mamba3Config: Mamba3,
    HybridConfig: Hybrid,
    JambaConfig: Jamba,
}


def make(name, dtype=torch.float64, **changes):
    """A model whose parameters are all away from their special initial values."""
    config = VARIANTS[name]
    if isinstance(config, HybridConfig) and changes.get("n_layers") == 1:
        changes |= {"layers": config.layers[:1], "mamba": {}, "mamba2": {}, "mamba3": {}}
    config = dataclasses.replace(config, **changes)
    model = STACKS[type(config)](config)
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))
    return model.to(dtype)


def in_chunks(model, x, cuts, **options):
    """The output and state of x, given in chunks that end at `cuts`."""
    state, ys = None, []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        if start < end:
            part = {key: T[:, start:end] for key, T in options.items()}
            y, state = model.prefill(x[:, start:end], state, **part)
            ys.append(y)
    return torch.cat(ys, dim=1), state


def plain(state):
    """A state's tensors: an angle by its point on the unit circle, as 2 pi is nothing.

    What stands in an attention state beyond a row's length means nothing and is left out.
    """
    if isinstance(state, ModelState):
        layers = {f"{i}.{n}": T for i, s in enumerate(state.layers) for n, T in plain(s).items()}
        return layers | {"seq_idx": state.seq_idx}
    tensors = {}
    if isinstance(state, AttentionState):
        longest = int(state.lengths.max())
        real = torch.arange(state.keys.shape[1]) < state.lengths[:, None]
        trim = lambda T: torch.where(real[:, :, None, None], T, 0)[:, :longest]  # noqa: E731
        state = dataclasses.replace(state, keys=trim(state.keys), values=trim(state.values))
    for name, T in state.tensors().items():
        if name.endswith("phase"):
            # One point on the unit circle: an angle near 0 has an error, too.
            tensors[name] = torch.stack((torch.cos(T), torch.sin(T)))
        else:
            tensors[name] = T
    return tensors


@property_test
@given(
    name=ALL,
    l=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_whole_is_chunks_is_steps(name, l, cuts, seed, dtype):  # traps 6, 21, 22, 28, 29, 33, 34
    torch.manual_seed(seed)
    model = make(name, dtype)
    x = torch.randn(2, l, 8, dtype=dtype)
    whole = model(x)
    assert whole.dtype == dtype
    y, last = model.prefill(x)
    assert_near(y, whole, TOLERANCE[dtype])
    y, state = in_chunks(model, x, sorted(min(cut, l) for cut in cuts))
    assert_near(y, whole, TOLERANCE[dtype])
    assert_near(plain(state), plain(last), TOLERANCE[dtype])
    state, ys = model.init_state(2), []
    for t in range(l):
        y, state = model.step(x[:, t], state)
        ys.append(y)
    assert_near(torch.stack(ys, dim=1), whole, TOLERANCE[dtype])
    assert_near(plain(state), plain(last), TOLERANCE[dtype])


@property_test
@given(name=ALL, l=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99), dtype=DTYPES)
def test_padding_anywhere_changes_nothing(name, l, data, seed, dtype):  # traps 9, 23 to 27
    torch.manual_seed(seed)
    model = make(name, dtype)
    rows = data.draw(st.sampled_from([1, 3]), label="rows")
    marks = data.draw(st.lists(st.booleans(), min_size=rows * l, max_size=rows * l), label="mask")
    mask = torch.tensor(marks).view(rows, l)
    x = torch.randn(rows, l, 8, dtype=dtype)
    # Padding may hold anything.
    x = torch.where(mask[:, :, None], x, float("nan"))
    y, state = model.prefill(x, mask=mask)
    assert_near(model(x, mask=mask), y, TOLERANCE[dtype])
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in range(rows):
        if not mask[row].any():
            assert_near(plain(state[row]), plain(model.init_state(1)), 0)
            continue
        alone, last = model.prefill(x[row : row + 1, mask[row]])
        assert_near(y[row, mask[row]], alone[0], TOLERANCE[dtype])
        assert_near(plain(state[row]), plain(last), TOLERANCE[dtype])


@property_test
@given(
    name=ALL,
    l=st.integers(1, 40),
    cut=st.integers(0, 40),
    data=st.data(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_packed_documents_are_as_if_alone(name, l, cut, data, seed, dtype):  # traps 30 to 32
    torch.manual_seed(seed)
    model = make(name, dtype)
    marks = data.draw(st.lists(st.integers(-1, 4), min_size=2 * l, max_size=2 * l), label="seq_idx")
    seq_idx = torch.tensor(marks).view(2, l)
    x = torch.randn(2, l, 8, dtype=dtype)
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
        assert_near(plain(last[row].layers[0]), plain(state.layers[0]), TOLERANCE[dtype])


@property_test
@given(name=ALL, l=st.integers(1, 30), cut=st.integers(0, 30), seed=st.integers(0, 99))
def test_gaps_in_chunks_steps_documents_and_beside_padding(name, l, cut, seed):
    torch.manual_seed(seed)
    model = make(name)
    x, dt_scale = torch.randn(2, l, 8, dtype=torch.float64), 3 * torch.rand(2, l).double()
    whole, last = model.prefill(x, dt_scale=dt_scale)
    assert_near(model(x, dt_scale=dt_scale), whole, 1e-11)
    y, state = in_chunks(model, x, [min(cut, l)], dt_scale=dt_scale)
    assert_near(y, whole, 1e-11)
    assert_near(plain(state), plain(last), 1e-11)
    state, ys = model.init_state(2), []
    for t in range(l):
        y, state = model.step(x[:, t], state, dt_scale=dt_scale[:, t])
        ys.append(y)
    assert_near(torch.stack(ys, dim=1), whole, 1e-11)
    assert_near(plain(state), plain(last), 1e-11)
    mask, seq_idx = torch.rand(2, l) > 0.3, torch.randint(0, 3, (2, l)).sort(dim=1).values
    packed = model(x, mask=mask, seq_idx=seq_idx, dt_scale=dt_scale)
    for row in range(2):
        for document in range(3):
            chosen = mask[row] & (seq_idx[row] == document)
            if chosen.any():
                alone = model(x[row : row + 1, chosen], dt_scale=dt_scale[row : row + 1, chosen])
                assert_near(packed[row, chosen], alone[0], 1e-11)


@each
def test_gaps_of_one_step_change_nothing(name):
    model, x = make(name), torch.randn(2, 9, 8, dtype=torch.float64)
    ones = torch.ones(2, 9, dtype=torch.float64)
    assert_near(model(x, dt_scale=ones), model(x), 1e-12)
    assert not torch.allclose(model(x, dt_scale=2 * ones), model(x), rtol=1e-3)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("name", ["inner norms", "groups", "siso", "mimo"])
def test_a_gap_is_steps_of_zero_input(name, backend):
    """Without convolution and biases, a token of zeros moves nothing into the state."""
    changes = {"d_conv": 1, "conv_bias": False} if name in ("inner norms", "groups") else {}
    model = make(name, n_layers=1, rescale_out_proj=False, backend=backend, **changes)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    zeros = torch.zeros(1, 4, 8, dtype=torch.float64)
    long = torch.cat((x[:, :2], zeros, x[:, 2:]), dim=1)
    short = torch.cat((x[:, :2], zeros[:, :1], x[:, 2:]), dim=1)
    dt_scale = torch.tensor([[1, 1, 4, 1, 1]], dtype=torch.float64)
    expected = model(long)
    found = model(short, dt_scale=dt_scale)
    assert_near(found[:, [0, 1, 3, 4]], expected[:, [0, 1, 6, 7]], 1e-11)


@pytest.mark.parametrize("name", ["inner norms", "groups"])
def test_a_gap_is_the_decay_of_its_steps(name):
    """What the gap's own token adds does not depend on how long the gap was."""
    model = make(name, n_layers=1)
    mixer = model.layers[0].mixer
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    _, before = mixer.prefill(x[:, :1])
    steps = [mixer.step(x[:, 1], before, torch.tensor([s]).double())[1] for s in (1e-6, 2, 4)]
    empty = dataclasses.replace(before, ssm=torch.zeros_like(before.ssm))
    fresh = mixer.step(x[:, 1], empty, torch.ones(1).double())[1]
    decayed = [state.ssm - fresh.ssm for state in steps]
    assert_near(decayed[1].square(), decayed[0] * decayed[2], 1e-4)


def test_bad_gaps():
    model, x = make("siso", torch.float32), torch.randn(2, 3, 8)
    for dt_scale, message in {
        torch.ones(2, 4): r"dt_scale must be a tensor \(2, 3\)",
        torch.ones(2, 3, dtype=torch.int64): "dt_scale must be floating point",
        -torch.ones(2, 3): r"dt_scale must be finite and >= 0, got -1 to -1",
        torch.full((2, 3), math.nan): "dt_scale must be finite",
    }.items():
        with pytest.raises(ShapeError, match=message):
            model(x, dt_scale=dt_scale)
    with pytest.raises(ShapeError, match=r"dt_scale must be a tensor \(2,\)"):
        model.step(x[:, 0], model.init_state(2), dt_scale=torch.ones(2, 1))


def grads_of(model, loss):
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(names, grads, model.parameters(), strict=True)
    return {name: torch.zeros_like(P) if g is None else g for name, g, P in pairs}


@each
def test_gradients_through_the_state(name):  # trap 36
    model = make(name)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    whole = grads_of(model, model(x).square().sum())
    y, _ = in_chunks(model, x, [2, 3])
    assert_near(grads_of(model, y.square().sum()), whole, 1e-10)
    state, loss = model.init_state(2), 0.0
    for t in range(9):
        y, state = model.step(x[:, t], state)
        loss = loss + y.square().sum()
    assert_near(grads_of(model, loss), whole, 1e-10)


@each
def test_gradients_with_padding_and_documents(name):  # traps 7, 31
    model = make(name)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    weight = torch.randn(1, 12, 8, dtype=torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, -1, 0, 0, 1, 1, 1, 1, -1, 1]])
    x_packed = x.clone().requires_grad_()
    packed = (model(x_packed, seq_idx=seq_idx) * weight).sum()
    (gx,) = torch.autograd.grad(packed, x_packed, retain_graph=True)
    assert torch.equal(gx[seq_idx < 0], torch.zeros(2, 8, dtype=torch.float64))
    alone = sum((model(x[:, seq_idx[0] == d]) * weight[:, seq_idx[0] == d]).sum() for d in (0, 1))
    assert_near(grads_of(model, packed), grads_of(model, alone), 1e-10)


@each
def test_gradients_of_the_initial_state(name):
    model = make(name, n_layers=1)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    start = model.init_state(1)
    start = model.prefill(x, start)[1].detach()
    fields = {
        key: torch.randn_like(T).requires_grad_() if T.is_floating_point() else T
        for key, T in start.layers[0].tensors().items()
    }

    def function(*values):
        layer = type(start.layers[0])(*values)
        y, last = model.prefill(x, dataclasses.replace(start, layers=(layer,)))
        tensors = plain(last.layers[0]).values()
        return y, *(T for T in tensors if T.is_floating_point() and T.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(fields.values()))


@each
def test_second_derivatives(name):
    model = make(name, n_layers=1)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    first = torch.autograd.grad(model(x).square().sum(), leaves)
    again = torch.autograd.grad(model(x).square().sum(), leaves, create_graph=True)
    for got, want in zip(again, first, strict=True):
        assert_near(got, want, 1e-10)
    # Attention's faster kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(model, (x,))


@each
def test_backends_agree(name):
    model = make(name)
    same = make(name, backend="reference")
    same.load_state_dict(model.state_dict())
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    options = {
        "mask": torch.rand(2, 40) > 0.2,
        "seq_idx": torch.randint(0, 2, (2, 40)).sort(dim=1).values,
    }
    y, state = model.prefill(x, **options)
    expected, last = same.prefill(x, **options)
    assert_near(y, expected, 1e-11)
    assert_near(plain(state), plain(last), 1e-11)


@each
def test_training_mode_and_gradients_change_nothing(name):  # traps 44, 45: one result, many paths
    model, x = make(name, torch.float32), torch.randn(2, 150, 8)
    expected = model.train()(x)
    assert expected.requires_grad
    with torch.no_grad():
        assert_near(model(x), expected, 1e-5)
        assert_near(model.eval()(x), expected, 1e-5)


@pytest.mark.parametrize("l", [1, 2, 3, 4, 9])
def test_the_convolutions_state_is_its_last_inputs(l):  # trap 49
    mixer = make("mamba2").layers[0].mixer
    x = torch.randn(2, l, 8, dtype=torch.float64)
    inputs = mixer.in_proj(x).split(mixer.parts, dim=-1)[3]
    y, state = mixer.prefill(x)
    assert y.shape == (2, l, 8)
    assert_near(state.conv, F.pad(inputs, (0, 0, 3, 0))[:, -3:], 0)


@each
@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_any_scale(name, scale, dtype):  # traps 1, 11
    model = make(name, dtype)
    x = (scale * torch.randn(2, 40, 8)).to(dtype).requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    for T in (y, x.grad, *(P.grad for P in model.parameters() if P.grad is not None)):
        assert torch.isfinite(T).all()


@each
def test_finite_under_autocast(name):
    model = make(name, torch.float32)
    x = torch.randn(2, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model.prefill(x)
        y.square().mean().backward()
    assert all(T.dtype == torch.float32 for T in state.tensors().values() if T.is_floating_point())
    exact = model(x)
    assert float((y - exact).detach().norm() / exact.detach().norm()) < 0.03


@heads
def test_sensitive_parameters_stay_in_float32(name):  # trap 10
    model = make(name, torch.float32).to(torch.bfloat16)
    kept = {n.rpartition(".")[2] for n, P in model.named_parameters() if P.dtype == torch.float32}
    mamba2 = {"A_log", "D", "dt_bias"} | ({"init_states"} if name == "learned" else set())
    assert kept == (mamba2 if isinstance(model, Mamba2) else {"dt_bias", "D", "B_bias", "C_bias"})


@each
def test_every_linear_layer_is_called(name):  # trap 63
    model = make(name, torch.float32)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    counts = dict.fromkeys(linear, 0)
    for layer in linear:
        layer.register_forward_hook(lambda layer, *_: counts.__setitem__(layer, counts[layer] + 1))
    x = torch.ones(1, 3, 8)
    _, state = model.prefill(x[:, :2])
    model.step(x[:, 2], state)
    assert set(counts.values()) == {2}


@each
def test_lm_saves_generates_and_trains(name, tmp_path):
    torch.manual_seed(0)
    config = VARIANTS[name]
    model = LM(config, vocab_size=11).eval()
    tokens = torch.randint(11, (2, 9))
    logits, state = model.prefill(tokens)
    assert logits.shape == (2, 9, 11)
    step, _ = model.step(tokens[:, 0], state)
    again = model(torch.cat((tokens, tokens[:, :1]), dim=1))
    assert_near(step, again[:, -1], 1e-5)
    model.save_pretrained(tmp_path)
    loaded = LM.from_pretrained(tmp_path)
    assert loaded.config == config
    assert_near(loaded(tokens), model(tokens), 1e-5)
    model.gradient_checkpointing = True
    plain_grads = grads_of(loaded, loaded(tokens).square().mean())
    assert_near(grads_of(model, model(tokens).square().mean()), plain_grads, 1e-5)


def test_two_runs_are_the_same_bits():  # trap 34
    for name in ("groups", "mimo"):
        model = make(name, torch.float32)
        x = torch.randn(2, 300, 8)
        runs = [(model(x), grads_of(model, model(x).square().sum())) for _ in range(2)]
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])


@heads
def test_state_of_something_else(name):  # trap 35
    model = make(name, torch.float32)
    x = torch.randn(2, 5, 8)
    state = model.init_state(2)
    with pytest.raises(ShapeError, match=r"layer 0's state: \w+ must be \(2, "):
        model.prefill(x, model.init_state(3))
    with pytest.raises(ShapeError, match=r"must be torch.float32 on cpu, got torch.float64"):
        model.prefill(x, state.to(dtype=torch.float64))
    other = make("siso" if isinstance(model, Mamba2) else "mamba2", torch.float32)
    with pytest.raises(ShapeError, match=r"must be of kind Mamba\dState, got Mamba\dState"):
        model.step(x[:, 0], other.init_state(2))
    with pytest.raises(ShapeError, match="the state is not one of a model with 2 layers"):
        model.prefill(x, dataclasses.replace(state, layers=state.layers[:1]))


def test_initialisation_of_mamba2():  # traps 52, 54, 55
    torch.manual_seed(1)
    config = Mamba2Config(d_model=256, n_layers=4, d_head=8, dt_min=2e-3, dt_max=0.05)
    for make_model in (Mamba2, lambda c: LM(c, vocab_size=300).backbone):
        rates, steps = [], []
        for layer in make_model(config).layers:
            mixer = layer.mixer
            rates.append(mixer.A_log.exp())
            steps.append(F.softplus(mixer.dt_bias))
            assert torch.equal(mixer.D, torch.ones(64))
            assert torch.equal(mixer.norm.weight, torch.ones(512))
            bound = 512**-0.5 / math.sqrt(4)
            assert 0.98 * bound < float(mixer.out_proj.weight.detach().abs().max()) <= bound
        A, dt = torch.cat(rates).detach(), torch.cat(steps).detach()
        assert A.min() >= 1
        assert A.max() <= 16
        assert abs(float(A.mean()) - 8.5) < 1  # uniform, not 1, 2, 3, ...
        assert dt.min() >= 2e-3 * 0.999
        assert dt.max() <= 0.05 * 1.001
        low, high = math.log(2e-3), math.log(0.05)
        assert abs(float(dt.log().mean()) - (low + high) / 2) < 0.15 * (high - low)


def test_initialisation_of_mamba3():
    torch.manual_seed(1)
    model = Mamba3(Mamba3Config(d_model=64, n_layers=2, d_head=8, mimo_rank=4, d_intermediate=100))
    for layer in model.layers:
        mixer = layer.mixer
        for T in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.mimo_z, mixer.B_norm.weight):
            assert torch.equal(T, torch.ones_like(T))
        for T in (mixer.mimo_x, mixer.mimo_o):
            assert torch.equal(T, torch.full((16, 4, 8), 0.25))
        assert layer.mlp.fc1.weight.shape == (256, 64)  # 100 rounded up to 128, twice
        for weight, inner in ((mixer.out_proj.weight, 128), (layer.mlp.fc2.weight, 128)):
            bound = inner**-0.5 / math.sqrt(2 * 2)
            assert 0.98 * bound < float(weight.detach().abs().max()) <= bound


def test_heavy_tail():
    x = torch.tensor([-1e4, -1.0, -1e-3, 0.0, 1.0, 50.0], dtype=torch.float64, requires_grad=True)
    y = heavy_tail(x)
    assert torch.allclose(y, torch.tensor([1 / 10001, 0.5, 1 / 1.001, 1, 2, 51]).double())
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = [1 / 10001**2, 0.25, 1 / 1.001**2, 1, 1, 1]
    assert torch.allclose(slope, torch.tensor(expected).double())


def test_published_parameter_counts():
    def count(config):
        with torch.device("meta"):
            model = LM(config, 128256, pad_vocab_size_multiple=16)
        return sum(P.numel() for P in model.parameters())

    siso = Mamba3Config(d_model=768, n_layers=12, d_intermediate=1500)
    assert count(siso) == 186_849_600
    mimo = Mamba3Config(d_model=768, n_layers=12, d_intermediate=1264, mimo_rank=4)
    assert count(mimo) == 187_291_968
    with torch.device("meta"):
        mamba2 = LM(Mamba2Config(d_model=768, n_layers=24), 50277, pad_vocab_size_multiple=16)
    assert sum(P.numel() for P in mamba2.parameters()) == 128_989_632


@each
def test_states_are_values(name, tmp_path):  # traps 34, 35, 36, 38
    """Reordered, repeated, chosen, saved and loaded, a state gives what its rows give; no call
    changes it."""
    model = make(name)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    _, state = model.prefill(x[:, :6], mask=mask)
    before = state.clone()
    y, after = model.prefill(x[:, 6:], state)
    model.step(x[:, 6], state)
    assert_near(state.tensors(), before.tensors(), 0)
    order = torch.tensor([2, 0, 0, 1])
    beams, _ = model.prefill(x[order, 6:], state.reorder(order))
    assert_near(beams, y[order], 1e-12)
    twice, _ = model.prefill(x.repeat_interleave(2, 0)[:, 6:], state.repeat(2))
    assert_near(twice, y.repeat_interleave(2, 0), 1e-12)
    one, last = model.prefill(x[1:2, 6:], state[1])
    assert_near(one, y[1:2], 1e-12)
    assert_near(plain(last), plain(after[1]), 1e-12)
    state.save(tmp_path / "state.safetensors")
    loaded = type(state).load(tmp_path / "state.safetensors")
    assert torch.equal(model.prefill(x[:, 6:], loaded)[0], y)


@each
def test_gaps_through_a_language_model(name):
    torch.manual_seed(0)
    lm = LM(VARIANTS[name], 11).double().eval()
    tokens, dt_scale = torch.randint(11, (2, 8)), 3 * torch.rand(2, 8).double()
    logits = lm(tokens, dt_scale=dt_scale)
    assert not torch.allclose(logits, lm(tokens), rtol=1e-3)
    y, state = lm.prefill(tokens[:, :5], dt_scale=dt_scale[:, :5])
    y2, state = lm.prefill(tokens[:, 5:7], state, dt_scale=dt_scale[:, 5:7])
    with torch.no_grad():
        # A step of even gaps is one launch; of others it must not be.
        y3, _ = lm.step(tokens[:, 7], state, dt_scale=dt_scale[:, 7])
    assert_near(torch.cat((y, y2, y3[:, None]), dim=1), logits, 1e-11)
