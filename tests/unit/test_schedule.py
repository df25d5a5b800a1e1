"""The learning rate: shape, ends, and dependence on the step alone."""

from __future__ import annotations

import pytest

from chronos.common.training.schedule import learning_rate

SHAPE = {"peak": 1.0, "floor": 0.1, "warmup": 10, "total": 101}


def test_rises_then_falls() -> None:
    rates = [learning_rate(step, **SHAPE) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert min(rates) > 0


def test_middle_of_the_decay_is_the_mean() -> None:
    assert learning_rate(55, **SHAPE) == pytest.approx(0.55)


def test_stays_at_the_floor() -> None:
    assert learning_rate(5000, **SHAPE) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("total", [1, 2, 5])
def test_short_runs_have_a_rate(warmup: int, total: int) -> None:
    for step in range(total):
        rate = learning_rate(step, peak=1.0, floor=0.1, warmup=warmup, total=total)
        assert 0.1 <= rate <= 1.0
