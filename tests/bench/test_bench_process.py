import sys
from pathlib import Path

import pytest
import torch

import mambapy
from mambapy.bench import process, rivals
from mambapy.bench.measure import ContestantError
from mambapy.bench.process import Run, Worker, without_paths
from mambapy.errors import BackendError, ConfigError

OURS = Path(mambapy.__file__).parent.parent
SIZES = {"batch": 1, "length": 4, "d_inner": 8, "d_model": 8, "d_state": 4}


def build(worker, name, kind, **options):
    who = rivals.WHO[name]
    about = {"file": who.file, "options": {**who.options}, "kind": kind}
    worker.send(do="build", name=name, sizes=SIZES, **about | options)
    return worker.receive(60)


def test_a_worker_runs_ours():
    with Worker(OURS, threads=1) as worker:
        worker.ready()
        assert worker.facts == {"threads": 1, "gpu": None}
        facts = build(worker, "pscan", "scan")["facts"]
        assert facts["forward"] in ("cpu", "chunked")
        run = Run("pscan", worker, "training", patience_s=60)
        first = run.seconds()
        assert run.first_s == first > 0
        peak = run.peak_bytes
        if sys.platform == "linux":
            assert 0 <= peak < run.process_bytes
        assert run.seconds() > 0
        # Memory is that of the first run.
        assert (run.peak_bytes, run.first_s) == (peak, first)
        with pytest.raises(ContestantError, match="KeyError"):
            Run("pscan", worker, "no such pass", 60).seconds()
        with pytest.raises(ContestantError, match=r"BackendError: .*official"):
            build(worker, "pscan", "scan", options={"backend": "official"})
        worker.send(do="clear")
        assert worker.receive(60) == {}
        with pytest.raises(ContestantError, match="KeyError"):
            run.seconds()
    assert not worker.alive


def test_a_worker_runs_the_other_mambapy(mamba_py):
    """Its folder wins over the editable install, and what it prints is no answer."""
    with Worker(mamba_py, threads=1) as worker:
        worker.ready()
        build(worker, "mamba.py", "scan")
        assert Run("mamba.py", worker, "training", 60).seconds() > 0
        with pytest.raises(ContestantError, match="broken off after 0 s"):
            Run("mamba.py", worker, "training", 0).seconds()
        assert not worker.alive
        with pytest.raises(ContestantError, match="its process ended"):
            Run("mamba.py", worker, "training", 60).seconds()


def test_a_worker_refuses_the_wrong_mambapy(tmp_path):
    with (
        Worker(tmp_path) as worker,
        pytest.raises(BackendError, match=r"mambapy was to come from .* took it from"),
    ):
        worker.ready()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_without_a_gpu():
    with (
        Worker(OURS, device="cuda") as worker,
        pytest.raises(BackendError, match="torch finds no CUDA device"),
    ):
        worker.ready()


def test_a_process_that_cannot_start_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit('no torch here')")
    monkeypatch.setattr(process, "SCRIPT", broken)
    with Worker(OURS) as worker, pytest.raises(BackendError, match="with status 1: no torch here"):
        worker.ready()


def test_no_file_hides_the_standard_library():
    """worker.py is run as a script, so its folder is where Python looks first, for a moment."""
    names = {path.stem for path in process.SCRIPT.parent.iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_reasons_name_no_folders():
    assert without_paths("OSError:\n /home/me/x.so gone") == "OSError: <path> gone"
    assert without_paths(r"no C:\Users\me\x here") == "no <path> here"
    assert without_paths("3 GiB/s, 1.2/3") == "3 GiB/s, 1.2/3"


def test_find_without_mamba_py():
    found = rivals.find()
    assert found.folders == {"mambapy": OURS}
    assert found.versions["mambapy"] == mambapy.__version__
    assert "--mamba-py DIR" in found.missing["mamba.py"]
    assert "floor" not in found.missing


def test_find_mamba_py(mamba_py):
    found = rivals.find(str(mamba_py))
    assert found.versions["mamba.py"] == "1.2.0"
    assert "mamba.py" not in found.missing


@pytest.mark.parametrize("name", ["gone", ".", "ours"])
def test_a_folder_without_mamba_py(name, tmp_path):
    folder = OURS if name == "ours" else tmp_path / name
    with pytest.raises(ConfigError, match=r"does not hold mamba\.py; pip install"):
        rivals.find(str(folder))


def test_expected_memory_grows_with_layers_in_training_only():
    one = {"batch": 2, "length": 8, "d_model": 4, "d_state": 16}
    tensor = 4 * 2 * 8 * 8 * 16
    assert rivals.expected_bytes("mamba.py", "forward", one) == 7 * tensor
    six = one | {"n_layers": 6}
    assert rivals.expected_bytes("mamba.py", "prefill", six) == 7 * tensor
    assert rivals.expected_bytes("mamba.py", "step", six) == (10 + 5 * 5) * tensor
    assert rivals.expected_bytes("mambapy", "step", six) == 0
