"""plan() and LinkUse: what is prefetched, and how likely its use must be."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.experts.plan import PAYS, LinkUse, expected_use, plan

RECORD = 1000


def test_expected_use_counts_horizons_and_skips_served_layers() -> None:
    probs = np.zeros((2, 2, 4), np.float32)
    probs[0, 0, 0] = probs[0, 1, 1] = 0.25  # this token: layer 0 is served, layer 1 is not
    probs[1, 0, 2] = 0.1  # next token
    scores = expected_use(probs, 2, after_layer=0, discount=0.5)
    np.testing.assert_allclose(scores, [[0, 0, 0.1, 0], [0, 0.5, 0, 0]], atol=1e-7)
    assert expected_use(probs, 2, after_layer=1)[1, 1] == 0
    assert expected_use(probs, 2, after_layer=-1)[0, 0] == 0.5


def test_expected_use_is_at_most_one_per_horizon() -> None:
    assert expected_use(np.full((3, 1, 1), 0.9), 4, after_layer=-1, discount=1.0)[0, 0] == 3.0


def test_plan_takes_the_best_absent_experts_within_the_budget() -> None:
    scores = np.array([[0.9, 0.6, 0.4], [0.8, 0.95, 0.6]])
    resident = np.array([[False, False, False], [False, True, False]])
    keys = plan(scores, resident, budget_bytes=3 * RECORD + 999, record_bytes=RECORD)
    assert keys == [(0, 0), (1, 0), (0, 1)]  # the resident is skipped, the tie goes to layer 0
    everything = plan(scores, resident, budget_bytes=10**9, record_bytes=RECORD, layers=[3, 7])
    assert everything == [(3, 0), (7, 0), (3, 1), (7, 2)]  # 0.4 is below the floor


@pytest.mark.parametrize("budget", [0, RECORD - 1, -5])
def test_plan_without_room_is_empty(budget: int) -> None:
    absent = np.zeros((1, 2), bool)
    assert plan(np.ones((1, 2)), absent, budget_bytes=budget, record_bytes=RECORD) == []


def test_on_an_idle_link_what_is_as_likely_as_not_is_read_ahead() -> None:
    use = LinkUse()
    assert use.floor == PAYS  # before anything is known
    use.end_token(100.0, 20.0)
    assert use.floor == PAYS


def test_the_busier_the_link_the_surer_a_read_ahead() -> None:
    use = LinkUse()
    use.end_token(100.0, 70.0)
    assert use.floor == pytest.approx(0.7)
    for _ in range(100):
        use.end_token(100.0, 90.0)
    assert use.floor == pytest.approx(0.9, abs=1e-3)
    use.end_token(100.0, 300.0)  # a burst: the link's rate is an average
    assert 0.9 < use.floor < 0.92
    for _ in range(100):
        use.end_token(100.0, 10.0)
    assert use.floor == PAYS


def test_a_link_without_a_rate_says_nothing() -> None:
    use = LinkUse()
    use.end_token(100.0, 80.0)
    use.end_token(0.0, 0.0)
    assert use.floor == pytest.approx(0.8)
