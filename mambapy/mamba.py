"""Mamba-1: a stack of selective state-space blocks, (b, l, d) -> (b, l, d).

From the outside in:

    Mamba                the stack:            x = x + MambaBlock(norm(x)), for every layer
      MambaBlock         one mixer:            in_proj -> convolution -> scan -> gate -> out_proj
        ops.causal_conv1d, ops.selective_scan  the two ops that look at other tokens

Letters, as in the paper (Gu & Dao 2023, arXiv 2312.00752):

    b  batch                    A  (e, n)    how fast each state decays; the same for all tokens
    l  length                   B  (b, l, n) how a token is written into the state
    d  d_model                  C  (b, l, n) how the state is read
    e  d_inner = expand * d     D  (e)       skip from x to y
    n  d_state                  dt (b, l, e) step size: how much a token counts
    k  d_conv                   R  dt_rank

Three ways through each class: `forward` for whole sequences, `prefill` for a sequence that goes on
from a state and leaves one, `step` for a single token. They give the same numbers.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.block import Mixer
from mambapy.config import MambaConfig
from mambapy.init import init_A_log
from mambapy.layers import (
    DtProjection,
    RMSNorm,
    UnscaledRMSNorm,
    is_plain,
    may_overwrite,
    product,
    taps,
    widen,
)
from mambapy.ragged import Ragged, stretch
from mambapy.stack import Stack
from mambapy.state import SSMState

if TYPE_CHECKING:
    from mambapy.ops.step_plan import Rows, StepPlan

__all__ = ["Mamba", "MambaBlock", "MambaConfig"]


class Mamba(Stack):
    """A stack of Mamba-1 blocks; see `Stack` for what it can do.

    Args:
        config: the architecture.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config, (MambaBlock(config) for _ in range(config.n_layers)))


