"""A trace at a glance: uses, evenness, repeats and clusters of each layer."""

from __future__ import annotations

import numpy as np
import pytest

from chronos.common.traces.overview import by_layer, first_ids
from chronos.common.traces.trace import RoutingTrace

META = {"model": "", "phase": "", "num_experts": 4, "top_k": 2, "layer_ids": [3]}


def trace(ids_TK: list[list[int]], seq_T: list[int]) -> RoutingTrace:
    ids_TLK = np.array(ids_TK, np.uint8)[:, None]
    return RoutingTrace(ids_TLK, None, np.array(seq_T, np.int32), META)


def test_a_layer_by_hand() -> None:
    """0 and 1 go together, 2 and 3; the third token repeats one pick of the second, and the last
    follows nothing: it begins another sequence."""
    found = by_layer(trace([[0, 1], [2, 3], [3, 2], [0, 1]], [0, 0, 0, 1]))
    assert len(found) == 1
    assert found[0]["layer"] == 3 and found[0]["uses"] == [2, 2, 2, 2]
    assert found[0]["effective_experts"] == pytest.approx(4)
    assert found[0]["largest_share"] == 0.25
    assert found[0]["repeat"] == 0.5  # of the four picks of the second and third token, two
    assert sorted(map(sorted, found[0]["clusters"])) == [[0, 1], [2, 3]]


def test_nothing_repeats_where_nothing_follows() -> None:
    found = by_layer(trace([[0, 1], [0, 2]], [0, 1]))[0]
    assert found["repeat"] is None and found["uses"] == [2, 1, 1, 0]
    assert found["effective_experts"] == pytest.approx(np.exp(1.5 * np.log(2)))
    assert sorted(expert for group in found["clusters"] for expert in group) == [0, 1, 2, 3]


def test_first_ids_are_as_recorded() -> None:
    recorded = trace([[0, 1], [2, 3]], [0, 0])
    assert first_ids(recorded, 1) == [[[0, 1]]]
    assert first_ids(recorded, 9) == [[[0, 1]], [[2, 3]]] and first_ids(recorded, 0) == []
