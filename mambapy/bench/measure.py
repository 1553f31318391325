"""Times of several contestants, taken in turn, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LEAST_ROUNDS, MOST_ROUNDS = 3, 20
# One warm-up is enough for what takes longer than this: kernels load and threads start in less.
ONE_WARMUP_S = 1.0


class ContestantError(Exception):
    """A contestant that could not run; the message is the reason."""


class Contestant(Protocol):
    """Something that can be run and timed."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    def seconds(self) -> float:
        """Run once; the wall time in seconds.

        Raises:
            ContestantError: it could not run.
        """


@dataclass(frozen=True)
class Timing:
    """The times of one contestant, in seconds: median and quartiles of its rounds."""

    median_s: float
    q1_s: float
    q3_s: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The statistics of one round or more."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3, len(seconds))


def alternate(
    contestants: Sequence[Contestant],
    *,
    rounds: int | None = None,
    warmup: int = 2,
    limit_s: float = 5.0,
    budget_s: float = 2.0,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time all contestants, one run of each in each round.

    A contestant whose first run takes longer than `limit_s` is measured by that run alone, and has
    `rounds` 1 in its timing. The others warm up, and take part in as many rounds as fit into their
    budget, but in 3 at least and in 20 at most. Each round begins with another contestant.

    Args:
        contestants: in the order of the first round.
        rounds: the number of rounds of each; without it, their budget decides.
        warmup: runs before the first round, >= 1; a slow contestant has one.
        limit_s: the longest first run, in seconds, of a contestant that is run again.
        budget_s: seconds for the rounds of each contestant.

    Returns:
        The timing of each contestant that ran, and the reason of each that could not.
    """
    timings: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    planned: list[tuple[Contestant, int]] = []
    for contestant in contestants:
        try:
            first, cost = _run(contestant)
            if first > limit_s:
                timings[contestant.name] = Timing.of([first])
                continue
            for _ in range(warmup - 1 if first < ONE_WARMUP_S else 0):
                _, cost = _run(contestant)
        except ContestantError as error:
            failures[contestant.name] = str(error)
            continue
        fitting = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget_s / cost)))
        planned.append((contestant, fitting if rounds is None else rounds))
    times: dict[str, list[float]] = {contestant.name: [] for contestant, _ in planned}
    for turn in range(max((count for _, count in planned), default=0)):
        start = turn % len(planned)
        for contestant, count in planned[start:] + planned[:start]:
            if turn >= count or contestant.name in failures:
                continue
            try:
                times[contestant.name].append(contestant.seconds())
            except ContestantError as error:
                failures[contestant.name] = str(error)
    timings |= {name: Timing.of(s) for name, s in times.items() if name not in failures}
    return {c.name: timings[c.name] for c in contestants if c.name in timings}, failures


def _run(contestant: Contestant) -> tuple[float, float]:
    """A time as the contestant says, and what it cost, which is more where it ran several times."""
    started = time.perf_counter()
    seconds = contestant.seconds()
    return seconds, max(seconds, time.perf_counter() - started)
