"""`bench(Options(kind="block"))`: measures the cases of a kind and writes the file of results."""

import contextlib
import datetime
import json
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from mambapy.bench import cases, machine, records, rivals
from mambapy.bench.cases import Case
from mambapy.bench.measure import ContestantError, alternate
from mambapy.bench.options import Options
from mambapy.bench.process import BUILD_SECONDS, Run, Worker, without_paths
from mambapy.bench.table import Table, Write
from mambapy.errors import ConfigError

# A contestant may be expected to need that share of the machine's memory.
MEMORY_SHARE = 0.5
GPU_SHARE = 0.9


def bench(options: Options, write: Write | None = None) -> dict[str, Any]:
    """Measure, and write `options.path`.

    Args:
        options: what to run.
        write: takes each line of a table as the cases are done.

    Returns:
        What the file holds.

    Raises:
        ConfigError: an option cannot be right.
        BackendError: no process could be started on the device.
        CheckpointError: the file cannot be written.
    """
    chosen = cases.select(
        options.kind,
        options.cases,
        options.contestants,
        quick=options.quick,
        device=options.device,
    )
    libraries = rivals.find(options.mamba_py)
    _check_writable(Path(options.out))
    found: list[records.Record] = []
    result: dict[str, Any] = {}
    unfinished = options.path.with_suffix(".unfinished")
    with Session(options, libraries) as session:
        wanted = dict.fromkeys(name for case in chosen for name in case.contestants)
        session.left_out += [
            {"contestant": name, "reason": libraries.missing[name]}
            for name in wanted
            if name in libraries.missing
        ]
        table = Table([n for n in wanted if n not in libraries.missing], write or (lambda _: None))
        table.head([case.name for case in chosen])
        for case in chosen:
            for record in session.measure(case):
                found.append(record)
                table.row(record)
            # Whoever stops it keeps what was measured, and the record of the last whole run.
            result = _result(options, session, found)
            _save(unfinished, result)
    unfinished.replace(options.path)
    for line in session.left_out:
        table.write("left out: " + ", ".join(line.values()))
    table.write(f"written: {options.path}")
    return result


def _result(options: Options, session: "Session", found: list[records.Record]) -> dict[str, Any]:
    """What the file holds."""
    return {
        "kind": options.kind,
        "command": options.command,
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(session.facts.get("threads"), session.facts.get("gpu"))
        | session.card,
        "versions": {**session.libraries.versions},
        "left_out": session.left_out,
        "cases": found,
    }


def _save(path: Path, result: dict[str, Any]) -> None:
    """Write the file of results."""
    # Importing checkpoints imports torch, which nothing else in this process needs.
    from mambapy.checkpoints import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


