"""A language model around a stack of Mamba blocks: tokens (b, l) -> logits (b, l, vocab_size).

`LM` is embedding -> Mamba -> norm -> head, with `forward`, `prefill` and `step` as the stack has
them. Sampling is in generation.py, files are in checkpoints/.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import checkpoints, generation, ops
from mambapy.config import (
    HybridConfig,
    JambaConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
    StackConfig,
)
from mambapy.errors import ConfigError, ShapeError
from mambapy.fused import Decoder, FusedStep
from mambapy.hybrid import Hybrid
from mambapy.jamba import Jamba
from mambapy.layers import (
    QUANTIZED,
    QuantizedEmbedding,
    QuantizedLinear,
    RMSNorm,
    is_plain,
    lookup,
    product,
    widen,
)
from mambapy.mamba import Mamba
from mambapy.mamba2 import Mamba2
from mambapy.mamba3 import Mamba3
from mambapy.ops.dispatch import is_traced
from mambapy.ops.step_plan import KeepingPlan
from mambapy.pretrained import Pretrained
from mambapy.ragged import Ragged
from mambapy.stack import Stack
from mambapy.state import ModelState
from mambapy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mambapy.ops.step_plan import Rows, StepPlan

__all__ = [
    "LM",
    "HybridConfig",
    "Mamba2Config",
    "Mamba3Config",
    "MambaConfig",
    "MambaLM",
    "from_pretrained",
]

L = TypeVar("L", bound="LM")
# A target that is none.
IGNORED = -100
# The stack of each kind of configuration.
STACKS: dict[type[StackConfig], Callable[[Any], Stack]] = {
    MambaConfig: Mamba,
    Mamba2Config: Mamba2,
    Mamba3Config: Mamba3,
    HybridConfig: Hybrid,
    JambaConfig: Jamba,
}


class LM(FusedStep, Pretrained):
    """A language model.

    Args:
        config: the stack of blocks: a MambaConfig, Mamba2Config, Mamba3Config, HybridConfig or
            JambaConfig.
        vocab_size: number of tokens, >= 1. Logits have this size.
        tie_embeddings: use the embedding's weight for the head too.
        pad_vocab_size_multiple: the weights have this many rows or a multiple, which suits the
            hardware; the rows beyond vocab_size are never seen outside.

    Raises:
        ConfigError: a value is out of its range.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 4.2, and the paper's code.
    """

    def __init__(
        self,
        config: StackConfig,
        vocab_size: int,
        *,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
    ) -> None:
        super().__init__()
        for name, value in {
            "vocab_size": vocab_size,
            "pad_vocab_size_multiple": pad_vocab_size_multiple,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be an integer >= 1")
        if type(config) not in STACKS:
            known = ", ".join(kind.__name__ for kind in STACKS)
            raise ConfigError(f"config must be one of {known}, got {type(config).__name__}")
        self.config = config
        self.vocab_size = vocab_size
        self.tie_embeddings = tie_embeddings
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        self.quantized: str | None = None
        rows = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.embedding = nn.Embedding(rows, config.d_model)
        self.backbone = STACKS[type(config)](config)
        self.can_plan = self.backbone.can_plan
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_model, rows, bias=False)
        self._reset_embedding()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does; after `to_empty`, for instance."""
        self.backbone.reset_parameters()
        self.norm_f.reset_parameters()
        self.lm_head.reset_parameters()
        self._reset_embedding()

    def _reset_embedding(self) -> None:
        """Normal with standard deviation base_std; a tied head shares it."""
        nn.init.normal_(self.embedding.weight, std=self.config.base_std)
        self.tie()

    def tie(self) -> None:
        """Make embedding and head one parameter again, where they should be."""
        if not self.tie_embeddings:
            return
        if not isinstance(self.lm_head, nn.Linear | QuantizedLinear):
            # An adapter has wrapped the head; what is in it is still the same parameter.
            return
        if self.lm_head.weight is not self.embedding.weight:
            self.lm_head.weight = self.embedding.weight
        if self.quantized is not None:
            self.lm_head.scale = self.embedding.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LM":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Moving off the meta device makes a new parameter of each name.
        self.tie()
        return self

    def quantize(self: L, kind: str) -> L:
        """Store the matrices in fewer bits, in place, so that a token reads less memory.

        Decoding one sequence is bound by reading the weights. Activations and recurrences stay as
        they are, and so do the small matrices that make dt. Those weights have no gradient.

        Args:
            kind: "int8" (a scale for each row) or "bfloat16".

        Returns:
            This model.

        Raises:
            ConfigError: the kind is unknown, or the model is quantised already.
        """
        if kind not in QUANTIZED:
            raise ConfigError(f"kind={kind!r} must be one of {', '.join(QUANTIZED)}")
        if self.quantized is not None:
            raise ConfigError(f"the model is in {self.quantized} already; load it anew")
        self.check_unchanged("quantised")
        for module in list(self.modules()):
            for name, layer in module.named_children():
                if is_plain(layer, nn.Linear):
                    setattr(module, name, QuantizedLinear(layer, kind))
                elif is_plain(layer, nn.Embedding):
                    setattr(module, name, QuantizedEmbedding(layer, kind))
        self.quantized = kind
        self.tie()
        return self

    @property
    def recompute(self) -> str:
        """What the backward pass computes again: "none", "conv", "scan" or "block"; see `Stack`."""
        return self.backbone.recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        self.backbone.recompute = value

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes each block again, to save memory; can be set."""
        return self.backbone.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.backbone.gradient_checkpointing = value

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, at every position.

        Args:
            tokens: (b, l) int64 in [0, vocab_size), l >= 1.
            mask: (b, l) bool, True at real tokens; padding may stand anywhere.
            seq_idx: (b, l) integers, the document of each token, where a row packs several.
            dt_scale: (b, l) >= 0, the time since the token before, in steps; see `Stack.forward`.

        Returns:
            (b, l, vocab_size); zeros at padding.

        Raises:
            ShapeError: an argument does not fit, or a token is out of range.
        """
        hidden, ragged = self._run(tokens, mask, seq_idx, dt_scale)
        return ragged.restore(self._head(hidden))

    def routed(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and the logits of every router: for `experts.load_balancing_loss`.

        Returns:
            (b, l, vocab_size), and for each layer with experts (b, l, n_experts), before the
            softmax; zeros at padding.
        """
        hidden, found, ragged = self._run_routed(tokens, mask, seq_idx, dt_scale)
        return ragged.restore(self._head(hidden)), [ragged.restore(logits) for logits in found]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token in nats; never holds the logits of all positions.

        Args:
            tokens: (b, l) int64 in [0, vocab_size), l >= 1.
            targets: (b, l) int64, what comes after each token, or -100 where that is not asked.
                Without it, the token to the right, in the same document.
            mask: (b, l) bool, True at real tokens; padding predicts nothing and is not predicted.
            seq_idx: (b, l) integers, the document of each token.
            dt_scale: (b, l) >= 0, the time since the token before, in steps.

        Returns:
            () in float32 or wider; nan where there is nothing to predict.

        Raises:
            ShapeError: an argument does not fit, or a token or target is out of range.
        """
        hidden = self.hidden(tokens, mask, seq_idx, dt_scale)
        return self.loss_from(hidden, _targets(tokens, targets, mask, seq_idx))

    def routed_loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`loss`, and the logits of every router, as `routed` has them."""
        hidden, found, ragged = self._run_routed(tokens, mask, seq_idx, dt_scale)
        hidden = ragged.restore(self.norm_f(hidden))
        loss = self.loss_from(hidden, _targets(tokens, targets, mask, seq_idx))
        return loss, [ragged.restore(logits) for logits in found]

    def loss_from(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy from what `hidden` or `prefill_hidden` gave.

        Args:
            hidden: (b, l, d_model).
            targets: (b, l) int64, or -100 where nothing is to be predicted.
            reduction: "mean" or "sum".
        """
        head, v = self.lm_head, self.vocab_size
        if not is_plain(head, nn.Linear):
            # An adapter or a hook wants to be called.
            logits = widen(head(hidden)[..., :v]).flatten(0, -2)  # (t, v)
            return F.cross_entropy(
                logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction
            )
        return ops.linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            vocab_size=v,
            ignore_index=IGNORED,
            reduction=reduction,
            backend="reference" if self.config.backend == "reference" else "auto",
        )

    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Tensor:
        """What the head sees, (b, l, d_model): features for other tasks, see heads.py.

        The arguments are those of `forward`.
        """
        hidden, ragged = self._run(tokens, mask, seq_idx, dt_scale)
        return ragged.restore(self.norm_f(hidden))

    def _run(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        dt_scale: Tensor | None,
    ) -> tuple[Tensor, Ragged]:
        """The residual stream (b, l, d) after the last block, rows packed, and their layout."""
        ragged = self._layout(tokens, 2, mask, seq_idx, dt_scale)
        return self.backbone.run(self._embed(ragged.pack(tokens)), ragged), ragged

    def _run_routed(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        dt_scale: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], Ragged]:
        """`_run`, and the logits of every router in between."""
        ragged = self._layout(tokens, 2, mask, seq_idx, dt_scale)
        hidden, found = self.backbone.run_routed(self._embed(ragged.pack(tokens)), ragged)
        return hidden, found, ragged

    def prefill_hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """`hidden` from a state on, and the state it leaves; see `prefill`."""
        ragged = self._layout(tokens, 2, mask, None, dt_scale)
        hidden, state = self.backbone.run_from(self._embed(ragged.pack(tokens)), state, ragged)
        return ragged.restore(self.norm_f(hidden)), state

    def prefill(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, ModelState]:
        """Run tokens from a state on; see `Mamba.prefill`.

        Args:
            tokens: (b, l) int64 in [0, vocab_size), l >= 1.
            state: what an earlier call returned; a fresh one without it.
            mask: (b, l) bool, True at real tokens.
            seq_idx: (b, l) integers, the document of each token.
            dt_scale: (b, l) >= 0, the time since the token before, in steps.
            logits_to_keep: 0 for the logits of all positions; n for those of each row's last n
                real tokens, the last one last; a row with fewer repeats its first.

        Returns:
            Logits (b, l or n, vocab_size), and the state after each row's last real token.

        Raises:
            ShapeError: an argument does not fit, or a token is out of range.
        """
        ragged = self._layout(tokens, 2, mask, seq_idx, dt_scale)
        self._check_keep(logits_to_keep, tokens)
        hidden, state = self.backbone.run_from(self._embed(ragged.pack(tokens)), state, ragged)
        if logits_to_keep == 0:
            return ragged.restore(self._head(hidden)), state
        return self._head(ragged.last(hidden, logits_to_keep)), state

    def step(
        self, token: Tensor, state: ModelState, dt_scale: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run one token of each row.

        Args:
            token: (b,) int64 in [0, vocab_size).
            state: what the last call returned, or `init_state`.
            dt_scale: (b,) >= 0, the time since the token before, in steps.

        Returns:
            Logits (b, vocab_size), and the new state.

        Raises:
            ShapeError: an argument does not fit, or a token is out of range.
        """
        x = self.step_input(token)
        self.backbone.check_state(state, x.shape[0])
        found = None if dt_scale is not None else self.fused_step(x, state, self.config.backend)
        if found is not None:
            return self.step_output(found[0]), found[1]
        x = self._embed(token) if x is token else x
        hidden, state = self.backbone.step(x, state, dt_scale)
        return self._head(hidden), state

    def decoder(self, state: ModelState) -> Decoder:
        """`step` as a function of the token, (b,) -> (b, vocab_size): what generation calls.

        On a GPU it is faster than `step`, as the state stays where it is; see `Decoder`.

        Args:
            state: where it starts, what `prefill` returned for instance; it is not changed.
        """
        self.backbone.check_state(state, state.batch_size)
        return Decoder(self, state, self.config.backend)

    def step_input(self, token: Tensor) -> Tensor:
        """The tokens, where a plan looks them up itself; else the residual stream's start."""
        self._layout(token, 1)
        by_plan = ops.plan_looks_up(token) and lookup(self.embedding) is not None
        return token if by_plan else self._embed(token)

    def step_output(self, y: Tensor) -> Tensor:
        """Logits of the true vocabulary, in the head's dtype."""
        return y[:, : self.vocab_size].to(self.norm_f.weight.dtype)

    def plan_input(self, plan: "StepPlan", x: Tensor) -> "Rows":
        """The residual stream, or where it is looked up."""
        table = lookup(self.embedding)
        if x.is_floating_point() or table is None or not isinstance(plan, KeepingPlan):
            return super().plan_input(plan, x)
        return plan.embed(table, "residual")

    def plan_step(self, plan: "StepPlan", residual: "Rows") -> "Rows | None":
        """Append a step, from the embedding on, to a plan; its logits, or None."""
        head = product(self.lm_head)
        if head is None or not is_plain(self.norm_f, RMSNorm):
            return None
        if self.backbone.plan_step(plan, residual) is None:
            return None
        hidden = plan.norm(residual, self.norm_f.weight, self.norm_f.eps)
        return plan.linear(hidden, head, "logits")

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token."""
        return self.backbone.init_state(batch_size)

    def generate(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[str],
        num_tokens: int = 50,
        batch_size: int = 1,
        sample: bool = True,
        top_k: int | None = 40,
        top_p: float | None = None,
        temperature: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """Continue one prompt or several; see `generation.generate`."""
        return generation.generate(
            self,
            tokenizer,
            prompt,
            num_tokens=num_tokens,
            batch_size=batch_size,
            sample=sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            stop=stop,
            seed=seed,
        )

    def generate_stream(self, tokenizer: Tokenizer, prompt: str, **options: Any) -> Iterator[str]:
        """Continue one prompt, piece by piece; see `generation.stream_text`."""
        return generation.stream_text(self, tokenizer, prompt, **options)

    def architecture(self) -> checkpoints.Architecture:
        """What this model is, apart from its numbers: what a checkpoint's config.json says."""
        return checkpoints.Architecture(
            self.config,
            self.vocab_size,
            self.tie_embeddings,
            self.pad_vocab_size_multiple,
            self.quantized,
        )

    @classmethod
    def from_architecture(cls: type[L], architecture: checkpoints.Architecture) -> L:
        """A new model of that architecture."""
        model = cls(
            architecture.config,
            architecture.vocab_size,
            tie_embeddings=architecture.tie_embeddings,
            pad_vocab_size_multiple=architecture.pad_vocab_size_multiple,
        )
        return model if architecture.quantized is None else model.quantize(architecture.quantized)

    @staticmethod
    def _check_keep(n: int, tokens: Tensor) -> None:
        """Raise unless the last n of the tokens (b, l) can be kept."""
        if not 0 <= n <= tokens.shape[1]:
            raise ShapeError(f"logits_to_keep={n} must be from 0 to l = {tokens.shape[1]}")

    def _layout(
        self,
        tokens: Tensor,
        dims: int,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        dt_scale: Tensor | None = None,
    ) -> Ragged:
        """Check the tokens and lay out their rows."""
        shape = "(b, l)" if dims == 2 else "(b,)"
        if not isinstance(tokens, Tensor):
            raise ShapeError(f"tokens must be a tensor {shape}, got {type(tokens).__name__}")
        if tokens.dim() != dims or 0 in tokens.shape:
            raise ShapeError(f"tokens must be {shape}, not empty, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens must be int64 or int32, got {tokens.dtype}")
        ragged = Ragged.of(tokens, mask, seq_idx, dt_scale) if dims == 2 else Ragged()
        # Reading values back would stall a GPU, and stop torch.compile.
        if tokens.device.type == "cpu" and not is_traced():
            # Padding may hold anything; packed, it is zero.
            low, high = (int(bound) for bound in ragged.pack(tokens).aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ShapeError(
                    f"tokens must be in [0, vocab_size = {self.vocab_size}), got {low} to {high}"
                )
        return ragged

    def _embed(self, tokens: Tensor) -> Tensor:
        """The start of the residual stream, (..., d)."""
        x = self.embedding(tokens)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of the true vocabulary, from the residual stream."""
        return self.lm_head(self.norm_f(hidden))[..., : self.vocab_size]


MambaLM = LM


def _targets(
    tokens: Tensor, targets: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """(b, l) what each token must predict, -100 where that is nothing."""
    real = mask
    if seq_idx is not None:
        real = seq_idx >= 0 if real is None else real & (seq_idx >= 0)
    if targets is None:
        targets = torch.full_like(tokens, IGNORED, dtype=torch.int64)
        targets[:, :-1] = tokens[:, 1:]
        if real is not None:
            targets[:, :-1].masked_fill_(~real[:, 1:], IGNORED)
        if seq_idx is not None:
            targets[:, :-1].masked_fill_(seq_idx[:, 1:] != seq_idx[:, :-1], IGNORED)
    return targets if real is None else targets.masked_fill(~real, IGNORED)


def from_pretrained(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> LM:
    """A trained language model; see `LM.from_pretrained`."""
    return LM.from_pretrained(name_or_dir, dtype=dtype, device=device, revision=revision)
