"""The processes that contestants run in, seen from the one that asks them: see worker.py."""

import contextlib
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mambapy.bench.measure import ContestantError
from mambapy.errors import BackendError

SCRIPT = Path(__file__).resolve().with_name("worker.py")
# Longest wait for a library to be imported, or for a contestant to be built and compiled.
START_SECONDS, BUILD_SECONDS = 120.0, 300.0
# OpenMP's threads still spin for some milliseconds after their work; the next one should not share
# the cores with them.
PAUSE_SECONDS = 0.01


class Worker:
    """A process with one `mambapy`; messages are sent and answered in order.

    Args:
        library: the folder with the package `mambapy` to be measured.
        threads: of torch, or None for as many as it takes by itself.
        device: "cpu" or "cuda".
    """

    def __init__(self, library: Path, threads: int | None = None, device: str = "cpu") -> None:
        self.facts: dict[str, Any] = {}
        # Closed by `close`.
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(do="start", library=str(library), threads=threads, device=device)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def ready(self) -> None:
        """Wait until the libraries are imported.

        Raises:
            BackendError: they cannot be, or another `mambapy` was found than the one asked for.
        """
        try:
            self.facts = self.receive(START_SECONDS)
        except ContestantError as error:
            raise BackendError(f"a process of the benchmark cannot start: {error}") from error

    def send(self, **message: Any) -> None:
        """Ask for something without waiting for it."""
        # A process that has ended is noticed where its answer is missing.
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            ContestantError: it is an error, or the process has ended, or took too long and was
                ended.
        """
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise ContestantError(f"broken off after {timeout_s:.0f} s") from None
        if line is None:
            raise ContestantError(f"its process ended{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file and not file.closed:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def _read(self) -> None:
        """Hand on the answers; None when there are no more."""
        if self._process.stdout:
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put(None)

    def _last_words(self) -> str:
        """How the process ended, and the last line it wrote to stderr."""
        code = self._process.wait()
        how = f" by signal {-code}" if code < 0 else f" with status {code}"
        if self._errors.closed:
            return how
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"{how}: {lines[-1]}" if lines else how


@dataclass
class Run:
    """One pass of one contestant in a worker: a `measure.Contestant`.

    Attributes:
        peak_bytes: the most that the first run took above what its process had before.
        process_bytes: the most that its process had in memory, over all runs.
        first_s: seconds of the first run, or of what it was broken off after.
        least_s: seconds that a run should take at least; the work is repeated to fill them.
    """

    name: str
    worker: Worker
    pass_: str
    patience_s: float
    least_s: float = 0.05
    peak_bytes: int | None = None
    process_bytes: int | None = None
    first_s: float | None = None

    def seconds(self) -> float:
        """Run once; the wall time.

        Raises:
            ContestantError: it failed, or was broken off after `patience_s`.
        """
        time.sleep(PAUSE_SECONDS)
        about = {"name": self.name, "pass": self.pass_, "least_s": self.least_s}
        self.worker.send(do="run", **about)
        started = time.perf_counter()
        try:
            answer = self.worker.receive(self.patience_s)
        except ContestantError:
            self.first_s = self.first_s or time.perf_counter() - started
            raise
        seconds: float = answer["seconds"]
        self.first_s = self.first_s or seconds
        for name in ("peak_bytes", "process_bytes"):
            if answer[name] is not None:
                setattr(self, name, max(getattr(self, name) or 0, answer[name]))
        return seconds


def without_paths(reason: str) -> str:
    """A reason fit for a file that others read: one line, without this machine's folders."""
    line = " ".join(reason.split())
    return re.sub(r"(/[\w.+-]+){2,}/?|[A-Za-z]:\\\S+", "<path>", line)[:300]
