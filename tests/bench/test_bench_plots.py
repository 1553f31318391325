import importlib.util
import json
import math

import pytest

from mambapy.bench import bars, cases, curves, plot, style, table
from mambapy.cli import main
from mambapy.errors import DataError, MissingExtraError
from tests.bench.conftest import figures, result

pytest.importorskip("matplotlib")


def block_results(memory=True):
    """Every block of the table; time and memory grow with the size."""
    records = []
    for case in cases.select("block"):
        for pass_ in case.passes:
            seconds = 1e-9 * math.prod(case.sizes.values())
            found = {name: figures(seconds) for name in case.contestants}
            found["mamba.py"]["rounds"] = 1
            if not memory:
                found = {name: one | {"peak_bytes": None} for name, one in found.items()}
            record = {"name": case.name, **case.sizes, "pass": pass_, "sweeps": [*case.sweeps]}
            records.append(record | {"contestants": found})
    return result("block", records)


def speeds(kind, passes, **more):
    case = cases.select(kind)[0]
    names = [name for name in case.contestants if name != "transformers"]
    records = []
    for pass_ in passes:
        found = {name: figures(1.0, tokens_per_s=64.0, **more) for name in names}
        record = {"name": case.name, **case.sizes, "pass": pass_, "sweeps": []}
        records.append(record | {"contestants": found})
    return result(kind, records)


def test_draws_from_the_files(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (results / "block.json").write_text(json.dumps(block_results()))
    (results / "block-quick.json").write_text(json.dumps(block_results(memory=False)))
    (results / "train.json").write_text(json.dumps(speeds("train", ["step"])))
    decode = speeds("decode", ["prefill", "decode"], bandwidth_fraction=0.5)
    (results / "decode.json").write_text(json.dumps(decode))
    (results / "demo.json").write_text(json.dumps({"what": "something else"}))
    assert main(["bench", "plot", "--results", str(results), "--out", str(tmp_path / "p")]) == 0
    names = ["block-quick_time", "block_time", "block_memory", "decode_speed", "train_step"]
    expected = [str(tmp_path / "p" / f"{name}.png") for name in names]
    assert capsys.readouterr().out.splitlines() == expected
    for path in (tmp_path / "p").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_of_every_case():
    one, two = speeds("decode", ["prefill", "decode"]), speeds("decode", ["prefill", "decode"])
    figure = bars.bars(one)
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["prefill: tokens a second", "decode: tokens a second"]
    for record in two["cases"]:
        record |= {"name": "another", "batch": 64, "n_layers": 7}
    figure = bars.bars({**one, "cases": one["cases"] + two["cases"]})
    labels = [axes.get_xlabel().split("\n") for axes in figure.axes]
    assert [label[0].split(":")[0] for label in labels] == 2 * ["prefill", "decode"]
    assert labels[0][1] == "24 layers, d_model 768"
    assert labels[2][1] == labels[3][1] == "batch 64, 7 layers, d_model 768"


def test_curves_hold_what_was_measured():
    figure = curves.curves(block_results(), "median_s")
    titles = [axes.get_xlabel() for axes in figure.axes[:3]]
    assert titles == [
        "length   (batch 1, d_model 768, d_state 16)",
        "d_model   (batch 1, length 1024, d_state 16)",
        "d_state   (batch 1, length 1024, d_model 768)",
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == ["forward", "", "", "training", "", ""]
    lengths = figure.axes[0].lines[0]
    assert [*lengths.get_xdata()] == [64, 256, 1024, 4096]
    assert lengths.get_linestyle() == "--"
    assert lengths.get_ydata()[0] == pytest.approx(1e-9 * 64 * 768 * 16)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["floor (matrix products)", "mambapy"]
    memory = curves.curves(block_results(), "peak_bytes")
    legend = [text.get_text() for text in memory.legends[0].get_texts()]
    assert legend[0] == "mambapy"
    assert curves.curves(block_results(memory=False), "peak_bytes") is None


def test_one_backend_has_one_line():
    """`auto` that always takes `cpu` is drawn in its place."""
    sweep = [case for case in cases.select("scan") if "length" in case.sweeps]
    found = {name: figures(0.1) for name in ("auto", "cpu", "chunked")}
    records = [
        {**case.sizes, "name": "x", "pass": "forward", "sweeps": ["length"]}
        | {"contestants": found, "auto_takes": "cpu"}
        for case in sweep
    ]
    assert {*curves._lines(result("scan", records), "forward", "length", "median_s")} == {
        "auto",
        "chunked",
    }
    records[0]["auto_takes"] = "chunked"
    lines = curves._lines(result("scan", records), "forward", "length", "median_s")
    assert {*lines} == {"auto", "cpu", "chunked"}


def test_every_contestant_has_a_style():
    names = {name for kind in cases.KINDS for c in cases.select(kind) for name in c.contestants}
    assert names <= {*style.STYLES}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "holds nothing to draw"),
        ("block.json", "{", "block.json cannot be read"),
        ("demo.json", "[]", "holds nothing to draw"),
        ("block.json", '{"kind": "block", "cases": [{}]}', "is not as bench wrote it"),
        ("block.json", json.dumps(result("block", [])), "holds nothing to draw"),
    ],
)
def test_refuses_clearly(name, text, message, tmp_path):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        plot(tmp_path, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mambapy\[train\]'"):
        plot(tmp_path, tmp_path)


def test_table():
    lines = []
    shown = table.Table(["floor", "mambapy", "mamba.py"], lines.append)
    shown.head(["block-b1"])
    found = {"floor": figures(0.02), "mambapy": figures(0.03, rounds=1)}
    shown.row({"name": "block-b1", "pass": "forward", "contestants": found})
    shown.row({"name": "block-b1", "pass": "training", "contestants": {}})
    assert [line.split() for line in lines] == [
        ["floor", "mambapy", "mamba.py"],
        ["block-b1", "forward", "20", "ms", "1.00x", "30", "ms*1.50x", "-"],
        ["memory", "20", "MB", "30", "MB", "-"],
        ["block-b1", "training", "-", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_units():
    assert [table.duration(s) for s in (62.3, 0.0245, 3e-6)] == ["62.3 s", "24.5 ms", "3 µs"]
    assert [style.size(b) for b in (5.04e9, 2e6, 1500, 12)] == ["5.04 GB", "2 MB", "1.5 kB", "12 B"]
    assert math.isclose(1024, float(table.megabytes(1.024e9).split()[0].replace(",", "")))
