"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambapy.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """The choice of a token, with the options of `generation.generate`; equal ones choose alike.

    Raises:
        ConfigError: an option is out of its range.
    """

    sample: bool = True
    top_k: int | None = 40
    top_p: float | None = None
    temperature: float = 1.0
    eos: int | None = None

    def __post_init__(self) -> None:
        top_k, top_p, temperature = self.top_k, self.top_p, self.temperature
        if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
            raise ConfigError(
                f"top_k={top_k!r} must be an integer >= 1, or 0 or None for all tokens"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} must be above 0 and at most 1")
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature={temperature} must be finite and >= 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and no noise."""
        return not self.sample or self.temperature == 0

    def __call__(self, logits: Tensor, noise: Tensor | None, last: Tensor | None) -> Tensor:
        """Choose a token of each row.

        Args:
            logits: (b, v).
            noise: (b,) uniform in [0, 1); None where it is greedy.
            last: (b,) the tokens chosen before: a row that has ended repeats its end.

        Returns:
            (b,) int64.
        """
        if noise is None:
            token = logits.argmax(dim=-1)
        else:
            token = sample_token(logits, noise, self.top_k, self.top_p, self.temperature)
        if self.eos is None or last is None:
            return token
        return torch.where(last == self.eos, self.eos, token)


def sample_token(
    logits: Tensor,
    noise: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Draw a token of each row by inverting the cumulative distribution.

    Args:
        logits: (b, v).
        noise: (b,) uniform in [0, 1).
        top_k: keep the k most likely tokens; None or 0 for all.
        top_p: keep the most likely tokens that together have this probability; at least one.
        temperature: divides the logits, > 0.

    Returns:
        (b,) int64.
    """
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = logits.float().topk(k, dim=-1)  # (b, k), the most likely first
    p = torch.softmax(values / temperature, dim=-1)
    total = p.cumsum(dim=-1)
    if top_p is not None:
        p = p.masked_fill(total - p >= top_p, 0.0)
        total = p.cumsum(dim=-1)
    chosen = (total <= noise[:, None] * total[:, -1:]).sum(dim=-1).clamp(max=k - 1)  # (b,)
    return tokens.gather(1, chosen[:, None])[:, 0]


def draw_noise(b: int, num_tokens: int, seed: int | None) -> Tensor:
    """(num_tokens, b) uniform numbers, each row of the batch from its own generator.

    A row's numbers do not depend on the rows beside it.
    """
    if seed is None:
        return torch.rand(b, num_tokens).T
    rows = [torch.Generator().manual_seed(seed + i) for i in range(b)]
    return torch.stack([torch.rand(num_tokens, generator=row) for row in rows], dim=1)
