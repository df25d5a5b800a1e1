"""Guests on MLX: how experts come to a layer: waited for, forecast, held and stood in for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends.mlx.guest import skeleton  # noqa: E402
from chronos.backends.mlx.guest.experts import CALL, ExpertsCall, StreamedLayer  # noqa: E402
from chronos.common.disk.header import TensorEntry  # noqa: E402
from chronos.common.experts.feed import FeedStep  # noqa: E402
from chronos.common.experts.prefetch import NEXT_GATE  # noqa: E402
from chronos.common.layout import open_layout, pack  # noqa: E402
from chronos.run.sequence import OneSequence  # noqa: E402
from tests.support.mlx_guests import (  # noqa: E402
    GREEDY,
    PROMPT,
    open_feed,
    packed,
    save,
    values,
)

pytestmark = pytest.mark.usefixtures("eager")


def test_a_token_waits_once_a_layer_and_once_at_its_end(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = open_layout(packed(folder("mixtral")))
    waits = []
    evaluate = mx.eval
    with open_feed(layout, 1.0) as feed:
        session = backend.session(backend.load(layout.folder, resident=False), feed)
        runner = OneSequence(session)
        token = runner.prefill(PROMPT, GREEDY)
        monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
        for _ in range(5):
            token = runner.decode(token, GREEDY)
    assert len(waits) == 5 * (1 + len(layout.moe_layers))


class Everything:
    """A source of experts that wants every forecast of next gates."""

    def __init__(self, step: FeedStep) -> None:
        self._step = step
        self.forecasts: dict[int, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def wants(self, source: str) -> bool:
        return source == NEXT_GATE

    def foresee(self, source: str, scores: list[int], layer: int) -> None:
        self.forecasts[layer] = scores


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "qwen3_next", "nemotron_h"])
def test_the_next_gate_forecasts(
    folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its choice from this layer's state rides along with this layer's wait. From a state that the
    attention between the two does not change, it is what the next layer is routed to."""
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    states: dict[int, tuple[Any, Any]] = {}
    compute = StreamedLayer.__call__

    def watched(layer: Any, x: Any, ids: Any) -> Any:
        states[layer.layer] = (x, ids)
        return compute(layer, x, ids)

    monkeypatch.setattr(StreamedLayer, "__call__", watched)
    waits = []
    evaluate = mx.eval
    with open_feed(layout, 0.5) as feed:
        monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
        source = Everything(feed.step())
        model(mx.array([[7]]), source=source)
    assert len(waits) == len(layout.moe_layers)
    assert list(source.forecasts) == list(layout.moe_layers[1:])
    assert {len(set(experts)) for experts in source.forecasts.values()} == {2}
    for layer in (m for m in model.core.modules() if isinstance(m, StreamedLayer)):
        if layer._ahead is not None:
            number, choose = layer._ahead
            x, ids = states[number]
            assert set(choose(x).reshape(-1).tolist()) == set(ids.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"intermediate_size": 1024}),
        ("gpt_oss", {"intermediate_size": 1024}),  # interleaved rows, transposed
        ("qwen3_moe-4bit", {"moe_intermediate_size": 2048}),
    ],
)
def test_no_expert_is_allocated_but_in_the_store(
    home: Path, name: str, changes: dict[str, Any]
) -> None:
    """Stand-ins have the experts' shapes and are never evaluated; slots are computed with where
    they lie."""
    save(name, home / f"wide-{name}", **changes)
    pack(home / f"wide-{name}", home / f"wide-{name}-packed")
    layout = open_layout(home / f"wide-{name}-packed")
    dense = (layout.folder / "model.safetensors").stat().st_size
    assert layout.total_bytes > 20 * dense
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = backend.load(layout.folder, resident=False)
    assert mx.get_peak_memory() - before < 4 * dense
    with open_feed(layout, 1.0) as feed:
        runner = OneSequence(backend.session(model, feed))
        runner.prefill(PROMPT[:3], GREEDY)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        for token in range(5):
            runner.decode(token, GREEDY)
        assert mx.get_peak_memory() - held < layout.record_nbytes


def test_replayed_ids_are_the_experts_used(folder: Callable[[str], Path]) -> None:
    layout = open_layout(packed(folder("qwen3_moe")))
    model = backend.load(layout.folder, resident=False)
    ids_TK = np.array([[6, 1]])
    with open_feed(layout, 1.0) as feed:
        runner = OneSequence(
            backend.session(model, feed),
            record=True,
            route_override=lambda layer: (ids_TK + layer, np.full((1, 2), 0.5, np.float32)),
        )
        runner.decode(7, GREEDY)
        assert feed.resident() == {(0, 6), (0, 1), (1, 7), (1, 2)}
    ids_TLK, weights_TLK = runner.routing()[0]
    np.testing.assert_array_equal(ids_TLK[0], [[6, 1], [7, 2]])
    assert weights_TLK is None  # a switch never sees them


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_stand_in(folder: Callable[[str], Path], name: str) -> None:
    layout = open_layout(packed(folder(name)))
    model = backend.load(layout.folder, resident=False)
    block = model.core.model.layers[1].mlp
    x_13D = mx.random.normal((1, 3, 32))
    seen = {}
    with open_feed(layout, 1.0, miss="fallback") as feed:
        before = CALL.set(ExpertsCall(feed.step()))
        y = values(block.switch_mlp(x_13D, mx.array([[[0, 1], [2, 1], [3, 0]]])))
        CALL.reset(before)
        seen = feed.stats()
        expected = block.shared_experts if name == "deepseek_v3" else block.shared_expert
        shared = expected(x_13D)
        if name == "qwen2_moe":
            shared = mx.sigmoid(block.shared_expert_gate(x_13D)) * shared
    np.testing.assert_array_equal(y, np.repeat(values(shared)[:, :, None], 2, axis=2))
    assert (seen.fallbacks, seen.fallback_weight) == (4, 3.0)


@pytest.mark.parametrize(
    ("kind", "values_", "dtype"),
    [
        ("F64", np.array([[1.5, -2.0]]), mx.float32),
        ("I64", np.array([[1, -(1 << 40)]]), mx.int64),
        ("U64", np.array([1, 2], np.uint64), mx.uint64),
        ("BOOL", np.array([[True, False, True]]), mx.bool_),
        ("C64", np.array([1 + 2j], np.complex64), mx.complex64),
        ("F8_E5M2", np.array([1, 2], np.uint8), mx.uint8),
        ("F64", np.zeros((0, 3)), mx.float32),
    ],
)
def test_dense_tensors_of_every_dtype(kind: str, values_: np.ndarray, dtype: Any) -> None:
    entry = TensorEntry("x", kind, values_.shape, 0, values_.nbytes)
    array = skeleton._array(entry, memoryview(values_.tobytes()))
    assert array.dtype == dtype and np.array_equal(np.array(array), values_)
