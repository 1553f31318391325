"""What every stack of blocks is configured by, and how a field is checked."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, InitVar, asdict, dataclass, fields
from typing import Any, TypeVar

from mambapy.errors import ConfigError

BACKENDS = ("auto", "reference", "pscan", "chunked", "cpu", "official")
# What the backward pass may compute again, from nothing to all.
RECOMPUTE = ("none", "conv", "scan", "block")
C = TypeVar("C", bound="StackConfig")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """What every stack has: blocks of a mixer, each with a norm before it and a residual around it.

    Args:
        d_model: width of the residual stream, >= 1.
        n_layers: number of blocks, >= 1.
        d_intermediate: inner width of a gated MLP after each mixer, rounded up to a multiple of
            `mlp_multiple_of`; 0 for none.
        mlp_multiple_of: see there; 128 in the published models.
        expand: d_inner / d_model; `expand * d_model` must be a whole number. (`expand_factor`, the
            original's name, is accepted too.)
        dt_min, dt_max: range of the initial step sizes, log-uniform, 0 < dt_min <= dt_max.
        dt_init_floor: least initial step size.
        rms_norm_eps: epsilon of the RMS norms, > 0.
        base_std: standard deviation of the initial embeddings (of a language model).
        residual_in_fp32: keep the residual stream in float32 whatever the activations are.
        rescale_out_proj: divide the initial weight of each branch's last projection by the square
            root of the number of branches, as GPT-2 does.
        backend: which implementation of the ops runs, see `mambapy.ops`; it is no part of the
            architecture and is not saved. The original's flags still set it: `pscan=False` is
            "reference" (step by step), `use_cuda=True` is "official".

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.4, and the paper's code.
    """

    d_model: int
    n_layers: int
    d_intermediate: int = 0
    mlp_multiple_of: int = 128
    expand: float = 2
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    rms_norm_eps: float = 1e-5
    base_std: float = 0.02
    residual_in_fp32: bool = True
    rescale_out_proj: bool = True
    backend: str = "auto"
    expand_factor: InitVar[float | None] = None
    pscan: InitVar[bool | None] = None
    use_cuda: InitVar[bool | None] = None

    def __post_init__(
        self, expand_factor: float | None, pscan: bool | None, use_cuda: bool | None
    ) -> None:
        """Translate the original's names, then check every field."""
        if expand_factor is not None:
            object.__setattr__(self, "expand", expand_factor)
        if use_cuda:
            object.__setattr__(self, "backend", "official")
        elif pscan is False:
            object.__setattr__(self, "backend", "reference")
        for name in ("d_model", "n_layers", "mlp_multiple_of"):
            check_int(self, name, 1)
        check_int(self, "d_intermediate", 0)
        names = ("expand", "dt_min", "dt_max", "dt_init_floor", "rms_norm_eps", "base_std")
        for name in names:
            check_positive(self, name)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type in (bool, "bool") and not isinstance(value, bool):
                raise ConfigError(f"{item.name}={value!r} must be True or False")
        if abs(self.expand * self.d_model - self.d_inner) > 1e-6:
            raise ConfigError(
                f"expand={self.expand} times d_model={self.d_model} must be a whole number"
            )
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min={self.dt_min} must not exceed dt_max={self.dt_max}")
        check_choice(self, "backend", BACKENDS)

    @property
    def d_inner(self) -> int:
        """E, the number of channels inside a block: expand * d_model."""
        return round(self.expand * self.d_model)

    @property
    def d_mlp(self) -> int:
        """Inner width of the gated MLP, rounded up; 0 for none."""
        return -(-self.d_intermediate // self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """What comes after each block's mixer: "mlp", "moe" (experts), or "" for nothing."""
        return ("mlp" if self.d_intermediate else "",) * self.n_layers

    @property
    def n_residuals(self) -> int:
        """How many branches the residual stream adds up."""
        return self.n_layers + sum(bool(kind) for kind in self.feed_forwards)

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; `from_dict` is the inverse."""
        values = asdict(self)
        del values["backend"]
        return values

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """A configuration from `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown, a required one is missing, or a value is impossible.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown keys {unknown} for {cls.__name__}; known: {sorted(known)}")
        needed = {
            field.name
            for field in fields(cls)
            if field.default is MISSING and field.default_factory is MISSING
        }
        if missing := sorted(needed - set(values)):
            raise ConfigError(f"{cls.__name__} needs {missing}")
        return cls(**values)


def check_pair(config: object, name: str) -> tuple[float, float]:
    """The field as two numbers, "inf" read as infinite; raise unless it is that."""
    value = getattr(config, name)
    if isinstance(value, list | tuple) and len(value) == 2:
        low, high = (math.inf if part == "inf" else part for part in value)
        plain = all(
            isinstance(part, int | float) and not isinstance(part, bool) and part == part
            for part in (low, high)
        )
        if plain:
            return float(low), float(high)
    raise ConfigError(f"{name}={value!r} must be two numbers")


def check_int(config: object, name: str, least: int, most: int | None = None) -> None:
    """Raise unless the field is an int within the bounds (bool is not an int here)."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be an integer")
    if value < least or (most is not None and value > most):
        span = f">= {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(f"{name}={value} must be {span}")


def check_positive(config: object, name: str) -> None:
    """Raise unless the field is a finite number above zero."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} must be a number")
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value} must be finite and above zero")


def check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")
