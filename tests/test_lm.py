import pytest
import torch
import torch.nn.functional as F

from mambapy.errors import ConfigError, ShapeError
from mambapy.lm import LM, MambaLM
from tests.helpers import assert_near, tiny


def make(**options) -> LM:
    torch.manual_seed(0)
    return LM(tiny(), 21, **options)


def test_vocabulary_is_padded_inside_only():  # trap 57
    model = make(pad_vocab_size_multiple=8)
    assert model.embedding.weight.shape == (24, 8)
    assert model.lm_head.weight is model.embedding.weight
    tokens = torch.randint(21, (2, 5))
    assert model(tokens).shape == (2, 5, 21)
    with torch.no_grad():
        model.embedding.weight[21:] = 1e4  # would win every argmax, could it be seen
    new = list(model.generate_stream(Letters(), "abc", num_tokens=20, sample=False))
    assert all(ord(c) - 97 < 21 for c in "".join(new))


class Letters:
    """A tokenizer with transformers' call interface, of a vocabulary that needs padding."""

    eos_token_id = None

    def __call__(self, text):
        return {"input_ids": [ord(c) - 97 for c in text]}

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def __len__(self):
        return 21


def test_tied_and_untied():  # trap 58
    tied, untied = make(), make(tie_embeddings=False)
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in dict(untied.named_parameters())
    tied.double()
    assert tied.lm_head.weight is tied.embedding.weight
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    untied(tokens).square().sum().backward()
    # Token 0 is <|endoftext|> in GPT-NeoX; it must learn like any other.
    assert float(untied.embedding.weight.grad[0].abs().max()) > 0


def test_whole_is_chunks_is_steps():
    model = make()
    tokens = torch.randint(21, (2, 9))
    whole = model(tokens)
    first, state = model.prefill(tokens[:, :4])
    second, state = model.prefill(tokens[:, 4:8], state)
    last, _ = model.step(tokens[:, 8], state)
    assert_near(torch.cat((first, second, last[:, None]), dim=1), whole, 1e-5)


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("rows", [1, 3])
def test_padding_on_any_side(side, rows):  # traps 23, 26, 64
    model = make()
    mask = torch.ones(rows, 10, dtype=torch.bool)
    for row in range(rows):
        if side != "right":
            mask[row, : row + 1] = False
        if side != "left":
            mask[row, 10 - row - 2 :] = False
    tokens = torch.where(mask, torch.randint(21, (rows, 10)), 999)  # padding may hold anything
    logits = model(tokens, mask=mask)
    kept, state = model.prefill(tokens, mask=mask, logits_to_keep=2)
    next_token = torch.randint(21, (rows,))
    stepped, _ = model.step(next_token, state)
    for row in range(rows):
        alone = tokens[row : row + 1, mask[row]]
        expected, expected_state = model.prefill(alone)
        assert_near(logits[row, mask[row]], expected[0], 1e-5)
        assert_near(kept[row], expected[0, -2:], 1e-5)
        after, _ = model.step(next_token[row : row + 1], expected_state)
        assert_near(stepped[row], after[0], 1e-5)


def test_logits_to_keep():
    model = make()
    tokens = torch.randint(21, (2, 6))
    whole = model(tokens)
    for n in (1, 2, 6):
        kept, _ = model.prefill(tokens, logits_to_keep=n)
        assert_near(kept, whole[:, -n:], 1e-6)
    # A row shorter than n repeats its first.
    mask = torch.tensor([[True] + [False] * 5, [True] * 6])
    kept, _ = model.prefill(tokens, mask=mask, logits_to_keep=3)
    assert torch.equal(kept[0, 0], kept[0, 2])
    with pytest.raises(ShapeError, match="logits_to_keep=7"):
        model.prefill(tokens, logits_to_keep=7)


def test_packed_documents():
    model = make()
    tokens = torch.randint(21, (1, 9))
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])
    logits = model(tokens, seq_idx=seq_idx)
    for document in range(3):
        chosen = seq_idx[0] == document
        assert_near(logits[:, chosen], model(tokens[:, chosen]), 1e-5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[1, 21]]), "got 1 to 21"),
        (torch.tensor([[-1, 2]]), "got -1 to 2"),
        (torch.tensor([1, 2]), "must be"),
        ([[1, 2]], "must be a tensor"),
        (torch.zeros(2, 0, dtype=torch.int64), "not empty"),
        (torch.zeros(2, 3), "int64"),
    ],
)
def test_bad_tokens(tokens, words):
    model = make()
    with pytest.raises(ShapeError, match=words):
        model(tokens)
    with pytest.raises(ShapeError, match=words):
        model.prefill(tokens)


