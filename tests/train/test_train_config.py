from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mambapy.config import (
    MODEL_TYPES,
    JambaConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
    StackConfig,
)
from mambapy.errors import ConfigError
from mambapy.train.config import DEFAULT_MINUTES, TrainConfig


def test_every_setting_has_a_help_text() -> None:
    assert all(item.metadata["help"] for item in fields(TrainConfig))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"d_state": 257}, "d_state=257 must be at most 256"),
        ({"d_model": 1.5}, "d_model=1.5 must be an integer"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"lr": 0}, "lr=0 must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be finite"),
        ({"lr": "fast"}, "lr='fast' must be a number"),
        ({"schedule": "linear"}, "schedule='linear' must be one of cosine, wsd"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
        ({"betas": (0.9,)}, "betas=(0.9,) must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must each be below 1"),
        ({"betas": (0.9, -1)}, "betas=-1 must be at least 0"),
        ({"compile": 1}, "compile=1 must be true or false"),
        ({"data": 3}, "data=3 must be a string"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 5, "minutes": 1.0}, "steps=5 and minutes=1.0 both say how long"),
        ({"minutes": -1}, "minutes=-1 must be above 0"),
        ({"out": ""}, "out='' must be the path"),
        ({"backend": "fast"}, "backend='fast' must be one of auto"),
        ({"model": "mamba4"}, "model='mamba4' must be one of mamba, mamba2, mamba3, jamba"),
        ({"mimo_rank": 2}, "mimo_rank=2 is no size of mamba; it has: d_conv"),
        ({"model": "mamba3", "d_conv": 4}, "d_conv=4 is no size of mamba3; it has: d_head"),
    ],
)
def test_impossible_value_raises(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, MambaConfig(d_model=192, n_layers=4)),
        ({"model": "mamba2"}, Mamba2Config(d_model=192, n_layers=4, d_state=64)),
        (
            {"model": "jamba", "d_model": 160, "top_k": 1},
            JambaConfig(
                d_model=160,
                n_layers=4,
                d_intermediate=320,
                n_heads=2,
                n_kv_heads=None,
                d_state=16,
                n_experts=8,
                top_k=1,
                attn_layer_period=4,
                attn_layer_offset=2,
            ),
        ),
        (
            {"model": "mamba3", "mimo_rank": 2, "d_state": 8},
            Mamba3Config(d_model=192, n_layers=4, d_state=8, mimo_rank=2, d_intermediate=384),
        ),
        (
            {"model": "mamba2", "d_head": 32, "n_groups": 2, "d_conv": 3, "d_intermediate": 9},
            Mamba2Config(
                d_model=192,
                n_layers=4,
                d_state=64,
                d_head=32,
                n_groups=2,
                d_conv=3,
                d_intermediate=9,
            ),
        ),
    ],
)
def test_sizes_of_an_architecture(values: dict[str, Any], expected: StackConfig) -> None:
    config = TrainConfig(**values)
    assert MODEL_TYPES[config.model](**config.sizes) == expected


def test_length_of_the_run() -> None:
    assert TrainConfig().minutes == DEFAULT_MINUTES
    assert TrainConfig(steps=5).minutes is None


def test_dict_round_trip() -> None:
    config = TrainConfig(steps=7, betas=(0.8, 0.9), data="x")
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(TrainConfig().to_dict()) == TrainConfig()


def test_toml_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 1e-4\nweight-decay = 0.3\nlength = 64\nbetas = [0.8, 0.9]\nminutes = 2\n")
    config = TrainConfig.from_toml(file, length=128, steps=10)
    assert (config.lr, config.length, config.betas) == (1e-4, 128, (0.8, 0.9))
    assert (config.steps, config.minutes) == (10, None)
    assert config.weight_decay == 0.3  # named as the flag


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_modle = 3", "unknown setting 'd_modle'; did you mean d_model?"),
        ("[model]\nwidth = 3", "model={'width': 3} must be a string"),
        ("zzz = 3", "unknown setting 'zzz'; known: data, out"),
        ("lr = = 3", "is not a TOML file"),
    ],
)
def test_bad_toml_raises(tmp_path: Path, text: str, message: str) -> None:
    # trap 60
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_toml(file)
    assert message in str(error.value)


def test_missing_and_binary_toml_raise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read: No such file"):
        TrainConfig.from_toml(tmp_path / "gone.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not a TOML file"):
        TrainConfig.from_toml(tmp_path / "bytes.toml")


def test_resumed_changes_what_may_change() -> None:
    config = TrainConfig(minutes=2.0)
    later = config.resumed(lr=1e-5, steps=100, d_model=config.d_model)
    assert (later.lr, later.steps, later.minutes) == (1e-5, 100, None)
    for name, value in {"d_model": 7, "data": "other", "minutes": 9.0}.items():
        with pytest.raises(ConfigError, match=f"{name}=.* cannot change when a run is resumed"):
            config.resumed(**{name: value})
