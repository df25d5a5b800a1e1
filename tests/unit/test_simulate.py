"""The simulator against exhaustive search, naive replays and the stores' own bookkeeping."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.disk.reader import RangedReader
from chronos.common.errors import UsageError
from chronos.common.experts.residency import LRU, DecayedLFU
from chronos.common.experts.tiers import SlotTier
from chronos.common.traces.simulate import (
    POLICIES,
    compare,
    missed_keys,
    simulate,
    simulate_policy,
    slots_for,
)
from chronos.common.traces.trace import RoutingTrace
from chronos.testing.store_rig import tiny_layout

Request = tuple[int, ...]
quick = settings(max_examples=25, deadline=None)


def trace_of(ids: Any, num_experts: int) -> RoutingTrace:
    ids_TLK = np.array(ids, np.uint8)
    meta = {"model": "", "phase": "", "num_experts": num_experts, "top_k": ids_TLK.shape[2]}
    return RoutingTrace(ids_TLK, None, np.zeros(len(ids_TLK), np.int32), meta)


def skewed(tokens: int, layers: int, experts: int, k: int, seed: int) -> RoutingTrace:
    """Some experts are liked more, and the last token's are liked again."""
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(layers, experts))
    ids = np.empty((tokens, layers, k), np.uint8)
    for token in range(tokens):
        noise = rng.gumbel(size=(layers, experts))
        if token:
            np.put_along_axis(
                noise, ids[token - 1], np.take_along_axis(noise, ids[token - 1], 1) + 1, 1
            )
        ids[token] = np.argsort(-liking - noise, axis=-1)[:, :k]
    return trace_of(ids, experts)


def tiny_traces(layers: int = 1) -> st.SearchStrategy[RoutingTrace]:
    one = st.sampled_from([list(pair) for pair in combinations(range(4), 2)])
    token = st.lists(one, min_size=layers, max_size=layers)
    return st.lists(token, min_size=1, max_size=8).map(lambda ids: trace_of(ids, 4))


def requests(trace: RoutingTrace) -> list[Request]:
    experts = trace.num_experts
    return [
        tuple(layer * experts + expert for expert in row)
        for token in trace.ids_TLK.tolist()
        for layer, row in enumerate(token)
    ]


def fewest_misses(
    asked: list[Request], slots: int, *, bypass: bool = True, start: Request = ()
) -> int:
    """The optimum by trying every cache content after every request."""
    costs = {frozenset(start): 0}
    for request in asked:
        after: dict[frozenset[int], int] = {}
        for content, cost in costs.items():
            cost += len(set(request) - content)
            pool = content | set(request)
            for kept in combinations(sorted(pool), min(slots, len(pool))):
                if bypass or set(request) <= set(kept):
                    key = frozenset(kept)
                    after[key] = min(cost, after.get(key, cost))
        costs = after
    return min(costs.values())


@quick
@given(tiny_traces(), st.integers(2, 3))
def test_min_is_the_optimum(trace: RoutingTrace, slots: int) -> None:
    asked = requests(trace)
    assert simulate(trace, slots, "min").misses == fewest_misses(asked, slots)
    admitting = fewest_misses(asked, slots, bypass=False)
    assert simulate(trace, slots, "min-admit").misses == admitting


@quick
@given(tiny_traces(layers=2), st.integers(2, 4))
def test_min_is_the_optimum_over_layers(trace: RoutingTrace, slots: int) -> None:
    assert simulate(trace, slots, "min").misses == fewest_misses(requests(trace), slots)


@quick
@given(tiny_traces(), st.permutations(range(4)))
def test_min_is_the_optimum_from_given_residents(trace: RoutingTrace, keys: list[int]) -> None:
    start = tuple(keys[:2])
    best = fewest_misses(requests(trace), 2, start=start)
    assert simulate(trace, 2, "min", resident=[(0, key) for key in start]).misses == best


@pytest.mark.parametrize("slots", [4, 9, 17, 30])
@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_those_of_the_stores_bookkeeping(slots: int, seed: int) -> None:
    trace = skewed(60, 4, 8, 3, seed)
    lru, lfu = LRU(4, 8), DecayedLFU(4, 8)
    assert simulate(trace, slots, "lru").misses == simulate_policy(trace, slots, lru).misses
    assert simulate(trace, slots, "lfu").misses == simulate_policy(trace, slots, lfu).misses


@pytest.mark.parametrize("policy", [LRU, DecayedLFU])
def test_counts_equal_those_of_a_store_that_reads(policy: Any, tmp_path: Path) -> None:
    layout, trace = tiny_layout(tmp_path, layers=3, experts=8), skewed(25, 3, 8, 3, 0)
    with RangedReader(threads=1) as reader:
        tier = SlotTier(layout, 7, reader, policy(3, 8))
        for ids_LK in trace.ids_TLK.tolist():
            for layer, experts in enumerate(ids_LK):
                assert len(list(tier.acquire(layer, experts))) == 3
            tier.end_token()
        counted = tier.stats()
        tier.close()
    replay = simulate(trace, 7, {LRU: "lru", DecayedLFU: "lfu"}[policy])
    assert (counted.misses, counted.hits) == (replay.misses, replay.hits)


