"""Jamba's configuration: attention and experts at regular distances in a stack of Mamba."""

import functools
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from mambapy.config.hybrid import MIXERS, check_experts
from mambapy.config.mixers import AttentionConfig
from mambapy.config.stack import StackConfig, check_choice, check_int
from mambapy.errors import ConfigError

T = TypeVar("T")

# Names of transformers' JambaConfig and of the original's JambaLMConfig -> ours.
ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "d_intermediate",
    "mlp_size": "d_intermediate",
    "initializer_range": "base_std",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_experts": "n_experts",
    "num_local_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "mamba_d_state": "d_state",
    "mamba_d_conv": "d_conv",
    "mamba_expand": "expand",
    "mamba_dt_rank": "dt_rank",
    "mamba_conv_bias": "conv_bias",
    "mamba_proj_bias": "bias",
    "tie_word_embeddings": "tie_embeddings",
    "tie_lm_weights": "tie_embeddings",
    "inner_layernorms": "inner_norm",
    "mamba_inner_layernorms": "inner_norm",
}


def _by_any_name(cls: type[T]) -> type[T]:
    """Let a configuration be made with the names in ALIASES, too."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        ours: dict[str, Any] = {}
        values.pop("pad_token_id", None)
        if dropout := values.pop("attention_dropout", 0):
            raise ConfigError(f"attention_dropout={dropout} must be 0: there is none here")
        for name, value in values.items():
            own = ALIASES.get(name, name)
            if own == "inner_norm" and isinstance(value, bool):
                value = "learned" if value else "none"
            if own in ours and ours[own] != value:
                raise ConfigError(f"{name}={value!r}, but {own} is {ours[own]!r} by another name")
            ours[own] = value
        init(self, **ours)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_by_any_name
@dataclass(frozen=True, kw_only=True)
class JambaConfig(StackConfig):
    """A Jamba: every block is a mixer and a feed-forward; some mixers are attention.

    The names of transformers and of the original (`hidden_size`, `mlp_size`, `num_experts`, ...)
    are accepted for the same fields; see `ALIASES`. `pad_token_id` changes nothing here: a mask
    says what is padding.

    Args (and those of `StackConfig`):
        d_intermediate: inner width of the MLPs, dense or expert, > 0.
        mixer: what is not attention: "mamba", "mamba2" or "mamba3".
        attn_layer_period, attn_layer_offset: block i is attention where i % period == offset.
        attn_layers: the attention's blocks, by number, in place of these two.
        expert_layer_period, expert_layer_offset: block i has experts where i % period == offset.
        expert_layers: the blocks with experts, by number, in place of these two.
        n_experts: experts of such a block; 1 makes it a dense MLP.
        top_k: how many of them a token goes through, 1 to n_experts.
        n_heads, n_kv_heads: heads of the attention, which has no positions.
        d_state, d_conv, dt_rank, bias, conv_bias: see `MambaConfig` (bias and conv_bias are no
            fields of Mamba-3, d_state's None is 16 for Mamba and the mixer's own default else).
        d_head, n_groups: see `Mamba2Config` and `Mamba3Config`.
        inner_norm: norms of dt, B and C in Mamba, see `MambaConfig`.
        vocab_size, tie_embeddings: for `JambaLM`.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Lieber et al. 2024 (arXiv 2403.19887).
    """

    d_intermediate: int
    mixer: Literal["mamba", "mamba2", "mamba3"] = "mamba"
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    attn_layers: tuple[int, ...] | None = None
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    expert_layers: tuple[int, ...] | None = None
    n_experts: int = 16
    top_k: int = 2
    n_heads: int = 32
    n_kv_heads: int | None = 8
    d_state: int | None = None
    d_conv: int = 4
    dt_rank: int | Literal["auto"] = "auto"
    d_head: int = 64
    n_groups: int = 1
    bias: bool = False
    conv_bias: bool = True
    inner_norm: Literal["none", "plain", "learned"] = "learned"
    vocab_size: int | None = None
    tie_embeddings: bool = False
    mlp_multiple_of: int = 1
    rms_norm_eps: float = 1e-6
    residual_in_fp32: bool = False

    def __post_init__(self, *original: Any) -> None:
        """Check every field, and the mixers' by making their configurations."""
        super().__post_init__(*original)
        check_choice(self, "mixer", ("mamba", "mamba2", "mamba3"))
        check_int(self, "d_intermediate", 1)
        check_experts(self)
        for kind in ("attn", "expert"):
            self._check_places(kind)
        for kind in set(self.mixers):
            self.mixer_config(kind)

    def _check_places(self, kind: str) -> None:
        """Raise unless a period and an offset, or a list of blocks, are possible."""
        listed = getattr(self, f"{kind}_layers")
        if listed is not None:
            if not isinstance(listed, list | tuple):
                raise ConfigError(f"{kind}_layers={listed!r} must be a list of numbers of blocks")
            if wrong := [i for i in listed if i not in range(self.n_layers)]:
                raise ConfigError(
                    f"{kind}_layers={listed}: {wrong[0]!r} must be from 0 to {self.n_layers - 1}"
                )
            if len(set(listed)) < len(listed):
                raise ConfigError(f"{kind}_layers={listed} names a block twice")
            object.__setattr__(self, f"{kind}_layers", tuple(listed))
        period, offset = f"{kind}_layer_period", f"{kind}_layer_offset"
        check_int(self, period, 1)
        check_int(self, offset, 0, getattr(self, period) - 1)

    def _at(self, kind: str) -> tuple[bool, ...]:
        """For each block, whether it is one of the kind."""
        listed = getattr(self, f"{kind}_layers")
        if listed is not None:
            return tuple(i in listed for i in range(self.n_layers))
        period = getattr(self, f"{kind}_layer_period")
        offset = getattr(self, f"{kind}_layer_offset")
        return tuple(i % period == offset for i in range(self.n_layers))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The kind of each block's mixer."""
        return tuple("attention" if here else self.mixer for here in self._at("attn"))

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """What comes after each block's mixer: "mlp" or "moe"."""
        many = self.n_experts > 1
        return tuple("moe" if here and many else "mlp" for here in self._at("expert"))

    def mixer_config(self, kind: str) -> Any:
        """The configuration of a kind of mixer."""
        cls = MIXERS[kind]
        values = {item.name: getattr(self, item.name) for item in fields(StackConfig)}
        values["d_intermediate"] = 0
        own = {item.name for item in fields(cls)} - set(values)
        if cls is AttentionConfig:
            own = {"n_heads", "n_kv_heads"}
        values |= {n: getattr(self, n) for n in own if hasattr(self, n)}
        if values.get("d_state", 0) is None:
            del values["d_state"]
        if kind == "mamba":
            values["inner_norm_eps"] = self.rms_norm_eps
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{kind}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; `from_dict` is the inverse."""
        listed = {
            name: None if getattr(self, name) is None else [*getattr(self, name)]
            for name in ("attn_layers", "expert_layers")
        }
        return {**super().to_dict(), **listed}
