"""Forecasts that cost more than they spare are dropped; tried again after a prompt; kept if not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chronos.common.rehearse import Oracle, Pace, rehearse
from chronos.common.routing import weigh
from chronos.common.routing.predictor import DecayedUse, PredictorPolicy
from chronos.common.routing.trace import RoutingTrace, TraceRecorder
from chronos.common.routing.weigh import FILL, JUDGED, WeighedPolicy

LAYERS, EXPERTS, TOP_K, SLOTS = 4, 12, 2, 16
TRIAL = FILL + JUDGED
PACE = Pace(1 << 20, link_bytes_per_s=(1 << 20) / 4e-3, token_s=0.02)  # 5 records a token


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    rng, recorder = np.random.default_rng(7), TraceRecorder(EXPERTS, TOP_K)
    for token in range(TRIAL + 40):
        if token % 20 == 0:
            liked = np.array([rng.dirichlet(np.full(EXPERTS, 0.3)) + 1e-3 for _ in range(LAYERS)])
        shares = [p / p.sum() for p in liked]
        recorder.append(np.stack([rng.choice(EXPERTS, TOP_K, False, p) for p in shares]))
    return recorder.trace()


class Wrong(DecayedUse):
    """Keeps what will not be used."""

    def scores(self) -> Any:
        return -super().scores()


class Spent:
    """Seconds that pass while a predictor observes: at every second look."""

    def __init__(self, each: float) -> None:
        self.now, self.each, self.looks = 0.0, each, 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += 0.0 if self.looks % 2 else self.each
        return self.now


def policy_of(forecaster: Any, each: float = 0.0) -> WeighedPolicy:
    return WeighedPolicy(forecaster, EXPERTS, SLOTS, clock=Spent(each))


def test_forecasts_that_spare_waits_are_kept(trace: RoutingTrace) -> None:
    policy = policy_of(Oracle(trace))
    weighed = rehearse(trace, SLOTS, policy, PACE)
    assert not policy.dropped
    forced = rehearse(trace, SLOTS, PredictorPolicy(Oracle(trace)), PACE)
    assert weighed.decisions == forced.decisions and weighed.stats == forced.stats


@pytest.mark.parametrize("costly", [True, False])
def test_forecasts_that_cost_more_than_they_spare_are_dropped(
    trace: RoutingTrace, costly: bool
) -> None:
    def policy() -> WeighedPolicy:
        return policy_of(Oracle(trace), 1.0) if costly else policy_of(Wrong(LAYERS, EXPERTS))

    rehearse(trace.part(0, TRIAL - 1), SLOTS, early := policy(), PACE)
    assert not early.dropped
    rehearse(trace, SLOTS, late := policy(), PACE)
    assert late.dropped and isinstance(late.predictor, DecayedUse)


def test_dropped_ones_rest_and_are_tried_again_after_a_prompt(
    trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weigh, "_REST", 30)
    policy = policy_of(Wrong(LAYERS, EXPERTS))
    rehearse(trace.part(0, TRIAL), SLOTS, policy, PACE)
    assert policy.dropped
    policy.begin_prompt()
    policy.end_prompt(trace.ids_TLK[:10])
    assert policy.dropped  # so soon
    run(policy, trace, 40)
    policy.begin_prompt()
    policy.end_prompt(trace.ids_TLK[:10])
    assert not policy.dropped
    run(policy, trace, TRIAL, waits=True)
    assert policy.dropped
    run(policy, trace, 40)
    policy.begin_prompt()
    policy.end_prompt(trace.ids_TLK[:10])
    assert policy.dropped  # rests twice as long


def test_kept_ones_are_weighed_again(trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weigh, "KEPT", 10)
    policy = policy_of(DecayedUse(LAYERS, EXPERTS, decay=0.9))
    run(policy, trace, TRIAL)  # nothing was waited for, so nothing but misses counts
    assert not policy.dropped
    run(policy, trace, 10)
    run(policy, trace, TRIAL, waits=True)
    assert policy.dropped  # as good as decayed use, and each miss waits


def run(policy: WeighedPolicy, trace: RoutingTrace, tokens: int, waits: bool = False) -> None:
    """Tokens without a store: with `waits`, every need is a miss of a second."""
    for ids_LK in trace.ids_TLK[:tokens].tolist():
        for layer, experts in enumerate(ids_LK):
            policy.observe(layer, experts)
        policy.end_token()
        policy.note_waits(*((LAYERS * TOP_K, float(LAYERS * TOP_K)) if waits else (0, 0.0)))
