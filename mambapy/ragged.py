"""Batches whose rows have padding, or several documents, or both.

Padding may stand anywhere in a row. Before a model runs, `Ragged.of` moves each row's real tokens
to the left, in order; what a causal model computes for them then cannot depend on padding, as all
of it is on their right. Only a layer's last state has to know where a row ends. Afterwards
`Ragged.restore` moves the results back and puts zeros at the padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambapy.errors import ShapeError
from mambapy.ops.dispatch import is_traced
from mambapy.ops.selective_scan import check_seq_idx

# softplus of this is exactly 0 in every dtype, and it fits a float16: the step size of padding.
NO_STEP = -1e4
# What no gap between two tokens is taken for; B / gap must stay finite.
LEAST_GAP = 1e-6


@dataclass(frozen=True)
class Ragged:
    """How the rows of a batch are laid out, once real tokens stand on the left.

    Args:
        lengths: (b,) int64, the real tokens of each row; None where all are real.
        seq_idx: (b, l) int64, the document of each token; None where a row is one document.
        order: (b, l) int64, which original position each token came from; None where none moved.
        dt_scale: (b, l) the time from the token before to each token, in steps, above 0; None
            where all are one step apart.
    """

    lengths: Tensor | None = None
    seq_idx: Tensor | None = None
    order: Tensor | None = None
    dt_scale: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        dt_scale: Tensor | None = None,
    ) -> "Ragged":
        """The layout of x (b, l, ...), from what the caller said about its tokens.

        Args:
            x: what will be moved.
            mask: (b, l) bool, True at real tokens.
            seq_idx: (b, l) integers, the document of each token; a negative one is padding too.
            dt_scale: (b, l) floating point >= 0, the time since the token before, in steps.

        Raises:
            ShapeError: the mask, seq_idx or dt_scale does not fit x.
        """
        b, l = x.shape[:2]
        check_seq_idx(seq_idx, b, l)
        dt_scale = check_dt_scale(dt_scale, (b, l))
        if mask is None and seq_idx is None:
            return cls(dt_scale=dt_scale)
        if mask is not None and not isinstance(mask, Tensor):
            raise ShapeError(f"mask must be a bool tensor (b, l), got {type(mask).__name__}")
        if mask is not None and (mask.shape != (b, l) or mask.dtype != torch.bool):
            raise ShapeError(
                f"mask must be bool (b, l) = {(b, l)}, True at real tokens, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        real = torch.ones(b, l, dtype=torch.bool, device=x.device) if mask is None else mask
        if seq_idx is not None:
            seq_idx = seq_idx.long()
            real = real & (seq_idx >= 0)
        lengths = real.sum(dim=1)
        order = torch.argsort(~real, dim=1, stable=True)
        if seq_idx is not None:
            last = seq_idx.gather(1, order).gather(1, (lengths[:, None] - 1).clamp(min=0))
            # The padding, now on the right, continues the last document.
            seq_idx = torch.where(_within(lengths, l), seq_idx.gather(1, order), last)
        if dt_scale is not None:
            dt_scale = dt_scale.gather(1, order)
        return cls(lengths, seq_idx, order, dt_scale)

    def pack(self, x: Tensor) -> Tensor:
        """x (b, l, ...) with each row's real tokens on the left, and zeros behind them."""
        if self.order is None or self.lengths is None:
            return x
        real = _within(self.lengths, x.shape[1])
        return torch.where(_like(real, x), x.gather(1, _like(self.order, x)), 0)

    def restore(self, y: Tensor) -> Tensor:
        """y (b, l, ...) with every token back in its place, and zeros at the padding."""
        if self.order is None or self.lengths is None:
            return y
        real = _within(self.lengths, y.shape[1])
        y = torch.where(_like(real, y), y, 0)
        return torch.zeros_like(y).scatter(1, _like(self.order, y), y)

    def clear(self, x: Tensor) -> Tensor:
        """Packed x (b, l, e) with zeros at the padding."""
        if self.lengths is None:
            return x
        return x.masked_fill(~_within(self.lengths, x.shape[1])[:, :, None], 0.0)

    def last(self, y: Tensor, n: int) -> Tensor:
        """(b, n, d) of packed y: each row's last n real tokens; a short row repeats its first."""
        if self.lengths is None:
            return y[:, y.shape[1] - n :]
        index = self.lengths[:, None] - n + torch.arange(n, device=y.device)  # (b, n)
        index = index.clamp(min=0)
        return y.gather(1, index[:, :, None].expand(-1, -1, y.shape[2]))

    def stop_padding(self, dt: Tensor) -> Tensor:
        """dt (b, l, e) before softplus, with no step at the padding, so that states stand still."""
        if self.lengths is None:
            return dt
        return dt.masked_fill(~_within(self.lengths, dt.shape[1])[:, :, None], NO_STEP)

    def no_step(self, delta: Tensor) -> Tensor:
        """delta (b, l, h) after softplus, 0 at the padding, so that states stand still."""
        if self.lengths is None:
            return delta
        return delta.masked_fill(~_within(self.lengths, delta.shape[1])[:, :, None], 0.0)

    def last_document(self, before: Tensor) -> Tensor:
        """(b,) the document of each row's last token; `before`'s where a row has no token."""
        if self.seq_idx is None:
            return before
        last = self.seq_idx[:, -1]
        return last if self.lengths is None else torch.where(self.lengths > 0, last, before)

    def continues(self, before: Tensor) -> Tensor | None:
        """(b,) bool, whether a row's first token belongs to the document that `before` names.

        None where no row can have changed its document.
        """
        if self.seq_idx is None:
            return None
        same = (self.seq_idx[:, 0] == before) | (before < 0)
        return same if self.lengths is None else same | (self.lengths == 0)


