"""A policy of several sequences: each predictor stands where it would stand alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from chronos.common.experts.foresight.forecast import Forecaster, ForecastModel
from chronos.common.experts.foresight.network import Geometry, initial
from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import (
    DecayedUse,
    Predictor,
    PreviousToken,
    TokenTable,
)
from chronos.common.traces.rehearse import Pace, rehearse
from chronos.common.traces.trace import RoutingTrace, TraceRecorder

L, E, K = 3, 8, 2
Make = Callable[[], Predictor]
Routing = np.ndarray


def forecaster() -> Forecaster:
    geometry = Geometry(L, E, K, hidden=8, rank=2)
    rng = np.random.default_rng(4)  # untrained, it would answer the same whatever it is told
    params = {
        name: value + rng.normal(0.0, 0.3, value.shape).astype(np.float32)
        for name, value in initial(geometry, 0).items()
    }
    return ForecastModel(geometry, params, known_TLK=routing(40, seed=9)).predictor()


def routing(tokens: int, seed: int) -> Routing:
    rng = np.random.default_rng(seed)
    return np.array([[rng.permutation(E)[:K] for _ in range(L)] for _ in range(tokens)], np.uint8)


KINDS = [
    pytest.param(lambda: DecayedUse(L, E), id="decayed use"),
    pytest.param(lambda: PreviousToken(L, E), id="previous token"),
    pytest.param(lambda: TokenTable(L, E), id="token table"),
    pytest.param(forecaster, id="forecaster"),
]


def decode(predictor: Predictor, ids_LK: Routing, token: int) -> None:
    predictor.begin_token(token)
    for layer, experts in enumerate(ids_LK.tolist()):
        predictor.observe(layer, experts)
        predictor.reconsider()
    predictor.end_token()


def together(policy: PredictorPolicy, needs: dict[int, Routing], tokens: list[int]) -> None:
    """A token of each sequence. needs: ids [L, K] of each."""
    policy.follow([*needs])
    policy.begin_token(*tokens)
    for layer in range(L):
        by = {seq: ids_LK[layer].tolist() for seq, ids_LK in needs.items()}
        policy.observe(layer, {expert for ids in by.values() for expert in ids}, by)
        policy.reconsider()
    policy.end_token()


def same(policy: PredictorPolicy, predictor: Predictor) -> bool:
    ranks = np.allclose(policy.priority, predictor.scores(), rtol=1e-6)
    return ranks and np.allclose(policy.next_uses(), predictor.next_uses(), rtol=1e-6)


@pytest.mark.parametrize("switchable", [False, True])
@pytest.mark.parametrize("make", KINDS)
def test_company_changes_nothing_of_what_a_sequence_is_expected_to_need(
    make: Make, switchable: bool
) -> None:
    policy = (SwitchablePolicy if switchable else PredictorPolicy)(make())
    alone = {3: make(), 7: make()}
    ids = {3: routing(12, 1), 7: routing(12, 2)}
    policy.follow([3, 7])  # before anything is observed: both begin as they begin alone
    for token in range(12):
        # Ids of their own: what is known of a token is shared.
        together(policy, {seq: ids[seq][token] for seq in ids}, [token, 100 + token])
        decode(alone[3], ids[3][token], token)
        decode(alone[7], ids[7][token], 100 + token)
        both = alone[3].scores() + alone[7].scores()
        np.testing.assert_allclose(policy.priority, both, rtol=1e-6)
        likeliest = np.maximum(alone[3].next_uses(), alone[7].next_uses())
        np.testing.assert_allclose(policy.next_uses(), likeliest, rtol=1e-6)
    policy.drop(3)
    assert same(policy, alone[7])
    policy.follow([7])
    assert same(policy, alone[7])


@pytest.mark.parametrize("make", KINDS)
def test_a_fork_begins_where_its_origin_is_and_goes_on_by_itself(make: Make) -> None:
    policy, origin = PredictorPolicy(make()), make()
    for token, ids_LK in enumerate(routing(9, 1)):
        together(policy, {1: ids_LK}, [token])
        decode(origin, ids_LK, token)
    policy.fork(1, 2)
    fork = origin.fork()
    for token, ids_LK in enumerate(routing(5, 2), start=50):
        together(policy, {2: ids_LK}, [token])
        decode(fork, ids_LK, token)
    assert same(policy, fork)
    policy.drop(2)
    policy.follow([1])
    assert same(policy, origin) and not np.allclose(origin.scores(), fork.scores())


@pytest.mark.parametrize("make", KINDS)
def test_one_after_the_other_is_one_stream(make: Make) -> None:
    policy, single = PredictorPolicy(make()), make()
    for seq in range(3):
        prompt_TLK = routing(6, 10 + seq)
        policy.begin_prompt()
        policy.end_prompt(prompt_TLK, seq)
        single.prime(prompt_TLK)
        assert same(policy, single)
        for token, ids_LK in enumerate(routing(4, seq)):
            together(policy, {seq: ids_LK}, [token])
            decode(single, ids_LK, token)
        policy.drop(seq)
        assert same(policy, single)


def test_a_prompt_that_ends_beside_others_is_its_own() -> None:
    policy = PredictorPolicy(DecayedUse(L, E))
    first, second = DecayedUse(L, E), DecayedUse(L, E)
    for token, ids_LK in enumerate(routing(8, 1)):
        together(policy, {1: ids_LK}, [token])
        decode(first, ids_LK, token)
    second.prime(routing(8, 1))  # a new one begins with what was believed last
    policy.begin_prompt()
    policy.observe(0, range(E))  # what a pass needs is no token's
    policy.end_prompt(prompt_TLK := routing(20, 5), 2)
    second.prime(prompt_TLK)
    np.testing.assert_allclose(policy.priority, first.scores() + second.scores())


def test_all_are_disabled_and_what_a_new_one_begins_with_too() -> None:
    policy = SwitchablePolicy(TokenTable(L, E))
    together(policy, {1: routing(1, 1)[0], 2: routing(1, 2)[0]}, [1, 2])
    policy.disable(True)
    assert not policy.by_token
    together(policy, {1: routing(1, 3)[0], 2: routing(1, 4)[0], 3: routing(1, 5)[0]}, [1, 2, 3])
    policy.disable(False)
    assert policy.by_token
    lone = TokenTable(L, E)
    for token, seed in ((2, 2), (2, 4)):
        decode(lone, routing(1, seed)[0], token)
    policy.drop(1)
    policy.drop(3)
    np.testing.assert_allclose(policy.priority, lone.scores())


@pytest.fixture(scope="module")
def texts() -> list[RoutingTrace]:
    """Two of 200 tokens of 40 ids; an id needs the same experts in both, one in five by chance."""
    rng = np.random.default_rng(3)
    liked = routing(40, 7)

    def text() -> RoutingTrace:
        recorder = TraceRecorder(E, K)
        for token in rng.integers(40, size=200):
            ids_LK = (
                liked[token] if rng.random() < 0.8 else routing(1, int(rng.integers(1 << 30)))[0]
            )
            recorder.append(ids_LK[None], None, [int(token)])
        return recorder.trace()

    return [text(), text()]


def test_each_sequence_foreseen_by_itself_needs_fewer_reads_in_time(
    texts: list[RoutingTrace],
) -> None:
    """What is rehearsed are the unions; one predictor for both would take them for a token's."""

    class OneForBoth(PredictorPolicy):
        def follow(self, seqs: object) -> None:
            super().follow([0])

        def observe(self, layer: int, experts: object, by: object = None) -> None:
            super().observe(layer, list(experts))  # type: ignore[call-overload]

        def begin_token(self, *tokens: int) -> None:
            super().begin_token(tokens[0])

    first, second = texts
    pace = Pace(1 << 20, (1 << 20) / 1e-3, 0.02)
    hits = {}
    for kind in (PredictorPolicy, OneForBoth):
        policy = kind(TokenTable(L, E))
        stats = rehearse(first, L * E // 2, policy, pace, warmup=60, beside=[second]).stats
        hits[kind] = stats.hits / stats.routed
        unions = sum(
            len(np.union1d(first.ids_TLK[token, layer], second.ids_TLK[token, layer]))
            for token in range(60, 200)
            for layer in range(L)
        )
        assert stats.routed == unions
    assert hits[PredictorPolicy] > hits[OneForBoth] + 0.05
