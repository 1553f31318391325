"""The configuration of a stack whose blocks differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mambapy.config.mixers import AttentionConfig, Mamba2Config, Mamba3Config, MambaConfig
from mambapy.config.stack import StackConfig, check_int
from mambapy.errors import ConfigError

MIXERS: dict[str, type[StackConfig]] = {
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "mamba3": Mamba3Config,
    "attention": AttentionConfig,
}
MLP, MOE = "+mlp", "+moe"
# What the whole stack has one of.
SHARED = {
    "d_model",
    "n_layers",
    "d_intermediate",
    "mlp_multiple_of",
    "base_std",
    "residual_in_fp32",
    "rescale_out_proj",
    "backend",
}


@dataclass(frozen=True, kw_only=True)
class HybridConfig(StackConfig):
    """A stack whose blocks differ: one list names the mixer of each.

    `layers=("mamba2", "attention+mlp")` is a block of Mamba-2 alone, then one of attention with a
    gated MLP after it.

    Args (and those of `StackConfig`):
        layers: the mixer of each block, "mamba", "mamba2", "mamba3" or "attention"; behind the name
            "+mlp" for a gated MLP after it, of width d_intermediate, or "+moe" for n_experts of
            them, of which each token goes through its top_k.
        n_experts: see there, >= 1.
        top_k: see there, 1 to n_experts.
        n_layers: need not be given; it is the length of `layers`.
        mamba, mamba2, mamba3, attention: options of each kind of mixer, by the names of its own
            configuration, {"n_heads": 8} for instance.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.
    """

    layers: tuple[str, ...]
    n_layers: int = 0
    n_experts: int = 8
    top_k: int = 2
    mamba: Mapping[str, Any] = field(default_factory=dict)
    mamba2: Mapping[str, Any] = field(default_factory=dict)
    mamba3: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self, *original: Any) -> None:
        """Check every field, and every mixer's options by making its configuration."""
        known = [name + behind for behind in ("", MLP, MOE) for name in MIXERS]
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ConfigError(f"layers={self.layers!r} must be a list of blocks: {known}")
        for name in self.layers:
            if name not in known:
                raise ConfigError(f"layers: {name!r} must be one of {', '.join(known)}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.n_layers not in (0, len(self.layers)):
            raise ConfigError(
                f"n_layers={self.n_layers} must be the length of layers, {len(self.layers)}"
            )
        object.__setattr__(self, "n_layers", len(self.layers))
        super().__post_init__(*original)
        if any(self.feed_forwards) != (self.d_intermediate > 0):
            raise ConfigError(
                f"d_intermediate={self.d_intermediate} must be above 0 where a block has {MLP!r} "
                f"or {MOE!r}, and only there"
            )
        check_experts(self)
        for kind in MIXERS:
            options = getattr(self, kind)
            if not isinstance(options, Mapping):
                raise ConfigError(f"{kind}={options!r} must be a mapping of options")
            if options and kind not in self.mixers:
                raise ConfigError(f"{kind}={dict(options)}, but no block of layers is {kind!r}")
            if kind in self.mixers:
                # As that configuration keeps them: lists are tuples, for instance.
                made = self.mixer_config(kind)
                options = {name: getattr(made, name) for name in options}
            object.__setattr__(self, kind, dict(options))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The kind of each block's mixer."""
        return tuple(name.partition("+")[0] for name in self.layers)

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """What comes after each block's mixer: "mlp", "moe" or ""."""
        return tuple(name.partition("+")[2] for name in self.layers)

    def mixer_config(self, kind: str) -> Any:
        """The configuration of one kind of mixer: the stack's own fields, then its options."""
        options = getattr(self, kind)
        if wrong := sorted(set(options) & SHARED):
            raise ConfigError(f"{kind}: {wrong} are of the whole stack; give them beside layers")
        values = {item.name: getattr(self, item.name) for item in fields(StackConfig)}
        values["d_intermediate"] = 0
        try:
            return MIXERS[kind].from_dict({**values, **options})
        except ConfigError as error:
            raise ConfigError(f"{kind}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; `from_dict` is the inverse."""
        values = {**super().to_dict(), "layers": [*self.layers]}
        for kind in set(self.mixers):
            plain = self.mixer_config(kind).to_dict()
            values[kind] = {name: plain[name] for name in getattr(self, kind)}
        return values


def check_experts(config: Any) -> None:
    """Raise unless a token can go through top_k of n_experts."""
    check_int(config, "n_experts", 1)
    check_int(config, "top_k", 1)
    if config.top_k > config.n_experts:
        raise ConfigError(f"top_k={config.top_k} must not exceed n_experts={config.n_experts}")
