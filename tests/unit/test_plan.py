"""plan() and PrefetchController: what is prefetched, how much, and that it stops where it loses."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.experts.plan import PAYS, LinkUse, PrefetchController, expected_use, plan

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


def drive(
    controller: PrefetchController, tokens: int, used: float, *, demand_bytes: int = 0
) -> list[int]:
    """Spend every allowance in whole records, a fraction `used` of it well; bytes per token."""
    spent = []
    for _ in range(tokens):
        asked = controller.allowance() // RECORD * RECORD
        controller.end_token(
            token_s=0.01,
            link_bytes_per_s=2e6,  # 20 records per token
            demand_bytes=demand_bytes,
            prefetched_bytes=asked,
            used_bytes=int(asked * used),
        )
        spent.append(asked)
    return spent


def test_nothing_is_granted_before_a_token_was_measured() -> None:
    assert PrefetchController(RECORD).allowance() == 0


def test_good_forecasts_get_the_whole_idle_link() -> None:
    controller = PrefetchController(RECORD)
    assert drive(controller, 100, 0.9)[-1] == 20 * RECORD
    assert controller.share == 1.0


def test_a_busy_link_grants_nothing() -> None:
    assert sum(drive(PrefetchController(RECORD), 50, 1.0, demand_bytes=20 * RECORD)) == 0


def test_bytes_in_flight_are_taken_off() -> None:
    controller = PrefetchController(RECORD, start_share=1.0)
    drive(controller, 1, 1.0)
    assert controller.allowance() == 20 * RECORD
    assert controller.allowance(15 * RECORD) == 5 * RECORD
    assert controller.allowance(30 * RECORD) == 0


def test_useless_forecasts_are_switched_off_and_probed_ever_more_rarely() -> None:
    spent = drive(PrefetchController(RECORD), 20_000, 0.1)
    assert sum(spent[:100]) > 0
    late = np.array(spent[10_000:])
    assert 0 < np.count_nonzero(late) < 200  # probes only
    assert late.sum() < 0.001 * len(late) * 20 * RECORD  # under a thousandth of the idle link


def test_prefetch_comes_back_when_forecasts_get_good() -> None:
    controller = PrefetchController(RECORD)
    drive(controller, 200, 0.0)
    drive(controller, 600, 1.0)
    assert controller.share == 1.0


def test_just_below_break_even_ends_off_and_at_break_even_stays_on() -> None:
    losing, even = PrefetchController(RECORD), PrefetchController(RECORD)
    drive(losing, 50, 0.4)
    drive(even, 50, 0.5)
    assert losing.share == 0.0
    assert even.share == 1.0


def test_a_slow_link_saves_up_for_whole_records_but_not_for_bursts() -> None:
    controller = PrefetchController(10 * RECORD, start_share=0.25)
    grants = []
    for _ in range(12):
        grants.append(controller.allowance())
        controller.end_token(
            token_s=0.01, link_bytes_per_s=1e6, demand_bytes=0, prefetched_bytes=0, used_bytes=0
        )
    assert grants[:5] == [0, 2500, 5000, 7500, 10_000]
    assert max(grants) == 10 * RECORD


def test_the_same_numbers_give_the_same_grants() -> None:
    first = drive(PrefetchController(RECORD), 500, 0.45)
    assert first == drive(PrefetchController(RECORD), 500, 0.45)
