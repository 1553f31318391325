"""The configurations of the models: frozen, keyword-only, checked when they are made.

A configuration says what the architecture is and how it is initialised. It imports no torch, so
that a tool can read and check one cheaply.

    StackConfig        what every stack of blocks has
      MambaConfig      Mamba2Config      Mamba3Config
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, InitVar, asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from mambapy.errors import ConfigError

BACKENDS = ("auto", "reference", "pscan", "chunked", "cpu", "official")
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
            _check_int(self, name, 1)
        _check_int(self, "d_intermediate", 0)
        names = ("expand", "dt_min", "dt_max", "dt_init_floor", "rms_norm_eps", "base_std")
        for name in names:
            _check_positive(self, name)
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
        _check_choice(self, "backend", BACKENDS)

    @property
    def d_inner(self) -> int:
        """E, the number of channels inside a block: expand * d_model."""
        return round(self.expand * self.d_model)

    @property
    def d_mlp(self) -> int:
        """Inner width of the gated MLP, rounded up; 0 for none."""
        return -(-self.d_intermediate // self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def n_residuals(self) -> int:
        """How many branches the residual stream adds up."""
        return self.n_layers * (2 if self.d_intermediate else 1)

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
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(needed - set(values)):
            raise ConfigError(f"{cls.__name__} needs {missing}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class MambaConfig(StackConfig):
    """A stack of Mamba-1 blocks.

    Args (and those of `StackConfig`):
        d_state: N, the state size of each channel, 1 to 256.
        d_conv: width k of the causal convolution, >= 1.
        dt_rank: R, the rank of the dt projection; "auto" is d_model / 16, rounded up.
        dt_init: initialiser of dt_proj.weight, "random" (uniform) or "constant".
        dt_scale: its scale; the bound is dt_scale / sqrt(R).
        bias, conv_bias: whether in_proj and out_proj, or the convolution, have a bias.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6, and the paper's code.
    """

    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | Literal["auto"] = "auto"
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        super().__post_init__(*original)
        _check_int(self, "d_conv", 1)
        _check_int(self, "d_state", 1, 256)
        if self.dt_rank != "auto":
            _check_int(self, "dt_rank", 1)
        _check_positive(self, "dt_scale")
        _check_choice(self, "dt_init", ("random", "constant"))

    @property
    def rank(self) -> int:
        """R, the rank of the dt projection, with "auto" resolved."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(StackConfig):
    """What Mamba-2 and Mamba-3 share: channels in heads that have one decay each.

    Args (and those of `StackConfig`):
        d_state: N, the state size of each channel, >= 1.
        d_head: P, channels of a head; must divide the channels of the recurrence.
        n_groups: G, heads of one group share B and C; must divide the number of heads.
        chunk_size: tokens that the training form handles at once, >= 1; None leaves it to the
            backend. It changes no result. (For the original's models it was 256.)

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.
    """

    d_state: int = 128
    d_head: int = 64
    n_groups: int = 1
    chunk_size: int | None = None

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        super().__post_init__(*original)
        for name in ("d_state", "d_head", "n_groups"):
            _check_int(self, name, 1)
        if self.chunk_size is not None:
            _check_int(self, "chunk_size", 1)
        if self.d_ssm_channels % self.d_head:
            raise ConfigError(
                f"d_head={self.d_head} must divide the recurrence's channels, "
                f"{self.d_ssm_channels} (expand * d_model, or d_ssm where given)"
            )
        if self.n_heads % self.n_groups:
            raise ConfigError(
                f"n_groups={self.n_groups} must divide the number of heads, "
                f"{self.n_heads} = {self.d_ssm_channels} / d_head={self.d_head}"
            )

    @property
    def d_ssm_channels(self) -> int:
        """The channels that go through the recurrence."""
        return self.d_inner

    @property
    def n_heads(self) -> int:
        """H, the number of heads."""
        return self.d_ssm_channels // self.d_head


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(HeadsConfig):
    """A stack of Mamba-2 blocks.

    Args (and those of `HeadsConfig` and `StackConfig`):
        d_conv: width k of the causal convolution over x, B and C, >= 1.
        d_ssm: channels of the recurrence; the other expand * d_model - d_ssm are a gated MLP inside
            the block. None for all.
        A_init_range: A starts uniform in -[low, high], one number a head; 0 < low <= high.
        dt_limit: (low, high) that step sizes are clamped to, after softplus; 0 <= low <= high.
        rmsnorm: whether a gated RMS norm, one for each group, comes before out_proj; without it,
            the gate alone.
        norm_before_gate: whether that norm comes before its gate.
        D_has_hdim: whether the skip D has a number for each channel, not for each head.
        learnable_init_states: whether documents start from a learned state, not from zero.
        bias, conv_bias: whether in_proj and out_proj, or the convolution, have a bias.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7, and the paper's code.
    """

    d_conv: int = 4
    d_ssm: int | None = None
    A_init_range: tuple[float, float] = (1.0, 16.0)
    dt_limit: tuple[float, float] = (0.0, math.inf)
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    learnable_init_states: bool = False
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        for name in ("A_init_range", "dt_limit"):
            low, high = _check_pair(self, name)
            decay = name == "A_init_range"
            if not 0 <= low <= high or (decay and not 0 < low <= high < math.inf):
                rule = "0 < low <= high < inf" if decay else "0 <= low <= high"
                raise ConfigError(f"{name}={(low, high)} must have {rule}")
            object.__setattr__(self, name, (low, high))
        if self.d_ssm is not None:
            _check_int(self, "d_ssm", 1)
        super().__post_init__(*original)
        _check_int(self, "d_conv", 1)
        if self.d_ssm_channels > self.d_inner:
            raise ConfigError(
                f"d_ssm={self.d_ssm} must not exceed expand * d_model = {self.d_inner}"
            )

    @property
    def d_ssm_channels(self) -> int:
        """The channels that go through the recurrence: d_ssm, or all."""
        return self.d_inner if self.d_ssm is None else self.d_ssm

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; an infinite limit is "inf"."""
        limit = ["inf" if math.isinf(value) else value for value in self.dt_limit]
        return {**super().to_dict(), "A_init_range": [*self.A_init_range], "dt_limit": limit}


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(HeadsConfig):
    """A stack of Mamba-3 blocks.

    Args (and those of `HeadsConfig` and `StackConfig`):
        mimo_rank: R, how many inputs and outputs a head's state has at each step, >= 1; 1 is SISO.
        rope_fraction: share of the state's channels that are rotated, 0.5 or 1.
        rotate: which channels are a pair: "pairs" (2s, 2s + 1), "halves" (s, s + N/2); "auto" is
            that of the released weights, pairs for SISO and halves for MIMO.
        a_activation: how a decay is made, "heavy_tail" (as released) or "softplus".
        A_floor: least decay rate, > 0.
        outproj_norm: whether a gated RMS norm over each head comes before out_proj.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Mamba-3 (2026), its appendices and released code.
    """

    mimo_rank: int = 1
    rope_fraction: float = 0.5
    rotate: Literal["auto", "pairs", "halves"] = "auto"
    a_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"
    A_floor: float = 1e-4
    outproj_norm: bool = False

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        super().__post_init__(*original)
        _check_int(self, "mimo_rank", 1)
        _check_positive(self, "A_floor")
        _check_choice(self, "rotate", ("auto", "pairs", "halves"))
        _check_choice(self, "a_activation", ("heavy_tail", "softplus"))
        if isinstance(self.rope_fraction, bool) or self.rope_fraction not in (0.5, 1):
            raise ConfigError(f"rope_fraction={self.rope_fraction!r} must be 0.5 or 1")
        rotated = self.d_state * self.rope_fraction
        if rotated % 2:
            raise ConfigError(
                f"d_state={self.d_state} times rope_fraction={self.rope_fraction} = {rotated:g} "
                "channels are rotated in pairs: their number must be even"
            )

    @property
    def n_angles(self) -> int:
        """S, how many pairs of channels are rotated."""
        return round(self.d_state * self.rope_fraction) // 2

    @property
    def rotation(self) -> str:
        """`rotate` with "auto" resolved."""
        if self.rotate != "auto":
            return self.rotate
        return "pairs" if self.mimo_rank == 1 else "halves"


def _check_pair(config: object, name: str) -> tuple[float, float]:
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
