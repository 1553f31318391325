"""The configurations of the models: frozen, keyword-only, checked when they are made.

A configuration says what the architecture is and how it is initialised. It imports no torch, so
that a tool can read and check one cheaply.
"""

import math
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal

from mambapy.errors import ConfigError

BACKENDS = ("auto", "reference", "pscan", "chunked", "cpu", "official")


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A stack of Mamba-1 blocks.

    Args:
        d_model: width of the residual stream, >= 1.
        n_layers: number of blocks, >= 1.
        d_state: N, the state size of each channel, 1 to 256.
        expand: d_inner / d_model; `expand * d_model` must be a whole number. (`expand_factor`, the
            original's name, is accepted too.)
        d_conv: width k of the causal convolution, >= 1.
        dt_rank: R, the rank of the dt projection; "auto" is d_model / 16, rounded up.
        dt_min, dt_max: range of the initial step sizes, log-uniform, 0 < dt_min <= dt_max.
        dt_init: initialiser of dt_proj.weight, "random" (uniform) or "constant".
        dt_scale: its scale; the bound is dt_scale / sqrt(R).
        dt_init_floor: least initial step size.
        rms_norm_eps: epsilon of the RMS norms, > 0.
        base_std: standard deviation of the initial embeddings (of a language model).
        bias, conv_bias: whether in_proj and out_proj, or the convolution, have a bias.
        residual_in_fp32: keep the residual stream in float32 whatever the activations are.
        rescale_out_proj: divide the initial out_proj.weight by sqrt(n_layers), as GPT-2 does.
        backend: which implementation of the ops runs, see `mambapy.ops`; it is no part of the
            architecture and is not saved. The original's flags still set it: `pscan=False` is
            "reference" (step by step), `use_cuda=True` is "official".

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6, and the paper's code.
    """

    d_model: int
    n_layers: int
    d_state: int = 16
    expand: float = 2
    d_conv: int = 4
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    rms_norm_eps: float = 1e-5
    base_std: float = 0.02
    bias: bool = False
    conv_bias: bool = True
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
        for name in ("d_model", "n_layers", "d_conv"):
            _check_int(self, name, 1)
        _check_int(self, "d_state", 1, 256)
        if self.dt_rank != "auto":
            _check_int(self, "dt_rank", 1)
        names = ("expand", "dt_min", "dt_max", "dt_scale", "dt_init_floor", "rms_norm_eps")
        for name in (*names, "base_std"):
            _check_positive(self, name)
        for name in ("bias", "conv_bias", "residual_in_fp32", "rescale_out_proj"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        if abs(self.expand * self.d_model - self.d_inner) > 1e-6:
            raise ConfigError(
                f"expand={self.expand} times d_model={self.d_model} must be a whole number"
            )
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min={self.dt_min} must not exceed dt_max={self.dt_max}")
        _check_choice(self, "dt_init", ("random", "constant"))
        _check_choice(self, "backend", BACKENDS)

    @property
    def d_inner(self) -> int:
        """E, the number of channels inside a block: expand * d_model."""
        return round(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        """R, the rank of the dt projection, with "auto" resolved."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; `from_dict` is the inverse."""
        values = asdict(self)
        del values["backend"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MambaConfig":
        """A configuration from `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown, a required one is missing, or a value is impossible.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown keys {unknown} for {cls.__name__}; known: {sorted(known)}")
        if missing := sorted({"d_model", "n_layers"} - set(values)):
            raise ConfigError(f"{cls.__name__} needs {missing}")
        return cls(**values)


def _check_int(config: object, name: str, least: int, most: int | None = None) -> None:
    """Raise unless the field is an int within the bounds (bool is not an int here)."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} must be an integer")
    if value < least or (most is not None and value > most):
        span = f">= {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(f"{name}={value} must be {span}")


def _check_positive(config: object, name: str) -> None:
    """Raise unless the field is a finite number above zero."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} must be a number")
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value} must be finite and above zero")


def _check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")
