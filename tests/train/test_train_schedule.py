import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambapy.train.schedule import lr_factor


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_end_points(schedule: str) -> None:
    def at(step: int) -> float:
        return lr_factor(step, 100, schedule=schedule, warmup=10, min_ratio=0.1)

    assert at(0) == pytest.approx(0.1)
    assert at(4) == pytest.approx(0.5)
    assert at(9) == 1.0
    assert at(99) == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    # 10 steps of warm-up and 90 of decay, of which 45 are done after step 54.
    assert lr_factor(54, 100, warmup=10, min_ratio=0.2) == pytest.approx(0.6)


def test_wsd_is_flat_until_it_decays_in_a_line() -> None:
    def at(step: int) -> float:
        return lr_factor(step, 100, schedule="wsd", warmup=10, decay_fraction=0.2)

    assert {at(step) for step in range(9, 80)} == {1.0}
    assert at(80) == pytest.approx(0.95)
    assert at(89) == pytest.approx(0.5)
    assert at(99) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_unknown_total_warms_up_and_stays(schedule: str) -> None:
    assert lr_factor(1, None, schedule=schedule, warmup=4) == 0.5
    assert lr_factor(1000, None, schedule=schedule, warmup=4) == 1.0


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 400),
    min_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0, 1),
)
def test_rises_then_falls_between_its_bounds(
    schedule: str, total: int, warmup: int, min_ratio: float, decay_fraction: float
) -> None:
    factors = [
        lr_factor(
            step,
            total,
            schedule=schedule,
            warmup=warmup,
            min_ratio=min_ratio,
            decay_fraction=decay_fraction,
        )
        for step in range(total)
    ]
    assert all(0 <= f <= 1 for f in factors)
    rise, fall = factors[:warmup], factors[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(f >= min_ratio - 1e-12 for f in fall)
    if total > warmup and (schedule == "cosine" or round(decay_fraction * total) > 0):
        assert factors[-1] == pytest.approx(min_ratio)
