"""The examples run, and write what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from mambapy.config import MODEL_TYPES
from mambapy.lm import LM
from mambapy.train import TrainConfig

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_labels():
    parity = load("parity")
    bits, odd = parity.strings(50, 9)
    assert bits.shape == odd.shape == (50, 9)
    assert bits.unique().tolist() == [0, 1]
    for row, labels in zip(bits.tolist(), odd.tolist(), strict=True):
        ones = 0
        for bit, label in zip(row, labels, strict=True):
            ones ^= bit
            assert label == ones


def test_parity_runs(tmp_path, capsys):
    parity = load("parity")
    sizes = {"d_model": 8, "d_state": 8, "d_head": 4, "batch": 4, "longest": 12, "strings": 16}
    options = {**sizes, "minutes": 0.01, "rates": 0.01, "out": tmp_path / "out"}
    parity.main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
    printed = capsys.readouterr().out
    assert "Mamba-2" in printed
    assert "Mamba-3" in printed
    record = json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))
    assert record["settings"]["d_model"] == record["configs"]["Mamba-3"]["d_model"] == 8
    assert record["versions"]["torch"] == torch.__version__
    for name in ("Mamba-2", "Mamba-3"):
        (found,) = record["runs"][name]
        assert found == record["best"][name]
        assert found["steps"] >= 1
        assert 0 < found["loss"] < 5
        assert [int(n) for n in found["last_place"]] == [*parity.LENGTHS]
        assert len(found["by_place"]) == 256
        assert all(-1 <= a <= 1 for a in found["by_place"])
        # The first place is the first bit; the last one is that of the longest strings.
        assert found["by_place"][-1] == found["last_place"]["256"]
        mean = sum(found["by_place"]) / 256
        assert found["all_places"]["256"] == pytest.approx(mean)
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_series_windows():
    pytest.importorskip("statsmodels")
    series = load("series")
    x, gaps, answers, year = series.windows(2, 0)
    assert x.shape == gaps.shape == (len(answers), 24)
    assert len(answers) == len(year) > 200
    assert torch.equal(x[:, -1], torch.zeros(len(x)))
    assert torch.equal(gaps, gaps.round().clamp(min=1))
    assert 7 < gaps.mean() < 9
    assert year.min() >= 1958
    assert year.max() == 2001
    assert torch.isfinite(answers).all()
    # The window moves on by one number (but in the first years, where some answers are missing).
    assert torch.allclose(x[101, :-1] - x[101, -2], x[100, 1:], atol=1e-3)
    assert torch.equal(gaps[101, :-1], gaps[100, 1:])
    weekly = series.on_every_week(x, gaps)
    assert weekly.shape == (len(x), 172)
    for row in (0, 100):
        ago = [int(gaps[row, place + 1 :].sum()) for place in range(24)]
        for weeks, number in zip(ago, x[row], strict=True):
            assert weeks >= 172 or weekly[row, 171 - weeks] == pytest.approx(float(number))


def test_series_runs(capsys):
    pytest.importorskip("statsmodels")
    load("series").main(["--steps", "1", "--draws", "1", "--d_model", "16"])
    lines = capsys.readouterr().out.splitlines()
    errors = {line[:45].strip(): [*map(float, line[45:].split())] for line in lines[1:-1]}
    assert len(errors) == 7
    assert all(len(row) == 3 and all(0 < e < 10 for e in row) for row in errors.values())
    rules = [row[2] for name, row in errors.items() if "Mamba" not in name]
    assert rules[1] < rules[0]
    assert lines[-1].startswith("windows: ")


def test_series_without_its_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(SystemExit, match="needs statsmodels: pip install statsmodels"):
        load("series")


def test_cryptomamba_on_files_of_its_kind(tmp_path, capsys):
    """Of other files than the published ones it says that they are others."""
    crypto = load("cryptomamba")
    weights = {f"model.{name}": T for name, T in crypto.CryptoMamba().state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "cmamba_v.ckpt")
    rows = torch.rand(30, 6).double().tolist()
    lines = [",".join(crypto.FEATURES), *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "test.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="not the published errors: RMSE, MAPE %, MAE differ"):
        crypto.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "15 windows" in printed
    assert "12 mixers: largest weight" in printed
    x, close = crypto.load_windows(tmp_path / "test.csv")
    assert x.shape == (15, 6, 14)
    assert x[3, 4, 0] == pytest.approx(rows[3][4], rel=1e-6)
    assert x[3, 5, 13] == pytest.approx(rows[16][5] / 1e9, rel=1e-6)
    assert close[3] == rows[17][4]
    torch.save({"state_dict": weights | {"model.more": torch.ones(1)}}, tmp_path / "cmamba_v.ckpt")
    with pytest.raises(RuntimeError, match="more"):
        crypto.main([str(tmp_path)])


def test_the_settings_for_a_gpu():
    config = TrainConfig.from_toml(str(EXAMPLES / "gpu_130m.toml"))
    with torch.device("meta"):
        model = LM(MODEL_TYPES[config.model](**config.sizes), 50277)
    assert 129e6 < sum(P.numel() for P in model.parameters()) < 130e6
