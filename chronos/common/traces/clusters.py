"""Which experts lie side by side on disk: clusters of those a token tends to ask for together.

The graph has one node per (layer, expert) and weighs an edge by how many tokens asked for both.
A request never spans layers, so neither do edges: a cluster holds experts of one layer. Louvain
finds the communities; inside one, each expert is followed by its most frequent companion.
Whether that beats plain layer order depends on record size and disk, so `choose_order` measures it
on tokens the clusters were not made from, and says what it found.
Not covered: reads of one prefetch that spans layers; writing files (`pack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.model.weights import Key
from chronos.common.traces.simulate import missed_keys, slots_for
from chronos.common.traces.trace import RoutingTrace

Order = list[list[Key]]

_MAX_CLUSTER_BYTES = 1 << 30
_MIN_TOKENS = 64  # below this the counts are noise
_MAX_SCORED = 8192  # tokens; more do not change the choice, and each costs some 0.2 ms
_MIN_GAIN = 0.02  # of read time; less is not worth an order that depends on a trace


@dataclass(frozen=True)
class OrderChoice:
    """An order for `pack`, what decided it, and the measurement. Extents: contiguous reads."""

    method: str  # "clusters" or "layer"
    order: Order
    reason: str
    reads_per_token: float = 0.0
    layer_extents_per_token: float = 0.0
    cluster_extents_per_token: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps: how the clusters were made."""
        return {
            "method": self.method,
            "reason": self.reason,
            "reads_per_token": self.reads_per_token,
            "layer_extents_per_token": self.layer_extents_per_token,
            "cluster_extents_per_token": self.cluster_extents_per_token,
        }


def clusters(
    trace: RoutingTrace,
    *,
    record_bytes: int,
    max_bytes: int = _MAX_CLUSTER_BYTES,
    seed: int = 0,
) -> Order:
    """Clusters of keys, layer by layer, every expert of the trace's layers exactly once.

    The most used cluster of a layer comes first; experts the trace never saw are its last one.
    Clusters above `max_bytes` are cut. The same trace and seed give the same order.
    """
    longest = max(1, max_bytes // record_bytes)
    order: Order = []
    for row, layer in enumerate(trace.layers):
        together_EE, uses_E = _counts(trace.ids_TLK[:, row], trace.num_experts)
        groups = _communities(together_EE, uses_E, seed)
        if unseen := np.flatnonzero(uses_E == 0).tolist():
            groups.append(unseen)
        for group in groups:
            cuts = range(0, len(group), longest)
            order += [[(layer, expert) for expert in group[at : at + longest]] for at in cuts]
    return order


def layer_order(trace: RoutingTrace) -> Order:
    """One cluster per layer, experts by number."""
    return [[(layer, e) for e in range(trace.num_experts)] for layer in trace.layers]


def extents(order: Sequence[Sequence[Key]], requests: Iterable[Sequence[Key]]) -> int:
    """Contiguous pieces to read for all requests; neighbours in a cluster are one piece."""
    place: dict[Key, int] = {}
    for number, cluster in enumerate(order):
        begin = len(place) + number  # a gap: clusters are separate files
        place.update((key, begin + at) for at, key in enumerate(cluster))
    count = 0
    for keys in requests:
        places = {place[key] for key in keys}
        count += sum(at - 1 not in places for at in places)
    return count


def choose_order(
    trace: RoutingTrace,
    *,
    record_bytes: int,
    share: float = 0.25,
    seek_s: float = 1e-4,
    bytes_per_s: float = 1e9,
    seed: int = 0,
) -> OrderChoice:
    """Layer order or clusters, by the read time each would need on the second half of the trace.

    Clusters are made from the first half and scored on what a decayed-LFU pool of `share` of the
    experts misses in (the first 8,192 tokens of) the second; time is extents x seek_s + bytes /
    bytes_per_s, by default a middling SSD's. Clusters that gain 2 % are made again from the whole
    trace and chosen.
    """
    plain, middle = layer_order(trace), trace.num_tokens // 2
    if trace.num_tokens < _MIN_TOKENS:
        reason = f"layer order: {trace.num_tokens} tokens are too few to cluster by"
        return OrderChoice("layer", plain, reason)
    unseen = trace.part(middle, min(trace.num_tokens, middle + _MAX_SCORED))
    reads = _missed_requests(unseen, share)
    trial = clusters(trace.part(0, middle), record_bytes=record_bytes, seed=seed)
    tokens = unseen.num_tokens
    missed = sum(map(len, reads)) / tokens
    layer, clustered = extents(plain, reads) / tokens, extents(trial, reads) / tokens
    layer_s = layer * seek_s + missed * record_bytes / bytes_per_s
    gain = (layer - clustered) * seek_s / layer_s if layer_s else 0.0
    method = "clusters" if gain >= _MIN_GAIN else "layer"
    reason = (
        f"{'clusters' if method == 'clusters' else 'layer order'}: of the {missed:.1f} experts of"
        f" {record_bytes} bytes that a token reads, clusters of those used together make"
        f" {clustered:.1f} separate reads, layer order {layer:.1f}: clusters"
        f" {'save' if gain >= 0 else 'cost'} {abs(gain):.1%} of read time, and saving"
        f" {_MIN_GAIN:.0%} is the least that counts"
    )
    order = clusters(trace, record_bytes=record_bytes, seed=seed) if method != "layer" else plain
    return OrderChoice(method, order, reason, missed, layer, clustered)


def _missed_requests(trace: RoutingTrace, share: float) -> list[list[Key]]:
    experts, layers = trace.num_experts, trace.layers
    slots = max(trace.top_k, slots_for(trace, share))
    return [
        [(layers[flat // experts], flat % experts) for flat in missing]
        for missing in missed_keys(trace, slots, "lfu")
        if missing
    ]


def _counts(
    ids_TK: npt.NDArray[Any], num_experts: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens that asked for both experts [E, E] (0 on the diagonal), and for each [E]."""
    ids_TK = ids_TK.astype(np.int64)
    pairs = (ids_TK[:, :, None] * num_experts + ids_TK[:, None, :]).ravel()
    both_EE = np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)
    uses_E = both_EE.diagonal().copy()
    np.fill_diagonal(both_EE, 0)
    return both_EE, uses_E


def _communities(
    together_EE: npt.NDArray[np.int64], uses_E: npt.NDArray[np.int64], seed: int
) -> list[list[int]]:
    """Louvain communities of one layer's used experts, the most used first, each as a chain."""
    import community  # here: networkx takes a quarter of a second to import
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(np.flatnonzero(uses_E).tolist())
    for a, b in np.argwhere(np.triu(together_EE)).tolist():
        graph.add_edge(a, b, weight=int(together_EE[a, b]))
    groups: dict[int, list[int]] = {}
    for expert, group in community.best_partition(graph, random_state=seed).items():
        groups.setdefault(group, []).append(expert)
    by_use = sorted(groups.values(), key=lambda group: (-int(uses_E[group].sum()), min(group)))
    return [_chain(together_EE, uses_E, group) for group in by_use]


def _chain(
    together_EE: npt.NDArray[np.int64], uses_E: npt.NDArray[np.int64], group: list[int]
) -> list[int]:
    """The most used expert, then always the one most often asked for with the last."""
    left = sorted(group, key=lambda expert: (-int(uses_E[expert]), expert))
    chain = [left.pop(0)]
    while left:
        best = max(left, key=lambda expert: int(together_EE[chain[-1], expert]))
        left.remove(best)
        chain.append(best)
    return chain