def test_padding_by_document_number_may_hold_anything():
    model = make()
    tokens, seq_idx = torch.tensor([[1, -100, 2]]), torch.tensor([[0, -1, 0]])
    assert_near(model(tokens, seq_idx=seq_idx)[:, [0, 2]], model(tokens[:, [0, 2]]), 1e-6)


def test_per_sample_gradients_by_vmap():
    model = make()
    names = dict(model.named_parameters())
    tokens = torch.randint(21, (3, 5))

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(names, tokens)
    for i in range(3):
        expected = torch.autograd.grad(loss(names, tokens[i]), list(names.values()))
        for got, want in zip(grads.values(), expected, strict=True):
            assert_near(got[i], want, 1e-5)


def test_bad_steps_and_keywords():
    model = make()
    with pytest.raises(ShapeError, match="got 21 to 21"):
        model.step(torch.tensor([21]), model.init_state(1))
    with pytest.raises(ShapeError, match=r"conv must be \(2"):
        model.step(torch.tensor([1, 2]), model.init_state(1))
    with pytest.raises(TypeError, match="totally_bogus"):  # trap 60
        model(torch.tensor([[1]]), totally_bogus=1)
    for bad in (0, 2.5, True):
        with pytest.raises(ConfigError, match="vocab_size"):
            LM(tiny(), bad)


def test_bfloat16_parameters_and_autocast():  # trap 13
    """Both train finitely; autocast over float32 parameters follows float32 more closely."""
    tokens = torch.randint(21, (8, 33))

    def losses(cast, autocast):
        model = make().to(cast)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        found = []
        for _ in range(100):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), tokens[:, 1:].flatten()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        return torch.tensor(found)

    exact = losses(torch.float32, False)
    mixed, low = losses(torch.float32, True), losses(torch.bfloat16, False)
    assert torch.isfinite(low).all()
    assert float((mixed - exact).abs().max()) < 0.02 * float(exact[0])
    assert float((mixed - exact).abs().mean()) < float((low - exact).abs().mean())


def test_a_stays_negative_after_violent_steps():  # trap 16
    model = make()
    optimiser = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(5):
        model(torch.randint(21, (2, 9))).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    for layer in model.backbone.layers:
        A = layer.mixer._A()
        assert (A < 0).all()
        assert torch.isfinite(A).all()


def test_alias():
    assert MambaLM is LM


def by_hand(model, tokens, targets):
    """The loss from the logits of all positions."""
    logits = model(tokens).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_multiple", [1, 8])
def test_loss_is_that_of_the_logits(tied, vocab_multiple):
    model = make(tie_embeddings=tied, pad_vocab_size_multiple=vocab_multiple).double()
    tokens = torch.randint(21, (2, 6))
    targets = torch.randint(21, (2, 6))
    targets[0, 1] = -100
    parameters = list(model.parameters())
    found, expected = model.loss(tokens, targets), by_hand(model, tokens, targets)
    assert_near(found, expected, 1e-12)
    pairs = zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for got, want in pairs:
        assert_near(got, want, 1e-11)


def test_loss_predicts_the_next_token_of_the_same_document():
    model = make().double()
    tokens = torch.randint(21, (2, 6))
    nothing = torch.full((2, 1), -100)
    shifted = torch.cat((tokens[:, 1:], nothing), dim=1)
    assert_near(model.loss(tokens), by_hand(model, tokens, shifted), 1e-12)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
    logits = model(tokens, mask=mask)
    # In the second row, the third token is padding between two real ones.
    aims = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 4)]
    parts = [F.cross_entropy(logits[b, t], tokens[b, t + 1]) for b, t in aims]
    assert_near(model.loss(tokens, mask=mask), torch.stack(parts).mean(), 1e-12)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2]])
    logits = model(tokens, seq_idx=seq_idx)
    aims = [(0, 0), (0, 1), (0, 3), *((1, t) for t in range(5))]
    parts = [F.cross_entropy(logits[b, t], tokens[b, t + 1]) for b, t in aims]
    assert_near(model.loss(tokens, seq_idx=seq_idx), torch.stack(parts).mean(), 1e-12)


def test_loss_calls_a_head_that_is_not_plain():
    model = make()
    tokens, seen = torch.randint(21, (2, 6)), []
    expected = model.loss(tokens)
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    assert_near(model.loss(tokens), expected, 1e-6)
    assert seen


def test_loss_in_pieces_of_a_sequence():
    model = make().double()
    tokens, targets = torch.randint(21, (2, 7)), torch.randint(21, (2, 7))
    first, state = model.prefill_hidden(tokens[:, :3])
    second, _ = model.prefill_hidden(tokens[:, 3:], state)
    parts = (
        model.loss_from(hidden, part, "sum")
        for hidden, part in ((first, targets[:, :3]), (second, targets[:, 3:]))
    )
    assert_near(sum(parts) / 14, model.loss(tokens, targets), 1e-12)
