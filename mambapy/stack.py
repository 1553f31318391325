"""What every stack of blocks is, (b, l, d) -> (b, l, d): the mixers differ, this does not.

Mamba, Mamba2 and Mamba3 are a `Stack` each:  x = x + mixer(norm(x)), for every layer, and where the
configuration has an MLP, x = x + mlp(norm2(x)) after it.

Three ways through a stack: `forward` for whole sequences, `prefill` for a sequence that goes on
from a state and leaves one, `step` for a single token. They give the same numbers.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mambapy.block import GatedMLP, Mixer, ResidualBlock, recomputed
from mambapy.config import RECOMPUTE, StackConfig
from mambapy.errors import ConfigError, ShapeError
from mambapy.experts import Experts
from mambapy.fused import FusedStep
from mambapy.init import rescale_residual
from mambapy.layers import is_plain
from mambapy.ragged import Ragged, check_dt_scale
from mambapy.state import ModelState

if TYPE_CHECKING:
    from mambapy.ops.step_plan import Rows, StepPlan


class Stack(FusedStep):
    """A stack of blocks, each with a norm before it and a residual around it.

    Args:
        config: the architecture.
        mixers: one for each block.

    """

    def __init__(self, config: StackConfig, mixers: Iterable[Mixer[Any]]) -> None:
        super().__init__()
        self.config = config
        self._recompute = "none"
        self.layers: Sequence[ResidualBlock] = nn.ModuleList(  # type: ignore[assignment]
            ResidualBlock(
                mixer,
                config.d_model,
                config.rms_norm_eps,
                self._feed_forward(kind),
            )
            for mixer, kind in zip(mixers, config.feed_forwards, strict=True)
        )
        self._rescale()

    @property
    def recompute(self) -> str:
        """What the backward pass computes again, to save memory; can be set.

        "none"; "conv": what lies between a mixer's in_proj and out_proj but for the recurrence,
        which costs next to nothing; "scan": the recurrence too, which is then most of what a mixer
        would keep; "block": all but each block's input, which costs one more forward pass.

        Raises:
            ConfigError: it is set to something else.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        if value not in RECOMPUTE:
            raise ConfigError(f"recompute={value!r} must be one of {', '.join(RECOMPUTE)}")
        self._recompute = value
        for layer in self.layers:
            layer.mixer.recompute = "none" if value == "block" else value

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether `recompute` is "block", as transformers calls it; can be set."""
        return self._recompute == "block"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.recompute = "block" if value else "none"

    def _feed_forward(self, kind: str) -> GatedMLP | Experts | None:
        """What comes after a mixer: "mlp", "moe" (of configurations that have experts), or ""."""
        config: Any = self.config
        if kind == "moe":
            return Experts(config.d_model, config.d_mlp, config.n_experts, config.top_k)
        return GatedMLP(config.d_model, config.d_mlp) if kind else None

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        for layer in self.layers:
            layer.reset_parameters()
        self._rescale()

    def _rescale(self) -> None:
        """Shrink the last projection of each residual branch."""
        if self.config.rescale_out_proj:
            for layer in self.layers:
                for weight in layer.last_weights():
                    rescale_residual(weight, self.config.n_residuals)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """Run whole sequences.

        Args:
            x: (b, l, d) floating point, l >= 1.
            mask: (b, l) bool, True at real tokens; padding may stand anywhere.
            seq_idx: (b, l) integers, the document of each token, where a row packs several. A
                negative one is padding.
            dt_scale: (b, l) >= 0, for series without a regular step: the time since the token
                before, in steps. States decay for that long and the token is written once, as if
                k - 1 steps without input had come before it where the gap is k; attention's
                positions are those times. All are 1 without it.

        Returns:
            (b, l, d) in x's dtype; zeros at padding.

        Raises:
            ShapeError: an argument does not fit.
        """
        self._check(x, 3)
        ragged = Ragged.of(x, mask, seq_idx, dt_scale)
        return ragged.restore(self.run(ragged.pack(x), ragged))

    def prefill(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
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
            dt_scale: (b, l) >= 0, the time since the token before, in steps; see `forward`.

        Returns:
            (b, l, d) in x's dtype, and the new state.

        Raises:
            ShapeError: an argument does not fit, the state's batch for instance.
        """
        self._check(x, 3)
        ragged = Ragged.of(x, mask, seq_idx, dt_scale)
        y, state = self.run_from(ragged.pack(x), state, ragged)
        return ragged.restore(y), state

    def step(
        self, x: Tensor, state: ModelState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run one token of each sequence, at a cost that does not depend on how many came before.

        (But for attention, which looks at all of them.)

        Args:
            x: (b, d) floating point.
            state: what the last call returned, or `init_state`. It is not changed.
            dt_scale: (b,) >= 0, the time since the token before, in steps; see `forward`.

        Returns:
            (b, d) in x's dtype, and the new state.

        Raises:
            ShapeError: an argument does not fit.
        """
        self._check(x, 2)
        self.check_state(state, x.shape[0])
        dt_scale = check_dt_scale(dt_scale, x.shape[:1])
        if dt_scale is None:
            found = self.fused_step(x, state, self.config.backend)
            if found is not None:
                return found[0].to(x.dtype), found[1]
        residual, states = self.to_residual(x), []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            residual, layer_state = layer.step(residual, layer_state, dt_scale)
            states.append(layer_state)
        return residual.to(x.dtype), ModelState(tuple(states), state.seq_idx)

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token, on the parameters' device."""
        layers = tuple(layer.mixer.init_state(batch_size) for layer in self.layers)
        device = next(iter(layers[0].tensors().values())).device
        return ModelState(layers, torch.full((batch_size,), -1, device=device))

    def run(self, x: Tensor, ragged: Ragged) -> Tensor:
        """`forward` for rows that `Ragged.pack` has laid out."""
        residual, added = self.to_residual(x), None
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if is_plain(layer, ResidualBlock) and not again:
                residual, added = layer.go_on(residual, added, ragged)
                continue
            residual = residual if added is None else residual + added
            residual = recomputed(layer, residual, ragged) if again else layer(residual, ragged)
            added = None
        residual = residual if added is None else residual + added
        return residual.to(x.dtype)

    def run_routed(self, x: Tensor, ragged: Ragged) -> tuple[Tensor, list[Tensor]]:
        """`run`, and the logits (b, l, E) of every router, in the order of the layers."""
        residual, found = self.to_residual(x), []
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                residual, logits = recomputed(layer.routed, residual, ragged)
            else:
                residual, logits = layer.routed(residual, ragged)
            if logits is not None:
                found.append(logits)
        return residual.to(x.dtype), found

    def run_from(
        self, x: Tensor, state: ModelState | None, ragged: Ragged
    ) -> tuple[Tensor, ModelState]:
        """`prefill` for rows that `Ragged.pack` has laid out."""
        state = self.init_state(x.shape[0]) if state is None else state
        self.check_state(state, x.shape[0])
        goes_on = ragged.continues(state.seq_idx)
        residual, added, states = self.to_residual(x), None, []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            if goes_on is not None:
                layer_state = layer.mixer.restart(layer_state, goes_on)
            residual, added, layer_state = layer.prefill(residual, added, layer_state, ragged)
            states.append(layer_state)
        residual = residual if added is None else residual + added
        return residual.to(x.dtype), ModelState(tuple(states), ragged.last_document(state.seq_idx))

    def plan_step(self, plan: "StepPlan", residual: "Rows") -> "Rows | None":
        """Append `step` to a plan; the rows of its result, or None if a layer must be called."""
        planned = all(layer.plan_step(plan, residual) for layer in self.layers)
        return residual if planned else None

    def to_residual(self, x: Tensor) -> Tensor:
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
