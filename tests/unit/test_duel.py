"""Two ways of running tokens in turns: the faster one goes on, the other is tried now and then."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.routing.duel import BLOCK, Duel


def play(
    duel: Duel, with_s: float, without_s: float, tokens: int, noise: float = 0.0
) -> list[bool]:
    rng, ways = np.random.default_rng(3), []
    for _ in range(tokens):
        ways.append(duel.on)
        seconds = with_s if duel.on else without_s
        duel.end_token(seconds * (1.0 + noise * rng.standard_normal()))
    return ways


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("with_s", "without_s"), [(1.0, 1.2), (1.2, 1.0)])
def test_the_faster_way_goes_on(with_s: float, without_s: float, noise: float) -> None:
    duel = Duel()
    first = play(duel, with_s, without_s, 8 * BLOCK, noise)
    assert first == ([True] * BLOCK + [False] * BLOCK) * 4
    later = play(duel, with_s, without_s, 90 * BLOCK, noise)
    share = np.mean(later)
    assert (share if with_s < without_s else 1.0 - share) == pytest.approx(8 / 9, abs=0.02)


def test_no_difference_is_on() -> None:
    duel = Duel()
    play(duel, 1.0, 1.0, 8 * BLOCK)
    assert duel.better
    assert np.mean(play(duel, 1.0, 1.0, 90 * BLOCK)) > 0.8


def test_a_few_interrupted_tokens_do_not_decide() -> None:
    duel = Duel()
    for token in range(8 * BLOCK):
        duel.end_token(50.0 if duel.on and token % BLOCK == 5 and token < BLOCK else 1.0)
    assert duel.better


def test_when_the_machine_changes_so_does_the_way() -> None:
    duel = Duel()
    play(duel, 1.0, 1.2, 30 * BLOCK)
    assert duel.better
    play(duel, 1.2, 1.0, 60 * BLOCK)
    assert duel.better is False
