"""Every setting of a training run: the one table behind its checks, its flags and their help."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mambapy.config import BACKENDS, RECOMPUTE
from mambapy.errors import ConfigError
from mambapy.train.presets import preset_settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What `minutes` is when neither it nor `steps` is given.
DEFAULT_MINUTES = 3.0
# The architectures, and which of the sizes below each has besides those that all have.
SIZES = {
    "mamba": ("d_conv",),
    "mamba2": ("d_conv", "d_head", "n_groups"),
    "mamba3": ("d_head", "n_groups", "mimo_rank"),
    "jamba": (
        *("d_conv", "d_head", "n_groups", "mixer", "n_heads", "n_kv_heads", "n_experts", "top_k"),
        *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
    ),
}
# Channels of an attention head, about, where their number is not given.
ATTENTION_HEAD = 64
# Share of the text that is not trained on.
HELD_OUT_SHARE = 0.05


def _setting(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    fixed: bool = False,
) -> Any:
    """A field with its help and its rule; a `fixed` one cannot change when a run is resumed."""
    rule = {"least": least, "above": above, "most": most, "choices": choices, "fixed": fixed}
    return field(default=default, metadata={"help": text, **rule})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run; each field's help, unit and rule stand beside it.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.
    """

    data: str = _setting(
        "", "text file (also .xz, .gz) or folder; empty: Python's own library", fixed=True
    )
    out: str = _setting("runs/demo", "run folder, made where it is missing")
    cache: str = _setting("", "folder for the prepared tokens; empty: data/ in the run folder")
    tokenizer: str = _setting("byte", '"byte" or the path of a tokenizer.json', fixed=True)

    held_out: float = _setting(
        HELD_OUT_SHARE, "share of the text held out, 256 KiB at most", above=0, most=0.5, fixed=True
    )

    model: str = _setting("mamba", "architecture", choices=tuple(SIZES), fixed=True)
    d_model: int = _setting(192, "width of the residual stream", least=1, fixed=True)
    n_layers: int = _setting(4, "number of blocks", least=1, fixed=True)
    d_state: int | None = _setting(
        None, "state size of each channel [16; 64 in heads]", least=1, most=256, fixed=True
    )
    expand: float = _setting(2.0, "inner width / d_model", above=0, fixed=True)
    d_intermediate: int | None = _setting(
        None, "width of the MLP after each mixer [0; mamba3, jamba: 2 d_model]", least=0, fixed=True
    )
    d_conv: int | None = _setting(
        None, "width of the convolution, tokens [4]; mamba, mamba2, jamba", least=1, fixed=True
    )
    d_head: int | None = _setting(
        None, "channels of a head [64]; mamba2, mamba3", least=1, fixed=True
    )
    mixer: str | None = _setting(
        None,
        "what is not attention [mamba]; jamba",
        choices=("mamba", "mamba2", "mamba3"),
        fixed=True,
    )
    n_heads: int | None = _setting(
        None, f"heads of attention [d_model / {ATTENTION_HEAD}]; jamba", least=1, fixed=True
    )
    n_kv_heads: int | None = _setting(
        None, "heads of its keys and values [n_heads]; jamba", least=1, fixed=True
    )
    attn_layer_period: int | None = _setting(
        None, "blocks from one attention to the next [4]; jamba", least=1, fixed=True
    )
    attn_layer_offset: int | None = _setting(
        None, "blocks before the first attention [2]; jamba", least=0, fixed=True
    )
    n_experts: int | None = _setting(
        None, "experts of a block; 1: none [8]; jamba", least=1, fixed=True
    )
    top_k: int | None = _setting(None, "experts of a token [2]; jamba", least=1, fixed=True)
    expert_layer_period: int | None = _setting(
        None, "blocks from one with experts to the next [2]; jamba", least=1, fixed=True
    )
    expert_layer_offset: int | None = _setting(
        None, "blocks before the first with experts [1]; jamba", least=0, fixed=True
    )
    n_groups: int | None = _setting(
        None, "groups of heads that share B and C [1]; mamba2, mamba3", least=1, fixed=True
    )
    mimo_rank: int | None = _setting(
        None, "inputs and outputs of a head at each step [1]; mamba3", least=1, fixed=True
    )
    tie_embeddings: bool = _setting(True, "share the head's weight with the embedding", fixed=True)

    batch_size: int = _setting(8, "sequences in one forward pass", least=1)
    length: int = _setting(256, "tokens in a sequence", least=1)
    accumulate: int = _setting(1, "forward passes in one step", least=1)
    steps: int | None = _setting(None, "optimiser steps of the whole run", least=1)
    minutes: float | None = _setting(
        None, f"length of the run in minutes, instead of steps [{DEFAULT_MINUTES:g}]", above=0
    )

    lr: float = _setting(4e-3, "peak learning rate", above=0)
    min_lr_ratio: float = _setting(0.05, "last learning rate / peak", least=0, most=1)
    warmup: int = _setting(20, "steps of linear warm-up", least=0)
    schedule: str = _setting("cosine", "shape of the decay", choices=("cosine", "wsd"))
    decay_fraction: float = _setting(0.2, "share of the steps in which wsd decays", least=0, most=1)
    weight_decay: float = _setting(0.1, "AdamW's decay of the matrices", least=0)
    betas: tuple[float, float] = _setting((0.9, 0.95), "AdamW's two betas", least=0, most=1)
    eps: float = _setting(1e-8, "AdamW's epsilon", above=0)
    aux_loss: float = _setting(
        0.001, "weight of the loss that balances the experts' loads; jamba", least=0
    )
    router_z_loss: float = _setting(
        0.0, "weight of the loss that keeps the router's logits small; jamba", least=0
    )
    grad_clip: float = _setting(1.0, "largest norm of the gradient; 0: no clipping", least=0)

    dtype: str = _setting(
        "float32", "bfloat16 is autocast: weights stay float32", choices=("float32", "bfloat16")
    )
    recompute: str = _setting(
        "none", "what the backward pass computes again, for less memory", choices=RECOMPUTE
    )
    compile: bool = _setting(False, "run the forward pass through torch.compile")
    cuda_graph: str = _setting(
        "auto",
        "play a step as one CUDA graph; auto: where that works",
        choices=("auto", "always", "never"),
    )
    tune: bool = _setting(
        False, "measure in the first step how the GPU's scan is best divided, for 20 s at most"
    )
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    threads: int = _setting(0, "CPU threads; 0: torch's own choice", least=0)
    backend: str = _setting("auto", "implementation of the ops", choices=BACKENDS)
    seed: int = _setting(0, "seed of weights and batches", least=0, most=2**32 - 1)

    eval_interval: int = _setting(0, "steps between validations; 0: at most about 20", least=0)
    eval_tokens: int = _setting(32768, "held-out tokens in each of them", least=1)
    save_interval: int = _setting(0, "steps between saves; 0: at validations, or 5 min", least=0)
    log_interval: int = _setting(1, "steps between lines of log.jsonl", least=1)

    plot: str = _setting(
        "auto", "draw loss.png; auto: if matplotlib is there", choices=("auto", "always", "never")
    )
    samples: int = _setting(3, "samples to draw at the end", least=0)
    sample_prompt: str = _setting("", "their prompt; empty: pieces of held-out text")
    sample_tokens: int = _setting(300, "tokens in each sample", least=1)
    sample_temperature: float = _setting(0.8, "their temperature; 0: the likeliest token", least=0)
    sample_top_k: int = _setting(40, "draw from that many likeliest tokens", least=1)

    def __post_init__(self) -> None:
        """Check every field, then what must hold between them."""
        for item in fields(self):
            _check(item.name, getattr(self, item.name), str(item.type), item.metadata)
        object.__setattr__(self, "betas", tuple(self.betas))
        if max(self.betas) >= 1:
            raise ConfigError(f"betas={self.betas} must each be below 1")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(
                f"steps={self.steps} and minutes={self.minutes} both say how long; give one of them"
            )
        for name in dict.fromkeys(name for names in SIZES.values() for name in names):
            if getattr(self, name) is not None and name not in SIZES[self.model]:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is no size of {self.model}; "
                    f"it has: {', '.join(SIZES[self.model])}"
                )
        if not self.out:
            raise ConfigError("out='' must be the path of a run folder")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)

    @property
    def cache_folder(self) -> Path:
        """Where the prepared tokens are."""
        return Path(self.cache) if self.cache else Path(self.out) / "data"

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the architecture, for its own configuration."""
        given = {name: getattr(self, name) for name in SIZES[self.model]}
        in_heads = (self.mixer or "mamba") != "mamba" or self.model in ("mamba2", "mamba3")
        mlp = 2 * self.d_model if self.model in ("mamba3", "jamba") else 0
        defaults: dict[str, Any] = {}
        if self.model == "jamba":
            heads = max(1, self.d_model // ATTENTION_HEAD)
            heads = next(n for n in range(heads, 0, -1) if self.d_model % n == 0)
            defaults = {"n_heads": heads, "n_kv_heads": None, "n_experts": 8}
            defaults |= {"attn_layer_period": 4, "attn_layer_offset": 2}
        return {
            **defaults,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "d_state": self.d_state or (64 if in_heads else 16),
            "expand": self.expand,
            "d_intermediate": mlp if self.d_intermediate is None else self.d_intermediate,
            **{name: value for name, value in given.items() if value is not None},
        }

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; `from_dict` is the inverse."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "") -> TrainConfig:
        """Settings from plain values; `source` is where they came from, for the messages.

        Raises:
            ConfigError: a key is unknown or a value breaks its rule.
        """
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise ConfigError(
                    f"{source}{': ' if source else ''}unknown setting {key!r}; {hint}"
                )
        return cls(**values)

    @classmethod
    def from_toml(
        cls, path: str | Path | None, preset: str | None = None, **overrides: Any
    ) -> TrainConfig:
        """Settings from a preset, then from a flat TOML file, then from the overrides.

        Raises:
            ConfigError: the file is missing, is not TOML, or has an unknown key or bad value; the
                preset is unknown, or no data is named for it.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
                values = {key.replace("-", "_"): value for key, value in given.items()}
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} is not a TOML file: {error}") from error
        if preset is not None:
            data = overrides.get("data") or values.get("data", "")
            values = _later_wins(preset_settings(preset, data), values)
        return cls.from_dict(_later_wins(values, overrides), source=str(path) if path else "")

    def resumed(self, **overrides: Any) -> TrainConfig:
        """These settings with some changed for the rest of a run.

        Raises:
            ConfigError: the setting is part of what the run is, or the new value breaks its rule.
        """
        values = self.to_dict()
        for item in fields(self):
            name = item.name
            if name in overrides and overrides[name] != getattr(self, name):
                if item.metadata["fixed"] or name == "minutes":
                    raise ConfigError(
                        f"{name}={overrides[name]!r} cannot change when a run is resumed; "
                        f"it is {getattr(self, name)!r} in this one"
                    )
                values[name] = overrides[name]
                if name == "steps":
                    values["minutes"] = None
        return type(self).from_dict(values)