class Session:
    """The processes of a run, and what was learnt on the way."""

    def __init__(self, options: Options, libraries: rivals.Libraries) -> None:
        self.options, self.libraries = options, libraries
        self.left_out: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}
        # What a GPU can do at most, measured before all contestants.
        self.card: dict[str, Any] = {}
        self._shared: dict[str, Worker] = {}
        # Case and seconds of every first run, by contestant and pass.
        self._seen: dict[tuple[str, str], list[tuple[Case, float]]] = {}

    def __enter__(self) -> "Session":
        if self.options.device == "cuda":
            folder = self.libraries.folders[rivals.OURS]
            with Worker(folder, self.options.threads, "cuda") as worker:
                worker.ready()
                worker.send(do="card")
                self.card = worker.receive(BUILD_SECONDS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the processes that served several cases."""
        for worker in self._shared.values():
            worker.close()

    def measure(self, case: Case) -> list[records.Record]:
        """Measure all passes of a case; one record each."""
        plan = {pass_: self._able(case, pass_) for pass_ in case.passes}
        names = [name for name in case.contestants if any(name in able for able in plan.values())]
        with contextlib.ExitStack() as stack:
            workers = {name: self._worker(name, case, stack) for name in names}
            built = self._build(case, workers)
            workers = {name: workers[name] for name in built}
            return [
                self._measure_pass(case, pass_, {n: workers[n] for n in able if n in built}, built)
                for pass_, able in plan.items()
            ]

    def _measure_pass(
        self, case: Case, pass_: str, workers: dict[str, Worker], facts: dict[str, dict[str, Any]]
    ) -> records.Record:
        """Time one pass of all contestants in turn."""
        runs = {}
        for name, worker in workers.items():
            if not worker.alive:
                self._leave_out(name, case, pass_, "its process was ended in another pass")
            else:
                # The floor of decoding is how fast memory can be read, in the same rounds.
                what = "bandwidth" if (name, pass_) == ("floor", "decode") else pass_
                runs[name] = Run(name, worker, what, case.patience_s, case.least_s)
        timings, failures = alternate(
            [*runs.values()],
            limit_s=case.limit_s,
            budget_s=case.budget_s,
        )
        for name, reason in failures.items():
            self._leave_out(name, case, pass_, reason)
        for name, run in runs.items():
            if run.first_s is not None:
                self._seen.setdefault((name, pass_), []).append((case, run.first_s))
        read = timings.pop("floor", None) if pass_ == "decode" else None
        record = records.make(case, pass_, timings, runs, facts)
        if read is not None:
            bandwidth = facts["floor"]["read_bytes"] / read.median_s
            records.add_bandwidth(record, bandwidth, case.sizes["tokens"], facts)
        return record

    def _able(self, case: Case, pass_: str) -> list[str]:
        """The contestants that are not expected to need too much memory or time."""
        able = []
        for name in case.contestants:
            if name in self.libraries.missing:
                continue
            reason = self._too_large(case, pass_, name) or self._too_slow(case, pass_, name)
            if reason:
                self._leave_out(name, case, pass_, reason)
            else:
                able.append(name)
        return able

    def _too_large(self, case: Case, pass_: str, name: str) -> str | None:
        """Why a pass would need too much memory."""
        need = rivals.expected_bytes(name, pass_, case.sizes)
        room = MEMORY_SHARE * (machine.memory_bytes() or 2 * (need + 1))
        if self.card:
            room = GPU_SHARE * self.card["gpu_memory_bytes"]
        limit = min(case.memory_limit, room)
        if need <= limit:
            return None
        gib = cases.GIB
        return f"it would need about {need / gib:.1f} GiB, the limit is {limit / gib:.1f} GiB"

    def _too_slow(self, case: Case, pass_: str, name: str) -> str | None:
        """Why a pass would take too long: a smaller case did."""
        for smaller, seconds in self._seen.get((name, pass_), []):
            larger = all(case.sizes[key] >= size for key, size in smaller.sizes.items())
            if larger and seconds >= case.patience_s:
                limit = f"the limit is {case.patience_s:.0f} s"
                return f"{smaller.name} took {seconds:.0f} s already, {limit}"
        return None

    def _worker(self, name: str, case: Case, stack: contextlib.ExitStack) -> Worker:
        """A process for a contestant: for this case alone, or the one it had in earlier cases."""
        if not case.fresh and name in self._shared and self._shared[name].alive:
            return self._shared[name]
        options, folder = self.options, self.libraries.folders[rivals.WHO[name].library]
        worker = Worker(folder, options.threads, options.device)
        if case.fresh:
            stack.enter_context(worker)
        else:
            self._shared[name] = worker
        return worker

    def _build(self, case: Case, workers: dict[str, Worker]) -> dict[str, dict[str, Any]]:
        """Make all contestants, at the same time; the facts of those that could be made."""
        for worker in {id(worker): worker for worker in workers.values()}.values():
            if not worker.facts:
                worker.ready()
                self.facts = self.facts or worker.facts
            worker.send(do="clear")
            worker.receive(BUILD_SECONDS)
        for name, worker in workers.items():
            who, sizes = rivals.WHO[name], {**case.sizes}
            dtype = {} if case.dtype == "float32" else {"dtype": case.dtype}
            about = {"file": who.file, "options": {**who.options} | dtype, "sizes": sizes}
            worker.send(do="build", name=name, kind=case.kind, **about)
        facts = {name: self._facts(name, case, worker) for name, worker in workers.items()}
        wrong = records.differing(facts)
        for name, reason in wrong.items():
            for pass_ in case.passes:
                self._leave_out(name, case, pass_, reason)
        return {n: found for n, found in facts.items() if found is not None and n not in wrong}

    def _facts(self, name: str, case: Case, worker: Worker) -> dict[str, Any] | None:
        """What a contestant that is being made says of itself; None if it could not be made."""
        try:
            facts: dict[str, Any] = worker.receive(BUILD_SECONDS)["facts"]
        except ContestantError as error:
            for pass_ in case.passes:
                self._leave_out(name, case, pass_, str(error))
            return None
        return facts

    def _leave_out(self, name: str, case: Case, pass_: str, reason: str) -> None:
        """Note that a contestant has no figure for a pass of a case, and why."""
        line = {"contestant": name, "case": case.name, "pass": pass_}
        self.left_out.append(line | {"reason": without_paths(reason)})


def _check_writable(folder: Path) -> None:
    """Raise before the measuring, not after it, where the results cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written to: {error.strerror}") from error
