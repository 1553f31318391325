"""Named settings for known tasks: what `mambapy train --preset NAME` starts from."""

from dataclasses import dataclass
from typing import Any

from mambapy.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Settings of TrainConfig, what they are for, and where the text is to be had."""

    text: str
    settings: dict[str, Any]
    source: str


PRESETS = {
    "shakespeare": Preset(
        text="characters of tinyshakespeare, the last tenth held out: nanoGPT's task for a CPU",
        settings={
            "out": "runs/shakespeare",
            "held_out": 0.1,
            "d_model": 128,
            "n_layers": 4,
            "d_state": 16,
            "batch_size": 8,
            "length": 128,
            "lr": 4e-3,
            "minutes": 1.1,
        },
        source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
    ),
}


def preset_settings(name: str, data: str) -> dict[str, Any]:
    """The settings of a preset.

    Args:
        name: a key of PRESETS.
        data: the text that the user has named; presets come without.

    Raises:
        ConfigError: there is no such preset, or no text was named.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
    if not data:
        raise ConfigError(f"--preset {name} needs --data, a file with {PRESETS[name].source}")
    return PRESETS[name].settings
