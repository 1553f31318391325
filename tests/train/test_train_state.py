import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mambapy.errors import CheckpointError, ConfigError, TrainingError
from mambapy.train import TrainConfig, state, train

FULL_DISK = """
import resource, sys
from mambapy.errors import CheckpointError
from mambapy.train import state, train
config = state.saved_config(sys.argv[1], steps=16)
# Larger than the log, smaller than last.pt: as on a disk that is full.
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
try:
    train(config, resume=True, quiet=True)
except CheckpointError as error:
    print(error)
"""


def test_last_pt_is_plain_data_and_holds_all(tiny: dict[str, Any]) -> None:
    train(TrainConfig(**tiny), quiet=True)
    payload = torch.load(Path(tiny["out"]) / "last.pt", weights_only=True)
    assert payload["step"] == payload["total"] == 12
    assert payload["config"]["d_model"] == 16
    assert {"model", "optimizer", "rng", "best", "fingerprint"} <= set(payload)
    assert payload["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32


def test_disk_full_while_saving_costs_nothing(tiny: dict[str, Any]) -> None:
    train(TrainConfig(**tiny), quiet=True)
    out = Path(tiny["out"])
    names = ("last.pt", "model.safetensors", "config.json")
    before = {name: (out / name).read_bytes() for name in names}
    assert len(before["last.pt"]) > 10_000
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(out)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert str(out) in done.stdout
    assert {name: (out / name).read_bytes() for name in names} == before
    assert not list(out.glob(".*.tmp"))
    # And the run goes on once there is room.
    assert train(state.saved_config(out, steps=16), resume=True, quiet=True)["step"] == 16


def test_unwritable_checkpoint_keeps_the_reason(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    sink = state._Sink(Full())  # type: ignore[arg-type]
    assert sink.write(b"abc") == 3
    assert sink.error is not None
    assert sink.error.errno == 28


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_damaged_last_pt_is_named(tiny: dict[str, Any], content: bytes | None) -> None:
    train(TrainConfig(**tiny), quiet=True)
    file = Path(tiny["out"]) / "last.pt"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or not a checkpoint"):
        state.read(file.parent)


def test_foreign_last_pt_is_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is not a training checkpoint of this version"):
        state.read(tmp_path)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no run to resume"):
        state.read(tmp_path)


def test_saved_config_may_have_moved(tiny: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig(**tiny), quiet=True)
    moved = Path(tiny["out"]).rename(tmp_path / "moved")
    assert state.saved_config(moved).out == str(moved)
    assert state.saved_config(moved, lr=1e-4).lr == 1e-4
    with pytest.raises(ConfigError, match="d_model=3 cannot change"):
        state.saved_config(moved, d_model=3)


def test_log_keeps_what_the_checkpoint_has(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines: list[dict[str, Any]] = [{"config": {}}, *({"step": i} for i in range(1, 9))]
    lines.append({"step": 5, "final_bpb": 1.0})
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    log = state.Log(path, 5)
    log.write(step=6, loss=0.1 + 0.2)
    log.close()
    kept = state.read_log(path)
    assert kept == [
        {"config": {}},
        *({"step": i} for i in range(1, 6)),
        {"step": 6, "loss": 0.1 + 0.2},
    ]


def test_a_run_from_before_recompute_had_its_name(tiny: dict[str, Any]) -> None:
    train(TrainConfig(**tiny), quiet=True)
    path = Path(tiny["out"]) / "last.pt"
    payload = torch.load(path, weights_only=True)
    del payload["config"]["recompute"], payload["config"]["cuda_graph"]
    torch.save(payload | {"config": payload["config"] | {"checkpointing": "block"}}, path)
    config = state.saved_config(tiny["out"], steps=13)
    assert (config.recompute, config.cuda_graph) == ("block", "auto")
    assert train(config, resume=True, quiet=True)["step"] == 13
