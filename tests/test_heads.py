"""Heads and series: what is beside a row, or in its padding, changes no answer of that row."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambapy.errors import ConfigError, ShapeError
from mambapy.heads import (
    POOLINGS,
    Regressor,
    SequenceClassifier,
    SeriesModel,
    TokenClassifier,
    pool,
)
from mambapy.hybrid import Hybrid
from mambapy.lm import LM, HybridConfig, Mamba2Config, Mamba3Config, MambaConfig
from mambapy.mamba import Mamba
from mambapy.mamba2 import Mamba2
from mambapy.mamba3 import Mamba3
from mambapy.optim import make_optimizer
from tests.helpers import assert_near

BASE = {"d_model": 8, "n_layers": 2, "d_state": 4}
MAMBA = MambaConfig(**BASE)
MAMBA2 = Mamba2Config(**BASE, d_head=4, n_groups=2, chunk_size=3)
MAMBA3 = Mamba3Config(**BASE, d_head=4, mimo_rank=2, chunk_size=2)
HEADS = {"d_head": 4, "d_state": 4}
ATTENTION = {"n_heads": 2, "rotary_dim": 4, "d_conv": 3}
HYBRID = HybridConfig(
    d_model=8,
    layers=("attention+mlp", "mamba", "mamba2"),
    d_intermediate=5,
    attention=ATTENTION,
    mamba={"d_state": 4},
    mamba2=HEADS,
)
ENDS_IN_ATTENTION = HybridConfig(
    d_model=8, layers=("mamba3", "attention"), attention=ATTENTION, mamba3=HEADS
)
VOCAB = 11
CORES = {
    "lm mamba": lambda: LM(MAMBA, VOCAB),
    "lm mamba2": lambda: LM(MAMBA2, VOCAB, tie_embeddings=False),
    "lm mamba3": lambda: LM(MAMBA3, VOCAB),
    "lm hybrid": lambda: LM(HYBRID, VOCAB),
    "series mamba": lambda: SeriesModel(MAMBA, 3),
    "series mamba2": lambda: SeriesModel(MAMBA2),
    "series mamba3": lambda: SeriesModel(Mamba3(MAMBA3), 1),
    "series hybrid": lambda: SeriesModel(HYBRID, 3),
    "stack mamba": lambda: Mamba(MAMBA),
    "stack mamba2": lambda: Mamba2(MAMBA2),
    "stack mamba3": lambda: Mamba3(MAMBA3),
    "stack hybrid": lambda: Hybrid(HYBRID),
}
each = pytest.mark.parametrize("name", [*CORES])
series = pytest.mark.parametrize("name", [n for n in CORES if n.startswith("series")])
poolings = pytest.mark.parametrize("pooling", POOLINGS)
# Real tokens on the left, on the right, at both ends, in between, everywhere, and only one.
MASK = torch.tensor(
    [
        [mark == "x" for mark in row]
        for row in ["xxxx....", "..xxxxxx", "xx...xx.", ".x.xx.x.", "xxxxxxxx", ".....x.."]
    ]
)
GAPS = 3 * torch.rand(MASK.shape, generator=torch.Generator().manual_seed(5)).double()


def away(model):
    """The model in float64, its parameters away from their special initial values."""
    model.double()
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))
    return model


def draw(model, *shape):
    """What the model's core reads: tokens, or numbers."""
    if isinstance(model.core, LM):
        return torch.randint(VOCAB, shape)
    layer = model.core.in_proj
    return torch.randn(*shape, 8 if layer is None else layer.in_features).double()


def spoil(x, padding):
    """x with anything at the padding: invalid tokens, or numbers that are none."""
    if x.is_floating_point():
        return torch.where(padding[..., None], math.nan, x)
    return torch.where(padding, torch.tensor([-7, 999, 3])[torch.arange(x.shape[1]) % 3], x)


def alone(x, row, mask=MASK):
    """One row's real tokens as a batch of one."""
    return x[row : row + 1, mask[row]]


