import dataclasses
import json
import math
import subprocess
import sys

import pytest

from mambapy.config import HybridConfig, Mamba2Config, Mamba3Config, MambaConfig
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


HEADS = [Mamba2Config, Mamba3Config]
LOW_HIGH = "must have 0 <= low <= high"
# What a field may not be, and what the error says of it: the value and the rule.
BAD_HEADS = [
    ({"d_head": 5}, "d_head=5 must divide the recurrence's channels, 16 (expand * d_model"),
    ({"d_head": 32}, "d_head=32 must divide the recurrence's channels, 16"),
    ({"d_head": 0}, "d_head=0 must be >= 1"),
    ({"d_head": 4.0}, "d_head=4.0 must be an integer"),
    ({"n_groups": 3}, "n_groups=3 must divide the number of heads, 4 = 16 / d_head=4"),
    ({"n_groups": 8}, "n_groups=8 must divide the number of heads, 4"),
    ({"n_groups": 0}, "n_groups=0 must be >= 1"),
    ({"n_groups": True}, "n_groups=True must be an integer"),
    ({"d_state": 0}, "d_state=0 must be >= 1"),
    ({"chunk_size": 0}, "chunk_size=0 must be >= 1"),
    ({"chunk_size": -64}, "chunk_size=-64 must be >= 1"),
    ({"chunk_size": 64.0}, "chunk_size=64.0 must be an integer"),
    ({"d_intermediate": -1}, "d_intermediate=-1 must be >= 0"),
    ({"mlp_multiple_of": 0}, "mlp_multiple_of=0 must be >= 1"),
    ({"expand": 1.3}, "expand=1.3 times d_model=8 must be a whole number"),
    ({"dt_min": 0.2}, "dt_min=0.2 must not exceed dt_max=0.1"),
    ({"backend": "fast"}, "backend='fast' must be one of"),
]
BAD_MAMBA2 = [
    ({"d_conv": 0}, "d_conv=0 must be >= 1"),
    ({"d_ssm": 0}, "d_ssm=0 must be >= 1"),
    ({"d_ssm": 20}, "d_ssm=20 must not exceed expand * d_model = 16"),
    ({"d_ssm": 6}, "d_head=4 must divide the recurrence's channels, 6"),
    ({"d_ssm": 8, "n_groups": 4}, "n_groups=4 must divide the number of heads, 2 = 8 / d_head=4"),
    ({"dt_limit": (0.5, 0.1)}, f"dt_limit=(0.5, 0.1) {LOW_HIGH}"),
    ({"dt_limit": (-0.1, 1.0)}, f"dt_limit=(-0.1, 1.0) {LOW_HIGH}"),
    ({"dt_limit": (0.0, math.nan)}, "dt_limit=(0.0, nan) must be two numbers"),
    ({"dt_limit": 0.1}, "dt_limit=0.1 must be two numbers"),
    ({"dt_limit": (0.0, 1.0, 2.0)}, "dt_limit=(0.0, 1.0, 2.0) must be two numbers"),
    ({"dt_limit": ("low", 1.0)}, "dt_limit=('low', 1.0) must be two numbers"),
    ({"A_init_range": (0.0, 16.0)}, "A_init_range=(0.0, 16.0) must have 0 < low <= high < inf"),
    ({"A_init_range": (1, "inf")}, "A_init_range=(1.0, inf) must have 0 < low <= high < inf"),
    ({"A_init_range": (16, 1)}, "A_init_range=(16.0, 1.0) must have 0 < low <= high"),
    ({"A_init_range": (True, 2)}, "A_init_range=(True, 2) must be two numbers"),
    ({"rmsnorm": 1}, "rmsnorm=1 must be True or False"),
    ({"learnable_init_states": None}, "learnable_init_states=None must be True or False"),
]
BAD_MAMBA3 = [
    ({"mimo_rank": 0}, "mimo_rank=0 must be >= 1"),
    ({"mimo_rank": -4}, "mimo_rank=-4 must be >= 1"),
    ({"mimo_rank": 2.0}, "mimo_rank=2.0 must be an integer"),
    ({"d_state": 6}, "d_state=6 times rope_fraction=0.5 = 3 channels are rotated in pairs"),
    ({"d_state": 5, "rope_fraction": 1}, "d_state=5 times rope_fraction=1 = 5 channels"),
    ({"d_state": 5}, "d_state=5 times rope_fraction=0.5 = 2.5 channels"),
    ({"rope_fraction": 0.25}, "rope_fraction=0.25 must be 0.5 or 1"),
    ({"rotate": "thirds"}, "rotate='thirds' must be one of auto, pairs, halves"),
    ({"a_activation": "relu"}, "a_activation='relu' must be one of heavy_tail, softplus"),
    ({"A_floor": 0.0}, "A_floor=0.0 must be finite and above zero"),
    ({"outproj_norm": 1}, "outproj_norm=1 must be True or False"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [(kind, *bad) for kind in HEADS for bad in BAD_HEADS]
    + [(Mamba2Config, *bad) for bad in BAD_MAMBA2]
    + [(Mamba3Config, *bad) for bad in BAD_MAMBA3],
)
def test_impossible_heads_name_field_value_and_rule(kind, changes, words):
    good = {"d_model": 8, "n_layers": 2, "d_state": 4, "d_head": 4}
    kind(**good)
    with pytest.raises(ConfigError) as error:
        kind(**good | changes)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", [MambaConfig, *HEADS])
def test_unknown_keywords_raise(kind):  # trap 60
    with pytest.raises(TypeError, match="d_modle"):
        kind(d_model=64, n_layers=1, d_modle=3)
    with pytest.raises(ConfigError, match=r"unknown keys \['d_modle'\] for " + kind.__name__):
        kind.from_dict({"d_model": 64, "n_layers": 1, "d_modle": 3})
    with pytest.raises(ConfigError, match=r"needs \['n_layers'\]"):
        kind.from_dict({"d_model": 64})
    with pytest.raises(TypeError):
        kind(64, 1)


def test_a_key_of_another_kind_is_unknown():  # trap 60
    with pytest.raises(TypeError, match="dt_rank"):
        Mamba2Config(d_model=64, n_layers=1, dt_rank=4)
    with pytest.raises(ConfigError, match=r"\['dt_limit'\] for Mamba3Config"):
        Mamba3Config.from_dict({"d_model": 64, "n_layers": 1, "dt_limit": [0, 1]})


@pytest.mark.parametrize(
    "config",
    [
        Mamba2Config(d_model=64, n_layers=2),
        Mamba2Config(d_model=8, n_layers=1, d_head=4, d_ssm=8, dt_limit=(0.25, 4), expand=1.5),
        Mamba2Config(d_model=64, n_layers=2, A_init_range=(2, 3), learnable_init_states=True),
        Mamba3Config(d_model=64, n_layers=2, mimo_rank=4, rope_fraction=1, chunk_size=16),
    ],
)
def test_heads_round_trip_through_json(config):
    # Plain JSON has no infinity.
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = type(config).from_dict(json.loads(text))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again == type(config).from_dict(config.to_dict())
    assert hash(again) == hash(config)
    assert "backend" not in config.to_dict()
    assert dataclasses.replace(config, n_layers=5).n_layers == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_head = 16


def test_pairs_of_numbers_are_tuples_of_floats():
    config = Mamba2Config(d_model=64, n_layers=1, dt_limit=[0, "inf"], A_init_range=[1, 2])
    assert config.dt_limit == (0.0, math.inf)
    assert config.A_init_range == (1.0, 2.0)
    assert {type(v) for v in (*config.dt_limit, *config.A_init_range)} == {float}
    assert config.to_dict()["dt_limit"] == [0.0, "inf"]


def test_derived_sizes_of_heads():
    config = Mamba2Config(d_model=768, n_layers=24)
    assert (config.d_inner, config.n_heads, config.d_ssm_channels) == (1536, 24, 1536)
    part = Mamba2Config(d_model=64, n_layers=1, d_ssm=64)
    assert (part.d_inner, part.d_ssm_channels, part.n_heads) == (128, 64, 1)
    siso = Mamba3Config(d_model=64, n_layers=1, d_intermediate=100)
    assert (siso.n_angles, siso.rotation, siso.d_mlp, siso.n_residuals) == (32, "pairs", 128, 2)
    mimo = Mamba3Config(d_model=64, n_layers=1, mimo_rank=2, rope_fraction=1)
    assert (mimo.n_angles, mimo.rotation, mimo.n_residuals) == (64, "halves", 1)
    assert Mamba3Config(d_model=64, n_layers=1, mimo_rank=2, rotate="pairs").rotation == "pairs"


@pytest.mark.parametrize("kind", HEADS)
def test_the_originals_names_of_heads(kind):
    config = kind(d_model=64, n_layers=2, d_head=16, expand_factor=3, pscan=False)
    assert (config.d_inner, config.n_heads, config.backend) == (192, 12, "reference")
    assert kind(d_model=64, n_layers=2, use_cuda=True).backend == "official"
    assert dataclasses.replace(config, d_model=32).d_inner == 96


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


HYBRID = {"d_model": 64, "layers": ["mamba2", "attention"], "attention": {"n_heads": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, r"layers=\[\] must be a list of blocks"),
        ({"layers": "mamba"}, "layers='mamba' must be a list of blocks"),
        ({"layers": ["mamba9"]}, "layers: 'mamba9' must be one of mamba, mamba2"),
        ({"n_layers": 3}, "n_layers=3 must be the length of layers, 2"),
        ({"d_intermediate": 8}, r"d_intermediate=8 must be above 0 where a block has '\+mlp'"),
        ({"layers": ["mamba+mlp"], "attention": {}}, "d_intermediate=0 must be above 0"),
        ({"attention": {}}, r"attention: AttentionConfig needs \['n_heads'\]"),
        ({"attention": 3}, "attention=3 must be a mapping of options"),
        ({"mamba2": {"d_stat": 3}}, r"mamba2: unknown keys \['d_stat'\]"),
        ({"mamba2": {"d_model": 3}}, r"mamba2: \['d_model'\] are of the whole stack"),
        ({"mamba3": {"d_state": 3}}, "no block of layers is 'mamba3'"),
        ({"attention": {"n_heads": 3}}, "n_heads=3 must divide d_model=64; or give d_head"),
        ({"attention": {"n_heads": 4, "n_kv_heads": 3}}, "n_kv_heads=3 must divide n_heads=4"),
        ({"attention": {"n_heads": 4, "rotary_dim": 18}}, "rotary_dim=18 must be even and at most"),
        ({"attention": {"n_heads": 4, "rotary_dim": 3}}, "rotary_dim=3 must be even"),
    ],
)
def test_a_hybrid_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        HybridConfig(**HYBRID | changes)


def test_a_hybrid_as_plain_values():
    options = {"d_head": 4, "dt_limit": [0.0, "inf"]}
    config = HybridConfig(**HYBRID | {"mamba2": options, "expand": 1, "d_intermediate": 0})
    assert (config.n_layers, config.n_residuals) == (2, 2)
    assert config.mixer_config("mamba2").d_inner == 64
    plain = json.loads(json.dumps(config.to_dict()))
    assert HybridConfig.from_dict(plain) == config
    mixed = HybridConfig(d_model=64, layers=("mamba", "mamba2+mlp"), d_intermediate=8)
    assert (mixed.feed_forwards, mixed.n_residuals) == (("", "mlp"), 3)
