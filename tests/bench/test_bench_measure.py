import statistics

import pytest

from mambapy.bench.measure import ContestantError, Timing, alternate


class Fake:
    """A contestant that takes the times it is given, and then fails or repeats the last."""

    def __init__(self, name, *times, calls=None, fails_at=None):
        self.name, self.times, self.fails_at = name, [*times], fails_at
        self.calls = [] if calls is None else calls
        self.count = 0

    def seconds(self):
        self.calls.append(self.name)
        self.count += 1
        if self.count == self.fails_at:
            raise ContestantError("out of memory")
        return self.times[min(self.count, len(self.times)) - 1]


def test_statistics():
    seconds = [5.0, 1.0, 4.0, 2.0, 3.0]
    timing = Timing.of(seconds)
    assert timing == Timing(median_s=3.0, q1_s=2.0, q3_s=4.0, rounds=5)
    assert timing.median_s == statistics.median(seconds)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)
    assert Timing.of([1.0, 2.0]) == Timing(1.5, 1.25, 1.75, 2)


def test_rounds_alternate_and_each_begins_with_another():
    calls = []
    pair = [Fake("a", 0.1, calls=calls), Fake("b", 0.1, calls=calls)]
    alternate(pair, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"


def test_warmups_do_not_count():
    timings, failures = alternate([Fake("a", 0.4, 0.3, 0.1, 0.2, 0.3)], rounds=3, warmup=2)
    assert timings["a"] == Timing.of([0.1, 0.2, 0.3])
    assert failures == {}


def test_too_slow_is_measured_once():
    slow = Fake("slow", 9.0)
    timings, _ = alternate([slow, Fake("fast", 0.1)], limit_s=5.0, rounds=3)
    assert timings["slow"] == Timing(9.0, 9.0, 9.0, 1)
    assert slow.count == 1
    assert timings["fast"].rounds == 3


@pytest.mark.parametrize(("seconds", "rounds"), [(4.0, 3), (0.2, 10), (0.001, 20)])
def test_rounds_fit_into_the_budget_within_bounds(seconds, rounds):
    assert alternate([Fake("a", seconds)], budget_s=2.0)[0]["a"].rounds == rounds


def test_the_slow_end_before_the_fast():
    timings, _ = alternate([Fake("slow", 1.0), Fake("fast", 0.1)], budget_s=1.0)
    assert timings["slow"].rounds == 3
    assert timings["fast"].rounds == 10


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_failure_spoils_no_one_else(fails_at):
    bad = Fake("bad", 0.1, fails_at=fails_at)
    timings, failures = alternate([bad, Fake("good", 0.1)], rounds=3)
    assert failures == {"bad": "out of memory"}
    assert [*timings] == ["good"]
    assert timings["good"].rounds == 3


def test_nobody():
    assert alternate([]) == ({}, {})
