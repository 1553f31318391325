"""The configuration of a stack whose blocks differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mambapy.config.mixers import AttentionConfig, Mamba2Config, Mamba3Config, MambaConfig
from mambapy.config.stack import StackConfig
from mambapy.errors import ConfigError

MIXERS: dict[str, type[StackConfig]] = {
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "mamba3": Mamba3Config,
    "attention": AttentionConfig,
}
MLP = "+mlp"
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
        layers: the mixer of each block, "mamba", "mamba2", "mamba3" or "attention"; "+mlp" behind
            the name for a gated MLP after it, of width d_intermediate.
        n_layers: need not be given; it is the length of `layers`.
        mamba, mamba2, mamba3, attention: options of each kind of mixer, by the names of its own
            configuration, {"n_heads": 8} for instance.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.
    """

    layers: tuple[str, ...]
    n_layers: int = 0
    mamba: Mapping[str, Any] = field(default_factory=dict)
    mamba2: Mapping[str, Any] = field(default_factory=dict)
    mamba3: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self, *original: Any) -> None:
        """Check every field, and every mixer's options by making its configuration."""
        known = [*MIXERS, *(name + MLP for name in MIXERS)]
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
        if any(self.mlp_layers) != (self.d_intermediate > 0):
            raise ConfigError(
                f"d_intermediate={self.d_intermediate} must be above 0 where a block has {MLP!r}, "
                "and only there"
            )
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
        return tuple(name.removesuffix(MLP) for name in self.layers)

    @property
    def mlp_layers(self) -> tuple[bool, ...]:
        """For each block, whether a gated MLP comes after its mixer."""
        return tuple(name.endswith(MLP) for name in self.layers)

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
