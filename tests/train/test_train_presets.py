"""Presets: what they set, and what stands above them."""

from pathlib import Path

import pytest

from mambapy.cli import main
from mambapy.errors import ConfigError
from mambapy.lm import LM
from mambapy.mamba import MambaConfig
from mambapy.train.config import TrainConfig
from mambapy.train.data import prepare
from mambapy.train.presets import PRESETS
from mambapy.train.text import open_source


def test_flags_stand_above_the_file_and_the_file_above_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 1e-3\nlength = 64\n")
    config = TrainConfig.from_toml(file, "shakespeare", length=32, data="x.txt")
    assert (config.lr, config.length) == (1e-3, 32)
    assert (config.d_model, config.held_out, config.minutes) == (128, 0.1, 1.1)


def test_steps_replace_the_minutes_of_a_preset() -> None:
    config = TrainConfig.from_toml(None, "shakespeare", steps=5, data="x.txt")
    assert (config.steps, config.minutes) == (5, None)


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="must be one of shakespeare"):
        TrainConfig.from_toml(None, "milton", data="x.txt")
    with pytest.raises(ConfigError, match=r"needs --data, .*tinyshakespeare/input\.txt"):
        TrainConfig.from_toml(None, "shakespeare")
    assert main(["train", "--resume", "--preset", "shakespeare"]) == 2
    assert "not --config or --preset" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration(name: str) -> None:
    TrainConfig.from_toml(None, name, data="x.txt")


def test_shakespeare_has_no_more_parameters_than_the_recipe_it_is_compared_with() -> None:
    config = TrainConfig.from_toml(None, "shakespeare", data="x.txt")
    sizes = {name: getattr(config, name) for name in ("d_model", "n_layers", "d_state")}
    model = LM(MambaConfig(**sizes), 257)
    assert sum(P.numel() for P in model.parameters()) <= 800_000


def test_held_out_share_is_the_end_of_a_single_file(tmp_path: Path) -> None:
    from mambapy.tokenizer import ByteTokenizer

    file = tmp_path / "text.txt"
    file.write_bytes(bytes(65 + i % 26 for i in range(5000)))
    data = prepare(open_source(str(file)), ByteTokenizer(), "byte", tmp_path / "cache", 0.1)
    assert (data.train_bytes, data.held_out_bytes) == (4500, 500)
    assert data.held_out_text() == file.read_bytes()[4500:]
