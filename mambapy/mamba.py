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

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambapy import ops
from mambapy.config import MambaConfig
from mambapy.errors import ShapeError
from mambapy.fused import FusedStep
from mambapy.init import init_A_log, rescale_residual
from mambapy.layers import (
    DtProjection,
    Mixer,
    ResidualBlock,
    is_plain,
    may_overwrite,
    product,
    wide,
    widen,
)
from mambapy.ragged import Ragged
from mambapy.state import ModelState, SSMState

if TYPE_CHECKING:
    from mambapy.ops.cpu.step import Rows, StepPlan

__all__ = ["Mamba", "MambaBlock", "MambaConfig"]


class Mamba(FusedStep):
    """A stack of Mamba-1 blocks, each with a norm before it and a residual around it.

    Args:
        config: the architecture.

    Attributes:
        gradient_checkpointing: set it to True to keep only each block's input for the backward
            pass, and compute the rest again: less memory, one more forward pass of time.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.layers: Sequence[ResidualBlock] = nn.ModuleList(  # type: ignore[assignment]
            ResidualBlock(MambaBlock(config), config.d_model, config.rms_norm_eps)
            for _ in range(config.n_layers)
        )
        self._rescale()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in self.layers:
            layer.norm.reset_parameters()
            layer.mixer.reset_parameters()
        self._rescale()

    def _rescale(self) -> None:
        """Shrink the last projection of each residual branch."""
        if self.config.rescale_out_proj:
            for layer in self.layers:
                rescale_residual(layer.mixer.out_proj.weight, self.config.n_layers)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Run whole sequences.

        Args:
            x: (b, l, d) floating point, l >= 1.
            mask: (b, l) bool, True at real tokens; padding may stand anywhere.
            seq_idx: (b, l) integers, the document of each token, where a row packs several. A
                negative one is padding.

        Returns:
            (b, l, d) in x's dtype; zeros at padding.

        Raises:
            ShapeError: an argument does not fit.
        """
        self._check(x, 3)
        ragged = Ragged.of(x, mask, seq_idx)
        return ragged.restore(self.run(ragged.pack(x), ragged))

    def prefill(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Run sequences that go on from a state, and return the state they leave.

        Any split of a sequence into calls gives what one call gives. Differentiable through the
        state; `state.detach()` cuts the graph.

        Args:
            x: (b, l, d) floating point, l >= 1.
            state: what an earlier call returned; a fresh one without it. It is not changed.
            mask: (b, l) bool, True at real tokens. A row's state stands after its last real token.
            seq_idx: (b, l) integers, the document of each token; a row whose first document is not
                the one its state stopped in starts afresh.

        Returns:
            (b, l, d) in x's dtype, and the new state.

        Raises:
            ShapeError: an argument does not fit, the state's batch for instance.
        """
        self._check(x, 3)
        ragged = Ragged.of(x, mask, seq_idx)
        y, state = self.run_from(ragged.pack(x), state, ragged)
        return ragged.restore(y), state

    def step(self, x: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Run one token of each sequence, at a cost that does not depend on how many came before.

        Args:
            x: (b, d) floating point.
            state: what the last call returned, or `init_state`. It is not changed.

        Returns:
            (b, d) in x's dtype, and the new state.

        Raises:
            ShapeError: an argument does not fit.
        """
        self._check(x, 2)
        self.check_state(state, x.shape[0])
        if (found := self.fused_step(x, state, self.config.backend)) is not None:
            return found[0].to(x.dtype), found[1]
        residual, states = self._to_residual(x), []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            residual, layer_state = layer.step(residual, layer_state)
            states.append(layer_state)
        return residual.to(x.dtype), ModelState(tuple(states), state.seq_idx)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token: zeros, on the parameters' device."""
        layers = tuple(layer.mixer.init_state(batch_size) for layer in self.layers)
        device = next(iter(layers[0].tensors().values())).device
        return ModelState(layers, torch.full((batch_size,), -1, device=device))

    def run(self, x: Tensor, ragged: Ragged) -> Tensor:
        """`forward` for rows that `Ragged.pack` has laid out."""
        residual = self._to_residual(x)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                residual = checkpoint(layer, residual, ragged, use_reentrant=False)
            else:
                residual = layer(residual, ragged)
        return residual.to(x.dtype)

    def run_from(
        self, x: Tensor, state: ModelState | None, ragged: Ragged
    ) -> tuple[Tensor, ModelState]:
        """`prefill` for rows that `Ragged.pack` has laid out."""
        state = self.init_state(x.shape[0]) if state is None else state
        self.check_state(state, x.shape[0])
        goes_on = ragged.continues(state.seq_idx)
        residual, states = self._to_residual(x), []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            if goes_on is not None:
                layer_state = layer_state.map(
                    lambda T: torch.where(goes_on.view(-1, *[1] * (T.dim() - 1)), T, 0.0)
                )
            residual, layer_state = layer.prefill(residual, layer_state, ragged)
            states.append(layer_state)
        return residual.to(x.dtype), ModelState(tuple(states), ragged.last_document(state.seq_idx))

    def plan_step(self, plan: "StepPlan", residual: "Rows") -> "Rows | None":
        """Append `step` to a plan; the rows of its result, or None if a layer must be called."""
        planned = all(layer.plan_step(plan, residual) for layer in self.layers)
        return residual if planned else None

    def _to_residual(self, x: Tensor) -> Tensor:
        """The residual stream in its own dtype."""
        if self.config.residual_in_fp32:
            return x.to(torch.promote_types(x.dtype, torch.float32))
        return x

    def _check(self, x: Tensor, dims: int) -> None:
        """Raise unless x is (b, l, d) or (b, d), floating point, not empty."""
        d = self.config.d_model
        shape = "(b, l, d)" if dims == 3 else "(b, d)"
        if not isinstance(x, Tensor):
            raise ShapeError(f"x must be a tensor {shape}, got {type(x).__name__}")
        if x.dim() != dims or x.shape[-1] != d or 0 in x.shape:
            raise ShapeError(f"x must be {shape} with d = {d} and no size 0, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ShapeError(f"x must be floating point, got {x.dtype}")

    def check_state(self, state: ModelState, batch_size: int) -> None:
        """Raise unless the state fits this model, this batch, and the parameters' device."""
        if not isinstance(state, ModelState) or len(state.layers) != len(self.layers):
            raise ShapeError(f"the state is not one of a model with {len(self.layers)} layers")
        for i, (layer, layer_state) in enumerate(zip(self.layers, state.layers, strict=True)):
            layer.mixer.check_state(layer_state, batch_size, f"layer {i}'s state")
        if state.seq_idx.shape != (batch_size,):
            raise ShapeError(
                f"the state's seq_idx must be ({batch_size},), got {tuple(state.seq_idx.shape)}"
            )


class MambaBlock(Mixer):
    """One selective state-space mixer, (b, l, d) -> (b, l, d).

    Args:
        config: the architecture; `n_layers` is not used here.

    Source: Gu & Dao 2023 (arXiv 2312.00752), figure 3 and Algorithm 2.
    """

    wide = ("A_log", "D")

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        d, e, n, k, R = config.d_model, config.d_inner, config.d_state, config.d_conv, config.rank
        self.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, R + 2 * n, bias=False)
        self.dt_proj = DtProjection(R, e, config.dt_init, config.dt_scale)
        self.A_log = nn.Parameter(widen(torch.empty(e, n)))
        self.D = nn.Parameter(widen(torch.empty(e)))
        self.out_proj = nn.Linear(e, d, bias=config.bias)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
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

    def forward(self, x: Tensor, ragged: Ragged = Ragged()) -> Tensor:
        """Run whole sequences, (b, l, d) -> (b, l, d)."""
        return self._mix(x, None, ragged)[0]

    def prefill(
        self, x: Tensor, state: SSMState | None = None, ragged: Ragged = Ragged()
    ) -> tuple[Tensor, SSMState]:
        """Run sequences (b, l, d) that go on from a state, and return the state they leave."""
        state = self.init_state(x.shape[0]) if state is None else state
        y, conv, ssm = self._mix(x, state, ragged)
        return y, SSMState(conv, ssm)

    def step(self, x: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        """Run one token of each sequence, (b, d) -> (b, d)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e)
        x, conv = ops.causal_conv1d_step(
            x,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            state=state.conv,
            activation="silu",
            backend=self._plain_backend,
        )
        dt, dt_bias, B, C = self._select(x)
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
            dt_softplus=True,
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
        dt = plan.linear(low, dt_proj, "dt")
        y = plan.scan(x, dt, self.A_log, B, C, self.D, z, dt_softplus=True, A_is_log=True)
        plan.linear(y, out_proj, add_to=residual)
        return True

    def init_state(self, batch_size: int) -> SSMState:
        """The state before the first token: zeros, float32 or wider."""
        e, n, k = self.config.d_inner, self.config.d_state, self.config.d_conv
        like = widen(self.A_log)
        return SSMState(like.new_zeros(batch_size, k - 1, e), like.new_zeros(batch_size, e, n))

    def check_state(self, state: SSMState, batch_size: int, name: str) -> None:
        """Raise a ShapeError unless the state is one of this block, for that batch."""
        e, n, k = self.config.d_inner, self.config.d_state, self.config.d_conv
        if not isinstance(state, SSMState):
            raise ShapeError(f"{name} must be an SSMState, got {type(state).__name__}")
        expected = {"conv": (batch_size, k - 1, e), "ssm": (batch_size, e, n)}
        dtype, device = wide(self.A_log.dtype), self.A_log.device
        for field, shape in expected.items():
            T = getattr(state, field)
            if T.shape != shape:
                raise ShapeError(f"{name}: {field} must be {shape}, got {tuple(T.shape)}")
            if T.dtype != dtype or T.device != device:
                raise ShapeError(
                    f"{name}: {field} must be {dtype} on {device}, got {T.dtype} on {T.device}"
                )

    def _mix(
        self, x: Tensor, state: SSMState | None, ragged: Ragged
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output (b, l, d), and what comes after `state`: conv (b, k-1, e), ssm (b, e, n)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e)
        conv = x
        if state is not None:
            conv = ops.conv_state(
                x,
                self.config.d_conv - 1,
                state=state.conv,
                seq_idx=ragged.seq_idx,
                lengths=ragged.lengths,
            )
        x = ops.causal_conv1d(
            x,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            activation="silu",
            state=None if state is None else state.conv,
            seq_idx=ragged.seq_idx,
            out=x if may_overwrite(self.in_proj) else None,
            backend=self._plain_backend,
        )
        dt, dt_bias, B, C = self._select(x)
        dt = ragged.stop_padding(dt)
        y, ssm = ops.selective_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            self.D,
            z,
            dt_bias=dt_bias,
            dt_softplus=True,
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
        dt, dt_bias = DtProjection.parts(self.dt_proj, low)  # (..., e)
        return dt, dt_bias, B, C

    @property
    def _plain_backend(self) -> str:
        """The backend of what is not the scan: the definition where that is asked for."""
        return "reference" if self.config.backend == "reference" else "auto"

    def _A(self) -> Tensor:  # noqa: N802 (the papers' letter)
        """A (e, n), below zero whatever A_log is."""
        return -torch.exp(self.A_log)
