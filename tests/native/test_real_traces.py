"""The two recorded real-model traces: figures of their README, to the digits given there.

They lie outside the repository (`../shared/traces`, or CHRONOS_TRACES); without them these tests
are skipped and say so. "All k admitted" is `min-admit`. Equal ages of LRU go by slot number here
and by position in the README's replay, which is worth up to 0.4 points.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from chronos.common.traces.clusters import choose_order
from chronos.common.traces.simulate import compare, simulate, slots_for
from chronos.common.traces.trace import RoutingTrace

FOLDER = Path(
    os.environ.get("CHRONOS_TRACES", Path(__file__).parents[2].parent / "shared" / "traces")
)
GPT_OSS, DEEPSEEK = "gpt-oss-20b", "deepseek-v2-lite-esft"


@cache
def load(name: str) -> RoutingTrace:
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no recorded trace {path.name} in {FOLDER}; set CHRONOS_TRACES to its folder")
    return RoutingTrace.load(path)


def hit_percent(trace: RoutingTrace, share: float, policy: str, *, pooled: bool) -> float:
    replay = simulate(trace, slots_for(trace, share, pooled=pooled), policy, pooled=pooled)
    return 100 * replay.hit_rate


@pytest.mark.parametrize(
    ("name", "shape", "sequences"),
    [(GPT_OSS, (47_670, 24, 32, 4), 139), (DEEPSEEK, (22_318, 26, 64, 6), 146)],
)
def test_the_traces_load_as_described(name: str, shape: tuple[int, ...], sequences: int) -> None:
    trace = load(name)
    found = (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k)
    assert found == shape
    assert len(np.unique(trace.seq_T)) == sequences


README = {  # percent of requests that hit, a quarter and half of the experts kept in every layer
    (GPT_OSS, "lru"): (65.9, 89.8),
    (GPT_OSS, "min-admit"): (77.7, 95.0),
    (DEEPSEEK, "lru"): (52.7, 76.1),
    (DEEPSEEK, "min-admit"): (70.2, 89.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "min-admit"])
def test_hit_rates_of_the_whole_trace(policy: str) -> None:
    found = hit_percent(load(GPT_OSS), 0.25, policy, pooled=False)
    tolerance = 0.4 if policy == "lru" else 0.06
    assert found == pytest.approx(README[GPT_OSS, policy][0], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy"), README)
def test_hit_rates_of_every_fourth_layer(name: str, policy: str) -> None:
    """Layers are cached apart, so some of them are a fair sample of all at a part of the time."""
    whole, rows = load(name), slice(2, None, 4)
    meta = whole.meta | {"layer_ids": list(whole.layers[rows])}
    trace = RoutingTrace(whole.ids_TLK[:, rows], None, whole.seq_T, meta)
    found = [hit_percent(trace, share, policy, pooled=False) for share in (0.25, 0.5)]
    assert found == pytest.approx(README[name, policy], abs=0.5)


@pytest.mark.slow
def test_shuffled_tokens_lose_the_locality() -> None:
    trace = load(GPT_OSS).part(0, 12_000)
    order = np.random.default_rng(0).permutation(trace.num_tokens)
    shuffled = RoutingTrace(trace.ids_TLK[order], None, trace.seq_T, trace.meta)
    assert hit_percent(shuffled, 0.25, "lru", pooled=False) == pytest.approx(37, abs=1)


@pytest.mark.slow
def test_foresight_of_a_few_tokens_closes_most_of_the_gap() -> None:
    """Published medians over nine models: 36 / 54 / 81 / 99 % for 1 / 2 / 4 / 8 tokens."""
    trace = load(GPT_OSS).part(0, 4_000)
    slots = slots_for(trace, 0.25, pooled=False)
    found = compare(trace, slots, [f"min-w{w}" for w in (1, 2, 4, 8)], pooled=False)
    lfu = next(r.misses for r in found.runs if r.policy == "lfu")
    best = next(r.misses for r in found.runs if r.policy == "min")
    closed = {r.policy: 100 * (lfu - r.misses) / (lfu - best) for r in found.runs}
    assert closed["min-w1"] == pytest.approx(42, abs=6)
    assert closed["min-w2"] == pytest.approx(63, abs=6)
    assert closed["min-w4"] == pytest.approx(88, abs=6)
    assert closed["min-w8"] >= 97


@pytest.mark.slow
def test_clusters_save_a_tenth_of_the_extents_and_pay_for_small_records_only() -> None:
    trace = load(GPT_OSS).part(0, 6_000)
    small = choose_order(trace, record_bytes=200_000)
    assert small.method == "clusters"
    saved = 1 - small.cluster_extents_per_token / small.layer_extents_per_token
    assert 0.05 < saved < 0.2
    assert choose_order(trace, record_bytes=13_000_000).method == "layer"
