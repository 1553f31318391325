"""What the results say of one pass of one case, as plain values for JSON."""

import math
from collections.abc import Mapping
from typing import Any

from mambapy.bench.cases import Case
from mambapy.bench.measure import Timing
from mambapy.bench.process import Run

Record = dict[str, Any]

# The largest difference between outputs that should be equal, relative to the largest output.
TOLERANCE = 1e-4


def make(
    case: Case,
    pass_: str,
    timings: Mapping[str, Timing],
    runs: Mapping[str, Run],
    facts: Mapping[str, dict[str, Any]],
) -> Record:
    """A record: the case's name and sizes, the pass, and a dict for each contestant."""
    contestants: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        # The floor has its results' memory from the start, so its own says nothing.
        measured = case.metered and name != "floor"
        contestants[name] = {
            "median_s": timing.median_s,
            "q1_s": timing.q1_s,
            "q3_s": timing.q3_s,
            "rounds": timing.rounds,
            "peak_bytes": runs[name].peak_bytes if measured else None,
            "process_bytes": runs[name].process_bytes if measured else None,
        }
        if tokens := _tokens(case, pass_):
            contestants[name]["tokens_per_s"] = tokens / timing.median_s
    record = {
        "name": case.name,
        **case.sizes,
        "pass": pass_,
        "sweeps": [*case.sweeps],
        "contestants": contestants,
    }
    if case.dtype != "float32":
        record["dtype"] = case.dtype
    if case.kind == "scan":
        _add_auto(record, facts)
    return record


def add_bandwidth(
    record: Record, bytes_per_s: float, tokens: int, facts: Mapping[str, dict[str, Any]]
) -> None:
    """Say what decoding read of its weights, and add the floor: to read them alone.

    Args:
        record: of the pass "decode"; it is added to.
        bytes_per_s: bandwidth of the memory, measured in the same run.
        tokens: how many the pass decodes, of each row of the batch.
        facts: `weight_bytes` of each contestant.
    """
    record["bandwidth_bytes_per_s"] = bytes_per_s
    for name, found in record["contestants"].items():
        weight_bytes = facts[name]["weight_bytes"]
        found["weight_bytes"] = weight_bytes
        steps_per_s = found["tokens_per_s"] / record["batch"]
        found["bandwidth_fraction"] = weight_bytes * steps_per_s / bytes_per_s
    first = ("mambapy float32", "mamba2", "mambapy")
    whole = [name for name in first if name in record["contestants"]]
    if whole:
        weight_bytes = facts[whole[0]]["weight_bytes"]
        seconds = tokens * weight_bytes / bytes_per_s
        floor = {
            "median_s": seconds,
            "q1_s": seconds,
            "q3_s": seconds,
            "rounds": 0,
            "peak_bytes": None,
            "process_bytes": None,
            "tokens_per_s": record["batch"] * bytes_per_s / weight_bytes,
            "weight_bytes": weight_bytes,
            "bandwidth_fraction": 1.0,
        }
        record["contestants"] = {"floor": floor, **record["contestants"]}


def differing(facts: Mapping[str, dict[str, Any] | None]) -> dict[str, str]:
    """Who does something else than the first one that shows its outputs, and by how much.

    Args:
        facts: of each contestant, with `outputs` from those that have the same inputs and weights.
    """
    shown = {
        name: found["outputs"] for name, found in facts.items() if found and "outputs" in found
    }
    wrong = {}
    for name, outputs in [*shown.items()][1:]:
        first, expected = next(iter(shown.items()))
        largest = max(abs(y) for y in expected)
        errors = [abs(a - b) / largest for a, b in zip(outputs, expected, strict=True)]
        # Not a number is the largest error of all.
        error = max(errors, key=lambda e: (math.isnan(e), e))
        if not error <= TOLERANCE:
            wrong[name] = f"its outputs differ from those of {first} by {error:.1e}"
    return wrong


def _tokens(case: Case, pass_: str) -> int | None:
    """The tokens that one run of a pass works through, for kinds told in tokens a second."""
    if "n_layers" not in case.sizes:
        return None
    return case.sizes["batch"] * case.sizes["tokens" if pass_ == "decode" else "length"]


def _add_auto(record: Record, facts: Mapping[str, dict[str, Any]]) -> None:
    """Say which backend "auto" takes, and its time over that of the fastest named one."""
    found = record["contestants"]
    others = ("auto", "deterministic", "mamba.py", "official")
    named = [found[name]["median_s"] for name in found if name not in others]
    if "auto" in found:
        record["auto_takes"] = facts["auto"][record["pass"]]
        record["auto_over_best"] = found["auto"]["median_s"] / min(named) if named else None
