"""Causal self-attention as a mixer beside the recurrent ones, (b, l, d) -> (b, l, d).

    Attention      in_proj -> convolution -> turn q and k by position -> attention -> out_proj

Letters:

    b  batch       h   n_heads                  q  (b, l, h, p)       what a token asks
    l  length      kv  n_kv_heads               k  (b, t + l, kv, p)  what each token offers
    d  d_model     p   channels of a head       v  (b, t + l, kv, p)  what it then gives
    t  tokens that the state remembers

Its state is the keys and values of all tokens so far, so it grows, which a recurrence's does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import Mixer
from mambapy.config import AttentionConfig
from mambapy.errors import ShapeError
from mambapy.layers import QuantizedLinear, taps, wide, widen
from mambapy.ops.dispatch import is_traced
from mambapy.ragged import Ragged
from mambapy.state import AttentionState

__all__ = ["Attention", "AttentionConfig"]


class Attention(Mixer[AttentionState]):
    """Causal self-attention, (b, l, d) -> (b, l, d).

    It runs on torch's `scaled_dot_product_attention`. That has second derivatives only under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        config: the architecture; `n_layers` is not used here.

    Source: see `AttentionConfig`.
    """

    state_kind = AttentionState

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        h, kv, p, k = config.n_heads, config.kv_heads, config.head_channels, config.d_conv
        channels = (h + 2 * kv) * p
        self.in_proj = nn.Linear(config.d_model, channels, bias=config.bias)
        self.conv1d = (
            nn.Conv1d(channels, channels, k, groups=channels, padding=k - 1, bias=config.conv_bias)
            if k
            else None
        )
        self.out_proj = nn.Linear(h * p, config.d_model, bias=config.out_bias)
        self._reset_biases()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        self._reset_biases()

    def _reset_biases(self) -> None:
        """The projections' biases start at zero."""
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, (h + 2 kv) p): (b, l, d)."""
        return self._attend(inputs, None, ragged)[0]

    def prefill(
        self, x: Tensor, state: AttentionState | None = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, AttentionState]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""
        state = self.init_state(x.shape[0]) if state is None else state
        return self._attend(self.in_proj(x), state, ragged)

    def step(
        self, x: Tensor, state: AttentionState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Run one token of each sequence, (b, d) -> (b, d)."""
        ragged = Ragged(dt_scale=None if dt_scale is None else dt_scale[:, None])
        y, state = self._attend(self.in_proj(x[:, None]), state, ragged)
        return y[:, 0], state

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `AttentionState` before the first token."""
        config = self.config
        heads = config.n_heads + 2 * config.kv_heads
        k, channels = config.d_conv, heads * config.head_channels if config.d_conv else 0
        empty = (batch_size, 0, config.kv_heads, config.head_channels)
        return {
            "conv": (batch_size, max(k - 1, 0), channels),
            "keys": empty,
            "values": empty,
            "lengths": (batch_size,),
            "time": (batch_size,),
        }

    def init_state(self, batch_size: int) -> AttentionState:
        """The state before the first token: no keys, no values."""
        dtype, device = self._made_of()
        dtypes = self._state_dtypes(dtype)
        shapes = self.state_shapes(batch_size)
        return AttentionState(
            *(torch.zeros(shapes[n], dtype=dtypes[n], device=device) for n in shapes)
        )

    def restart(self, state: AttentionState, goes_on: Tensor) -> AttentionState:
        """The rows of `state` where goes_on (b) is True; elsewhere nothing is remembered."""
        return AttentionState(
            torch.where(goes_on[:, None, None], state.conv, 0),
            state.keys,
            state.values,
            torch.where(goes_on, state.lengths, 0),
            torch.where(goes_on, state.time, 0),
        )

    def check_state(self, state: AttentionState, batch_size: int, name: str) -> None:
        """Raise a ShapeError, naming `name`, unless the state is this layer's, for that batch."""
        if not isinstance(state, AttentionState):
            raise ShapeError(f"{name} must be of kind AttentionState, got {type(state).__name__}")
        dtype, device = self._made_of()
        dtypes, tokens = self._state_dtypes(dtype), state.keys.shape[1:2]
        for field, shape in self.state_shapes(batch_size).items():
            T = getattr(state, field)
            if field in ("keys", "values"):
                shape = (batch_size, *tokens, *shape[2:])
            if T.shape != shape:
                raise ShapeError(f"{name}: {field} must be {shape}, got {tuple(T.shape)}")
            if T.dtype != dtypes[field] or T.device != device:
                raise ShapeError(
                    f"{name}: {field} must be {dtypes[field]} on {device}, got {T.dtype} on "
                    f"{T.device}"
                )

    def _made_of(self) -> tuple[torch.dtype, torch.device]:
        """The dtype of keys and values, that of the weights that make them; the device."""
        weight: Tensor = self.in_proj.weight
        # A quantised layer computes in its input's dtype, which is that of the norm before it.
        quantized = isinstance(self.in_proj, QuantizedLinear)
        return torch.float32 if quantized else weight.dtype, weight.device

    @staticmethod
    def _state_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of each field of the state."""
        return {
            "conv": wide(dtype),
            "keys": dtype,
            "values": dtype,
            "lengths": torch.int64,
            "time": wide(dtype),
        }

    def _attend(
        self, inputs: Tensor, state: AttentionState | None, ragged: Ragged
    ) -> tuple[Tensor, AttentionState]:
        """The output (b, l, d), and the state after it."""
        config = self.config
        before = self.init_state(inputs.shape[0]) if state is None else state
        qkv = self._convolve(inputs, before, ragged)  # (b, l, (h + 2 kv) p)
        heads = qkv.unflatten(-1, (-1, config.head_channels))
        q, k, v = heads.split([config.n_heads, config.kv_heads, config.kv_heads], dim=2)
        rows = _Rows(inputs, before, ragged)
        if config.rotary_dim:
            q, k = (rotate(T, rows.time, config.rotary_dim, config.rotary_base) for T in (q, k))
        keys = torch.cat((before.keys.to(k.dtype), k), dim=1)  # (b, t + l, kv, p)
        values = torch.cat((before.values.to(v.dtype), v), dim=1)
        mask = rows.mask()
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=config.n_heads != config.kv_heads,
        )  # (b, h, l, p)
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        if state is None:
            return y, before
        conv = before.conv
        if self.conv1d is not None:
            conv = ops.conv_state(
                inputs,
                config.d_conv - 1,
                state=conv,
                seq_idx=ragged.seq_idx,
                lengths=ragged.lengths,
            )
        kept = [T.to(state.keys.dtype) for T in rows.remember(keys, values)]
        return y, AttentionState(conv, kept[0], kept[1], rows.lengths, rows.next_time)

    def _convolve(self, qkv: Tensor, state: AttentionState, ragged: Ragged) -> Tensor:
        """q, k and v after the convolution, where there is one."""
        if self.conv1d is None:
            return qkv
        return ops.causal_conv1d(
            qkv,
            *taps(self.conv1d),
            state=state.conv,
            seq_idx=ragged.seq_idx,
            backend="reference" if self.config.backend == "reference" else "auto",
        )


class _Rows:
    """Which tokens of each row may look at which, and what the next call must remember of them.

    Only a row's first document goes on from the state: its keys are the t cached ones, and then its
    own. Every later document starts at its own first token.

    Args:
        x: (b, l, ...) for its sizes.
        state: before the first token of x.
        ragged: how the rows are laid out.
    """

    def __init__(self, x: Tensor, state: AttentionState, ragged: Ragged) -> None:
        b, l = x.shape[:2]
        self.state, self.t = state, state.keys.shape[1]
        self.index = torch.arange(l, device=x.device)
        # (b, l) the number of each token's document within its row; None where there is only one.
        self.document: Tensor | None = None
        # (b, l) each token's place in its document, counted from the first of this call.
        place = self.index.expand(b, l)
        # (b,) where each row's last document starts in x, and how many cached keys it goes on from.
        first, kept = torch.zeros_like(state.lengths), state.lengths
        if ragged.seq_idx is not None:
            self.document = ops.reference.runs(ragged.seq_idx)
            self.document = self.document - self.document[:, :1]
            new = torch.ones_like(self.document, dtype=torch.bool)
            new[:, 1:] = self.document.diff(dim=1) != 0
            start = torch.where(new, place, 0).cummax(dim=1).values
            place, first = place - start, start[:, -1]
            kept = torch.where(self.document[:, -1] == 0, kept, 0)
        self.first, self.kept = first, kept
        real = l if ragged.lengths is None else ragged.lengths
        self.lengths = kept + real - first
        self.time = self._times(place, ragged)
        self.next_time = self._next_time(ragged)

    def _times(self, place: Tensor, ragged: Ragged) -> Tensor:
        """(b, l) the position of each token: its place, or with gaps, the time at which it came."""
        base = self.state.time[:, None].expand(place.shape)
        if self.document is not None:
            base = torch.where(self.document == 0, base, 0)
        if ragged.dt_scale is None:
            return base + place
        total = ragged.dt_scale.to(base.dtype).cumsum(dim=1)
        start = total.gather(1, self.index - place)
        if self.document is None:
            return base + total - 1
        return base + torch.where(self.document == 0, total - 1, total - start)

    def _next_time(self, ragged: Ragged) -> Tensor:
        """(b,) one after the last real token's; the state's where a row has none."""
        if ragged.lengths is None:
            return self.time[:, -1] + 1
        last = self.time.gather(1, (ragged.lengths - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(ragged.lengths > 0, last + 1, self.state.time)

    def mask(self) -> Tensor | None:
        """(b, 1, l, t + l), True where a query may look at a key; None for plain causality.

        Padding is on the right, so that no real token is after any.
        """
        if self.document is None and self.t == 0:
            return None
        b, l = self.time.shape
        new = (self.index[:, None] >= self.index).expand(b, l, l)
        old = (torch.arange(self.t, device=new.device) < self.state.lengths[:, None])[:, None]
        old = old.expand(b, l, self.t)
        if self.document is not None:
            new = new & (self.document[:, :, None] == self.document[:, None])
            old = old & (self.document == 0)[:, :, None]
        return torch.cat((old, new), dim=2)[:, None]

    def remember(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and values (b, t + l, kv, p), those of each row's last document, at the left."""
        size = keys.shape[1]
        if keys.device.type == "cpu" and not is_traced():
            # Reading values back would stall a GPU; there, a row's unused room is kept.
            size = int(self.lengths.max())
            if bool((self.lengths == keys.shape[1]).all()):
                return keys, values
        slot = torch.arange(size, device=keys.device)
        after = self.t + self.first[:, None] + slot - self.kept[:, None]
        index = torch.where(slot < self.kept[:, None], slot, after).clamp(max=keys.shape[1] - 1)
        index = index[:, :, None, None].expand(-1, -1, *keys.shape[2:])
        return keys.gather(1, index), values.gather(1, index)


def rotate(x: Tensor, time: Tensor, size: int, base: float) -> Tensor:
    """Turn the first `size` channels of x (b, l, h, p) by their token's position.

    Channels s and s + size/2 are a pair, turned by the angle time * base^(-2s / size); so the
    product of two turned vectors depends on the difference of their times alone.

    Args:
        x: (b, l, h, p).
        time: (b, l) positions.
        size: even, at most p.
        base: of the wavelengths.

    Source: Su et al. 2021 (arXiv 2104.09864), in the layout of GPT-NeoX.
    """
    half = size // 2
    exponents = torch.arange(half, device=x.device, dtype=time.dtype) / half
    angle = (time[:, :, None] * base**-exponents)[:, :, None]  # (b, l, 1, size / 2)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([half, half, x.shape[-1] - size], dim=-1)
    wide_first, wide_second = widen(first), widen(second)
    turned = (wide_first * cos - wide_second * sin, wide_second * cos + wide_first * sin)
    return torch.cat((*(T.to(x.dtype) for T in turned), rest), dim=-1)
