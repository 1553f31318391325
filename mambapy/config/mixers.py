"""The mixers' configurations: one class each, and all of `StackConfig`'s fields in every one."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from mambapy.config.stack import StackConfig, check_choice, check_int, check_pair, check_positive
from mambapy.errors import ConfigError


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
        inner_norm: an RMS norm on each of dt (its R numbers), B and C, once x_proj has made them:
            "none", "plain" (without a scale, as in Falcon-Mamba) or "learned" (with one, as in
            Jamba).
        inner_norm_eps: epsilon of those norms, > 0.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6, and the paper's code; the inner norms:
    Zuo et al. 2024 (arXiv 2410.05355) and Lieber et al. 2024 (arXiv 2403.19887), section 6.4.
    """

    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | Literal["auto"] = "auto"
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    bias: bool = False
    conv_bias: bool = True
    inner_norm: Literal["none", "plain", "learned"] = "none"
    inner_norm_eps: float = 1e-6

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        super().__post_init__(*original)
        check_int(self, "d_conv", 1)
        check_int(self, "d_state", 1, 256)
        check_choice(self, "inner_norm", ("none", "plain", "learned"))
        check_positive(self, "inner_norm_eps")
        if self.dt_rank != "auto":
            check_int(self, "dt_rank", 1)
        check_positive(self, "dt_scale")
        check_choice(self, "dt_init", ("random", "constant"))

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
            check_int(self, name, 1)
        if self.chunk_size is not None:
            check_int(self, "chunk_size", 1)
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
            low, high = check_pair(self, name)
            decay = name == "A_init_range"
            if not 0 <= low <= high or (decay and not 0 < low <= high < math.inf):
                rule = "0 < low <= high < inf" if decay else "0 <= low <= high"
                raise ConfigError(f"{name}={(low, high)} must have {rule}")
            object.__setattr__(self, name, (low, high))
        if self.d_ssm is not None:
            check_int(self, "d_ssm", 1)
        super().__post_init__(*original)
        check_int(self, "d_conv", 1)
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
        check_int(self, "mimo_rank", 1)
        check_positive(self, "A_floor")
        check_choice(self, "rotate", ("auto", "pairs", "halves"))
        check_choice(self, "a_activation", ("heavy_tail", "softplus"))
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


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(StackConfig):
    """Causal self-attention, as the hybrids have it between their recurrent mixers.

    Args (and those of `StackConfig`):
        n_heads: heads of the queries, >= 1.
        n_kv_heads: heads of the keys and values, which must divide n_heads; None for as many.
        d_head: channels of a head, >= 1; None is d_model / n_heads.
        d_conv: width of a causal convolution over queries, keys and values, 0 for none.
        rotary_dim: channels of each head that positions turn, even and at most d_head; 0 for no
            positions at all.
        rotary_base: base of the turns' wavelengths, > 0.
        bias, out_bias, conv_bias: whether in_proj, out_proj or the convolution has a bias.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); rotary positions: Su et al. 2021 (arXiv
    2104.09864); the convolution: Waleffe et al. 2024 (arXiv 2406.07887) and the Mamba papers' code.
    """

    n_heads: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_conv: int = 0
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    bias: bool = False
    out_bias: bool = False
    conv_bias: bool = True

    def __post_init__(self, *original: Any) -> None:
        """Check every field."""
        super().__post_init__(*original)
        check_int(self, "n_heads", 1)
        for name in ("n_kv_heads", "d_head"):
            if getattr(self, name) is not None:
                check_int(self, name, 1)
        for name in ("d_conv", "rotary_dim"):
            check_int(self, name, 0)
        check_positive(self, "rotary_base")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} must divide d_model={self.d_model}; or give d_head"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_channels:
            raise ConfigError(
                f"rotary_dim={self.rotary_dim} must be even and at most the {self.head_channels} "
                "channels of a head"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_channels(self) -> int:
        """P, the channels of a head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head
