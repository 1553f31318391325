import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mambapy import generation
from mambapy.errors import ConfigError, DataError, ShapeError
from mambapy.generation import generate_tokens, sample_token
from mambapy.lm import LM
from mambapy.sampling import Choice
from mambapy.tokenizer import ByteTokenizer
from tests.helpers import tiny

PROMPTS = ["Mamba is", "ü", "a longer prompt than the others"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LM(tiny(d_model=16), 257)
    with torch.no_grad():
        # Away from the start, where a tied model mostly repeats its input.
        for P in model.parameters():
            P.add_(0.3 * torch.randn_like(P))
    return model


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


class Scripted:
    """A model that says a given text, whatever it reads."""

    vocab_size = 257

    def __init__(self, ids):
        self.ids = ids

    def logits(self, i):
        logits = torch.zeros(1, 257)
        logits[0, self.ids[min(i, len(self.ids) - 1)]] = 50.0
        return logits

    def prefill(self, tokens, state=None, *, mask=None, logits_to_keep=0):
        return self.logits(0)[:, None], 1

    def step(self, token, state):
        return self.logits(state), state + 1


def recomputed(model, ids, n):
    """Greedy continuation with the whole sequence computed again for every token."""
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def test_greedy_equals_full_recomputation(model):
    ids = torch.randint(256, (2, 3))
    found = generate_tokens(model, ids, num_tokens=20, sample=False)
    assert torch.equal(found, recomputed(model, ids, 20)[:, 3:])


@pytest.mark.parametrize("sample", [True, False])
def test_ragged_prompts_give_what_each_gives_alone(model, tokenizer, sample):
    options = {"num_tokens": 15, "sample": sample}
    together = model.generate(tokenizer, PROMPTS, seed=7, **options)
    alone = [model.generate(tokenizer, p, seed=7 + i, **options) for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS, strict=True))


def test_seed_and_batch_size(model, tokenizer):
    texts = model.generate(tokenizer, "abc", num_tokens=15, batch_size=3, seed=1)
    assert texts == model.generate(tokenizer, "abc", num_tokens=15, batch_size=3, seed=1)
    assert len(set(texts)) == 3
    assert texts[0] == model.generate(tokenizer, "abc", num_tokens=15, seed=1)
    before = torch.random.get_rng_state()
    model.generate(tokenizer, "abc", num_tokens=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stream_is_generate(model, tokenizer):
    for prompt in PROMPTS:
        whole = model.generate(tokenizer, prompt, num_tokens=30, seed=5)
        pieces = list(model.generate_stream(tokenizer, prompt, num_tokens=30, seed=5))
        assert prompt + "".join(pieces) == whole
        assert len(pieces) > 3


def test_stream_holds_back_half_characters(tokenizer):
    ids = list("aé€😀b".encode())
    pieces = list(
        LM.generate_stream(Scripted(ids), tokenizer, "x", num_tokens=len(ids), sample=False)
    )
    assert pieces == ["a", "é", "€", "😀", "b"]


@pytest.mark.parametrize("stop", ["END", ["nothing", "END"], ["END!", "END"]])
def test_stop_strings(tokenizer, stop):
    script = Scripted(list(b"one EN two END! three"))
    assert LM.generate(script, tokenizer, "x", stop=stop, sample=False) == "xone EN two "
    pieces = list(LM.generate_stream(script, tokenizer, "x", stop=stop, sample=False))
    assert "".join(pieces) == "one EN two "


def test_end_of_text_per_row(tokenizer):
    assert LM.generate(Scripted([65, 66, 256, 67]), tokenizer, "x", sample=False) == "xAB"

    class Two(Scripted):
        def logits(self, i):
            rows = torch.zeros(2, 257)
            rows[0, 256 if i >= 1 else 65] = 50.0
            rows[1, 256 if i >= 3 else 66] = 50.0
            return rows

    ids = torch.zeros(2, 1, dtype=torch.int64)
    found = generate_tokens(Two([]), ids, num_tokens=9, eos=256)
    assert found.tolist() == [[65, 256, 256, 256], [66, 66, 66, 256]]
    assert LM.generate(Two([]), tokenizer, ["x", "y"]) == ["xA", "yBBB"]


@pytest.mark.parametrize("sample", [True, False])
def test_what_a_gpu_computes_ahead_is_not_seen(model, tokenizer, monkeypatch, sample):
    eos = int(generate_tokens(model, torch.tensor([[97, 98]]), sample=sample, seed=2)[0, 20])
    ids, options = torch.tensor([[97, 98]]), {"sample": sample, "seed": 2, "eos": eos}
    texts = {"stop": "\n", "num_tokens": 60, "sample": sample, "seed": 3}

    def results():
        pieces = list(model.generate_stream(tokenizer, "abc", **texts))
        return (
            generate_tokens(model, ids, **options),
            model.generate(tokenizer, "abc", **texts),
            pieces,
        )

    now = results()
    monkeypatch.setattr(generation, "most_ahead", lambda device: 3)
    later = results()
    assert torch.equal(now[0], later[0])
    assert now[1:] == later[1:]
    assert now[0].shape[1] <= 21


def test_sampling_filters():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    noise = torch.linspace(0, 1, 4001)[:-1]

    def shares(**options):
        counts = torch.bincount(sample_token(logits, noise, **options), minlength=4)
        return (counts / 4000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    assert shares(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=2e-3)
    assert shares(top_p=0.81) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=2e-3)
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    cold = [0.25, 0.09, 0.0225, 0.0025]
    assert shares(temperature=0.5) == pytest.approx([c / sum(cold) for c in cold], abs=2e-3)
    assert shares(top_k=99)[3] > 0


def test_a_choice():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 1], [0, 1, 4]])
    last = torch.tensor([2, 1, 0])
    assert Choice(sample=False)(logits, None, last).tolist() == [1, 0, 2]
    assert Choice(sample=False, eos=2)(logits, None, last).tolist() == [2, 0, 2]
    assert Choice(sample=False, eos=2)(logits, None, None).tolist() == [1, 0, 2]
    choice, noise = Choice(top_k=2, eos=0), torch.tensor([0.0, 0.99, 0.99])
    assert choice(logits, noise, last).tolist() == [1, 2, 0]
    assert choice == Choice(top_k=2, eos=0)
    assert hash(choice) == hash(Choice(top_k=2, eos=0))
    assert choice != Choice(top_k=2, eos=0, temperature=0.5)
    assert Choice(temperature=0).greedy