def grads_of(model, loss):
    """Gradients by name; zeros for what the loss does not depend on."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {name: torch.zeros_like(P) if g is None else g for (name, P), g in pairs}


@each
@poolings
def test_a_row_answers_as_if_alone(name, pooling):  # trap 64: left padding; traps 9, 23 to 27
    model = away(SequenceClassifier(CORES[name](), 5, pooling))
    clean, weight = draw(model, *MASK.shape), torch.randn(len(MASK), 5).double()
    gaps = GAPS if name.startswith("series") else None
    answers = model(spoil(clean, ~MASK), mask=MASK, dt_scale=gaps)
    parts = [
        model(alone(clean, row), dt_scale=None if gaps is None else alone(gaps, row))
        for row in range(len(MASK))
    ]
    assert answers.shape == (len(MASK), 5)
    assert_near(answers, torch.cat(parts), 1e-11)
    assert_near(model(clean, mask=MASK, dt_scale=gaps), answers, 1e-12)
    found = grads_of(model, (answers * weight).sum())
    assert_near(found, grads_of(model, (torch.cat(parts) * weight).sum()), 1e-10)
    # Nothing is a coincidence of an answer that is the same everywhere.
    assert (answers.std(dim=0) > 1e-4).all()


@poolings
def test_gradients_of_numbers(pooling):
    """Those of padding are zero, whatever stands there."""
    model = away(Regressor(SeriesModel(MAMBA2, 3), 2, pooling))
    clean = draw(model, *MASK.shape)
    x = spoil(clean, ~MASK).requires_grad_()
    (found,) = torch.autograd.grad(model(x, mask=MASK).square().sum(), x)
    assert torch.equal(found[~MASK], torch.zeros_like(found[~MASK]))
    for row in range(len(MASK)):
        x = alone(clean, row).requires_grad_()
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
        assert_near(found[row, MASK[row]], expected[0], 1e-10)


@each
@poolings
def test_the_answer_is_linear_in_what_is_pooled(name, pooling):
    model = away(SequenceClassifier(CORES[name](), 5, pooling))
    x = draw(model, 2, 7)
    features, state = model.core.prefill_hidden(x)
    assert_near(model.core.hidden(x), features, 1e-11)
    pooled = {
        "last": features[:, 6],
        "mean": features.sum(dim=1) / 7,
        "max": features.max(dim=1).values,
        "state": state.layers[-1].ssm.reshape(2, -1),
    }[pooling]
    assert_near(model(x), F.linear(pooled, model.head.weight, model.head.bias), 1e-11)
    everywhere = torch.ones(2, 7, dtype=torch.bool)
    assert_near(model(x, mask=everywhere), model(x), 1e-12)


def test_pool_by_hand():  # trap 64
    y = torch.tensor([[1.0, -5, 3, 9], [-4, -2, -3, 7]])[..., None]
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    for pooling, expected in {"last": (3, -3), "mean": (-1 / 3, -2.5), "max": (3, -2)}.items():
        assert torch.equal(pool(y, mask, pooling), torch.tensor(expected).view(2, 1).float())
    for pooling, expected in {"last": (9, 7), "mean": (2, -0.5), "max": (9, 7)}.items():
        assert torch.equal(pool(y, None, pooling), torch.tensor(expected).view(2, 1).float())


@each
def test_token_classifier_beside_padding_and_documents(name):  # traps 7, 31
    model = away(TokenClassifier(CORES[name](), 4))
    clean = draw(model, 2, 9)
    seq_idx = torch.tensor([[0, 0, 0, -1, 1, 1, -1, 2, 2], [-1, 4, 4, 4, 4, 7, 7, 7, 7]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3] = False
    real = mask & (seq_idx >= 0)
    x, gaps = spoil(clean, ~real), 3 * torch.rand(2, 9).double()
    weight = torch.randn(2, 9, 4).double()
    logits = model(x, mask=mask, seq_idx=seq_idx, dt_scale=gaps)
    assert logits.shape == (2, 9, 4)
    loss = 0.0
    for row, document in ((0, 0), (0, 1), (0, 2), (1, 4), (1, 7)):
        chosen = (real[row] & (seq_idx[row] == document)).nonzero()[:, 0]
        own = model(clean[row, chosen][None], dt_scale=gaps[row, chosen][None])
        assert_near(logits[row, chosen], own[0], 1e-11)
        loss = loss + (own[0] * weight[row, chosen]).sum()
    found = grads_of(model, (logits[real] * weight[real]).sum())
    assert_near(found, grads_of(model, loss), 1e-10)
    # Documents, not one long row.
    assert not torch.allclose(model(clean, dt_scale=gaps)[0, 7], logits[0, 7], rtol=1e-3)


@each
def test_gaps_pass_through(name):
    tokens = away(TokenClassifier(CORES[name](), 4))
    x, ones = draw(tokens, 2, 8), torch.ones(2, 8).double()
    for model in (
        tokens,
        away(Regressor(CORES[name]())),
        away(Regressor(CORES[name](), 1, "state")),
    ):
        assert_near(model(x, dt_scale=ones), model(x), 1e-12)
        changed = model(x, dt_scale=GAPS[:2]) - model(x)
        assert (changed.flatten(1).abs().amax(dim=1) > 1e-6).all()


@series
@pytest.mark.parametrize("gaps", [False, True])
def test_series_whole_is_chunks_is_steps(name, gaps):  # traps 6, 21, 22
    model = away(CORES[name]())
    d = 8 if model.in_proj is None else model.in_proj.in_features
    x, options = torch.randn(2, 8, d).double(), {"dt_scale": GAPS[:2]} if gaps else {}
    whole = model(x, **options)
    assert whole.shape == (2, 8, 8)
    state, ys = None, []
    for part in (slice(0, 1), slice(1, 4), slice(4, 8)):
        now = {key: T[:, part] for key, T in options.items()}
        y, state = model.prefill(x[:, part], state, **now)
        ys.append(y)
    assert_near(torch.cat(ys, dim=1), whole, 1e-11)
    stepped, ys = model.init_state(2), []
    for t in range(8):
        y, stepped = model.step(x[:, t], stepped, **{key: T[:, t] for key, T in options.items()})
        ys.append(y)
    assert_near(torch.stack(ys, dim=1), whole, 1e-11)
    after = [model.step(x[:, 0], s)[0] for s in (state, stepped)]
    assert_near(after[0], after[1], 1e-11)
    # Padding, with anything in it, between two chunks.
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    spoilt = spoil(x[:, :4], ~mask)
    _, state = model.prefill(spoilt, state, mask=mask)
    y, _ = model.step(x[:, 5], state)
    for row in range(2):
        parts = torch.cat((x[row], x[row, :4][mask[row]], x[row, 5:6]))[None]
        times = torch.ones(1, parts.shape[1]).double()
        if gaps:
            times[:, :8] = GAPS[row]
        assert_near(y[row], model(parts, dt_scale=times)[0, -1], 1e-11)


@pytest.mark.parametrize("name", ["stack mamba", "stack hybrid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_series_is_where_its_stack_is(name, dtype):
    stack = CORES[name]().to(dtype)
    model = SequenceClassifier(SeriesModel(stack, 3), 2)
    assert {P.dtype for n, P in model.named_parameters() if "backbone" not in n} == {dtype}
    assert model(torch.randn(2, 5, 3, dtype=dtype)).dtype == dtype
    bare = SequenceClassifier(stack, 2)
    assert bare(torch.randn(2, 5, 8, dtype=dtype)).dtype == dtype
    with torch.device("meta"):
        stack = CORES[name]()
    assert all(P.is_meta for P in Regressor(SeriesModel(stack, 3)).parameters())


@pytest.mark.parametrize("name", [n for n in CORES if n.startswith("lm")])
def test_a_pretrained_language_model_as_core(name, tmp_path):
    lm = away(CORES[name]()).eval()
    lm.save_pretrained(tmp_path)
    model = SequenceClassifier.from_pretrained(tmp_path, 5, pooling="mean")
    assert isinstance(model.core, LM)
    assert model.pooling == "mean"
    expected = lm.state_dict()
    assert model.core.state_dict().keys() == expected.keys()
    for key, T in model.core.state_dict().items():
        assert torch.equal(T, expected[key]), key
        assert T.dtype == expected[key].dtype
    assert (model.core.lm_head.weight is model.core.embedding.weight) == lm.tie_embeddings
    tokens = torch.randint(VOCAB, MASK.shape)
    features = lm.hidden(tokens, mask=MASK)
    assert torch.equal(model.core.hidden(tokens, mask=MASK), features)
    logits = lm.lm_head(features)[..., :VOCAB]
    assert_near(lm(tokens, mask=MASK), torch.where(MASK[..., None], logits, 0), 1e-12)
    mean = features.sum(dim=1) / MASK.sum(dim=1, keepdim=True)
    assert_near(model(tokens, mask=MASK), model.head(mean), 1e-12)
    for kind in (Regressor, TokenClassifier):
        assert kind.from_pretrained(tmp_path, 2).head.weight.shape == (2, 8)


@poolings
def test_pretrained_in_bfloat16(pooling, tmp_path):  # trap 10
    lm = LM(MAMBA2, VOCAB)
    lm.save_pretrained(tmp_path)
    model = SequenceClassifier.from_pretrained(
        tmp_path, 5, dtype=torch.bfloat16, pooling=pooling, dropout=0.1
    ).eval()
    kept = {n.rpartition(".")[2] for n, P in model.named_parameters() if P.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.core.embedding.weight, lm.embedding.weight.bfloat16())
    tokens = torch.randint(VOCAB, MASK.shape)
    answers = model(tokens, mask=MASK)
    assert answers.dtype == torch.bfloat16
    exact = SequenceClassifier(lm, 5, pooling).eval()
    exact.head.load_state_dict(model.head.state_dict())
    assert_near(answers, exact(tokens, mask=MASK), 0.05)
    answers.float().square().mean().backward()
    assert all(P.grad is None or torch.isfinite(P.grad).all() for P in model.parameters())


@each
@pytest.mark.parametrize("kind", [Regressor, TokenClassifier])
def test_one_step_of_the_optimiser_lowers_the_loss(name, kind):
    model = kind(CORES[name](), 3)
    optimizer = make_optimizer(model, lr=1e-3)
    listed = [P for group in optimizer.param_groups for P in group["params"]]
    assert {id(P) for P in listed} == {id(P) for P in model.parameters()}
    assert len(listed) == len({id(P) for P in listed})
    assert any(P is model.head.weight for P in optimizer.param_groups[0]["params"])
    assert any(P is model.head.bias for P in optimizer.param_groups[1]["params"])
    x = draw(model, *MASK.shape)
    x = spoil(x.float() if x.is_floating_point() else x, ~MASK)
    labels, wanted = torch.randint(3, MASK.shape), torch.randn(len(MASK), 3)

    def loss():
        found = model(x, mask=MASK)
        if kind is Regressor:
            return F.mse_loss(found, wanted)
        return F.cross_entropy(found[MASK], labels[MASK])

    before = loss()
    before.backward()
    unused = {n for n, P in model.named_parameters() if P.grad is None}
    assert unused <= {"core.lm_head.weight"}
    optimizer.step()
    assert loss() < before


def test_a_wrapped_core():
    """As adapters wrap a model, and torch.compile does."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "model" else getattr(self.model, name)

    lm, tokens = LM(MAMBA, VOCAB), torch.randint(VOCAB, (2, 5))
    for pooling in POOLINGS:
        model = SequenceClassifier(Wrapper(lm), 2, pooling)
        plain = SequenceClassifier(lm, 2, pooling)
        plain.head.load_state_dict(model.head.state_dict())
        assert torch.equal(model(tokens), plain(tokens))


