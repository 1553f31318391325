"""Mamba-3: a stack of blocks whose state turns as it decays, (b, l, d) -> (b, l, d).

From the outside in:

    Mamba3               the stack, see stack.py: after each mixer comes a gated MLP
      Mamba3Block        one mixer:   in_proj -> norms of B and C -> mamba3_scan -> gate -> out_proj
        ops.mamba3_scan               the only op that looks at other tokens

Letters, beside those of mamba2.py:

    r  mimo_rank   inputs and outputs that a head's state has at each step; 1 is SISO
    s  n_angles    pairs of channels of B and C that are turned
    omega          how fast they turn, the same for all heads
    trap           1: a token counts at its own step; 0: at the next one

What changed since Mamba-2: the state turns, so that it can count modulo something; a token is
written half at its own step and half at the next (the trapezoidal rule), which does the work of the
convolution; A is made from the token, too; norms and biases on B and C.

Source: Mamba-3 (2026) and its released code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import Mixer
from mambapy.config import Mamba3Config
from mambapy.init import init_dt_bias
from mambapy.layers import GatedRMSNorm, RMSNorm, widen
from mambapy.ragged import Ragged
from mambapy.stack import Stack
from mambapy.state import Mamba3State

__all__ = ["Mamba3", "Mamba3Block", "Mamba3Config"]


class Mamba3(Stack):
    """A stack of Mamba-3 blocks; see `Stack` for what it can do.

    Args:
        config: the architecture.
    """

    can_plan = False

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__(config, (Mamba3Block(config) for _ in range(config.n_layers)))


class Mamba3Block(Mixer[Mamba3State]):
    """One Mamba-3 mixer, (b, l, d) -> (b, l, d).

    Args:
        config: the architecture; `n_layers` is not used here.
    """

    wide = ("dt_bias", "D", "B_bias", "C_bias")
    state_kind = Mamba3State

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        d, e, h, p = config.d_model, config.d_inner, config.n_heads, config.d_head
        g, n, r, s = config.n_groups, config.d_state, config.mimo_rank, config.n_angles
        # What in_proj gives, in this order: z, x, B, C, dt, A, trap, omega.
        self.parts = [e, e, r * g * n, r * g * n, h, h, h, s]
        self.in_proj = nn.Linear(d, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(widen(torch.empty(h)))
        self.B_bias = nn.Parameter(widen(torch.empty(h, r, n)))
        self.C_bias = nn.Parameter(widen(torch.empty(h, r, n)))
        self.B_norm = RMSNorm(n, config.rms_norm_eps)
        self.C_norm = RMSNorm(n, config.rms_norm_eps)
        self.D = nn.Parameter(widen(torch.empty(h)))
        self.mimo_x = nn.Parameter(torch.empty(h, r, p)) if r > 1 else None
        self.mimo_z = nn.Parameter(torch.empty(h, r, p)) if r > 1 else None
        self.mimo_o = nn.Parameter(torch.empty(h, r, p)) if r > 1 else None
        self.norm = (
            GatedRMSNorm(e, h, config.rms_norm_eps, norm_before_gate=True)
            if config.outproj_norm
            else None
        )
        self.out_proj = nn.Linear(e, d, bias=False)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in (self.in_proj, self.B_norm, self.C_norm, self.norm, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        """What the layers inside have not drawn themselves."""
        config = self.config
        init_dt_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        for T in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(T)
        share = 1 / config.mimo_rank
        for weight, value in ((self.mimo_x, share), (self.mimo_z, 1.0), (self.mimo_o, share)):
            if weight is not None:
                nn.init.constant_(weight, value)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, ...): (b, l, d)."""
        return self._mix(inputs, None, ragged)[0]

    def prefill(
        self, x: Tensor, state: Mamba3State | None = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, Mamba3State]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""
        state = self.init_state(x.shape[0]) if state is None else state
        return self._mix(self.in_proj(x), state, ragged)

    def step(
        self, x: Tensor, state: Mamba3State, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        """Run one token of each sequence, (b, d) -> (b, d)."""
        z, (x, dt, A, trap, omega, B, C) = self._split(self.in_proj(x), dt_scale)
        y, parts = ops.mamba3_step(
            *(x, dt, A, trap, omega, B, C, self.D),
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            rotate=self.config.rotation,
            state=_parts(state),
        )
        return self._finish(y, z), Mamba3State(*parts)

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `Mamba3State`."""
        config = self.config
        h, p, n = config.n_heads, config.d_head, config.d_state
        return {
            "phase": (batch_size, h, config.n_angles),
            "ssm": (batch_size, h, p, n),
            "key": (batch_size, config.mimo_rank, h, n),
            "value": (batch_size, h, p),
        }

    def _mix(
        self, inputs: Tensor, state: Mamba3State | None, ragged: Ragged
    ) -> tuple[Tensor, Mamba3State]:
        """The output (b, l, d), and the state after it."""
        z, parts = self._split(inputs, ragged.dt_scale)
        y, last = ops.mamba3_scan(
            *parts,
            self.D,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            mimo_x=self.mimo_x,
            rotate=self.config.rotation,
            chunk_size=self.config.chunk_size,
            state=None if state is None else _parts(state),
            seq_idx=ragged.seq_idx,
            lengths=ragged.lengths,
            return_state=True,
            backend=self.config.backend,
        )
        return self._finish(y, z), Mamba3State(*last)

    def _split(self, inputs: Tensor, dt_scale: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """z (..., h, p), and what the recurrence takes: x, dt, A, trap, omega, B, C."""
        config = self.config
        z, x, B, C, dt, A, trap, omega = inputs.split(self.parts, dim=-1)
        z, x = (T.unflatten(-1, (config.n_heads, config.d_head)) for T in (z, x))
        rows = (config.mimo_rank, config.n_groups, config.d_state)
        B, C = self.B_norm(B.unflatten(-1, rows)), self.C_norm(C.unflatten(-1, rows))
        dt = F.softplus(widen(dt) + self.dt_bias)
        rate = widen(A)
        rate = heavy_tail(rate) if config.a_activation == "heavy_tail" else F.softplus(rate)
        A, omega = -rate.clamp(min=config.A_floor), math.pi * torch.tanh(widen(omega))
        if dt_scale is not None:
            # The state decays and turns for the whole gap; tokens are written as ever.
            A, omega = A * dt_scale[..., None], omega * dt_scale[..., None]
        return z, (x, dt, A, torch.sigmoid(widen(trap)), omega, B, C)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate y (..., r, h, p) by z (..., h, p), add up a step's outputs, and project."""
        z = z.unsqueeze(-3)  # (..., 1, h, p)
        if self.mimo_z is not None:
            z = z * self.mimo_z.transpose(0, 1)  # (..., r, h, p)
        if self.norm is None:
            y = y * F.silu(z)
        else:
            y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, y.shape[-2:])
        if self.mimo_o is not None:
            y = y * self.mimo_o.transpose(0, 1)
        y = y.squeeze(-3) if y.shape[-3] == 1 else y.sum(-3)  # (..., h, p)
        return self.out_proj(y.flatten(-2))


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x >= 0, else 1 / (1 - x): positive, and slow to reach either end."""
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


def _parts(state: Mamba3State) -> ops.Mamba3Parts:
    """The state as the ops take it."""
    return ops.Mamba3Parts(state.phase, state.ssm, state.key, state.value)