def test_temperature_zero_is_greedy(model, tokenizer):  # trap 61
    greedy = model.generate(tokenizer, "abc", sample=False)
    assert model.generate(tokenizer, "abc", temperature=0) == greedy
    assert model.generate(tokenizer, "abc", top_k=1, seed=3) == greedy


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model, tokenizer, training):  # trap 61
    model.train(training)
    model.generate(tokenizer, "abc", num_tokens=2)
    assert model.training is training
    stream = model.generate_stream(tokenizer, "abc", num_tokens=5)
    next(stream)
    stream.close()
    assert model.training is training


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"batch_size": 0},
        {"stop": ""},
        {"num_tokens": 2.5},
        {"top_k": 2.5},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_options(model, tokenizer, options):
    with pytest.raises(ConfigError, match=next(iter(options)).replace("stop", "empty stop")):
        model.generate(tokenizer, "abc", **options)


def test_bad_prompts(model, tokenizer):
    with pytest.raises(DataError, match="the prompt is empty"):
        model.generate(tokenizer, "")
    with pytest.raises(DataError, match="must be a text"):
        model.generate(tokenizer, [3])
    for nothing in ([], None):
        with pytest.raises(DataError, match="the prompt is empty"):
            model.generate(tokenizer, nothing)
    with pytest.raises(ConfigError, match=r"stop=\[1\]"):
        model.generate(tokenizer, "abc", stop=[1])
    with pytest.raises(DataError, match="trained with another tokenizer"):
        LM(tiny(), 20).generate(tokenizer, "abc")
    with pytest.raises(TypeError, match="topk"):
        model.generate(tokenizer, "abc", topk=3)
    mask = torch.tensor([[True], [False]])
    with pytest.raises(ShapeError, match="every row of mask"):
        generate_tokens(model, torch.zeros(2, 1, dtype=torch.int64), mask=mask)


def test_a_transformers_tokenizer(model):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "mamba": 1, "is": 2, "a": 3, "snake": 4, "<eos>": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    small = LM(tiny(), len(tokenizer))
    text = small.generate(tokenizer, "mamba is a", num_tokens=5, seed=0)
    assert text.startswith("mamba is a")
    assert (
        "".join(small.generate_stream(tokenizer, "mamba is a", num_tokens=5, seed=0)) == text[10:]
    )


@pytest.mark.slow
def test_a_token_costs_the_same_after_a_long_prefix():
    """Counted in operator calls, which unlike seconds are the same on every run."""
    model = LM(tiny(), 257)

    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shape = tuple(result.shape) if isinstance(result, torch.Tensor) else None
            self.seen.append((str(function), shape))
            return result

    def calls(prefix):
        _, state = model.prefill(torch.zeros(1, prefix, dtype=torch.int64))
        with Calls() as mode:
            model.step(torch.tensor([1]), state)
        assert len(mode.seen) > 20
        return mode.seen

    assert calls(4096) == calls(16)


def test_a_stream_leaves_its_reader_alone(model):
    ids = torch.randint(256, (1, 3))
    model.train()
    frozen = model.backbone.layers[0]
    frozen.eval()
    stream = generation.stream_tokens(model, ids, num_tokens=3)
    other = generation.stream_tokens(model, ids, num_tokens=3)
    for _ in zip(stream, other, strict=True):
        assert torch.is_grad_enabled()
        assert model.training
        assert not frozen.training
        model.loss(ids).backward()
    model.zero_grad()
    with torch.no_grad():
        begun = generation.stream_tokens(model, ids, num_tokens=3)
        next(begun)
    begun.close()
    assert torch.is_grad_enabled()
    model.eval()