def test_dropout_is_for_training_alone():
    model = Regressor(SeriesModel(MAMBA, 1), 2, dropout=0.5)
    x = torch.randn(2, 5, 1)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


CONFIG_ERRORS = {
    "pooling='first' must be one of last, mean, max, state": lambda: SequenceClassifier(
        Mamba(MAMBA), 2, "first"
    ),
    "pooling=None must be one of": lambda: Regressor(Mamba(MAMBA), 2, None),
    "the number of outputs, 0, must be an integer >= 1": lambda: Regressor(Mamba(MAMBA), 0),
    "the number of outputs, 2.0, must be": lambda: TokenClassifier(Mamba(MAMBA), 2.0),
    "the number of outputs, True, must be": lambda: TokenClassifier(Mamba(MAMBA), True),
    "d_input=0 must be an integer >= 1": lambda: SeriesModel(MAMBA, 0),
    "d_input=True must be": lambda: SeriesModel(MAMBA, True),
    "d_input='3' must be": lambda: SeriesModel(MAMBA, "3"),
    "pooling='state' needs a recurrent mixer in the last block": lambda: Regressor(
        LM(ENDS_IN_ATTENTION, VOCAB), pooling="state"
    ),
    "core must be a stack or one of MambaConfig, .*, got dict": lambda: SeriesModel({"d_model": 8}),
    "core must be a stack or one of MambaConfig, .*, got LM": lambda: SeriesModel(LM(MAMBA, VOCAB)),
    "core must be an LM, a SeriesModel or a stack, got MambaConfig": lambda: Regressor(MAMBA),
    "core must be an LM, a SeriesModel or a stack, got Linear": lambda: TokenClassifier(
        nn.Linear(8, 8), 2
    ),
}


