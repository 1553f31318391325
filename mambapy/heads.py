"""Models for other tasks than the next token: a head on what a core has made of its input.

    SequenceClassifier, Regressor    core -> pool -> linear     one answer for a sequence
    TokenClassifier                  core -> linear             one for each token
    SeriesModel                      linear -> stack -> norm    a core for numbers, not tokens

A core is an `LM`, whose head is not used, a `SeriesModel`, or a bare stack such as `Mamba`.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mambapy.config import StackConfig
from mambapy.errors import ConfigError, ShapeError
from mambapy.layers import RMSNorm
from mambapy.lm import LM, STACKS
from mambapy.ops.dispatch import is_traced
from mambapy.stack import Stack
from mambapy.state import ModelState

__all__ = ["POOLINGS", "Regressor", "SequenceClassifier", "SeriesModel", "TokenClassifier"]

POOLINGS = ("last", "mean", "max", "state")
H = TypeVar("H", bound="_Head")


class SeriesModel(nn.Module):
    """A stack on numbers instead of tokens, (b, l, d_input) -> (b, l, d_model).

    Args:
        core: a configuration, from which a stack is made, or a stack.
        d_input: numbers at each time, >= 1; without it they are d_model, and go in as they are.

    Raises:
        ConfigError: d_input is no positive integer, or core is neither.
    """

    def __init__(self, core: StackConfig | Stack, d_input: int | None = None) -> None:
        super().__init__()
        wrong = isinstance(d_input, bool) or not isinstance(d_input, int) or d_input < 1
        if d_input is not None and wrong:
            raise ConfigError(f"d_input={d_input!r} must be an integer >= 1")
        if not isinstance(core, Stack) and type(core) not in STACKS:
            known = ", ".join(kind.__name__ for kind in STACKS)
            raise ConfigError(f"core must be a stack or one of {known}, got {type(core).__name__}")
        self.backbone = core if isinstance(core, Stack) else STACKS[type(core)](core)
        self.config = self.backbone.config
        d = self.config.d_model
        self.in_proj = None if d_input is None else nn.Linear(d_input, d)
        self.norm_f = RMSNorm(d, self.config.rms_norm_eps)
        like = self.backbone.layers[0].norm.weight
        for part in (self.in_proj, self.norm_f):
            if part is not None:
                part.to(like.device, like.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """Run whole sequences; the arguments are those of `Stack.forward`.

        Args:
            x: (b, l, d_input) floating point.
            mask: (b, l) bool, True at real times.
            seq_idx: (b, l) integers, the series of each time, where a row packs several.
            dt_scale: (b, l) >= 0, the time since the one before, in steps.

        Returns:
            (b, l, d_model).
        """
        return self.norm_f(
            self.backbone(
                self._enter(x, 3, mask, seq_idx), mask=mask, seq_idx=seq_idx, dt_scale=dt_scale
            )
        )

    hidden = forward

    def prefill_hidden(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """`forward` from a state on, and the state it leaves; see `Stack.prefill`."""
        x = self._enter(x, 3, mask)
        y, state = self.backbone.prefill(x, state, mask=mask, dt_scale=dt_scale)
        return self.norm_f(y), state

    prefill = prefill_hidden

    def step(
        self, x: Tensor, state: ModelState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """One time of each series, (b, d_input) -> (b, d_model); see `Stack.step`."""
        y, state = self.backbone.step(self._enter(x, 2), state, dt_scale)
        return self.norm_f(y), state

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first time."""
        return self.backbone.init_state(batch_size)

    def _enter(
        self, x: Tensor, dims: int, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """x as the stack takes it; padding may hold anything, NaN too."""
        if self.in_proj is None:
            return x
        d, shape = self.in_proj.in_features, "(b, l, d_input)" if dims == 3 else "(b, d_input)"
        if not isinstance(x, Tensor) or x.dim() != dims or x.shape[-1] != d:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(f"x must be {shape} with d_input = {d}, got {got}")
        if not x.is_floating_point():
            raise ShapeError(f"x must be floating point, got {x.dtype}")
        # The stack checks both, and clears padding itself; but in_proj's gradient would see it.
        for real in (mask, None if seq_idx is None else seq_idx >= 0):
            if real is not None and real.shape == x.shape[:2] and real.dtype == torch.bool:
                x = torch.where(real[:, :, None], x, 0)
        return self.in_proj(x)


class _Head(nn.Module):
    """A core, and a linear layer on what is pooled of it."""

    def __init__(
        self, core: LM | SeriesModel | Stack, n_outputs: int, pooling: str, dropout: float
    ) -> None:
        super().__init__()
        if isinstance(n_outputs, bool) or not isinstance(n_outputs, int) or n_outputs < 1:
            raise ConfigError(f"the number of outputs, {n_outputs!r}, must be an integer >= 1")
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}")
        # Not by its kind: an LM may be wrapped, by an adapter for instance.
        if not isinstance(core, Stack) and not hasattr(core, "prefill_hidden"):
            raise ConfigError(
                f"core must be an LM, a SeriesModel or a stack, got {type(core).__name__}"
            )
        self.core = SeriesModel(core) if isinstance(core, Stack) else core
        self.pooling = pooling
        size = self.core.config.d_model
        if pooling == "state":
            shapes = self.core.backbone.layers[-1].mixer.state_shapes(1)
            if "ssm" not in shapes:
                raise ConfigError(
                    "pooling='state' needs a recurrent mixer in the last block; attention has no "
                    "state of a fixed size"
                )
            size = torch.Size(shapes["ssm"]).numel()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(size, n_outputs)
        self.head.to(self.core.norm_f.weight.device, self.core.norm_f.weight.dtype)

    @classmethod
    def from_pretrained(
        cls: type[H],
        name_or_dir: str | Path,
        n_outputs: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> H:
        """A new head on a pretrained language model; see `LM.from_pretrained`.

        Args:
            name_or_dir: see there.
            n_outputs: classes, or numbers to predict.
            dtype: see there.
            device: see there.
            revision: see there.
            **options: the head's own, pooling for instance.
        """
        core = LM.from_pretrained(name_or_dir, dtype=dtype, device=device, revision=revision)
        return cls(core, n_outputs, **options)

    def _answer(self, features: Tensor) -> Tensor:
        """The linear layer."""
        return self.head(self.dropout(features).to(self.head.weight.dtype))


class SequenceClassifier(_Head):
    """One answer for each sequence.

    Args:
        core: an `LM`, a `SeriesModel`, or a stack.
        n_outputs: number of classes, >= 1.
        pooling: what of the sequence is looked at: the "last" real token's features, their "mean"
            or "max" over the real tokens, or the last layer's final "state".
        dropout: probability of dropping a feature, in training.

    Raises:
        ConfigError: a value is out of its range, or the last layer has no state of a fixed size.
    """

    def __init__(
        self,
        core: LM | SeriesModel | Stack,
        n_outputs: int,
        pooling: str = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(core, n_outputs, pooling, dropout)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, dt_scale: Tensor | None = None
    ) -> Tensor:
        """Logits of the classes.

        Args:
            x: (b, l) tokens, or (b, l, d_input) numbers, as the core takes them.
            mask: (b, l) bool, True at real tokens, at least one in each row; padding may stand
                anywhere.
            dt_scale: (b, l) >= 0, the time since the token before, in steps.

        Returns:
            (b, n_outputs).

        Raises:
            ShapeError: an argument does not fit, or a row has no real token.
        """
        looked_at = mask is not None and mask.device.type == "cpu" and not is_traced()
        # A mask of another shape is the core's to refuse.
        if mask is not None and looked_at and mask.dim() == 2 and not bool(mask.any(dim=1).all()):
            raise ShapeError("every row of mask needs at least one real token")
        if self.pooling == "state":
            _, state = self.core.prefill_hidden(x, mask=mask, dt_scale=dt_scale)
            last: Any = state.layers[-1]
            return self._answer(last.ssm.flatten(1))
        return self._answer(
            pool(self.core.hidden(x, mask=mask, dt_scale=dt_scale), mask, self.pooling)
        )


class Regressor(SequenceClassifier):
    """Numbers for each sequence, (b, n_outputs); arguments are those of `SequenceClassifier`.

    Args:
        core: an `LM`, a `SeriesModel`, or a stack.
        n_outputs: how many numbers, >= 1.
        pooling: see there.
        dropout: see there.
    """

    def __init__(
        self,
        core: LM | SeriesModel | Stack,
        n_outputs: int = 1,
        pooling: str = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(core, n_outputs, pooling, dropout)


class TokenClassifier(_Head):
    """One answer for each token, from it and what came before.

    Args:
        core: an `LM`, a `SeriesModel`, or a stack.
        n_outputs: number of classes, >= 1.
        dropout: probability of dropping a feature, in training.
    """

    def __init__(
        self, core: LM | SeriesModel | Stack, n_outputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__(core, n_outputs, "last", dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """Logits of the classes at every token.

        Args:
            x: (b, l) tokens, or (b, l, d_input) numbers, as the core takes them.
            mask: (b, l) bool, True at real tokens.
            seq_idx: (b, l) integers, the document of each token, where a row packs several.
            dt_scale: (b, l) >= 0, the time since the token before, in steps.

        Returns:
            (b, l, n_outputs); what stands at padding means nothing.
        """
        return self._answer(self.core.hidden(x, mask=mask, seq_idx=seq_idx, dt_scale=dt_scale))


def pool(y: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector of each row's real tokens.

    Args:
        y: (b, l, d).
        mask: (b, l) bool, True at real tokens, wherever they stand; all are without it.
        pooling: "last", "mean" or "max".

    Returns:
        (b, d).
    """
    if mask is None:
        if pooling == "last":
            return y[:, -1]
        return y.mean(dim=1) if pooling == "mean" else y.amax(dim=1)
    if pooling == "last":
        # Not from the number of real tokens: padding may stand before them.
        place = torch.arange(y.shape[1], device=y.device).masked_fill(~mask, -1).amax(dim=1)
        return y[torch.arange(len(y), device=y.device), place]
    if pooling == "mean":
        total = torch.where(mask[:, :, None], y, 0).sum(dim=1)
        return total / mask.sum(dim=1, keepdim=True)
    return torch.where(mask[:, :, None], y, -torch.inf).amax(dim=1)
