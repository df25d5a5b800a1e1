"""Clusters hold every expert once, keep partners together, and are chosen by measurement."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.traces.clusters import choose_order, clusters, extents, layer_order
from chronos.common.traces.trace import RoutingTrace

RECORD = 1000


def paired(tokens: int, experts: int = 8, seed: int = 0) -> RoutingTrace:
    """Two layers; expert e is always asked for with its partner, e + experts / 2."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, experts // 2, (tokens, 2, 1))
    ids_TLK = np.concatenate([first, first + experts // 2], axis=-1).astype(np.uint8)
    meta = {"model": "", "phase": "", "num_experts": experts, "top_k": 2, "layer_ids": [1, 4]}
    return RoutingTrace(ids_TLK, None, np.zeros(tokens, np.int32), meta)


def test_partners_become_clusters_in_layer_order() -> None:
    order = clusters(paired(200), record_bytes=RECORD)
    pairs = [{(layer, e), (layer, e + 4)} for layer in (1, 4) for e in range(4)]
    assert sorted(map(sorted, order)) == sorted(map(sorted, pairs))
    assert [cluster[0][0] for cluster in order] == [1] * 4 + [4] * 4


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_every_expert_is_there_once_seen_or_not(tokens: int) -> None:
    trace = paired(tokens, experts=16)
    for order in (clusters(trace, record_bytes=RECORD), layer_order(trace)):
        keys = [key for cluster in order for key in cluster]
        assert sorted(keys) == [(layer, expert) for layer in (1, 4) for expert in range(16)]


def test_clusters_are_cut_at_max_bytes() -> None:
    trace = paired(3, experts=64)
    order = clusters(trace, record_bytes=RECORD, max_bytes=5 * RECORD + 999)
    assert max(map(len, order)) == 5
    assert max(map(len, clusters(trace, record_bytes=RECORD, max_bytes=1))) == 1


def test_the_same_seed_gives_the_same_order() -> None:
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(12, dtype=np.uint8), (80, 1, 1)), axis=-1)[..., :3]
    meta = {"model": "", "phase": "", "num_experts": 12, "top_k": 3}
    trace = RoutingTrace(ids, None, np.zeros(80, np.int32), meta)
    one, two = (clusters(trace, record_bytes=RECORD, seed=7) for _ in range(2))
    assert one == two


def test_extents_count_neighbours_within_a_cluster_only() -> None:
    order = [[(0, 0), (0, 3), (0, 1)], [(0, 2)]]
    assert extents(order, [[(0, 3), (0, 0)]]) == 1
    assert extents(order, [[(0, 1), (0, 0)]]) == 2
    assert extents(order, [[(0, 1), (0, 2)]]) == 2  # neighbours in two files
    assert extents(order, [[(0, 2)], [], [(0, 0), (0, 1), (0, 3)]]) == 2


def test_small_records_get_clusters_and_large_ones_layer_order() -> None:
    trace = paired(400, experts=16)
    small, large = (choose_order(trace, record_bytes=size) for size in (20_000, 20_000_000))
    assert small.method == "clusters"
    assert small.order == clusters(trace, record_bytes=20_000)
    assert large.method == "layer"
    assert large.order == layer_order(trace)
    assert small.cluster_extents_per_token < small.layer_extents_per_token
    assert small.layer_extents_per_token == small.reads_per_token  # partners lie 8 apart
    for choice in (small, large):
        assert choice.reason.startswith(("clusters", "layer order"))
        assert "of read time" in choice.reason
        assert choice.to_json()["method"] == choice.method


def test_a_slow_seek_makes_clusters_pay() -> None:
    trace = paired(400, experts=16)
    assert choose_order(trace, record_bytes=20_000_000, seek_s=8e-3).method == "clusters"


def test_a_handful_of_tokens_decides_nothing() -> None:
    choice = choose_order(paired(20), record_bytes=1)
    assert choice.method == "layer"
    assert "too few" in choice.reason
