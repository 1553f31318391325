"""One process of the benchmarks: builds contestants and runs them, asked by lines of JSON on stdin.

It is run by path, never imported: mamba.py's package is called `mambapy` too, so this file and what
it loads by path (memory.py, work.py, contestants/) take no `mambapy` but the one they are told to
measure, whose folder stands first in sys.path. That one is looked at before anything is measured.

Requests, each answered by one line of JSON, {"error": reason} where it failed:

    {"do": "start", "library": folder, "threads": N or null, "device": "cpu"}
    {"do": "build", "name": "floor", "file": "floor.py", "kind": "block", "sizes": {...},
     "options": {...}}
    {"do": "run", "name": "floor", "pass": "forward", "least_s": 0.05}
    {"do": "card"}
    {"do": "clear"}
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_REPEATS = 1000


class WrongLibraryError(Exception):
    """The `mambapy` that Python found is not the one to be measured."""


class Worker:
    """The contestants of one process."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], Callable[[], Any]] = {}
        self.repeats: dict[tuple[str, str], int] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what one message asks for."""
        asked: Callable[..., dict[str, Any]] = getattr(self, message.pop("do"))
        return asked(message)

    def start(self, message: dict[str, Any]) -> dict[str, Any]:
        """Import the library to be measured, and set torch up."""
        _take_library(message["library"])
        import torch

        self.work, self.device = _load("work.py"), message["device"]
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        if message["threads"]:
            torch.set_num_threads(message["threads"])
        if self.device == "cuda":
            # Before memory is looked at: it is no contestant's.
            self.work.cache_room()
        self.meter = _load("memory.py").Meter(self.device)
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else None
        return {"threads": torch.get_num_threads(), "gpu": gpu}

    def build(self, message: dict[str, Any]) -> dict[str, Any]:
        """Make a contestant: first a tiny one that runs once, so that its kernels are loaded."""
        contestant = _load(f"contestants/{message['file']}")
        kind, options = message["kind"], message["options"]
        tiny = self.work.shrink(message["sizes"])
        for run in self.work.build(contestant, kind, tiny, options, self.device)[0].values():
            run()
        passes, facts = self.work.build(contestant, kind, message["sizes"], options, self.device)
        self.runs |= {(message["name"], name): run for name, run in passes.items()}
        return {"facts": facts}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run a contestant, after its first time as often as fits into `least_s`: mean seconds."""
        key = message["name"], message["pass"]
        run, repeats = self.runs[key], self.repeats.get(key, 1)
        first = key not in self.repeats
        if first:
            gc.collect()
            self.meter.rest()
        seconds = self.work.timed(run, repeats, self.device)
        self.repeats[key] = max(1, min(MOST_REPEATS, int(message["least_s"] / seconds)))
        peak, process = self.meter.peak()
        # Later runs take what the C library has kept from earlier ones, which says little.
        return {
            "seconds": seconds,
            "peak_bytes": peak if first else None,
            "process_bytes": process,
        }

    def card(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the GPU can do at most."""
        facts: dict[str, Any] = self.work.card()
        return facts

    def clear(self, message: dict[str, Any]) -> dict[str, Any]:
        """Forget all contestants."""
        self.runs.clear()
        self.repeats.clear()
        gc.collect()
        if self.device == "cuda":
            # Other processes need the card's memory too.
            self.work.give_back()
        return {}


def _take_library(folder: str) -> None:
    """Import `mambapy` from that folder, and from no other."""
    # Python put this script's own folder there.
    if sys.path and Path(sys.path[0] or ".").resolve() == HERE:
        del sys.path[0]
    sys.path.insert(0, folder)
    found = importlib.import_module("mambapy").__file__
    if not found or Path(found).resolve().parent.parent != Path(folder).resolve():
        raise WrongLibraryError(f"mambapy was to come from {folder}, Python took it from {found}")


def _load(name: str) -> Any:
    """A file of this folder as a module, without importing the package it belongs to."""
    known = f"bench_{Path(name).stem}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, HERE / name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} cannot be loaded")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def main() -> None:
    """Answer until stdin ends."""
    # Ctrl-C reaches the whole group; whoever started this process ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a library prints must not end up among the answers.
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
