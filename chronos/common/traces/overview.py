"""What a trace shows of a model's routing: use by layer, experts that go together, first tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from chronos.common.traces.clusters import clusters
from chronos.common.traces.trace import RoutingTrace


def by_layer(trace: RoutingTrace) -> list[dict[str, Any]]:
    """For each layer: `layer`, `uses` of each expert (tokens), `effective_experts` (exponential of
    the entropy of the uses), `largest_share` of the picks, `repeat` (the share of picks that the
    sequence's token before made too; None where none has one) and `clusters`, the experts in groups
    that tokens ask for together (Louvain), the most used first."""
    follows = trace.seq_T[1:] == trace.seq_T[:-1]
    groups: dict[int, list[list[int]]] = {layer: [] for layer in trace.layers}
    for group in clusters(trace, record_bytes=1):
        groups[group[0][0]].append([expert for _, expert in group])
    found = []
    for row, layer in enumerate(trace.layers):
        ids_TK = trace.ids_TLK[:, row]
        uses_E = np.bincount(ids_TK.ravel(), minlength=trace.num_experts)
        share_E = uses_E / uses_E.sum()
        entropy = -(share_E * np.log(np.maximum(share_E, 1e-12))).sum()
        again = (ids_TK[1:, :, None] == ids_TK[:-1, None, :]).any(-1)[follows]
        found.append(
            {
                "layer": layer,
                "uses": uses_E.tolist(),
                "effective_experts": float(np.exp(entropy)),
                "largest_share": float(share_E.max()),
                "repeat": float(again.mean()) if again.size else None,
                "clusters": groups[layer],
            }
        )
    return found


def first_ids(trace: RoutingTrace, tokens: int) -> list[list[list[int]]]:
    """The experts of the first tokens, [T, L, K]."""
    ids: list[list[list[int]]] = trace.ids_TLK[:tokens].tolist()
    return ids
