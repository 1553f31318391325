import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mambapy.bench import Options, bench, cases, records, rivals
from mambapy.bench import run as bench_run
from mambapy.bench.cases import Case
from mambapy.bench.measure import Timing
from mambapy.bench.process import Run
from mambapy.bench.run import Session
from mambapy.cli import main
from mambapy.errors import ConfigError

CONTESTANTS = {
    "scan": "auto,reference",
    "block": "floor,mambapy",
    "heads": "floor,mamba2,mamba3",
    "experts": "floor,mambapy,dense",
    "vision": "floor,mambapy,vit",
    "train": "floor,mambapy",
    "decode": "floor,mambapy float32,mambapy int8",
}
FIGURES = {"median_s", "q1_s", "q3_s", "rounds", "peak_bytes", "process_bytes"}


def check(result, kind, names):
    """The file's form, as the plots and README rely on it."""
    assert [*result] == [
        "kind", "command", "date", "machine", "versions", "left_out", "cases",
    ]  # fmt: skip
    assert result["kind"] == kind
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert {*result["machine"]} == {"cpu", "cores", "threads", "memory_bytes", "os", "gpu"}
    assert {"python", "mambapy", "torch"} <= {*result["versions"]}
    for record in result["cases"]:
        assert {"name", "batch", "length", "pass", "sweeps"} <= {*record}
        assert ("d_mlp" if kind == "experts" else "d_state") in record
        assert [*record["contestants"]] == names
        for one in record["contestants"].values():
            assert {*one} >= FIGURES
            assert 0 < one["q1_s"] <= one["median_s"] <= one["q3_s"]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_quick_end_to_end(kind, tmp_path, capsys):
    out = tmp_path / "new" / "results"
    flags = ["--quick", "--threads", "1", "--contestants", CONTESTANTS[kind], "--out", str(out)]
    assert main(["bench", kind, *flags]) == 0
    text = (out / f"{kind}-quick-part.json").read_text(encoding="utf-8")
    result = json.loads(text)
    names = CONTESTANTS[kind].split(",")
    check(result, kind, names)
    assert result["command"].startswith(f"mambapy bench {kind} --quick --contestants '")
    assert result["machine"]["threads"] == 1
    assert result["left_out"] == []
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == " ".join(names).split()
    assert len(lines) == 2 + len(result["cases"])
    for record in result["cases"]:
        found = record["contestants"].values()
        assert all("tokens_per_s" in one for one in found) == ("n_layers" in record)
        if kind == "scan":
            assert record["auto_takes"] in ("cpu", "chunked")
            ratio = record["contestants"]["auto"]["median_s"]
            ratio /= record["contestants"]["reference"]["median_s"]
            assert record["auto_over_best"] == pytest.approx(ratio)
        if record["pass"] == "decode":
            bandwidth = record["bandwidth_bytes_per_s"]
            for one in found:
                used = one["tokens_per_s"] * one["weight_bytes"] / bandwidth
                assert one["bandwidth_fraction"] == pytest.approx(used)
            floor, ours, other = found
            assert floor["weight_bytes"] == ours["weight_bytes"]
            assert kind == "heads" or other["weight_bytes"] < ours["weight_bytes"]
            assert floor["rounds"] == 0


def test_a_step_reads_its_weights_once_for_all_rows():
    record = {"batch": 64, "contestants": {"mambapy": {"tokens_per_s": 6400.0}}}
    records.add_bandwidth(record, 1e9, 10, {"mambapy": {"weight_bytes": 5_000_000}})
    floor, ours = record["contestants"].values()
    assert floor["median_s"] == pytest.approx(0.05)
    assert floor["tokens_per_s"] == pytest.approx(64 * 10 / 0.05)
    assert ours["bandwidth_fraction"] == pytest.approx(0.5)


def test_fresh_processes_measure_memory_beside_mamba_py(tmp_path, mamba_py):
    """Each contestant in a process of its own, the rival's with its own `mambapy`."""
    options = Options(kind="scan", out=str(tmp_path), threads=1)
    sizes = {"batch": 1, "length": 256, "d_inner": 128, "d_state": 16}
    case = Case(kind="scan", sizes=sizes, contestants=("pscan", "mamba.py"), budget_s=0)
    with Session(options, rivals.find(str(mamba_py))) as session:
        forward, training = session.measure(case)
        assert session.left_out == []
    assert [*forward["contestants"]] == ["pscan", "mamba.py"]
    if sys.platform == "linux":
        for name in ("pscan", "mamba.py"):
            peaks = [record["contestants"][name]["peak_bytes"] for record in (forward, training)]
            assert 0 < peaks[0] < peaks[1] < 50e6


