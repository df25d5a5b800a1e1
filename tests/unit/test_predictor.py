"""Predictors made of what was used, and the policy made of a predictor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import (
    DecayedUse,
    Predictor,
    PreviousToken,
    TokenClock,
    TokenTable,
)
from chronos.common.experts.residency import Policy, Residency

L, E, K = 3, 8, 2
Make = Callable[[], Predictor]
SIMPLE = [
    pytest.param(lambda: DecayedUse(L, E), id="decayed use"),
    pytest.param(lambda: PreviousToken(L, E), id="previous token"),
    pytest.param(lambda: TokenTable(L, E), id="token table"),
]


def _ids(tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(tokens)], np.uint8)


def test_the_clock_counts_layers_that_are_still_to_come_in_this_token_more() -> None:
    clock = TokenClock(4, 0.5)
    assert clock.weight_L.tolist() == pytest.approx([0.5 ** (p / 4) for p in range(4)])
    clock.observe(1)
    assert clock.weight_L.tolist() == pytest.approx([0.5 ** (p / 4) for p in (2, 3, 0, 1)])
    clock.end_token()
    assert clock.weight_L[0] == 1.0
    clock.observe(3)
    assert clock.weight_L[0] == 1.0


def test_decayed_use_is_the_rate_of_turns_with_old_ones_fading() -> None:
    predictor = DecayedUse(L, E, decay=0.5, discount=0.5)
    predictor.observe(0, [1])
    predictor.observe(1, [1])
    predictor.end_token()
    predictor.observe(0, [2])
    predictor.end_token()
    assert predictor.next_uses()[0, :3].tolist() == [0.0, 0.25, 0.5]
    assert predictor.next_uses()[1, :3].tolist() == [0.0, 0.5, 0.0]  # not asked: does not fade
    assert predictor.scores()[0, 2] == pytest.approx(0.5 * 2)
    assert predictor.scores()[1, 1] == pytest.approx(0.5 * 2 * 0.5 ** (1 / 3))


def test_the_previous_token_comes_before_all_older_ones() -> None:
    ids_TLK = _ids(50)
    predictor = PreviousToken(L, E)
    predictor.prime(ids_TLK)
    for row, used in zip(predictor.next_uses(), ids_TLK[-1], strict=True):
        assert set(np.argsort(-row)[:K].tolist()) == set(used.tolist())


@pytest.mark.parametrize("make", SIMPLE)
def test_priming_with_a_prompt_is_decoding_it(make: Make) -> None:
    ids_TLK = _ids(20)
    primed, stepped = make(), make()
    primed.prime(ids_TLK)
    for ids_LK in ids_TLK:
        for layer, experts in enumerate(ids_LK.tolist()):
            stepped.observe(layer, experts)
        stepped.end_token()
    assert np.array_equal(primed.scores(), stepped.scores())
    assert np.array_equal(primed.next_uses(), stepped.next_uses())


@pytest.mark.parametrize("make", SIMPLE)
def test_a_policy_ranks_as_its_predictor_at_every_moment(make: Make) -> None:
    policy: Policy = PredictorPolicy(make())
    predictor = make()
    for ids_LK in _ids(5):
        for layer, experts in enumerate(ids_LK.tolist()):
            policy.observe(layer, experts)
            predictor.observe(layer, experts)
            assert np.array_equal(policy.priority, predictor.scores())
        policy.end_token()
        predictor.end_token()
        assert np.array_equal(policy.priority, predictor.scores())


def test_a_token_table_expects_what_the_same_token_needed_before() -> None:
    predictor, ids_TLK = TokenTable(L, E), _ids(12)
    for token, ids_LK in enumerate(ids_TLK.tolist()):
        predictor.begin_token(token)
        for layer, experts in enumerate(ids_LK):
            predictor.observe(layer, experts)
        predictor.end_token()
    rates = predictor.next_uses().copy()
    predictor.begin_token(99)
    assert np.array_equal(predictor.next_uses(), rates)  # never run: decayed use
    predictor.begin_token(3)
    for row, used in zip(predictor.next_uses(), ids_TLK[3], strict=True):
        assert set(np.argsort(-row)[:K].tolist()) == set(used.tolist())
    predictor.observe(0, ids_TLK[3, 0].tolist())
    assert predictor.next_uses()[0].max() < 1.0  # its turn has passed
    assert predictor.scores()[1, ids_TLK[3, 1]].min() > predictor.scores()[0].max()


def test_a_token_table_learns_from_a_prompt_and_forgets_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chronos.common.experts.foresight.predictor._TABLE_BYTES", 4 * L * E * 3)
    policy, ids_TLK = PredictorPolicy(TokenTable(L, E)), _ids(4)
    assert policy.by_token and not PredictorPolicy(DecayedUse(L, E)).by_token
    policy.learn([10, 11, 12, 13], ids_TLK)
    policy.learn([11], ids_TLK[:1])
    for token, rows in ((12, [2]), (13, [3]), (11, [0, 1])):
        policy.begin_token(token)
        for layer, row in enumerate(policy.next_uses()):
            needed = {e for r in rows for e in ids_TLK[r, layer].tolist()}
            assert set(np.flatnonzero(row > 0.4).tolist()) == needed
    policy.begin_token(10)
    assert policy.next_uses().max() == 0.0


def test_a_prefetch_must_outrank_what_it_would_replace() -> None:
    policy = PredictorPolicy(DecayedUse(L, E))
    residency = Residency(L, E, 1, policy)
    policy.observe(0, [3])
    admission = residency.admit((0, 3), demand=True)
    assert admission is not None
    residency.mark_ready(admission.slot)
    assert residency.admit((0, 4), demand=False) is None
    for _ in range(3):
        policy.observe(0, [4])
    assert residency.admit((0, 4), demand=False) is not None


def test_decay_is_checked() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        DecayedUse(L, E, decay=1.0)


def test_a_forecaster_that_was_disabled_is_told_what_it_missed() -> None:
    """Ranks are decayed use's meanwhile; enabled again, it stands where it would have."""
    ids_TLK = _ids(40)
    switched, enabled = SwitchablePolicy(TokenTable(L, E)), TokenTable(L, E)
    plain = DecayedUse(L, E)
    assert switched.can_disable and not PredictorPolicy(plain).can_disable
    for token, ids_LK in enumerate(ids_TLK.tolist()):
        for layer, experts in enumerate(ids_LK):
            for one in (switched, enabled, plain):
                one.observe(layer, experts)
            ranks = plain if 10 <= token < 30 else enabled
            np.testing.assert_allclose(switched.priority, ranks.scores())
        for one in (switched, enabled, plain):
            one.end_token()
        switched.disable(9 <= token < 29)
        switched.disable(9 <= token < 29)  # told again: nothing changes


