"""What only MLX has: lazy evaluation, one memory, and an allocator that can be asked.

Bytes are counted by MLX itself. A wait is a call of `mx.eval`; the backend makes no other.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends.mlx.arena import _arena  # noqa: E402
from chronos.backends.probe import MemoryLimits  # noqa: E402
from chronos.common.disk.io import ALIGN  # noqa: E402
from chronos.common.errors import BudgetError  # noqa: E402
from chronos.common.layout import open_layout  # noqa: E402
from chronos.common.text.sampling import SamplingParams  # noqa: E402
from chronos.run.engine import load  # noqa: E402
from chronos.run.sequence import OneSequence  # noqa: E402
from chronos.testing.store_rig import (  # noqa: E402
    EXPERTS,
    LAYERS,
    expected,
    feed_over,
    tiny_layout,
    until,
)
from chronos.testing.tiny import CONFIG, tiny_packed  # noqa: E402

GREEDY = SamplingParams()
PROMPT = [5, 80, 41, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_packed(tmp_path_factory.mktemp("mlx") / "model")


def active() -> int:
    gc.collect()
    return mx.get_active_memory()


def test_the_budget_is_what_is_allocated_and_evicting_allocates_nothing(tmp_path: Path) -> None:
    layout, before = tiny_layout(tmp_path), active()
    slots = 5
    with feed_over(backend, layout, slots * layout.record_nbytes) as feed:
        held = active() - before
        assert 0 <= held - slots * layout.record_nbytes <= ALIGN  # a page, to start on a boundary
        mx.reset_peak_memory()
        for number in range(100):
            with feed.step() as step:
                list(step.acquire(number % LAYERS, range(EXPERTS)))
            assert mx.get_active_memory() - before == held
        assert feed.stats().misses > 500
        assert mx.get_peak_memory() <= before + held
    del feed, step
    assert active() == before


def test_computing_with_slots_copies_no_expert(folder: Path) -> None:
    """The gather reads the slots where they are: no stack of experts is ever made of them."""
    with load(folder, backend="mlx", budget="all", prefetch="off") as engine:
        runner = OneSequence(engine.session)
        token = runner.prefill(PROMPT, GREEDY)
        for _ in range(20):
            token = runner.decode(token, GREEDY)
        held = active()
        mx.clear_cache()
        mx.reset_peak_memory()
        runner.decode(token, GREEDY)
        assert mx.get_peak_memory() - held < open_layout(folder).total_bytes / 4


class Waits:
    def __init__(self) -> None:
        self.count = 0

    def counting(self, evaluate: Callable[..., None]) -> Callable[..., None]:
        def wait(*arrays: Any) -> None:
            self.count += 1
            evaluate(*arrays)

        return wait


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    found = Waits()
    monkeypatch.setattr(mx, "eval", found.counting(mx.eval))
    return found


@pytest.mark.parametrize(
    ("budget", "prefetch", "least"),
    [
        ("resident", "off", 1),  # the sampled id
        ("all", "off", 1 + CONFIG.num_hidden_layers),  # and each layer's ids, to find its experts
        ("30%", "off", 1 + CONFIG.num_hidden_layers),
        ("30%", "auto", 1 + CONFIG.num_hidden_layers),  # forecasts ride along
    ],
)
def test_a_token_waits_no_more_than_it_must(
    folder: Path, waits: Waits, budget: str, prefetch: str, least: int
) -> None:
    with load(folder, backend="mlx", budget=budget, prefetch=prefetch) as engine:
        runner = OneSequence(engine.session)
        token = runner.prefill(PROMPT, GREEDY)
        for _ in range(8):
            token = runner.decode(token, GREEDY)
        waits.count = 0
        for _ in range(10):
            token = runner.decode(token, GREEDY)
        assert waits.count == 10 * least


def test_experts_taken_at_once_stay_until_the_next_acquire(tmp_path: Path) -> None:
    """Computation on them is lazy: it may run long after the lease is used up."""
    layout = tiny_layout(tmp_path)
    with feed_over(backend, layout, 3 * layout.record_nbytes) as feed, feed.step() as step:
        places = step.acquire(0, [0, 1]).all()
        lazy = [place.stack.down_DF[place.slot] * 1 for place in places.values()]
        feed.preload([(1, expert) for expert in range(EXPERTS)])
        until(lambda: feed._reader.queue_depth() == 0)
        for expert, array in zip(places, lazy, strict=True):
            assert (expected((0, expert))[1] == array).all()
        assert {(0, 0), (0, 1)} <= feed.resident()
        assert sorted(e for e, _ in step.acquire(1, [5, 6, 7])) == [5, 6, 7]


def test_no_loader_or_writer_of_mlx_is_used() -> None:
    """mx.load accepts files that the strict header check refuses; mx.save overwrites in place."""
    refused = {"load", "save", "savez", "savez_compressed", "save_safetensors", "save_gguf",
               "load_weights", "save_weights"}  # fmt: skip
    for path in sorted(Path(backend.__file__).parent.glob("*.py")):
        used = set(attributes(path.read_text("utf-8")))
        assert not used & {f"mx.{name}" for name in refused}, path.name
        assert not {name for name in used if name.endswith((".load_weights", ".save_weights"))}


def attributes(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def test_slots_begin_where_direct_reads_can() -> None:
    pages, room, start = _arena(3 * ALIGN)
    assert len(room) == 3 * ALIGN and pages.nbytes == 4 * ALIGN
    assert np.frombuffer(room, np.uint8).ctypes.data % ALIGN == 0
    room[:2] = b"\x01\x02"
    assert np.array(pages).reshape(-1)[start : start + 2].tolist() == [1, 2]


def test_no_room_is_an_error_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = tiny_layout(tmp_path)
    memory = MemoryLimits(layout.total_bytes // 2, 0, None, None, "test")
    monkeypatch.setattr("chronos.backends.mlx.arena.memory_limits", lambda: memory)
    with pytest.raises(BudgetError, match="no room for"):
        feed_over(backend, layout, layout.total_bytes)
    feed_over(backend, layout, layout.total_bytes // 2).close()
