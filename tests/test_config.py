import dataclasses
import subprocess
import sys

import pytest

from mambapy.config import MambaConfig
from mambapy.errors import ConfigError
from tests.helpers import tiny


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 0}, "d_model=0 must be >= 1"),
        ({"d_model": 8.0}, "d_model=8.0 must be an integer"),
        ({"n_layers": True}, "n_layers=True"),
        ({"d_state": 257}, "d_state=257 must be between 1 and 256"),
        ({"d_conv": 0}, "d_conv=0"),
        ({"dt_rank": 0}, "dt_rank=0"),
        ({"dt_rank": "half"}, "dt_rank='half'"),
        ({"expand": 1.3}, "expand=1.3 times d_model=8"),
        ({"expand": -1}, "expand=-1"),
        ({"dt_min": 0.2}, "dt_min=0.2 must not exceed dt_max=0.1"),
        ({"dt_min": 0.0}, "dt_min=0.0"),
        ({"dt_max": float("inf")}, "dt_max=inf"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"dt_init": "zero"}, "dt_init='zero' must be one of random, constant"),
        ({"bias": 1}, "bias=1 must be True or False"),
        ({"backend": "fast"}, "backend='fast' must be one of"),
    ],
)
def test_impossible_values_name_field_value_and_rule(changes, words):
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert words in str(error.value)


def test_unknown_keywords_raise():  # trap 60
    with pytest.raises(TypeError, match="d_modle"):
        MambaConfig(d_model=8, n_layers=1, d_modle=3)
    with pytest.raises(ConfigError, match=r"unknown keys \['d_modle'\]"):
        MambaConfig.from_dict({"d_model": 8, "n_layers": 1, "d_modle": 3})
    with pytest.raises(ConfigError, match=r"needs \['n_layers'\]"):
        MambaConfig.from_dict({"d_model": 8})


def test_frozen_and_round_trip():
    config = tiny(backend="pscan", expand=1.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 16
    again = MambaConfig.from_dict(config.to_dict())
    assert again == dataclasses.replace(config, backend="auto")
    assert "backend" not in config.to_dict()
    assert dataclasses.replace(config, d_model=32).d_inner == 48


def test_derived_sizes():
    assert MambaConfig(d_model=100, n_layers=1).rank == 7
    assert MambaConfig(d_model=100, n_layers=1, dt_rank=5).rank == 5
    assert MambaConfig(d_model=100, n_layers=1, expand=2.5).d_inner == 250
    # 1.1 * 100 is 110.00000000000001 in floating point.
    assert MambaConfig(d_model=100, n_layers=1, expand=1.1).d_inner == 110


def test_the_originals_flags():
    assert tiny(expand_factor=3).d_inner == 24
    assert tiny(pscan=False).backend == "reference"
    assert tiny(use_cuda=True).backend == "official"
    assert tiny(pscan=True, use_cuda=False).backend == "auto"


def test_import_needs_no_torch():
    code = "import sys, mambapy.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
