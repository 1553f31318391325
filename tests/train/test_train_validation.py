import lzma
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional

from mambapy.config import MambaConfig
from mambapy.lm import LM
from mambapy.train import validation
from mambapy.train.validation import bits_per_byte, nats, xz_bits_per_byte

EOS = 20


@pytest.fixture
def model() -> LM:
    torch.manual_seed(0)
    return LM(MambaConfig(d_model=8, n_layers=2, d_state=4), EOS + 1)


def tokens_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, EOS, n).astype(np.uint16)


def test_one_segment_in_chunks_is_one_pass_over_the_text(
    model: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_SEGMENTS", 1)
    monkeypatch.setattr(validation, "_CHUNK", 7)
    tokens = tokens_of(100)
    stream = torch.from_numpy(np.concatenate([[EOS], tokens]).astype(np.int64))
    with torch.no_grad():
        logits = model(stream[None, :-1])[0]
    expected = functional.cross_entropy(logits, stream[1:], reduction="sum")
    total, count = nats(model, tokens, EOS, autocast=nullcontext)
    assert count == 100
    assert total == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 333])
def test_every_token_is_predicted_once(n: int) -> None:
    tokens = tokens_of(n)
    inputs, targets = validation._segments(tokens, EOS, None)
    assert inputs.shape == targets.shape
    assert targets[targets >= 0].tolist() == tokens.tolist()
    before = np.concatenate([[EOS], tokens])[:-1]
    assert inputs[targets >= 0].tolist() == before.tolist()


def test_limit_reads_the_heads_of_the_segments() -> None:
    tokens = tokens_of(1600)
    _, targets = validation._segments(tokens, EOS, 160)
    assert targets.shape == (16, 10)
    assert targets[3].tolist() == tokens[300:310].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model: LM, training: bool) -> None:
    # trap 61
    model.train(training)
    nats(model, tokens_of(20), EOS, autocast=nullcontext)
    assert model.training is training
    with pytest.raises(IndexError):
        nats(model, tokens_of(20) + 500, EOS, autocast=lambda: exec("raise IndexError"))
    assert model.training is training


def test_bits_per_byte() -> None:
    # A uniform guess among 256 bytes costs 8 bits; half as many tokens as bytes, half of that.
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 50, 100) == pytest.approx(4)


def test_xz() -> None:
    text = b"some text " * 100
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / 1000
