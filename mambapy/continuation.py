"""Tokens become text, piece by piece, up to a stop string or the end of text."""

from collections.abc import Sequence

from mambapy.errors import ConfigError
from mambapy.tokenizer import Tokenizer


class Continuation:
    """One row's continuation: its tokens become text, up to a stop string or the end of text.

    A token can be part of a character, so the whole is decoded again from a few tokens back, where
    the text was last complete; that start moves along, and a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # Some tokenizers drop a leading space, so the decoding starts inside the prompt.
        self.window = prompt[-8:]
        self.shown = len(self._decode())
        self.text, self.given, self.done = "", 0, False

    def add(self, token: int, eos: int | None) -> None:
        """Take in a token, unless the text has ended."""
        if self.done:
            return
        if token == eos:
            self.done = True
            return
        self.window.append(token)
        decoded = self._decode()
        if decoded.endswith("\ufffd") and len(self.window) < 64:
            return
        self._extend(decoded)

    def take(self) -> str:
        """What is new and can no longer change."""
        end = len(self.text) if self.done else self._safe_end()
        piece = self.text[self.given : end]
        self.given = max(self.given, end)
        return piece

    def finish(self) -> str:
        """The whole continuation."""
        if not any(stop in self.text for stop in self.stops):
            self._extend(self._decode())
        self.done = True
        return self.text

    def _extend(self, decoded: str) -> None:
        """Add what `decoded` has beyond what was known, and cut at a stop string."""
        self.text += decoded[self.shown :]
        self.window = self.window[-8:]
        self.shown = len(self._decode())
        cuts = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if cuts:
            self.text, self.done = self.text[: min(cuts)], True

    def _safe_end(self) -> int:
        """Where the text could still turn into a stop string."""
        for length in range(min(max(map(len, self.stops), default=0), len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return len(self.text) - length
        return len(self.text)

    def _decode(self) -> str:
        return self.tokenizer.decode(self.window)


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """The stop strings as a list."""
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if not all(isinstance(each, str) for each in stops):
        raise ConfigError(f"stop={stop!r} must be a string, or several")
    if "" in stops:
        raise ConfigError("an empty stop string would end every text at once")
    return stops
