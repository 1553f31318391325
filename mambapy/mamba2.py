"""Mamba-2: a stack of state-space-dual blocks, (b, l, d) -> (b, l, d).

From the outside in:

    Mamba2               the stack, see stack.py
      Mamba2Block        one mixer:   in_proj -> convolution -> ssd -> gated norm -> out_proj
        ops.causal_conv1d, ops.ssd    the two ops that look at other tokens

Letters, as in the paper (Dao & Gu 2024, arXiv 2405.21060):

    b  batch      h  heads               A  (h)          how fast a head's state decays
    l  length     p  channels of a head  B  (b, l, g, n) how a token is written into the state
    d  d_model    g  groups of heads     C  (b, l, g, n) how the state is read
    n  d_state    k  d_conv              D  (h) or (h, p)  skip from x to y
                                         dt (b, l, h)    step size: how much a token counts

What changed since Mamba-1: one decay for all channels and states of a head, so that the recurrence
becomes matrix products; B, C and dt come straight from the block's input, beside x.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import Mixer
from mambapy.config import Mamba2Config
from mambapy.init import init_A_log_uniform, init_dt_bias
from mambapy.layers import GatedRMSNorm, is_plain, may_overwrite, product, taps, widen
from mambapy.ragged import Ragged, stretch
from mambapy.stack import Stack
from mambapy.state import Mamba2State

if TYPE_CHECKING:
    from mambapy.ops.step_plan import Rows, StepPlan

__all__ = ["Mamba2", "Mamba2Block", "Mamba2Config"]


class Mamba2(Stack):
    """A stack of Mamba-2 blocks; see `Stack` for what it can do.

    Args:
        config: the architecture.
    """

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config, (Mamba2Block(config) for _ in range(config.n_layers)))


class Mamba2Block(Mixer[Mamba2State]):
    """One state-space-dual mixer, (b, l, d) -> (b, l, d).

    Args:
        config: the architecture; `n_layers` is not used here.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.1 and figure 6.
    """

    wide: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "init_states")
    state_kind = Mamba2State

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        d, e, h, p = config.d_model, config.d_ssm_channels, config.n_heads, config.d_head
        g, n, k = config.n_groups, config.d_state, config.d_conv
        # What in_proj gives, in this order: a gated MLP beside the recurrence (its gate and its
        # value), then the gate z, what is convolved (x, B and C), and dt.
        mlp = config.d_inner - e
        self.parts = [mlp, mlp, e, e + 2 * g * n, h]
        self.in_proj = nn.Linear(d, sum(self.parts), bias=config.bias)
        channels = e + 2 * g * n
        self.conv1d = nn.Conv1d(
            channels, channels, k, groups=channels, padding=k - 1, bias=config.conv_bias
        )
        self.dt_bias = nn.Parameter(widen(torch.empty(h)))
        self.A_log = nn.Parameter(widen(torch.empty(h)))
        self.D = nn.Parameter(widen(torch.empty((h, p) if config.D_has_hdim else (h,))))
        learned = config.learnable_init_states
        self.init_states = nn.Parameter(widen(torch.empty(h, p, n))) if learned else None
        self.norm = (
            GatedRMSNorm(e, g, config.rms_norm_eps, norm_before_gate=config.norm_before_gate)
            if config.rmsnorm
            else None
        )
        self.out_proj = nn.Linear(config.d_inner, d, bias=config.bias)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            if layer is not None:
                layer.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        """What the layers inside have not drawn themselves."""
        config = self.config
        init_dt_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        init_A_log_uniform(self.A_log, *config.A_init_range)
        nn.init.ones_(self.D)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, ...): (b, l, d)."""
        return self._mix(inputs, None, ragged)[0]

    def prefill(
        self, x: Tensor, state: Mamba2State | None = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, Mamba2State]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""
        state = self.init_state(x.shape[0]) if state is None else state
        y, conv, ssm = self._mix(self.in_proj(x), state, ragged)
        return y, Mamba2State(conv, ssm)

    def step(
        self, x: Tensor, state: Mamba2State, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Run one token of each sequence, (b, d) -> (b, d)."""
        gate, value, z, xBC, dt = self.in_proj(x).split(self.parts, dim=-1)
        xBC, conv = ops.causal_conv1d_step(
            xBC,
            *taps(self.conv1d),
            state=state.conv,
            activation="silu",
            backend=self._plain_backend,
        )
        x, B, C = self._split(xBC)
        delta, B = stretch(self._delta(dt), B, dt_scale)
        y, ssm = ops.ssd_step(x, delta, self._A(), B, C, self.D, state=state.ssm)
        return self._finish(y, z, gate, value), Mamba2State(conv, ssm)

    def plan_step(self, plan: "StepPlan", x: "Rows", residual: "Rows") -> bool:
        """Append `step` to a plan, adding to `residual`; False where it must be called instead."""
        config, norm = self.config, self.norm
        in_proj, out_proj = product(self.in_proj), product(self.out_proj)
        if in_proj is None or out_proj is None or norm is None or self.parts[0]:
            return False
        if type(self) is not Mamba2Block or not is_plain(self.conv1d, nn.Conv1d):
            return False
        if not is_plain(norm, GatedRMSNorm) or norm.norm_before_gate:
            return False
        groups = config.n_groups * config.d_state
        _, _, z, xBC, dt = plan.linear(x, in_proj, "in_proj").split(*self.parts)
        xBC = plan.conv(xBC, self.conv1d.weight, self.conv1d.bias, silu=True)
        x, B, C = xBC.split(config.d_ssm_channels, groups, groups)
        y = plan.ssd(
            x,
            dt,
            self.A_log,
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_limit=config.dt_limit,
            d_head=config.d_head,
            n_groups=config.n_groups,
        )
        y = plan.gated_norm(y, z, norm.weight, norm.n_groups, norm.eps)
        plan.linear(y, out_proj, add_to=residual)
        return True

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `Mamba2State`."""
        config = self.config
        channels = self.conv1d.in_channels
        return {
            "conv": (batch_size, config.d_conv - 1, channels),
            "ssm": (batch_size, config.n_heads, config.d_head, config.d_state),
        }

    def init_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token: zeros, but for a learned h."""
        state = super().init_state(batch_size)
        if self.init_states is None:
            return state
        return Mamba2State(state.conv, widen(self.init_states).expand(batch_size, -1, -1, -1))

    def _mix(
        self, inputs: Tensor, state: Mamba2State | None, ragged: Ragged
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output (b, l, d), and what comes after `state`: conv and ssm."""
        gate, value, z, xBC, dt = inputs.split(self.parts, dim=-1)  # (b, l, ...)
        conv = xBC
        if state is not None:
            conv = ops.conv_state(
                xBC,
                self.config.d_conv - 1,
                state=state.conv,
                seq_idx=ragged.seq_idx,
                lengths=ragged.lengths,
            )
        elif self.init_states is not None:
            # Where no state is asked for, h may start from what was learned all the same.
            state = self.init_state(inputs.shape[0])
        xBC = ops.causal_conv1d(
            xBC,
            *taps(self.conv1d),
            activation="silu",
            state=None if state is None else state.conv,
            seq_idx=ragged.seq_idx,
            out=xBC if may_overwrite(self.in_proj) else None,
            backend=self._plain_backend,
        )
        x, B, C = self._split(xBC)
        # After the limit, which could make a step of no step.
        delta = ragged.no_step(self._delta(dt))  # (b, l, h)
        delta, B = stretch(delta, B, ragged.dt_scale)
        y, ssm = ops.ssd(
            x,
            delta,
            self._A(),
            B,
            C,
            self.D,
            chunk_size=self.config.chunk_size,
            state=None if state is None else state.ssm,
            seq_idx=ragged.seq_idx,
            return_state=True,
            out=x if may_overwrite(self.in_proj) else None,
            backend=self.config.backend,
        )
        if self.init_states is not None and ragged.seq_idx is not None:
            more, ssm_more = ops.ssd_from_start(
                self.init_states, delta, self._A(), C, ragged.seq_idx
            )
            y, ssm = y + more.to(y.dtype), ssm + ssm_more
        return self._finish(y, z, gate, value), conv, ssm

    def _delta(self, dt: Tensor) -> Tensor:
        """The step sizes (..., h)."""
        return F.softplus(widen(dt) + self.dt_bias).clamp(*self.config.dt_limit)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., h, p), B and C (..., g, n)."""
        config = self.config
        groups = config.n_groups * config.d_state
        x, B, C = xBC.split([config.d_ssm_channels, groups, groups], dim=-1)
        B, C = (T.unflatten(-1, (config.n_groups, config.d_state)) for T in (B, C))
        return x.unflatten(-1, (config.n_heads, config.d_head)), B, C

    def _finish(self, y: Tensor, z: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """Gate and norm, the MLP beside the recurrence, and out_proj."""
        y = y.flatten(-2)  # (..., e)
        if self.norm is None:
            y = y * F.silu(z)
        else:
            own = may_overwrite(self.in_proj) and is_plain(self.norm, GatedRMSNorm)
            y = self.norm(y, z, overwrite=own)
        if value.shape[-1]:
            y = torch.cat((F.silu(gate) * value, y), dim=-1)  # (..., d_inner)
        return self.out_proj(y)

    @property
    def _plain_backend(self) -> str:
        """The backend of the convolution: the definition where that is asked for."""
        return "reference" if self.config.backend == "reference" else "auto"

    def _A(self) -> Tensor:  # noqa: N802 (the papers' letter)
        """A (h), below zero whatever A_log is."""
        return -torch.exp(self.A_log)