def test_a_disabled_forecaster_misses_tokens_of_several_sequences_too() -> None:
    """Run together they need more experts of a layer than one token does, here more, there less."""
    policy = SwitchablePolicy(DecayedUse(L, E))
    policy.disable(True)
    for token in range(4):
        for layer in range(L):
            policy.observe(layer, range(K + (layer + token) % 3))
        policy.end_token()
    policy.disable(False)
    assert (policy.priority[:, :K] > policy.priority[:, -1:]).all()


def test_prompts_reach_a_disabled_forecaster() -> None:
    ids_TLK = _ids(30)
    switched, enabled = SwitchablePolicy(DecayedUse(L, E, 0.5)), DecayedUse(L, E, 0.5)
    switched.disable(True)
    for one in (switched, enabled):
        for layer, experts in enumerate(ids_TLK[0].tolist()):
            one.observe(layer, experts)
        one.end_token()
    switched.begin_prompt()
    for layer in range(L):
        switched.observe(layer, range(E))  # a chunk's needs are not a token's
    switched.end_prompt(ids_TLK[1:])
    enabled.prime(ids_TLK[1:])
    plain = switched.priority.copy()
    switched.disable(False)
    np.testing.assert_allclose(switched.priority, enabled.scores())
    assert not np.allclose(plain, switched.priority)