def naive_window(
    asked: list[Request], per_token: int, slots: int, window: int, decay: float
) -> int:
    """min-w by its definition: everything is ranked anew at each request."""
    content: set[int] = set()
    uses: dict[int, list[int]] = {}
    misses = 0

    def rank(key: int, now: int) -> float:
        seen = asked[now + 1 : now + 1 + window * per_token]
        ahead = [at for at, request in enumerate(seen) if key in request]
        if ahead:
            return 1e9 - ahead[0]
        return sum(decay ** ((now // per_token) - token) for token in uses.get(key, []))

    for now, request in enumerate(asked):
        misses += len(set(request) - content)
        for key in request:
            uses.setdefault(key, []).append(now // per_token)
        pool = content | set(request)
        ranked = sorted(pool, key=lambda key: (rank(key, now), key))
        content = set(ranked[-slots:])
    return misses


@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_follow_their_definition(window: int) -> None:
    for seed in range(4):
        trace = skewed(40, 2, 6, 2, seed)
        expected = naive_window(requests(trace), 2, 5, window, 0.9)
        assert simulate(trace, 5, f"min-w{window}", decay=0.9).misses == expected


def test_a_window_over_the_whole_trace_is_min() -> None:
    trace = skewed(40, 3, 8, 2, 0)
    start = [(0, 1), (2, 7), (1, 3)]
    for pooled in (True, False):
        options: dict[str, Any] = {"pooled": pooled, "resident": start}
        best = simulate(trace, 5, "min", **options).misses
        assert simulate(trace, 5, "min-w40", **options).misses == best


def test_policies_order_as_theory_says() -> None:
    trace = skewed(200, 4, 16, 2, 1)
    for pooled in (True, False):
        slots = slots_for(trace, 0.25, pooled=pooled)
        misses = {r.policy: r.misses for r in compare(trace, slots, pooled=pooled).runs}
        assert misses["min"] <= min(misses.values())
        assert misses["min-w8"] <= misses["min-w2"] <= misses["lfu"]
        assert misses["min"] <= simulate(trace, slots, "min-admit", pooled=pooled).misses


def test_lru_by_hand() -> None:
    trace = trace_of([[[0, 1]], [[1, 2]], [[0, 1]], [[3, 1]]], 4)
    # 0 1 missed; 2 missed, takes 0's place; 0 missed, takes 2's; 3 missed.
    assert simulate(trace, 2, "lru").misses == 5
    assert list(missed_keys(trace, 2, "lru")) == [[0, 1], [2], [0], [3]]


def test_an_expert_of_the_request_is_never_its_victim() -> None:
    # 3 is a favourite of LFU, 0 is not, and 0 is asked for again together with 1.
    trace = trace_of([[[3, 2]]] * 5 + [[[3, 0]], [[0, 1]], [[0, 1]]], 4)
    assert simulate(trace, 2, "lfu").misses == 2 + 1 + 1


def test_resident_experts_are_evicted_in_the_order_given() -> None:
    trace = trace_of([[[0, 1]], [[3, 2]]], 4)
    assert simulate(trace, 3, "lru", resident=[(0, 2), (0, 3)]).misses == 2 + 1
    assert list(missed_keys(trace, 4, "lru")) == [[0, 1], [3, 2]]


def test_everything_fits_misses_each_expert_once() -> None:
    trace = skewed(50, 3, 6, 2, 0)
    used = len({(layer, e) for t in trace.ids_TLK.tolist() for layer, r in enumerate(t) for e in r})
    for policy in POLICIES:
        assert simulate(trace, 18, policy).misses == used
        assert simulate(trace, 6, policy, pooled=False).misses == used


def test_warm_up_tokens_are_not_counted() -> None:
    trace = trace_of([[[0, 1]]] * 10, 4)
    replay = simulate(trace, 2, "lru", warmup=0.25)
    assert (replay.tokens, replay.requests, replay.misses, replay.hit_rate) == (8, 16, 0, 1.0)
    assert simulate_policy(trace, 2, LRU(1, 4), warmup=0.25).misses == 0
    assert simulate(trace, 2, "lru").reads_per_token == 0.2


def test_slots_for_rounds_down_but_not_by_a_float_error() -> None:
    trace = trace_of([[[0, 1], [2, 3]]], 10)
    assert slots_for(trace, 0.25) == 5
    assert slots_for(trace, 0.25, pooled=False) == 2
    assert slots_for(trace, 0.3, pooled=False) == 3  # 0.3 x 10 is 2.9999... in floats elsewhere
    assert slots_for(trace, 0.7) == 14


def test_comparison_names_the_limit_and_the_reference() -> None:
    comparison = compare(skewed(100, 2, 16, 2, 3), 8, ["min-w2"])
    data = comparison.to_json()
    assert set(data["policies"]) == {"min-w2", "lru", "lfu", "min"}
    assert data["policies"]["min"]["eta_policy"] == 1.0
    assert data["r_ref"] == min(data["policies"][p]["reads_per_token"] for p in ("lru", "lfu"))
    assert max(data["policies"][p]["eta_policy"] for p in ("lru", "lfu")) == 0.0


@pytest.mark.parametrize(
    ("slots", "policy", "options"),
    [
        (4, "fifo", {}),
        (4, "min-w0", {}),
        (1, "lru", {}),
        (4, "lfu", {"decay": 0.0}),
        (4, "lru", {"warmup": 1.0}),
        (4, "lru", {"resident": [(1, 0)]}),
        (4, "lru", {"resident": [(0, 4)]}),
        (2, "lru", {"resident": [(0, 0), (0, 1), (0, 2)]}),
    ],
)
def test_senseless_requests_are_refused(slots: int, policy: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        simulate(trace_of([[[0, 1]]], 4), slots, policy, **options)
