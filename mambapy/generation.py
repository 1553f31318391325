"""Sampling from a language model: the prompt in one parallel pass, then one step a token.

Who calls whom:

    generate         texts from texts      -> _tokens
    stream_text      pieces of one text    -> _tokens
    generate_tokens  ids from ids          -> stream_tokens -> _tokens
    _tokens          prefill, then for each token: Choice, step

The state has a fixed size, so a token costs the same after ten tokens as after ten thousand.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mambapy.continuation import Continuation, stop_strings
from mambapy.errors import ConfigError, DataError, ShapeError
from mambapy.layers import evaluating
from mambapy.sampling import Choice, draw_noise, sample_token
from mambapy.tokenizer import Tokenizer

__all__ = [
    "LanguageModel",
    "generate",
    "generate_tokens",
    "next_tokens",
    "pad_right",
    "sample_token",
    "stream_text",
    "stream_tokens",
]


# So many tokens a GPU is ahead, and calculates at once. As often, a change of the model is noticed.
AHEAD = 4


class LanguageModel(Protocol):
    """What generation asks of a model; `LM` has it."""

    vocab_size: int

    def prefill(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Any]:
        """Logits of the last `logits_to_keep` positions (b, n, vocab_size), and a state."""
        ...

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits (b, vocab_size) after one token (b,), and the next state."""
        ...


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    num_tokens: int = 50,
    batch_size: int = 1,
    sample: bool = True,
    top_k: int | None = 40,
    top_p: float | None = None,
    temperature: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> str | list[str]:
    """Continue one prompt or several.

    Prompts of different lengths run in one batch, and each gets what it would get alone.

    Args:
        model: a language model.
        tokenizer: anything with transformers' call interface; its `eos_token_id` ends a text.
        prompt: a text, or several.
        num_tokens: most tokens to add, >= 1.
        batch_size: continuations of each prompt, >= 1.
        sample: False takes the most likely token each time (greedy).
        top_k: sample among the k most likely tokens; None or 0 for all.
        top_p: sample among the most likely tokens that together have this probability, in (0, 1].
        temperature: divides the logits, >= 0; 0 is greedy.
        stop: a string, or several, before which a text ends.
        seed: makes the result repeatable; row i of the batch uses seed + i.

    Returns:
        The prompt with its continuation; a list of them where there are several.

    Raises:
        ConfigError: an option is out of its range.
        DataError: a prompt is empty, or the tokenizer gives ids that the model does not have.
    """
    eos = tokenizer.eos_token_id
    choice = Choice(sample, top_k, top_p, temperature, eos)
    _check(num_tokens, seed)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r} must be an integer >= 1")
    if not isinstance(prompt, str | list | tuple) or not prompt:
        raise DataError("the prompt is empty; give it a text, or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    stops = stop_strings(stop)
    rows = [_encode(model, tokenizer, text) for text in prompts for _ in range(batch_size)]
    ids, mask = pad_right(rows, _device(model))
    texts = [Continuation(tokenizer, row, stops) for row in rows]
    tokens = _tokens(model, ids, mask, num_tokens, choice, seed)
    with closing(tokens):
        for token in tokens:
            for text, value in zip(texts, token.read(), strict=True):
                text.add(value, eos)
            if all(text.done for text in texts):
                break
    results = [prompts[i // batch_size] + text.finish() for i, text in enumerate(texts)]
    return results[0] if isinstance(prompt, str) and batch_size == 1 else results


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 50,
    sample: bool = True,
    top_k: int | None = 40,
    top_p: float | None = None,
    temperature: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue one prompt, piece by piece: the pieces together are `generate`'s continuation.

    A piece is held back while it might be half of a character or the start of a stop string.
    Args, errors: those of `generate`.

    Yields:
        The text after the prompt, as it comes.
    """
    eos = tokenizer.eos_token_id
    choice = Choice(sample, top_k, top_p, temperature, eos)
    _check(num_tokens, seed)
    row = _encode(model, tokenizer, prompt)
    ids, _ = pad_right([row], _device(model))
    text = Continuation(tokenizer, row, stop_strings(stop))
    tokens = _tokens(model, ids, None, num_tokens, choice, seed)
    # Whoever stops listening gets the model back in its mode at once.
    with closing(tokens):
        for token in tokens:
            text.add(token.read()[0], eos)
            if piece := text.take():
                yield piece
            if text.done:
                break
    text.finish()
    if piece := text.take():
        yield piece


def generate_tokens(model: LanguageModel, ids: Tensor, **options: Any) -> Tensor:
    """`stream_tokens`, gathered: (b, l') int64, the new tokens alone."""
    return torch.stack(list(stream_tokens(model, ids, **options)), dim=1)


def stream_tokens(
    model: LanguageModel,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    num_tokens: int = 50,
    sample: bool = True,
    top_k: int | None = 40,
    top_p: float | None = None,
    temperature: float = 1.0,
    eos: int | None = None,
    seed: int | None = None,
) -> Generator[Tensor, None, None]:
    """Continue token ids, one token at a time.

    Args:
        model: a language model; its train or eval mode is what it was, afterwards.
        ids: (b, l) int64 prompts, l >= 1.
        mask: (b, l) bool, True at real tokens, where prompts are of different lengths.
        num_tokens: most tokens to add, >= 1.
        sample: False takes the most likely token each time.
        top_k: see `generate`.
        top_p: see `generate`.
        temperature: see `generate`.
        eos: the token that ends a row; the row then repeats it, and all stop when all have it.
        seed: makes the result repeatable; row i uses seed + i.

    Yields:
        (b,) int64, the next token of each row.

    Raises:
        ConfigError: an option is out of its range.
        ShapeError: ids or mask do not fit, or a row of the mask has no real token.
    """
    choice = Choice(sample, top_k, top_p, temperature, eos)
    tokens = _tokens(model, ids, mask, num_tokens, choice, seed, is_read=False)
    with closing(tokens):
        for token in tokens:
            yield token.value


class _Token(NamedTuple):
    """The next token of each row (b,), and a copy on its way to the CPU if somebody reads it.

    To wait for a number from a GPU stalls it. So numbers are sent when they are ready, and read
    some tokens later.
    """

    value: Tensor
    copy: Tensor | None = None
    came: torch.cuda.Event | None = None

    def read(self) -> list[int]:
        """The token of each row."""
        if self.came is not None:
            self.came.synchronize()
        assert self.copy is not None
        return self.copy.tolist()


def _sent(values: Sequence[Tensor], *, is_read: bool) -> list[_Token]:
    """Tokens (b,) that follow each other, sent to the CPU together."""
    if not is_read:
        return [_Token(value) for value in values]
    if not values[0].is_cuda:
        return [_Token(value, value) for value in values]
    copies = torch.stack(list(values)).to("cpu", non_blocking=True)
    # On the stream of that device, which need not be the current one.
    came = torch.cuda.current_stream(values[0].device).record_event()
    return [_Token(value, copy, came) for value, copy in zip(values, copies, strict=True)]


def _tokens(
    model: LanguageModel,
    ids: Tensor,
    mask: Tensor | None,
    num_tokens: int,
    choice: Choice,
    seed: int | None,
    *,
    is_read: bool = True,
) -> Generator[_Token, None, None]:
    """`stream_tokens`; a GPU is some tokens ahead of what is yielded."""
    _check(num_tokens, seed)
    if mask is not None and not bool(mask.any(dim=1).all()):
        raise ShapeError("every row of mask needs at least one real token")
    is_read = is_read or choice.eos is not None
    # All random numbers at once.
    noise = None if choice.greedy else draw_noise(len(ids), num_tokens, seed).to(ids.device)
    # Whoever takes a token gets it in the mode he was in himself, and may train meanwhile.
    with evaluating(model):
        logits, state = model.prefill(ids, mask=mask, logits_to_keep=1)
        last = choice(logits[:, -1], None if noise is None else noise[0], None)
        ahead, count = deque(_sent([last], is_read=is_read)), 1
        decoder = _decoder(model, state)
    most = most_ahead(ids.device)
    with closing(decoder):
        while ahead or count < num_tokens:
            while len(ahead) <= most and count < num_tokens:
                end = min(count + max(most, 1), num_tokens)
                with evaluating(model):
                    draws = None if noise is None else noise[count:end]
                    values = next_tokens(decoder, last, end - count, choice, draws)
                    ahead.extend(_sent(values, is_read=is_read))
                last, count = values[-1], count + len(values)
            oldest = ahead.popleft()
            yield oldest
            # A row that has ended repeats its end.
            if choice.eos is not None and set(oldest.read()) == {choice.eos}:
                return


def next_tokens(
    decoder: Any, last: Tensor, n: int, choice: Choice, noise: Tensor | None
) -> Sequence[Tensor]:
    """The next n tokens (b,), from noise (n, b), where a plan chooses them itself; else one."""
    by_plan = getattr(decoder, "choose", None)
    found = None if by_plan is None else by_plan(last, n, choice, noise)
    if found is not None:
        return found.unbind()
    return [choice(decoder(last), None if noise is None else noise[0], last)]


def most_ahead(device: torch.device) -> int:
    """How many tokens a device is ahead of those that are read, at least."""
    return AHEAD if device.type == "cuda" else 0


class _Steps:
    """`LM.decoder` for a model that has none."""

    def __init__(self, model: LanguageModel, state: Any) -> None:
        self._model, self._state = model, state

    def __call__(self, token: Tensor) -> Tensor:
        logits, self._state = self._model.step(token, self._state)
        return logits

    def close(self) -> None:
        """There is nothing to give back."""


def _decoder(model: LanguageModel, state: Any) -> Any:
    """What gives the logits (b, v) after a token (b,), and keeps the state itself."""
    make = getattr(model, "decoder", None)
    return _Steps(model, state) if make is None else make(state)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch: ids (b, l) int64, zero-padded, and the mask (b, l) bool."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=device)
    return ids, mask


def _encode(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's token ids, at least one, all of them known to the model."""
    if not isinstance(prompt, str):
        raise DataError(f"a prompt must be a text, got {type(prompt).__name__}")
    ids = [int(i) for i in tokenizer(prompt)["input_ids"]]
    if not ids:
        raise DataError("the prompt is empty; give it at least one character")
    if max(ids) >= model.vocab_size:
        raise DataError(
            f"the tokenizer gives id {max(ids)}, the model has {model.vocab_size} tokens; "
            "it was trained with another tokenizer"
        )
    return ids


def _check(num_tokens: int, seed: int | None) -> None:
    """Raise unless both are in their range."""
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ConfigError(f"num_tokens={num_tokens!r} must be an integer >= 1")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ConfigError(f"seed={seed!r} must be an integer from 0 to 2^63 - 1")


def _device(model: LanguageModel) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