class MambaBlock(Mixer[SSMState]):
    """One selective state-space mixer, (b, l, d) -> (b, l, d).

    Args:
        config: the architecture; `n_layers` is not used here.

    Source: Gu & Dao 2023 (arXiv 2312.00752), figure 3 and Algorithm 2.
    """

    wide: ClassVar[tuple[str, ...]] = ("A_log", "D")
    state_kind = SSMState

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        d, e, n, k, R = config.d_model, config.d_inner, config.d_state, config.d_conv, config.rank
        self.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, R + 2 * n, bias=False)
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = map(self._inner_norm, (R, n, n))
        self.dt_proj = DtProjection(R, e, config.dt_init, config.dt_scale)
        self.A_log = nn.Parameter(widen(torch.empty(e, n)))
        self.D = nn.Parameter(widen(torch.empty(e)))
        self.out_proj = nn.Linear(e, d, bias=config.bias)
        self._reset_own_parameters()

    def _inner_norm(self, d: int) -> RMSNorm | UnscaledRMSNorm | None:
        """One of the norms behind x_proj."""
        kind, eps = self.config.inner_norm, self.config.inner_norm_eps
        if kind == "none":
            return None
        return RMSNorm(d, eps) if kind == "learned" else UnscaledRMSNorm(eps)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        layers = (self.in_proj, self.conv1d, self.x_proj, *norms, self.dt_proj, self.out_proj)
        for layer in layers:
            if layer is not None:
                layer.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        """What the layers inside have not drawn themselves."""
        config = self.config
        self.dt_proj.reset_bias(config.dt_min, config.dt_max, config.dt_init_floor)
        init_A_log(self.A_log)
        nn.init.ones_(self.D)
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def output(self, inputs: Tensor, ragged: Ragged) -> Tensor:
        """What `forward` makes of in_proj's output (b, l, 2e): (b, l, d)."""
        return self._mix(inputs, None, ragged)[0]

    def prefill(
        self, x: Tensor, state: SSMState | None = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, SSMState]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""
        state = self.init_state(x.shape[0]) if state is None else state
        y, conv, ssm = self._mix(self.in_proj(x), state, ragged)
        return y, SSMState(conv, ssm)

    def step(
        self, x: Tensor, state: SSMState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, SSMState]:
        """Run one token of each sequence, (b, d) -> (b, d)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e)
        x, conv = ops.causal_conv1d_step(
            x,
            *taps(self.conv1d),
            state=state.conv,
            activation="silu",
            backend=self._plain_backend,
        )
        dt, dt_bias, B, C = self._select(x)
        dt, dt_bias, B = _stretched(dt, dt_bias, B, dt_scale)
        y, ssm = ops.selective_scan_step(
            x,
            dt,
            self._A(),
            B,
            C,
            self.D,
            z,
            state=state.ssm,
            dt_bias=dt_bias,
            dt_softplus=dt_scale is None,
            backend=self._plain_backend,
        )
        return self.out_proj(y), SSMState(conv, ssm)

    def plan_step(self, plan: "StepPlan", x: "Rows", residual: "Rows") -> bool:
        """Append `step` to a plan, adding to `residual`; False where it must be called instead."""
        weights = [product(P) for P in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)]
        in_proj, x_proj, dt_proj, out_proj = weights
        if in_proj is None or x_proj is None or dt_proj is None or out_proj is None:
            return False
        if type(self) is not MambaBlock or not is_plain(self.conv1d, nn.Conv1d):
            return False
        e, n, R = self.config.d_inner, self.config.d_state, self.config.rank
        x, z = plan.linear(x, in_proj, "in_proj").split(e, e)
        x = plan.conv(x, self.conv1d.weight, self.conv1d.bias, silu=True)
        low, B, C = plan.linear(x, x_proj, "x_proj").split(R, n, n)
        norms: list[Any] = [self.dt_layernorm, self.b_layernorm, self.c_layernorm]
        if norms[0] is not None:
            if not all(is_plain(N, RMSNorm) or is_plain(N, UnscaledRMSNorm) for N in norms):
                return False
            low, B, C = (
                plan.norm(T, N.weight, N.eps, room)
                for T, N, room in zip((low, B, C), norms, ("low", "B", "C"), strict=True)
            )
        dt = plan.linear(low, dt_proj, "dt")
        y = plan.scan(x, dt, self.A_log, B, C, self.D, z, dt_softplus=True, A_is_log=True)
        plan.linear(y, out_proj, add_to=residual)
        return True

    def state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `SSMState`."""
        e, n, k = self.config.d_inner, self.config.d_state, self.config.d_conv
        return {"conv": (batch_size, k - 1, e), "ssm": (batch_size, e, n)}

    def _mix(
        self, inputs: Tensor, state: SSMState | None, ragged: Ragged
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output (b, l, d), and what comes after `state`: conv (b, k-1, e), ssm (b, e, n)."""
        conv = inputs
        if state is not None:
            conv = ops.conv_state(
                inputs.chunk(2, dim=-1)[0],
                self.config.d_conv - 1,
                state=state.conv,
                seq_idx=ragged.seq_idx,
                lengths=ragged.lengths,
            )
        x, again, z = ops.conv_and_gate(  # (b, l, e)
            inputs,
            *taps(self.conv1d),
            activation="silu",
            state=None if state is None else state.conv,
            seq_idx=ragged.seq_idx,
            overwrite=may_overwrite(self.in_proj),
            backend=self._plain_backend,
        )
        dt, dt_bias, B, C = self._select(again)
        dt = ragged.stop_padding(dt)
        dt, dt_bias, B = _stretched(dt, dt_bias, B, ragged.dt_scale)
        y, ssm = ops.selective_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            self.D,
            z,
            dt_bias=dt_bias,
            dt_softplus=ragged.dt_scale is None,
            state=None if state is None else state.ssm,
            seq_idx=ragged.seq_idx,
            return_state=True,
            out=dt if may_overwrite(self.dt_proj) and dt.dtype == x.dtype else None,
            backend=self.config.backend,
        )
        return self.out_proj(y), conv, ssm

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What makes the scan selective: dt, its bias, B and C, all made from the token itself."""
        n, R = self.config.d_state, self.config.rank
        low, B, C = self.x_proj(x).split([R, n, n], dim=-1)  # (..., R), (..., n), (..., n)
        if self.dt_layernorm and self.b_layernorm and self.c_layernorm:
            low, B, C = self.dt_layernorm(low), self.b_layernorm(B), self.c_layernorm(C)
        dt, dt_bias = DtProjection.parts(self.dt_proj, low)  # (..., e)
        return dt, dt_bias, B, C

    @property
    def _plain_backend(self) -> str:
        """The backend of what is not the scan: the definition where that is asked for."""
        return "reference" if self.config.backend == "reference" else "auto"

    def _A(self) -> Tensor:  # noqa: N802 (the papers' letter)
        """A (e, n), below zero whatever A_log is."""
        return -torch.exp(self.A_log)


def _stretched(
    dt: Tensor, dt_bias: Tensor | None, B: Tensor, dt_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dt, its bias and B, as they are without dt_scale; else dt is after softplus, and longer."""
    if dt_scale is None:
        return dt, dt_bias, B
    delta, B = stretch(F.softplus(widen(dt) + (0 if dt_bias is None else dt_bias)), B, dt_scale)
    return delta, None, B
