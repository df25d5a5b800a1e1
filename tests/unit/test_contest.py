"""Ways of running tokens in turns: the fastest goes on, the others are tried now and then."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.experts.contest import BLOCK, Contest


def play(
    contest: Contest, seconds: list[float], blocks: int, noise: float = 0.0, seed: int = 3
) -> list[int]:
    rng, ways = np.random.default_rng(seed), []
    for _ in range(blocks * BLOCK):
        ways.append(contest.way)
        contest.end_token(seconds[contest.way] * (1.0 + noise * rng.standard_normal()), 0.0)
    return ways


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seconds", [[1.0, 1.2], [1.2, 1.0], [1.2, 1.0, 1.3], [1.2, 1.3, 1.0]])
def test_the_fastest_way_goes_on(seconds: list[float], noise: float) -> None:
    contest, ways = Contest(len(seconds)), len(seconds)
    first = play(contest, seconds, 2 * ways, noise)
    assert first == [way for _ in range(2) for way in range(ways) for _ in range(BLOCK)]
    later = play(contest, seconds, 18, noise)
    best = seconds.index(min(seconds))
    assert contest.best == best and later.count(best) == pytest.approx(16 * BLOCK, abs=2 * BLOCK)
    much_later = play(contest, seconds, 600, noise)
    shares = np.bincount(much_later, minlength=ways) / len(much_later)
    assert shares[best] == pytest.approx(64 / 65, abs=0.02)
    assert min(shares) > 0.004  # every other way is tried again


def test_no_difference_is_the_last_way() -> None:
    contest = Contest(3)
    play(contest, [1.0, 1.0, 1.0], 6)
    assert contest.best == 2


def test_a_lead_that_chance_explains_is_no_lead() -> None:
    def led(seconds: list[float]) -> int:
        found = 0
        for seed in range(100):
            contest = Contest(2)
            play(contest, seconds, 4, noise=0.1, seed=seed)
            found += contest.best == 0
        return found

    assert led([1.0, 1.0]) < 30  # one standard error: 16 of 100; without one it is half of them
    assert led([0.85, 1.0]) > 95


def test_one_interrupted_token_does_not_decide() -> None:
    contest = Contest(2)
    for token in range(4 * BLOCK):
        contest.end_token(50.0 if token == BLOCK - 2 else (1.0, 1.1)[contest.way], 0.0)
    assert contest.best == 0


def test_a_way_is_not_blamed_for_the_text_it_met() -> None:
    """The slower way gets the easy tokens: per token it takes less time, for its news more."""
    rng, contest = np.random.default_rng(4), Contest(2)
    mean: list[list[float]] = [[], []]
    for _ in range(4 * BLOCK):
        way = contest.way
        news = (10.0 if way == 0 else 5.0) + rng.random()
        seconds = (1.0, 1.2)[way] + 0.1 * news
        mean[way].append(seconds)
        contest.end_token(seconds, news)
    assert np.mean(mean[0]) > np.mean(mean[1])
    assert contest.best == 0


def test_a_new_winner_is_doubted_as_often_as_the_first() -> None:
    contest = Contest(2)
    play(contest, [1.0, 1.2], 300)
    play(contest, [1.2, 1.0], 300)
    play(contest, [1.0, 1.0], 0)
    assert contest.best == 1
    contest = Contest(2)
    first = play(contest, [1.0, 1.2], 4 + 9 + 17)
    assert [first.count(way) // BLOCK for way in (0, 1)] == [2 + 8 + 16, 2 + 1 + 1]
    while contest.best == 0:
        play(contest, [1.2, 1.0], 1)
    while contest.way == 0:
        play(contest, [1.2, 1.0], 1)
    since = play(contest, [1.2, 1.0], 9)
    assert [since.count(way) // BLOCK for way in (1, 0)] == [8, 1]


def test_when_the_machine_changes_so_does_the_way() -> None:
    contest = Contest(2)
    play(contest, [1.0, 1.2], 30)
    assert contest.best == 0
    play(contest, [1.2, 1.0], 200)
    assert contest.best == 1