@pytest.mark.parametrize("message", [*CONFIG_ERRORS])
def test_models_that_cannot_be(message):
    with pytest.raises(ConfigError, match=message):
        CONFIG_ERRORS[message]()


def test_the_other_poolings_fit_a_hybrid_that_ends_in_attention():
    for pooling in ("last", "mean", "max"):
        model = away(SequenceClassifier(LM(ENDS_IN_ATTENTION, VOCAB), 2, pooling))
        x = draw(model, *MASK.shape)
        answers = model(spoil(x, ~MASK), mask=MASK)
        for row in range(len(MASK)):
            assert_near(answers[row], model(alone(x, row))[0], 1e-11)


@poolings
def test_bad_inputs(pooling):
    model = SequenceClassifier(SeriesModel(MAMBA, 3), 2, pooling)
    words = SequenceClassifier(LM(MAMBA, VOCAB), 2, pooling)
    x, mask = torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    empty = mask.clone()
    empty[1] = False
    shape = r"x must be \(b, l, d_input\) with d_input = 3, got"
    for call, message in (
        (lambda: model(x, mask=empty), "every row of mask needs at least one real token"),
        (lambda: words(torch.zeros(2, 4).long(), mask=empty), "every row of mask needs"),
        (lambda: model(x[..., :2]), rf"{shape} \(2, 4, 2\)"),
        (lambda: model(x[0, 0]), rf"{shape} \(3,\)"),
        (lambda: model(x[0]), rf"{shape} \(4, 3\)"),
        (lambda: model([[1.0, 2.0, 3.0]]), f"{shape} list"),
        (lambda: model(x.numpy()), f"{shape} ndarray"),
        (lambda: model(x.long()), r"x must be floating point, got torch.int64"),
        (lambda: model(x[:, :0]), "no size 0|not empty"),
        (lambda: model(x, mask=mask[:, :3]), r"mask must be bool \(b, l\) = \(2, 4\)"),
        (lambda: model(x, mask=mask[0]), r"mask must be bool \(b, l\) = \(2, 4\)"),
        (lambda: model(x, mask=mask.long()), r"mask must be bool \(b, l\) = \(2, 4\)"),
        (lambda: model(x, dt_scale=torch.ones(2, 3)), r"dt_scale must be a tensor \(2, 4\)"),
        (lambda: words(x), r"tokens must be \(b, l\), not empty, got \(2, 4, 3\)"),
        (lambda: words("text"), r"tokens must be a tensor \(b, l\), got str"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()


def test_bad_inputs_of_series():
    model, bare = SeriesModel(MAMBA, 3), SeriesModel(MAMBA)
    x = torch.randn(2, 4, 3)
    state = model.init_state(2)
    one = r"x must be \(b, d_input\) with d_input = 3, got"
    for call, message in (
        (lambda: model.prefill(x[..., :2]), r"x must be \(b, l, d_input\) with d_input = 3"),
        (lambda: model.step(x, state), rf"{one} \(2, 4, 3\)"),
        (lambda: model.step(x[:, 0, :2], state), rf"{one} \(2, 2\)"),
        (lambda: model.step([1.0], state), f"{one} list"),
        (lambda: bare(x), r"x must be \(b, l, d\) with d = 8 and no size 0, got \(2, 4, 3\)"),
        (lambda: bare(x.tolist()), r"x must be a tensor \(b, l, d\), got list"),
        (lambda: model.prefill(x, model.init_state(3)), "layer 0's state"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()
