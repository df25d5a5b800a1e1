"""Ways of running tokens in turns: the fastest goes on, the others are tried now and then."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.routing.contest import BLOCK, Contest


def play(contest: Contest, seconds: list[float], blocks: int, noise: float = 0.0) -> list[int]:
    rng, ways = np.random.default_rng(3), []
    for _ in range(blocks * BLOCK):
        ways.append(contest.way)
        contest.end_token(seconds[contest.way] * (1.0 + noise * rng.standard_normal()))
    return ways


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seconds", [[1.0, 1.2], [1.2, 1.0], [1.2, 1.0, 1.3], [1.2, 1.3, 1.0]])
def test_the_fastest_way_goes_on(seconds: list[float], noise: float) -> None:
    contest, ways = Contest(len(seconds)), len(seconds)
    first = play(contest, seconds, 2 * ways, noise)
    assert first == [way for _ in range(2) for way in range(ways) for _ in range(BLOCK)]
    later = play(contest, seconds, 180, noise)
    shares = np.bincount(later, minlength=ways) / len(later)
    best = seconds.index(min(seconds))
    assert contest.best == best and shares[best] == pytest.approx(8 / 9, abs=0.02)
    assert min(shares) > 0.04  # every other way is tried again


def test_no_difference_is_the_first_way() -> None:
    contest = Contest(3)
    play(contest, [1.0, 1.0, 0.999], 6)
    assert contest.best == 0


def test_one_interrupted_token_does_not_decide() -> None:
    contest = Contest(2)
    for token in range(4 * BLOCK):
        contest.end_token(50.0 if token == BLOCK - 2 else 1.0)
    assert contest.best == 0


def test_when_the_machine_changes_so_does_the_way() -> None:
    contest = Contest(2)
    play(contest, [1.0, 1.2], 30)
    assert contest.best == 0
    play(contest, [1.2, 1.0], 60)
    assert contest.best == 1