def _later_wins(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both, where steps and minutes say the same thing."""
    values = dict(earlier)
    for name, other in (("steps", "minutes"), ("minutes", "steps")):
        if later.get(name) is not None and later.get(other) is None:
            values.pop(other, None)
    return {**values, **later}


def _check(name: str, value: Any, kind: str, rule: Mapping[str, Any]) -> None:
    """Raise unless the value has the field's type and obeys its rule."""
    if value is None and "None" in kind:
        return
    if "tuple" in kind:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{name}={value!r} must be two numbers")
        for one in value:
            _check(name, one, "float", rule)
        return
    types, noun = {
        "str": ((str,), "a string"),
        "int": ((int,), "an integer"),
        "bool": ((bool,), "true or false"),
        "float": ((int, float), "a number"),
    }[kind.split(" ")[0]]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{name}={value!r} must be {noun}")
    if rule["choices"] and value not in rule["choices"]:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(rule['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be finite")
    if rule["least"] is not None and value < rule["least"]:
        raise ConfigError(f"{name}={value} must be at least {rule['least']:g}")
    if rule["above"] is not None and value <= rule["above"]:
        raise ConfigError(f"{name}={value} must be above {rule['above']:g}")
    if rule["most"] is not None and value > rule["most"]:
        raise ConfigError(f"{name}={value} must be at most {rule['most']:g}")
