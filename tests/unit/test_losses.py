"""The objectives' formulas at values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chronos.common.training import losses

SEGMENTS = np.array([[0, 0, 1, 1, -1]])
UNIFORM = np.full((2, 1, 5, 4), 0.25)


def one_hot(ids, experts: int = 4) -> np.ndarray:
    return np.eye(experts)[np.asarray(ids)]


def test_cross_entropy_ignores_masked_labels() -> None:
    logits = np.zeros((1, 3, 8))
    logits[0, 2] = 1e6 * np.arange(8)  # masked: no influence, no overflow
    labels = np.array([[3, 0, losses.IGNORE]])
    assert losses.cross_entropy(logits, labels) == pytest.approx(math.log(8))
    assert losses.cross_entropy(logits, np.full((1, 3), losses.IGNORE)) == 0.0


def test_cross_entropy_prefers_the_target() -> None:
    logits = np.log([[[0.7, 0.2, 0.1]]])
    assert losses.cross_entropy(logits, np.array([[1]])) == pytest.approx(-math.log(0.2))


def test_balance_is_the_number_of_layers_when_even() -> None:
    ids = np.array([[[[0], [1], [2], [3], [0]]]] * 2)
    assert losses.balance(UNIFORM, ids, SEGMENTS) == pytest.approx(2.0)


def test_balance_is_layers_times_experts_when_collapsed() -> None:
    ids = np.zeros((2, 1, 5, 1), int)
    assert losses.balance(one_hot(ids[..., 0]), ids, SEGMENTS) == pytest.approx(2 * 4)


def test_temporal_counts_pairs_within_a_document() -> None:
    # The only changes are at the border and into the padding.
    probs = one_hot([[[0, 0, 1, 1, 2]]])
    assert losses.temporal(probs, SEGMENTS) == 0.0
    # One of two pairs changes from one expert to another: ||.||^2 = 2.
    probs = one_hot([[[0, 3, 1, 1, 2]]])
    assert losses.temporal(probs, SEGMENTS) == pytest.approx(1.0)


def test_locality_is_the_mass_on_the_last_picks() -> None:
    ids = np.zeros((2, 1, 5, 2), int) + [0, 1]
    assert losses.locality(UNIFORM, ids, SEGMENTS) == pytest.approx(-math.log(0.5))


def test_lookahead_is_the_entropy_when_right() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    probs = np.broadcast_to(p, (2, 1, 5, 4))
    q = np.broadcast_to(p, (1, 5, 3, 2, 4))
    entropy = -(p * np.log(p)).sum()
    assert losses.lookahead(q, probs, SEGMENTS) == pytest.approx(entropy)
    assert losses.router_entropy(probs, SEGMENTS) == pytest.approx(entropy)


def test_lookahead_looks_j_tokens_ahead() -> None:
    ids = np.array([[[[0], [1], [2], [3], [0]]]])
    probs = one_hot(ids[..., 0])
    right = np.zeros((1, 5, 2, 1, 4))
    for j in range(2):
        for t in range(5 - j):
            right[0, t, j, 0, ids[0, 0, t + j, 0]] = 1.0
    assert losses.lookahead(right, probs, SEGMENTS) == 0.0
    assert losses.lookahead_hit(right, ids, SEGMENTS) == 0.0
    assert losses.recall(right, ids, SEGMENTS, 1, 1) == 1.0
    late = np.roll(right, 1, axis=1)
    assert losses.lookahead(late, probs, SEGMENTS) > 10
    assert losses.recall(late, ids, SEGMENTS, 1, 1) == 0.0


def test_hit_term_is_mass_over_k() -> None:
    ids = np.zeros((2, 1, 5, 2), int) + [0, 1]
    q = np.full((1, 5, 1, 2, 4), 0.25)
    assert losses.lookahead_hit(q, ids, SEGMENTS) == pytest.approx(-math.log(0.5 / 2))


def test_padding_has_no_influence() -> None:
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(4), (2, 1, 5))
    q = random.dirichlet(np.ones(4), (1, 5, 2, 2))
    ids = np.argsort(-probs, -1)[..., :2]
    other, other_q, other_ids = probs.copy(), q.copy(), ids.copy()
    other[:, :, 4], other_q[:, 4], other_ids[:, :, 4] = 0.25, 0.25, [3, 2]

    def terms(p, q, i) -> list[float]:
        return [
            losses.balance(p, i, SEGMENTS),
            losses.temporal(p, SEGMENTS),
            losses.locality(p, i, SEGMENTS),
            losses.lookahead(q, p, SEGMENTS),
            losses.lookahead_hit(q, i, SEGMENTS),
            losses.router_entropy(p, SEGMENTS),
            losses.anchor(p, probs, SEGMENTS),
            losses.largest_share(losses.pick_shares(i, SEGMENTS, 4)),
        ]

    assert terms(probs, q, ids) == terms(other, other_q, other_ids)


def test_all_padding_is_zero() -> None:
    nothing, ids = np.full((1, 5), -1), np.zeros((2, 1, 5, 1), int)
    assert losses.balance(UNIFORM, ids, nothing) == 0.0
    assert losses.temporal(UNIFORM, nothing) == 0.0
    assert losses.lookahead(np.full((1, 5, 2, 2, 4), 0.25), UNIFORM, nothing) == 0.0


def test_anchor_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    peaked = np.broadcast_to([0.7, 0.1, 0.1, 0.1], UNIFORM.shape)
    assert losses.anchor(peaked, peaked, SEGMENTS) == 0.0
    assert losses.anchor(peaked, UNIFORM, SEGMENTS) > 0.1


def test_health_of_the_picks() -> None:
    ids = np.array([[[[0], [0], [0], [1], [3]]]])
    share = losses.pick_shares(ids, SEGMENTS, 4)
    assert share.tolist() == [[0.75, 0.25, 0.0, 0.0]]
    assert losses.largest_share(share) == 0.75
    assert losses.effective_experts(np.full((1, 4), 0.25)) == pytest.approx([4.0])
    assert losses.effective_experts(np.eye(4)[:1]) == pytest.approx([1.0])


def test_accuracies_count_pairs() -> None:
    """Not whether the mean of one side is above the other's: three of four, and one far below."""
    gain = np.array([[1.0], [0.0], [0.5], [0.0], [0.1], [0.0], [-9.0], [0.0]])
    found = losses.dpo(gain, np.zeros_like(gain), np.zeros_like(gain, int), beta=0.1)
    assert found["rewards/accuracies"] == 0.75
    assert found["rewards/margins"] == pytest.approx(0.1 * (1.0 + 0.5 + 0.1 - 9.0) / 4)


