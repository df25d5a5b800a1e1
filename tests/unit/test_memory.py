"""The memory of recent routing against its definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.experts.foresight import memory as room
from chronos.common.experts.foresight.memory import RoutingMemory

L, E, K, HORIZON, DISCOUNT = 3, 8, 2, 4, 0.5


def routing(tokens: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((tokens, L, E))
    return np.argsort(draws, -1)[..., :K]


def naive_vote(ids_TLK: np.ndarray, token_LK: np.ndarray) -> tuple[np.ndarray, float]:
    """ids_TLK: tokens before the one under way, of which token_LK [met, K] is known."""
    tokens, met = len(ids_TLK), len(token_LK)

    def agree(one: np.ndarray, other: np.ndarray) -> int:
        return sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(one, other, strict=True))

    first = max(1, tokens - room.REMEMBERED + 1)
    alike = {}
    for j in range(first, tokens - 1):
        now = agree(token_LK, ids_TLK[j, :met]) + agree(ids_TLK[-1, met:], ids_TLK[j - 1, met:])
        alike[j] = (now + 0.25 * agree(ids_TLK[-1], ids_TLK[j - 1])) / (1.25 * L * K)
    voters = sorted(alike, key=lambda j: -alike[j])[: room.VOTERS]
    likeness = alike[voters[0]]
    votes, mass = np.zeros((2, L, E)), np.zeros((2, L))
    for j in voters:
        weight = np.exp(25.0 * (alike[j] - likeness))
        for layer in range(L):
            turn = j + (layer < met)
            for ahead in range(HORIZON):
                if turn + ahead >= tokens:
                    continue
                answer, share = (0, 1.0) if ahead == 0 else (1, DISCOUNT ** (ahead - 1))
                votes[answer, layer, ids_TLK[turn + ahead, layer]] += weight * share
                mass[answer, layer] += weight * share
    return votes / np.maximum(mass, 1e-12)[..., None], likeness


@pytest.mark.parametrize("remembered", [200, 24])
def test_votes_are_what_followed_the_tokens_most_alike(
    monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    monkeypatch.setattr(room, "REMEMBERED", remembered)
    monkeypatch.setattr(room, "VOTERS", remembered - 2 if remembered < 50 else 197)  # no ties
    memory, ids_TLK = RoutingMemory(L, E, K, HORIZON, DISCOUNT), routing(270)
    for token, ids_LK in enumerate(ids_TLK.tolist()):
        for layer, experts in enumerate(ids_LK):
            memory.observe(layer, experts)
            vote = memory.vote()
            if token < remembered:
                assert vote is None or token > room.VOTERS
            elif token % 10 == 0:
                expected, likeness = naive_vote(ids_TLK[:token], ids_TLK[token, : layer + 1])
                assert vote is not None
                assert vote.likeness == pytest.approx(likeness)
                assert np.allclose(vote.uses_OLE, expected, atol=1e-6)
        memory.end_token()


def test_a_sequence_seen_before_is_recognised_and_continued() -> None:
    memory, ids_TLK = RoutingMemory(L, E, K, HORIZON, DISCOUNT), routing(60)
    memory.prime(np.concatenate([ids_TLK, ids_TLK[:20]]))
    vote = memory.vote()
    assert vote is not None and vote.likeness == pytest.approx(1.0)
    best = np.argsort(-vote.uses_OLE[0], -1)[:, :K]
    assert np.array_equal(np.sort(best), np.sort(ids_TLK[20]))


def test_the_example_of_the_docstring() -> None:
    memory = RoutingMemory(2, 8, 2, HORIZON, DISCOUNT)
    other = [[4, 5], [2, 3]]
    told = [[[1, 2], [5, 6]], [[3, 7], [0, 4]], [[3, 5], [1, 6]], *[other] * 20, [[1, 2], [5, 6]]]
    for ids_LK in told:
        for layer, experts in enumerate(ids_LK):
            memory.observe(layer, experts)
        memory.end_token()
    memory.observe(0, [3, 7])
    vote = memory.vote()
    assert vote is not None and vote.likeness == 1.0
    assert (4 * memory._alike_N + memory._before_N)[1:3].tolist() == [20, 4]
    next_LE = np.zeros((2, 8))
    next_LE[0, [3, 5]] = next_LE[1, [0, 4]] = 1.0
    np.testing.assert_allclose(vote.uses_OLE[0], next_LE, atol=1e-6)


def test_a_token_that_an_error_ended_is_not_counted_twice() -> None:
    memory = RoutingMemory(L, E, K, HORIZON, DISCOUNT)
    memory.prime(routing(40))
    for layer in range(L):
        memory.observe(layer, list(range(K)))  # and no end of the token
    for ids_LK in routing(60)[40:].tolist():
        for layer, experts in enumerate(ids_LK):
            memory.observe(layer, experts)
        memory.end_token()
    assert np.array_equal(memory._alike_N, memory._agree_LN.sum(0))


def test_a_prompt_at_once_is_the_prompt_token_by_token() -> None:
    primed, stepped = (RoutingMemory(L, E, K, HORIZON, DISCOUNT) for _ in range(2))
    ids_TLK = routing(90)
    for part in (ids_TLK[:50], ids_TLK[50:51], ids_TLK[51:]):
        primed.prime(part)
    for ids_LK in ids_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            stepped.observe(layer, experts)
        stepped.end_token()
    one, other = primed.vote(), stepped.vote()
    assert one is not None and other is not None
    assert one.likeness == other.likeness
    assert np.array_equal(one.uses_OLE, other.uses_OLE)


def test_what_is_known_from_the_start_votes_as_what_was_met_does() -> None:
    past_TLK, ids_TLK = routing(60, seed=1), routing(20, seed=2)
    known = RoutingMemory(L, E, K, HORIZON, DISCOUNT, past_TLK)
    known.prime(np.concatenate([ids_TLK, past_TLK[20:30]]))
    vote = known.vote()
    assert vote is not None and vote.likeness == pytest.approx(1.0)
    best = np.argsort(-vote.uses_OLE[0], -1)[:, :K]
    assert np.array_equal(np.sort(best), np.sort(past_TLK[30]))


@pytest.mark.parametrize("tokens", [1, 4095, 4097])
def test_bits_of_the_known_are_their_routing(tokens: int) -> None:
    past_TLK = routing(tokens)
    memory = RoutingMemory(L, E, K, HORIZON, DISCOUNT, past_TLK)
    used_XN = np.unpackbits(memory._bits_XM, 1)[:, : tokens + 1]
    expected = np.zeros((L, E, tokens + 1), np.uint8)
    np.put_along_axis(expected[..., :tokens], past_TLK.transpose(1, 2, 0), 1, 1)
    assert np.array_equal(used_XN, expected.reshape(L * E, -1))


def test_a_sequence_does_not_go_on_after_the_last_known_token() -> None:
    """The last known token has no successor: like it, the one before it votes, for it."""
    past_TLK = routing(40, seed=1)
    memory = RoutingMemory(L, E, K, HORIZON, DISCOUNT, past_TLK)
    memory.prime(np.concatenate([routing(20, seed=2), past_TLK[-2:]]))
    vote = memory.vote()
    assert vote is not None and vote.likeness < 1.0
