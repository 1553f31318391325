"""What a run is at a step, and how it is saved and taken up again exactly.

`last.pt` holds everything that the next step depends on, in one file that is replaced atomically:
a run killed at any moment goes on from its last save as if it had not been killed. Batches and
learning rate are functions of the step, so nothing about them is stored.
"""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.optim import AdamW

from mambapy.checkpoints import atomic_write
from mambapy.errors import CheckpointError, ConfigError, TrainingError
from mambapy.lm import LM
from mambapy.train.config import TrainConfig

LAST = "last.pt"
LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
# What a run puts into its folder; `--overwrite` removes these and nothing else.
RUN_FILES = (LAST, WEIGHTS, "config.json", LOG, "loss.png", "experts.png", "samples.txt")

_FORMAT = 1


@dataclass
class Run:
    """A run at a step: `step` optimiser steps are done, of `total` (None: not fixed yet).

    `interval` is the number of steps between validations, `validated` the step of the last, `best`
    the bits per byte of the best, whose weights are in the folder. In a run of some minutes,
    `plans` counts how often `total` was planned, and `reserve` is the time set aside for the end,
    in seconds.
    """

    config: TrainConfig
    model: LM
    optimizer: AdamW
    fingerprint: str
    step: int = 0
    total: int | None = None
    interval: int = 0
    validated: int = 0
    best: float = float("inf")
    best_step: int = 0
    seconds: float = 0.0
    plans: int = 0
    reserve: float = 0.0


def save(run: Run, folder: Path) -> None:
    """Write `last.pt` atomically.

    Raises:
        CheckpointError: it cannot be written; the earlier one is still there.
    """
    device = next(run.model.parameters()).device
    payload = {
        "format": _FORMAT,
        "config": run.config.to_dict(),
        "fingerprint": run.fingerprint,
        "step": run.step,
        "total": run.total,
        "interval": run.interval,
        "validated": run.validated,
        "best": run.best,
        "best_step": run.best_step,
        "seconds": run.seconds,
        "plans": run.plans,
        "reserve": run.reserve,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with atomic_write(folder / LAST) as path, Path(path).open("wb") as file:
        sink = _Sink(file)
        try:
            torch.save(payload, cast(IO[bytes], sink))
        except RuntimeError:
            # The reason, where the file has one; torch's own message does not say it.
            raise sink.error or CheckpointError(f"{folder / LAST} could not be written") from None
        if sink.error:
            raise sink.error


def read(folder: Path) -> dict[str, Any]:
    """The contents of a run folder's `last.pt`.

    Raises:
        TrainingError: the folder holds no run.
        CheckpointError: the file is damaged or foreign.
    """
    path = folder / LAST
    if not path.is_file():
        raise TrainingError(f"{folder} holds no run to resume: there is no {LAST} in it")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(payload, dict) or payload.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint of this version of mambapy")
    return payload


def saved_config(folder: str | Path, **overrides: Any) -> TrainConfig:
    """The settings of the run in a folder, with some changed; the folder may have been moved.

    Raises:
        TrainingError, CheckpointError: there is no run, or it is damaged.
        ConfigError: a setting that cannot change is among the overrides.
    """
    values = {**read(Path(folder))["config"], "out": str(folder)}
    if "checkpointing" in values:
        # Its name before there were three ways.
        values["recompute"] = values.pop("checkpointing")
    config = TrainConfig.from_dict(values)
    return config.resumed(**overrides)


def restore(run: Run, payload: dict[str, Any], folder: Path) -> None:
    """Put a run into the state that `read` gave.

    The weights in the folder may be those of a better validation than it knows of, after the last
    save; then the state is saved again with what the log says of it.

    Raises:
        CheckpointError: the weights do not fit the run's model, or the state cannot be saved.
    """
    try:
        run.model.load_state_dict(payload["model"])
        # The settings of this run's configuration hold, not those of the saved groups.
        groups = [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]
        run.optimizer.load_state_dict(payload["optimizer"])
        for group, mine in zip(run.optimizer.param_groups, groups, strict=True):
            group.update(mine)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / LAST} does not fit this model: {error}") from error
    # Older files have none: then a validation is due at once.
    run.validated = payload.get("validated", 0)
    for name in ("step", "best", "best_step", "seconds", "plans", "reserve"):
        setattr(run, name, payload[name])
    # Where other values are asked for than the run had, the new run's own hold already.
    if run.config.steps is None:
        run.total = payload["total"]
    if run.total is not None and run.total != payload["total"] and run.total <= run.step:
        raise ConfigError(f"steps={run.total}: the run in {folder} is at step {run.step} already")
    if not run.config.eval_interval and run.total == payload["total"]:
        run.interval = payload["interval"]
    torch.set_rng_state(payload["rng"])
    if payload["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(payload["cuda_rng"], next(run.model.parameters()).device)
    for line in read_log(folder / LOG):
        if line.get("val_bpb", run.best) < run.best:
            run.best, run.best_step = line["val_bpb"], line["step"]
    if run.best < payload["best"]:
        # `Log` drops the lines after the run's step.
        save(run, folder)


class Log:
    """`log.jsonl`: one JSON object a line; opened, it keeps the lines up to a step."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop the lines after `step`, and a last one that a kill cut short."""
        lines = [line for line in read_log(path) if line.get("step", 0) <= step]
        # The last report is written anew at the end.
        kept = [json.dumps(line) + "\n" for line in lines if "final_bpb" not in line]
        with atomic_write(path) as temporary:
            Path(temporary).write_text("".join(kept), encoding="utf-8")
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line; it survives the death of this process."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self._path} cannot be written: {error}") from error

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without what is not a whole line."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    lines.append(line)
    return lines


class _Sink:
    """A file for torch.save that keeps the reason why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, or keep the error and go on, so that it can be raised afterwards."""
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is closed."""