@pytest.mark.parametrize("x", [-1e-9, -1e-4, -math.log(2), -1.0, -50.0])
def test_odds_of_what_is_almost_certain(x: float) -> None:
    """log(1 - e^x) by its series near 0 and far away, by definition between."""
    expected = {-1e-9: math.log(1e-9), -1e-4: math.log(1e-4 - 5e-9), -50.0: -math.exp(-50.0)}
    found = float(losses.log1mexp(np.array([x]))[0])
    assert found == pytest.approx(expected.get(x, math.log(1 - math.exp(x))), rel=1e-8)
    certain = losses.orpo(np.array([[0.0], [x]]), np.ones((2, 1), bool), np.zeros((2, 1), int))
    assert all(map(math.isfinite, certain.values()))


def test_the_ends_of_jsd_are_the_two_divergences() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7))
    s, t = losses.log_softmax(student / 2), losses.log_softmax(teacher / 2)
    forward, reverse = (np.exp(t) * (t - s)).sum(-1), (np.exp(s) * (s - t)).sum(-1)
    np.testing.assert_allclose(losses.divergence(student, teacher, 2.0, 0.0), forward)
    np.testing.assert_allclose(losses.divergence(student, teacher, 2.0, 1.0), reverse)
    np.testing.assert_allclose(losses.divergence(student, teacher, 2.0), 4 * forward)
    # Beside the ends the mixture's divergence is beta, or 1 - beta, times one of them.
    near = losses.divergence(student, teacher, 2.0, 1e-6) / 1e-6
    np.testing.assert_allclose(near, forward, rtol=1e-4)
    near = losses.divergence(student, teacher, 2.0, 1 - 1e-6) / 1e-6
    np.testing.assert_allclose(near, reverse, rtol=1e-4)


def test_one_collapsed_layer_is_seen() -> None:
    """Two layers that lean to opposite sides are even together and not by themselves."""
    ids = np.array([[[[0]] * 5], [[[1]] * 5]])
    probs, segments = one_hot(ids[..., 0], 2), np.zeros((1, 5), int)
    assert losses.balance(probs, ids, segments) == pytest.approx(2 * 2)
    share = losses.pick_shares(ids, segments, 2)
    assert losses.effective_experts(share) == pytest.approx([1, 1])
    assert losses.effective_experts(share.mean(0, keepdims=True)) == pytest.approx([2])
