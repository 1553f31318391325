"""Mixers that look both ways, (b, l, d) -> (b, l, d): two recurrences between shared projections.

    BiMambaBlock     in_proj -> two times, forward and backward in time: convolution -> scan -> gate
                     -> their mean -> out_proj
    BiMamba2Block    the same of Mamba-2: the gated norm comes after the mean

What belongs to the backward direction has a "b" more in its name, as in Vim's checkpoints. A token
sees all others, so there is no state after it: such a model has no prefill and no step.

Source: Zhu et al. 2024 (arXiv 2401.09417), version 2 of its block.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.config import Mamba2Config, MambaConfig
from mambapy.errors import ConfigError
from mambapy.init import init_A_log, init_A_log_uniform, init_dt_bias
from mambapy.layers import DtProjection, taps, widen
from mambapy.mamba import MambaBlock
from mambapy.mamba2 import Mamba2Block
from mambapy.ragged import Ragged


class BiMambaBlock(MambaBlock):
    """Mamba-1 in both directions.

    Args:
        config: the architecture; both directions have its sizes.
    """

    wide = (*MambaBlock.wide, "A_b_log", "D_b")

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        if config.inner_norm != "none":
            raise ConfigError("inner_norm must be 'none' in a bidirectional block")
        e, n, k, R = config.d_inner, config.d_state, config.d_conv, config.rank
        self.conv1d_b = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj_b = nn.Linear(e, R + 2 * n, bias=False)
        self.dt_proj_b = DtProjection(R, e, config.dt_init, config.dt_scale)
        self.A_b_log = nn.Parameter(widen(torch.empty(e, n)))
        self.D_b = nn.Parameter(widen(torch.empty(e)))
        self._reset_backward()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        super().reset_parameters()
        for layer in (self.conv1d_b, self.x_proj_b, self.dt_proj_b):
            layer.reset_parameters()
        self._reset_backward()

    def _reset_backward(self) -> None:
        """What the layers of the backward direction have not drawn themselves."""
        config = self.config
        self.dt_proj_b.reset_bias(config.dt_min, config.dt_max, config.dt_init_floor)
        init_A_log(self.A_b_log)
        nn.init.ones_(self.D_b)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, 2e): (b, l, d)."""
        x, z = inputs.chunk(2, dim=-1)  # (b, l, e)
        y = self._direction(x, z, ragged, backward=False)
        return self.out_proj(y + self._direction(x, z, ragged, backward=True))

    def _direction(self, x: Tensor, z: Tensor, ragged: Ragged, *, backward: bool) -> Tensor:
        """Half of what one direction makes of x and its gate z (b, l, e)."""
        n, R = self.config.d_state, self.config.rank
        conv1d, x_proj, dt_proj, A_log, D = (
            (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            if backward
            else (self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        )
        if backward:
            # Backward in time padding comes first: it must be like the zeros before a sequence.
            x = ragged.clear(x)
        x = ops.causal_conv1d(
            x,
            *taps(conv1d),
            activation="silu",
            seq_idx=ragged.seq_idx,
            reverse=backward,
            backend=self._plain_backend,
        )
        low, B, C = x_proj(x).split([R, n, n], dim=-1)
        dt, dt_bias = DtProjection.parts(dt_proj, low)
        # y is linear in C and D together, which are smaller than y.
        return ops.selective_scan(
            x,
            ragged.stop_padding(dt),
            -torch.exp(A_log),
            B,
            C / 2,
            D / 2,
            z,
            dt_bias=dt_bias,
            dt_softplus=True,
            seq_idx=ragged.seq_idx,
            reverse=backward,
            backend=self.config.backend,
        )

    def prefill(self, x: Tensor, state: Any = None, ragged: Ragged = Ragged()) -> NoReturn:
        """There is none."""
        _has_no_state()

    def step(self, x: Tensor, state: Any, dt_scale: Tensor | None = None) -> NoReturn:
        """There is none."""
        _has_no_state()


class BiMamba2Block(Mamba2Block):
    """Mamba-2 in both directions.

    Args:
        config: the architecture; both directions have its sizes.
    """

    wide = (*Mamba2Block.wide, "A_b_log", "D_b", "dt_bias_b")

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        if config.learnable_init_states:
            raise ConfigError("learnable_init_states must be False in a bidirectional block")
        channels, k = self.conv1d.in_channels, config.d_conv
        self.conv1d_b = nn.Conv1d(
            channels, channels, k, groups=channels, padding=k - 1, bias=config.conv_bias
        )
        self.dt_bias_b = nn.Parameter(torch.empty_like(self.dt_bias))
        self.A_b_log = nn.Parameter(torch.empty_like(self.A_log))
        self.D_b = nn.Parameter(torch.empty_like(self.D))
        self._reset_backward()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        super().reset_parameters()
        self.conv1d_b.reset_parameters()
        self._reset_backward()

    def _reset_backward(self) -> None:
        """What the layers of the backward direction have not drawn themselves."""
        config = self.config
        init_dt_bias(self.dt_bias_b, config.dt_min, config.dt_max, config.dt_init_floor)
        init_A_log_uniform(self.A_b_log, *config.A_init_range)
        nn.init.ones_(self.D_b)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, ...): (b, l, d)."""
        gate, value, z, xBC, dt = inputs.split(self.parts, dim=-1)  # (b, l, ...)
        y = self._direction(xBC, dt, ragged, backward=False)
        y = y + self._direction(xBC, dt, ragged, backward=True)
        return self._finish(y / 2, z, gate, value)

    def _direction(self, xBC: Tensor, dt: Tensor, ragged: Ragged, *, backward: bool) -> Tensor:
        """What one direction makes of x, B, C and dt: (b, l, h, p)."""
        conv1d, dt_bias, A_log, D = (
            (self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b)
            if backward
            else (self.conv1d, self.dt_bias, self.A_log, self.D)
        )
        seq_idx = ragged.seq_idx
        xBC = ops.causal_conv1d(
            ragged.clear(xBC) if backward else xBC,
            *taps(conv1d),
            activation="silu",
            seq_idx=seq_idx,
            reverse=backward,
            backend=self._plain_backend,
        )
        delta = F.softplus(widen(dt) + dt_bias).clamp(*self.config.dt_limit)  # (b, l, h)
        delta = ragged.no_step(delta)
        if backward:
            # ssd has one direction.
            xBC, delta = xBC.flip(1), delta.flip(1)
            seq_idx = None if seq_idx is None else seq_idx.flip(1)
        x, B, C = self._split(xBC)
        y = ops.ssd(
            x,
            delta,
            -torch.exp(A_log),
            B,
            C,
            D,
            chunk_size=self.config.chunk_size,
            seq_idx=seq_idx,
            backend=self.config.backend,
        )
        return y.flip(1) if backward else y

    def prefill(self, x: Tensor, state: Any = None, ragged: Ragged = Ragged()) -> NoReturn:
        """There is none."""
        _has_no_state()

    def step(self, x: Tensor, state: Any, dt_scale: Tensor | None = None) -> NoReturn:
        """There is none."""
        _has_no_state()


def _has_no_state() -> NoReturn:
    """Say why."""
    raise ConfigError(
        "a bidirectional model has no prefill and no step: every token sees those after it; run "
        "whole sequences with forward"
    )
