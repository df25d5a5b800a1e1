"""Routing traces: round trip, the recorder, and what makes no sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import DataError
from chronos.common.traces.trace import RoutingTrace, TraceRecorder, join

META = {"model": "tiny", "num_experts": 8, "top_k": 2, "phase": "generation"}


def make(tokens: int = 6, layers: int = 3, experts: int = 8, k: int = 2) -> RoutingTrace:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)[..., :k]
    return RoutingTrace(
        ids.astype(np.uint8 if experts <= 256 else np.uint16),
        rng.random((tokens, layers, k)).astype(np.float16),
        np.repeat(np.arange(2, dtype=np.int32), tokens // 2),
        META | {"num_experts": experts, "top_k": k},
    )


@pytest.mark.parametrize(("experts", "dtype"), [(8, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_save_and_load_give_the_same_trace(tmp_path: Path, experts: int, dtype: Any) -> None:
    trace, path = make(experts=experts), tmp_path / "t.npz"
    trace.save(path)
    again = RoutingTrace.load(path)
    assert again.ids_TLK.dtype == dtype
    np.testing.assert_array_equal(again.ids_TLK, trace.ids_TLK)
    np.testing.assert_array_equal(again.weights_TLK, trace.weights_TLK)
    np.testing.assert_array_equal(again.seq_T, trace.seq_T)
    assert again.meta == trace.meta
    assert [item.name for item in tmp_path.iterdir()] == ["t.npz"]


def test_ids_of_the_tokens_come_along(tmp_path: Path) -> None:
    recorder = TraceRecorder(8, 2)
    whole = make()
    recorder.append(whole.ids_TLK[0], tokens=5)
    recorder.append(whole.ids_TLK[1:4], tokens=[6, 7, 6])
    recorder.trace().save(tmp_path / "t.npz")
    again = RoutingTrace.load(tmp_path / "t.npz")
    assert again.tokens_T is not None and again.tokens_T.tolist() == [5, 6, 7, 6]
    part = again.select(np.array([True, False, True, False]))
    assert part.tokens_T is not None and part.tokens_T.tolist() == [5, 7]
    with pytest.raises(DataError, match="tokens must be int32"):
        dataclasses.replace(again, tokens_T=np.array([1, 2], np.int32))


def test_joined_traces_are_other_sequences_and_keep_what_all_have() -> None:
    one, other = make(), dataclasses.replace(make(), meta=META | {"phase": "prefill"})
    both = join([one, other])
    assert both.seq_T.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert both.meta["phase"] == "mixed" and both.weights_TLK is not None
    assert join([one, one]).meta["phase"] == "generation"
    assert join([one, dataclasses.replace(one, weights_TLK=None)]).weights_TLK is None


def test_any_memory_order_and_wide_ids_are_saved_plain(tmp_path: Path) -> None:
    trace = make()
    turned = dataclasses.replace(
        trace, ids_TLK=np.asfortranarray(trace.ids_TLK.astype(np.uint16)), weights_TLK=None
    )
    turned.save(tmp_path / "t.npz")
    again = RoutingTrace.load(tmp_path / "t.npz")
    assert again.ids_TLK.dtype == np.uint8
    assert again.weights_TLK is None
    np.testing.assert_array_equal(again.ids_TLK, trace.ids_TLK)


def test_numpy_alone_reads_what_we_write(tmp_path: Path) -> None:
    make().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"ids", "weights", "seq", "meta"}
        assert archive["seq"].dtype == np.int32


def test_numbers_and_parts() -> None:
    trace = make(tokens=6, layers=3, experts=8, k=2)
    numbers = (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts)
    assert numbers == (6, 3, 2, 8)
    part = trace.part(2, 5)
    np.testing.assert_array_equal(part.ids_TLK, trace.ids_TLK[2:5])
    assert part.seq_T.tolist() == [0, 1, 1]


def test_layers_are_absolute() -> None:
    trace = make()
    assert trace.layers == (0, 1, 2)
    sparse = dataclasses.replace(trace, meta=trace.meta | {"layer_ids": [1, 2, 9]})
    assert sparse.layers == (1, 2, 9)


def test_the_recorder_takes_tokens_one_by_one_and_in_bulk() -> None:
    source = make()
    assert source.weights_TLK is not None
    recorder = TraceRecorder(8, 2, model="m", layers=[1, 3, 5], extra={"prompt": "x"})
    recorder.new_sequence()  # nothing appended yet: still the first
    recorder.append(source.ids_TLK[:3], source.weights_TLK[:3])
    recorder.new_sequence()
    recorder.new_sequence()
    for ids, weights in zip(source.ids_TLK[3:], source.weights_TLK[3:], strict=True):
        recorder.append(ids, weights)
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.ids_TLK, source.ids_TLK)
    np.testing.assert_array_equal(trace.weights_TLK, source.weights_TLK)
    assert trace.seq_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.layers == (1, 3, 5)
    assert trace.meta["model"] == "m"
    assert trace.meta["prompt"] == "x"


def test_the_recorder_refuses_half_the_weights_and_nothing_at_all() -> None:
    with pytest.raises(DataError, match="no token"):
        TraceRecorder(8, 2).trace()
    recorder = TraceRecorder(8, 2)
    recorder.append([[0, 1]], [[0.5, 0.5]])
    recorder.append([[0, 1]])
    with pytest.raises(DataError, match="without"):
        recorder.trace()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids_TLK": np.zeros((2, 3), np.uint8)}, "tokens, layers, k"),
        ({"ids_TLK": np.zeros((0, 3, 2), np.uint8)}, "not empty"),
        ({"ids_TLK": np.zeros((6, 3, 2), np.int64)}, "uint8 or uint16"),
        ({"ids_TLK": np.full((6, 3, 2), [1, 8], np.uint8)}, "token 0, layer row 0 is 8"),
        ({"ids_TLK": np.full((6, 3, 2), [5, 5], np.uint8)}, "one expert twice"),
        ({"ids_TLK": np.full((6, 3, 3), [1, 2, 3], np.uint8)}, "meta says 2"),
        ({"seq_T": np.array([0, 0, 1, 1, 0, 0], np.int32)}, "not contiguous"),
        ({"seq_T": np.zeros(6, np.int64)}, "seq must be int32"),
        ({"seq_T": np.zeros(5, np.int32)}, "seq must be int32"),
        ({"weights_TLK": np.zeros((6, 3, 2), np.float32)}, "weights must be float16"),
        ({"weights_TLK": np.zeros((6, 3, 1), np.float16)}, "weights must be float16"),
        ({"weights_TLK": np.full((6, 3, 2), np.nan, np.float16)}, "NaN"),
        ({"weights_TLK": np.full((6, 3, 2), -1, np.float16)}, "negative"),
        ({"meta": []}, "not a JSON object"),
        ({"meta": META | {"num_experts": True}}, "num_experts"),
        ({"meta": META | {"num_experts": 0}}, "num_experts"),
        ({"meta": META | {"top_k": "2"}}, "top_k"),
        ({"meta": META | {"phase": None}}, "phase"),
        ({"meta": {"num_experts": 8, "top_k": 2, "phase": ""}}, "model"),
        ({"meta": META | {"layer_ids": [0, 1]}}, "layer_ids"),
        ({"meta": META | {"layer_ids": [2, 1, 0]}}, "rise"),
        ({"meta": META | {"layer_ids": [0, 1, -2]}}, "layer_ids"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        dataclasses.replace(make(), **change)
