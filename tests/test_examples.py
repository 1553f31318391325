"""The examples run, and write what they say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

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