def test_no_one_is_asked_for_too_much(tmp_path):
    """Too much memory, too much time going by a smaller case; no process is needed to say so."""
    libraries = rivals.find()
    with Session(Options(kind="block", out=str(tmp_path)), libraries) as session:
        sizes = {"batch": 1, "length": 64, "d_model": 64, "d_state": 16}
        small = Case(kind="block", sizes=sizes, contestants=("floor",), patience_s=30)
        session._seen["floor", "training"] = [(small, 40.0)]
        larger = replace(small, sizes=sizes | {"length": 128})
        reason = "block-b1-l64-d64-n16 took 40 s already, the limit is 30 s"
        assert session._too_slow(larger, "training", "floor") == reason
        assert session._too_slow(larger, "forward", "floor") is None
        assert session._too_slow(larger, "training", "mambapy") is None
        assert session._too_slow(replace(larger, patience_s=50), "training", "floor") is None
        smaller = replace(small, sizes=sizes | {"length": 256, "d_state": 8})
        assert session._too_slow(smaller, "training", "floor") is None
        scan = Case(
            kind="scan",
            sizes={"batch": 128, "length": 4096, "d_inner": 64, "d_state": 64},
            contestants=("pscan",),
            memory_limit=4 << 30,
        )
        assert session.measure(scan)[0]["contestants"] == {}
        assert [line["pass"] for line in session.left_out] == ["forward", "training"]
        assert "would need about 32.0 GiB, the limit is 4.0 GiB" in session.left_out[0]["reason"]


def test_other_outputs_have_no_figure():
    ours = [3.0, -4.0, 0.0]
    facts = {
        "floor": {},
        "mambapy": {"outputs": ours},
        "near": {"outputs": [3.0, -4.0, 0.0003]},
        "far": {"outputs": [3.0, -4.0, 0.0005]},
        "broken": {"outputs": [3.0, -4.0, math.nan]},
        "failed": None,
    }
    assert records.differing(facts) == {
        "far": "its outputs differ from those of mambapy by 1.3e-04",
        "broken": "its outputs differ from those of mambapy by nan",
    }


def test_full_tables():
    for kind in cases.KINDS:
        names = [case.name for case in cases.select(kind)]
        assert len(names) == len({*names})
        for case in cases.select(kind) + cases.select(kind, quick=True):
            assert case.kind == kind
            assert {*case.contestants} <= {*rivals.WHO}
    grid = [case for case in cases.select("scan") if not case.sweeps]
    assert len(grid) == 5 * 3 * 2
    assert all("auto" in case.contestants for case in grid)


def test_select():
    assert [c.name for c in cases.select("block", "l1024-d768-n16")] == ["block-b1-l1024-d768-n16"]
    assert len(cases.select("scan", "scan-b1-l*-e1536-n16")) == 5
    only = cases.select("block", contestants="mamba.py, floor")
    assert all(case.contestants == ("floor", "mamba.py") for case in only)
    with pytest.raises(ConfigError, match="fits no case of `bench scan`: scan-b1-l64-e1536-n16"):
        cases.select("scan", "l77")
    with pytest.raises(ConfigError, match="'warp' is not in `bench block`: floor, mambapy"):
        cases.select("block", contestants="floor,warp")


def test_mistakes_are_told_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_run, "Session", None)
    (tmp_path / "file").touch()
    for flags, message in {
        ("--cases", "l77"): "fits no case",
        ("--contestants", "warp"): "'warp' is not in",
        ("--out", str(tmp_path / "file" / "x")): "cannot be written to: Not a directory",
        ("--device", "abacus"): "must be cpu or cuda",
        ("--mamba-py", str(tmp_path)): "does not hold mamba.py",
    }.items():
        assert main(["bench", "block", *flags]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err


def test_part_of_the_cases_is_a_file_of_its_own(tmp_path):
    paths = [
        Options(kind="block", out="x", **more).path.name
        for more in ({}, {"quick": True}, {"cases": "l1"}, {"device": "cuda", "quick": True})
    ]
    assert paths == ["block.json", "block-quick.json", "block-part.json", "cuda-block-quick.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_it_leaves_no_record(tmp_path):
    command = [sys.executable, "-m", "mambapy.cli", "bench", "block", "--quick"]
    with subprocess.Popen(
        [*command, "--contestants", "floor", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert err == "\nmambapy: interrupted\n"
    assert [*tmp_path.glob("*.json")] == []


def test_stopped_it_keeps_what_was_measured(tmp_path):
    options = Options(kind="block", quick=True, contestants="floor", out=str(tmp_path), threads=1)
    options.path.write_text("the last whole run")
    rows = []

    def stop_later(line):
        rows.append(line)
        # Two lines of the table's head, two passes of a case.
        if len(rows) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(options, stop_later)
    result = json.loads(options.path.with_suffix(".unfinished").read_text())
    assert [record["pass"] for record in result["cases"]] == ["forward", "training"]
    assert options.path.read_text() == "the last whole run"
    bench(options)
    assert [*tmp_path.iterdir()] == [options.path]


def test_the_python_call(tmp_path):
    options = Options(
        kind="block", quick=True, cases="l16", contestants="floor", out=str(tmp_path), threads=1
    )
    result = bench(options)
    assert json.loads((tmp_path / "block-quick-part.json").read_text()) == result
    assert [record["pass"] for record in result["cases"]] == ["forward", "training"]


def test_auto_over_the_best_of_our_backends():
    case = cases.select("scan")[0]
    names = ["auto", "cpu", "chunked", "mamba.py"]
    timings = {name: Timing.of([s]) for name, s in zip(names, (3, 2, 4, 1), strict=True)}
    runs = {name: Run(name, None, "forward", 1.0) for name in names}
    facts = {"auto": {"forward": "cpu", "training": "chunked"}}
    record = records.make(case, "forward", timings, runs, facts)
    assert (record["auto_takes"], record["auto_over_best"]) == ("cpu", 1.5)
    alone = records.make(case, "training", {"auto": timings["auto"]}, runs, facts)
    assert (alone["auto_takes"], alone["auto_over_best"]) == ("chunked", None)