def check_dt_scale(dt_scale: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """dt_scale in float32 or wider and at least LEAST_GAP; a ShapeError if it does not fit.

    Its values are looked at on a CPU alone: to read them back would stall a GPU.
    """
    if dt_scale is None:
        return None
    if not isinstance(dt_scale, Tensor) or dt_scale.shape != shape:
        shape = tuple(shape)
        got = tuple(dt_scale.shape) if isinstance(dt_scale, Tensor) else type(dt_scale).__name__
        raise ShapeError(f"dt_scale must be a tensor {shape}, a time for each token, got {got}")
    if not dt_scale.is_floating_point():
        raise ShapeError(f"dt_scale must be floating point, got {dt_scale.dtype}")
    if dt_scale.device.type == "cpu" and not is_traced():
        low, high = (float(bound) for bound in dt_scale.detach().aminmax())
        if not (low >= 0 and high < float("inf")):
            raise ShapeError(f"dt_scale must be finite and >= 0, got {low:g} to {high:g}")
    return dt_scale.to(torch.promote_types(dt_scale.dtype, torch.float32)).clamp(min=LEAST_GAP)


def stretch(delta: Tensor, B: Tensor, dt_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step sizes and B of tokens that come dt_scale steps after the one before.

    The state decays for the whole gap, exp(s dt A) h, and the token is written once, dt B x, as if
    the steps that are missing had had no input: so dt is multiplied by s, and B divided by it.

    Args:
        delta: (..., h) step sizes, after softplus.
        B: (..., n) or (..., g, n).
        dt_scale: (...) above 0, or None for one step each.
    """
    if dt_scale is None:
        return delta, B
    gap = dt_scale.reshape(*dt_scale.shape, *[1] * (B.dim() - dt_scale.dim()))
    return delta * dt_scale[..., None], B / gap


def _within(lengths: Tensor, l: int) -> Tensor:
    """(b, l) bool, True at each row's first `lengths` positions."""
    return torch.arange(l, device=lengths.device) < lengths[:, None]


def _like(index: Tensor, x: Tensor) -> Tensor:
    """index (b, l), expanded to x's shape (b, l, ...)."""
    return index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand_as(x)
