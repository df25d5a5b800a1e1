"""A bandit of two arms: forecasts run first, and are left only for what the clock shows faster."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.experts.bandit import BLOCK, FORECASTS, PLAIN, Bandit


def play(
    bandit: Bandit, seconds: list[float], blocks: int, noise: float = 0.0, seed: int = 3
) -> list[int]:
    """The arm of each token; seconds: of a token of each arm."""
    rng, arms = np.random.default_rng(seed), []
    for _ in range(blocks * BLOCK):
        arms.append(bandit.arm)
        bandit.end_token(seconds[bandit.arm] * (1.0 + noise * rng.standard_normal()), 0.0)
    return arms


def blocks(arms: list[int]) -> list[int]:
    assert all(len(set(arms[at : at + BLOCK])) == 1 for at in range(0, len(arms), BLOCK))
    return arms[::BLOCK]


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seconds", [[1.0, 1.2], [1.2, 1.0]])
def test_the_faster_arm_is_exploited_and_the_other_explored(
    seconds: list[float], noise: float
) -> None:
    bandit, best = Bandit(), seconds.index(min(seconds))
    assert blocks(play(bandit, seconds, 5, noise)) == [FORECASTS] * 4 + [PLAIN]
    assert bandit.best == best
    much_later = play(bandit, seconds, 600, noise)
    assert much_later.count(best) / len(much_later) == pytest.approx(64 / 65, abs=0.03)
    assert much_later.count(1 - best) >= 9 * BLOCK


def test_an_arm_that_stays_better_runs_twice_as_long_each_time() -> None:
    arms = blocks(play(Bandit(), [1.0, 1.2], 4 + 1 + 16 + 1 + 32 + 1 + 64 + 1 + 64 + 1))
    explored = [at for at, arm in enumerate(arms) if arm == PLAIN]
    assert np.diff([-1, *explored]).tolist() == [5, 17, 33, 65, 65]


def test_an_arm_that_became_better_is_doubted_soon() -> None:
    arms = blocks(play(Bandit(), [1.2, 1.0], 4 + 1 + 8 + 1 + 16 + 1))
    assert [at for at, arm in enumerate(arms) if arm == FORECASTS] == [0, 1, 2, 3, 13, 30]


def test_a_lead_that_chance_explains_is_no_lead() -> None:
    def left(seconds: list[float]) -> int:
        found = 0
        for seed in range(100):
            bandit = Bandit()
            play(bandit, seconds, 5, noise=0.1, seed=seed)
            found += bandit.best == PLAIN
        return found

    assert left([1.0, 1.0]) < 30  # one standard error: 16 of 100; without one it is half of them
    assert left([1.0, 0.8]) > 95


def test_one_interrupted_token_does_not_decide() -> None:
    bandit = Bandit()
    for token in range(5 * BLOCK):
        bandit.end_token(50.0 if token == BLOCK else (1.0, 1.1)[bandit.arm], 0.0)
    assert bandit.best == FORECASTS


def test_an_arm_is_not_blamed_for_the_text_it_met() -> None:
    """Forecasts get the hard tokens: they take more time, and less for their reuse distance."""
    rng, bandit = np.random.default_rng(4), Bandit()
    mean: list[list[float]] = [[], []]
    for _ in range(5 * BLOCK):
        arm = bandit.arm
        distance = (10.0 if arm == FORECASTS else 5.0) + rng.random()
        seconds = (1.0, 1.2)[arm] + 0.1 * distance
        mean[arm].append(seconds)
        bandit.end_token(seconds, distance)
    assert np.mean(mean[FORECASTS]) > np.mean(mean[PLAIN])
    assert bandit.best == FORECASTS


@pytest.mark.parametrize("now", [[1.0, 1.2], [1.2, 1.0]])
def test_when_the_machine_changes_so_does_the_arm(now: list[float]) -> None:
    bandit = Bandit()
    play(bandit, now[::-1], 30)
    assert bandit.best == now.index(max(now))
    play(bandit, now, 300)
    assert bandit.best == now.index(min(now))
