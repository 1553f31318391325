"""Validation loss in bits per byte of the text, and what `xz -9` makes of the same text."""

import itertools
import lzma
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mambapy.layers import evaluating
from mambapy.lm import IGNORED, LM

# The held-out text is read as that many segments side by side, in chunks of that many tokens.
_SEGMENTS = 16
_CHUNK = 512


def nats(
    model: LM,
    tokens: npt.NDArray[Any],
    eos: int,
    *,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, int]:
    """Total cross-entropy over held-out tokens, with the state carried along each segment.

    Each token is predicted exactly once. The model is left in the mode it was in.

    Args:
        model: the language model.
        tokens: (n,) held-out tokens.
        eos: end-of-text token, which stands before the first of them.
        limit: read only that many of them, the heads of segments spread over the text.
        autocast: makes the precision context of the forward pass.

    Returns:
        The sum in nats, and over how many tokens it went.
    """
    inputs, targets = _segments(tokens, eos, limit)
    device = next(model.parameters()).device
    parts: list[torch.Tensor] = []
    state = None
    with evaluating(model):
        for start in range(0, inputs.shape[1], _CHUNK):
            x = inputs[:, start : start + _CHUNK].to(device)
            y = targets[:, start : start + _CHUNK].to(device)
            with autocast():
                hidden, state = model.prefill_hidden(x, state)
                parts.append(model.loss_from(hidden, y, "sum"))
    # Read back at once: each value would stall a GPU.
    return sum(torch.stack(parts).tolist()), int((targets >= 0).sum())


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of a text of so many tokens and bytes."""
    return nats_per_token * tokens / (text_bytes * math.log(2))


def xz_bits_per_byte(text: bytes) -> float:
    """What `xz -9` needs for a text, in bits per byte."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def _segments(
    tokens: npt.NDArray[Any], eos: int, limit: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (segments, length); a target of -100 is none."""
    n = len(tokens)
    count = min(_SEGMENTS, n)
    stream = torch.from_numpy(np.concatenate([[eos], tokens]).astype(np.int64))
    edges = [i * n // count for i in range(count + 1)]
    length = max(b - a for a, b in itertools.pairwise(edges))
    if limit is not None:
        length = min(length, max(1, limit // count))
    inputs = torch.full((count, length), eos)
    targets = torch.full((count, length), IGNORED)
    for row, (start, end) in enumerate(itertools.pairwise(edges)):
        size = min(length, end - start)
        inputs[row, :size] = stream[start : start + size]
        targets[row, :size] = stream[start + 1 : start + size + 1]
    return inputs, targets
