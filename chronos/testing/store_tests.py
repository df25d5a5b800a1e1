"""StoreTests: what every backend's expert store must do. Subclass it with a `backend` fixture.

`backend` needs `open_store(layout, capacity_bytes, *, top_k, miss, policy, reader)`. Reads go
through a `GatedIO`, which holds them back, fails them or delays them, so "in flight" is a state a
test sets up and not a matter of timing. Experts are float32 and differ in every value.
Not covered: speed, and how bytes reach an accelerator.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from chronos.common.errors import BudgetError, CorruptClusterError, StoreError
from chronos.common.files import ALIGN, FileIO, RangedReader
from chronos.common.layout.folder import Layout
from chronos.common.layout.manifest import TENSOR_ALIGN, Manifest, Record, RecordTensor
from chronos.common.residency import Key
from chronos.common.weights import EXPERT_TENSORS

LAYERS, EXPERTS, D, F = 3, 8, 8, 12
_PATIENCE_S = 20  # long enough for any machine; only a broken store waits for it


def expected(key: Key) -> tuple[np.ndarray, np.ndarray]:
    """gate_up [2F, D] and down [D, F] of an expert: values that name their key and their place."""
    base = 1000.0 * (key[0] * EXPERTS + key[1])
    gate_up = base + np.arange(2 * F * D, dtype=np.float32).reshape(2 * F, D)
    down = base + 500 + np.arange(D * F, dtype=np.float32).reshape(D, F)
    return gate_up, down


def tiny_layout(folder: Path, layers: int = LAYERS, experts: int = EXPERTS) -> Layout:
    """A layout over one file of records, without the container around them."""
    name, records, data = "records.ctsr", {}, bytearray(ALIGN)
    for key in [(layer, expert) for layer in range(layers) for expert in range(experts)]:
        tensors, body = [], bytearray()
        for tensor, array in zip(EXPERT_TENSORS, expected(key), strict=True):
            body += bytes(-len(body) % TENSOR_ALIGN)
            tensors.append(RecordTensor(tensor, "F32", array.shape, len(body)))
            body += array.tobytes()
        body += bytes(-len(body) % ALIGN)
        digest = xxhash.xxh3_128_digest(bytes(body))
        records[key] = Record(key, name, len(data), len(body), digest, tuple(tensors))
        data += body
    layout = Layout(folder, Manifest("tiny", {}, {name: len(data)}, records))
    layout.files[0].parent.mkdir(parents=True, exist_ok=True)
    layout.files[0].write_bytes(data)
    return layout


class GatedIO(FileIO):
    """Reads wait for `gate`; offsets in `broken` fail; `delay` seconds each. Keeps the order."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[int] = set()
        self.delay: Callable[[], float] | None = None
        self.begun: list[int] = []  # offsets, in order of arrival at the disk

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.begun.append(offset)
        if not self.gate.wait(_PATIENCE_S):
            raise OSError(errno.ETIMEDOUT, "the gate stayed shut")
        if self.delay is not None:
            time.sleep(self.delay())
        if offset in self.broken:
            raise OSError(errno.ENXIO, "broken on purpose")
        return super().preadv(fd, buffers, offset)


class Ranking:
    """A forecasting policy whose ranks a test sets; `told` is what it was told."""

    forecasts = True

    def __init__(self) -> None:
        self.priority = np.zeros((LAYERS, EXPERTS))
        self.told: list[Any] = []

    def observe(self, layer: int, experts: object) -> None:
        self.told.append(layer)

    def end_token(self) -> None:
        self.told.append("token")

    def begin_prompt(self) -> None:
        self.told.append("begin")

    def end_prompt(self, ids_TLK: np.ndarray) -> None:
        self.told.append("end")


@dataclass
class Opened:
    """A store under test and what surrounds it."""

    store: Any
    layout: Layout
    io: GatedIO
    reader: RangedReader

    def take(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Acquire, check every value, and return the ids in the order they came."""
        order = []
        for expert, weights in self.store.acquire(layer, experts):
            check((layer, expert), weights)
            order.append(expert)
        return order

    def offset(self, key: Key) -> int:
        return self.layout.records[key].offset

    def settle(self) -> None:
        """Wait until no read is under way, and no copy where the store under test has copies."""
        until(lambda: self.reader.queue_depth() == 0)
        getattr(self.store, "drain", lambda: None)()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must become true."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def check(key: Key, weights: Any) -> None:
    assert weights is not None, f"{key} was not delivered"
    for have, want in zip(weights, expected(key), strict=True):
        np.testing.assert_array_equal(np.asarray(have), want, err_msg=f"bytes of {key}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


class StoreTests:
    """Every test opens its own store; `slots` is the budget in experts."""

    @contextlib.contextmanager
    def open(
        self, backend: Any, folder: Path, slots: int, threads: int = 2, **options: Any
    ) -> Iterator[Opened]:
        layout, io = tiny_layout(folder), GatedIO()
        with RangedReader(threads=threads, chunk_bytes=ALIGN, io=io) as reader:
            store = self.open_store(
                backend, layout, slots * layout.record_nbytes, reader=reader, **options
            )
            try:
                yield Opened(store, layout, io, reader)
            finally:
                io.gate.set()
                store.close()

    def open_store(self, backend: Any, layout: Layout, capacity: int, **options: Any) -> Any:
        return backend.open_store(layout, capacity, **options)

    # What acquire delivers

    def test_each_expert_once_with_its_bytes(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            for layer in (0, 1, 2, 0, 2):
                assert sorted(o.take(layer, [5, 0, 7])) == [0, 5, 7]

    def test_a_repeated_id_comes_once(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            assert o.take(1, [3, 3, 3]) == [3]
            assert o.take(1, [3, 4, 3]) == [3, 4]
            assert o.store.stats().routed == 3

    def test_ready_ones_come_before_any_read_ends(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            o.take(0, [4, 6])
            o.io.gate.clear()
            items = iter(o.store.acquire(0, [1, 4, 2, 6]))
            first = {next(items)[0], next(items)[0]}
            assert first == {4, 6}
            o.io.gate.set()
            assert {expert for expert, _ in items} == {1, 2}

    def test_all_missing_reads_start_when_called(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            o.io.gate.clear()
            items = o.store.acquire(0, [1, 2, 3])
            assert o.reader.queue_depth() == 3
            o.io.gate.set()
            o.settle()
            assert len(list(items)) == 3

    def test_more_experts_than_slots(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=2) as o:
            o.take(1, [6, 7])
            for _ in range(3):
                assert sorted(o.take(1, range(EXPERTS))) == list(range(EXPERTS))
                assert sorted(o.take(0, range(EXPERTS))) == list(range(EXPERTS))

    def test_a_single_slot(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=1) as o:
            o.store.prefetch([(0, 1)])
            assert sorted(o.take(0, [0, 1, 2])) == [0, 1, 2]

    def test_everything_fits(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=LAYERS * EXPERTS) as o:
            for _ in range(3):
                for layer in range(LAYERS):
                    assert sorted(o.take(layer, range(EXPERTS))) == list(range(EXPERTS))
            assert len(o.store.resident()) == LAYERS * EXPERTS
            stats = o.store.stats()
            assert (stats.misses, stats.hits) == (LAYERS * EXPERTS, 2 * LAYERS * EXPERTS)
            assert stats.bytes_read == o.layout.total_bytes == o.reader.stats.bytes_read
            assert o.store.prefetch(list(o.layout.records)) == 0

    def test_an_unknown_expert_is_named(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=LAYERS * EXPERTS) as o:
            for experts in ([1, EXPERTS], [-1]):
                with pytest.raises(StoreError, match=f"expert {experts[-1]} in layer 0"):
                    list(o.store.acquire(0, experts))
            for layer in range(LAYERS):
                o.take(layer, range(EXPERTS))
            with pytest.raises(StoreError, match=f"expert {EXPERTS}"):
                list(o.store.acquire(0, [EXPERTS]))

    # The budget

    def test_capacity_is_never_exceeded(self, backend: Any, tmp_path: Path) -> None:
        draw = random.Random(1)
        with self.open(backend, tmp_path, slots=5) as o:
            capacity = 5 * o.layout.record_nbytes
            for _ in range(150):
                layer = draw.randrange(LAYERS)
                o.store.prefetch([(draw.randrange(LAYERS), draw.randrange(EXPERTS))])
                for expert, weights in o.store.acquire(layer, draw.sample(range(EXPERTS), 3)):
                    check((layer, expert), weights)
                    stats = o.store.stats()
                    assert stats.live_bytes <= stats.peak_expert_bytes <= capacity
                    assert len(o.store.resident()) <= 5
                o.store.end_token()
            assert o.store.stats().capacity_bytes == capacity

    def test_too_small_a_budget_names_the_least(self, backend: Any, tmp_path: Path) -> None:
        layout, threads = tiny_layout(tmp_path), threading.active_count()
        least = 2 * layout.record_nbytes
        with pytest.raises(BudgetError, match=str(least)):
            self.open_store(backend, layout, least - 1, top_k=2)
        assert threading.active_count() == threads
        self.open_store(backend, layout, least, top_k=2).close()

    def test_what_is_held_is_not_evicted(self, backend: Any, tmp_path: Path) -> None:
        others = [(layer, expert) for layer in (1, 2) for expert in range(EXPERTS)]
        with self.open(backend, tmp_path, slots=4) as o:
            items = iter(o.store.acquire(0, [0, 1, 2]))
            for _ in range(3):
                expert, weights = next(items)
                for _ in range(3):
                    o.store.prefetch(others)
                    o.store.end_token()
                    o.settle()
                check((0, expert), weights)
            assert next(items, None) is None

    def test_a_closed_or_dropped_iterator_holds_nothing(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=2) as o:
            for leave in ("close", "drop", "never started"):
                items = o.store.acquire(0, [0, 1])
                if leave != "never started":
                    next(iter(items))
                if leave == "close":
                    items.close()
                del items
                assert sorted(o.take(1, [0, 1, 2])) == [0, 1, 2]

    # Prefetch

    def test_prefetch_is_idempotent(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            keys = [(0, 1), (2, 3)]
            nbytes = sum(o.layout.records[key].nbytes for key in keys)
            assert o.store.prefetch(keys) == nbytes
            assert o.store.prefetch(keys) == 0
            o.settle()
            assert o.store.prefetch(keys) == 0
            assert o.store.resident() == set(keys)
            assert o.take(0, [1]) + o.take(2, [3]) == [1, 3]
            stats = o.store.stats()
            assert (stats.hits, stats.misses, stats.late) == (2, 0, 0)
            assert stats.bytes_read == stats.bytes_prefetched == nbytes
            assert o.reader.stats.bytes_read == nbytes

    def test_prefetch_is_only_a_hint(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=3) as o:
            everything = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
            assert o.store.prefetch([]) == 0
            assert o.store.prefetch([(LAYERS, 0), (0, EXPERTS), (0, -1)]) == 0
            assert 0 <= o.store.prefetch(everything) <= 3 * o.layout.record_nbytes
            assert sorted(o.take(2, [5, 6, 7])) == [5, 6, 7]

    def test_a_late_prefetch_is_awaited_not_reread(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=6) as o:
            o.io.gate.clear()
            o.store.prefetch([(1, 2)])
            until(lambda: o.io.begun != [])
            items = o.store.acquire(1, [2])
            stats = o.store.stats()
            assert (stats.hits, stats.late, stats.misses) == (0, 1, 0)
            assert stats.bytes_late == o.layout.record_nbytes
            o.io.gate.set()
            assert [expert for expert, _ in items] == [2]
            assert o.io.begun == [o.offset((1, 2))]
            assert o.reader.stats.bytes_read == o.layout.record_nbytes

    def test_a_demand_overtakes_prefetches(self, backend: Any, tmp_path: Path) -> None:
        """Both those queued before it and, in their order, what of them is needed now."""
        with self.open(backend, tmp_path, slots=16, threads=1) as o:
            o.io.gate.clear()
            o.store.prefetch([(1, expert) for expert in range(6)])
            until(lambda: o.io.begun != [])
            items = o.store.acquire(1, [7, 5])
            o.io.gate.set()
            assert {expert for expert, _ in items} == {5, 7}
            o.settle()
            assert o.io.begun[0] == o.offset((1, 0))
            assert set(o.io.begun[1:3]) == {o.offset((1, 7)), o.offset((1, 5))}
            assert len(o.io.begun) == 7

    def test_queued_prefetches_never_block_a_demand(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4, threads=1) as o:
            o.io.gate.clear()
            o.store.prefetch([(1, expert) for expert in range(4)])
            until(lambda: o.io.begun != [])
            items = o.store.acquire(0, [0, 1])
            o.io.gate.set()
            assert sorted(expert for expert, _ in items) == [0, 1]
            assert o.io.begun[1:3] == [o.offset((0, 0)), o.offset((0, 1))]

    def test_bytes_never_used_are_wasted(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4) as o:
            o.store.prefetch([(1, 0), (1, 1)])
            o.settle()
            o.take(1, [0])
            assert o.store.stats().bytes_wasted == 0
            for _ in range(4):
                o.take(0, range(EXPERTS))
                o.store.end_token()
            assert o.store.stats().bytes_wasted == o.layout.record_nbytes
            o.store.prefetch([(2, 2)])
            o.settle()
            o.store.close()
            assert o.store.stats().bytes_wasted == 2 * o.layout.record_nbytes

    # Counting

    def test_counters_add_up_to_the_needs(self, backend: Any, tmp_path: Path) -> None:
        draw, needs = random.Random(2), 0
        with self.open(backend, tmp_path, slots=7) as o:
            o.io.delay = lambda: draw.random() * 0.002
            for _ in range(100):
                o.store.prefetch([(draw.randrange(LAYERS), draw.randrange(EXPERTS))])
                experts = draw.sample(range(EXPERTS), draw.randrange(1, 5))
                needs += len(experts)
                assert sorted(o.take(draw.randrange(LAYERS), experts)) == sorted(experts)
            o.settle()
            stats = o.store.stats()
            assert stats.hits + stats.late + stats.misses == stats.routed == needs
            assert stats.bytes_read == o.reader.stats.bytes_read
            from_disk = stats.misses - stats.warm_hits
            assert from_disk * o.layout.record_nbytes <= stats.bytes_read
            assert min(stats.hits, stats.late, stats.misses) > 0
            assert stats.stall_s > 0

    def test_a_forecast_decides_what_is_kept_and_read_ahead(
        self, backend: Any, tmp_path: Path
    ) -> None:
        """Needs add up as ever; a prefetch displaces only what is worth less than it."""
        policy = Ranking()
        with self.open(backend, tmp_path, slots=3, policy=policy) as o:
            policy.priority[0, [1, 2, 3]] = 5.0, 3.0, 4.0
            o.take(0, [1, 2, 3])
            policy.priority[1, 6], policy.priority[1, 7] = 4.5, 2.0
            assert o.store.prefetch([(1, 7)]) == 0
            assert o.store.prefetch([(1, 6)]) == o.layout.record_nbytes
            o.settle()
            assert o.store.resident() == {(0, 1), (0, 3), (1, 6)}
            assert o.take(1, [6]) == [6] and sorted(o.take(0, [1, 2])) == [1, 2]
            stats = o.store.stats()
            assert (stats.hits, stats.late, stats.misses) == (2, 0, 4)
            assert stats.prefetch_hits == 1 and stats.prefetch_precision == 1.0
            assert stats.prefetch_recall == 1 / 5

    def test_a_prompt_is_told_to_the_policy_at_its_end(self, backend: Any, tmp_path: Path) -> None:
        policy = Ranking()
        with self.open(backend, tmp_path, slots=4, policy=policy) as o:
            o.store.begin_prompt()
            for layer in range(LAYERS):
                assert sorted(o.take(layer, [0, 1, 2])) == [0, 1, 2]
            ids_TLK = np.zeros((2, LAYERS, 1), np.int64)
            o.store.end_prompt(ids_TLK)
            o.take(0, [3])
            o.store.end_token()
        assert policy.told == ["begin", 0, 1, 2, "end", 0, "token"]

    def test_stats_are_a_copy(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4) as o:
            before = o.store.stats()
            o.take(0, [0, 1])
            o.store.end_token()
            change = o.store.stats().minus(before)
            assert (before.misses, change.misses, change.tokens) == (0, 2, 1)
            assert change.to_json()["routed"] == 2

    # Misses that may fall back

    def test_exact_waits_however_long_it_takes(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4) as o:
            o.io.delay = lambda: 0.02
            for layer in range(LAYERS):
                assert sorted(o.take(layer, [1, 2])) == [1, 2]
            assert o.store.stats().fallbacks == 0

    def test_fallback_yields_none_and_reads_on(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4, miss="fallback") as o:
            o.io.gate.clear()
            o.store.prefetch([(0, 2)])
            assert sorted(o.store.acquire(0, [1, 2])) == [(1, None), (2, None)]
            o.store.record_fallback(0.25)
            o.io.gate.set()
            o.settle()
            assert sorted(o.take(0, [1, 2])) == [1, 2]
            stats = o.store.stats()
            assert (stats.late, stats.misses, stats.hits, stats.fallbacks) == (1, 1, 2, 2)
            assert stats.fallback_weight == 0.25

    # Faults

    def test_a_failed_read_leaves_the_store_usable(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=3) as o:
            o.io.broken = {o.offset((0, 1))}
            for _ in range(3):
                with pytest.raises(StoreError, match="broken on purpose"):
                    o.take(0, [0, 1, 2])
                o.settle()
                assert (0, 1) not in o.store.resident()
                assert sorted(o.take(1, [0, 1, 2])) == [0, 1, 2]
            o.io.broken = set()
            assert sorted(o.take(0, [0, 1, 2])) == [0, 1, 2]

    def test_a_failed_prefetch_is_told_only_when_needed(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=3) as o:
            o.io.broken = {o.offset((0, 1))}
            o.store.prefetch([(0, 1)])
            o.settle()
            assert sorted(o.take(0, [0, 2])) == [0, 2]
            with pytest.raises(StoreError, match="broken on purpose"):
                o.take(0, [1])
            o.io.broken = set()
            assert o.take(0, [1]) == [1]

    def test_a_late_prefetch_that_fails_raises(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=3) as o:
            o.io.broken = {o.offset((0, 1))}
            o.io.gate.clear()
            o.store.prefetch([(0, 1)])
            items = o.store.acquire(0, [1, 2])
            o.io.gate.set()
            with pytest.raises(StoreError, match="broken on purpose"):
                list(items)
            assert sorted(o.take(1, [0, 1, 2])) == [0, 1, 2]

    def test_corrupt_bytes_are_never_delivered(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=3) as o:
            record = o.layout.records[1, 3]
            with open(o.layout.path((1, 3)), "r+b") as file:
                file.seek(record.offset + 100)
                file.write(b"\xff")
            with pytest.raises(CorruptClusterError, match="expert 3"):
                o.take(1, [3])
            assert o.take(1, [2]) == [2]

    def test_the_same_bytes_under_latency(self, backend: Any, tmp_path: Path) -> None:
        """Prefetches from another thread, reads that end in any order, small budgets."""
        draw, stop = random.Random(3), threading.Event()
        with self.open(backend, tmp_path, slots=4, threads=3) as o:
            o.io.delay = lambda: draw.random() * 0.003

            def hints() -> None:
                while not stop.wait(0.0005):
                    o.store.prefetch([(draw.randrange(LAYERS), draw.randrange(EXPERTS))])

            thread = threading.Thread(target=hints)
            thread.start()
            try:
                for _ in range(60):
                    experts = draw.sample(range(EXPERTS), draw.randrange(1, 6))
                    assert sorted(o.take(draw.randrange(LAYERS), experts)) == sorted(experts)
                    o.store.end_token()
            finally:
                stop.set()
                thread.join()

    # The end

    def test_close_leaks_no_thread_and_no_file(self, backend: Any, tmp_path: Path) -> None:
        layout = tiny_layout(tmp_path)
        threads, files = threading.active_count(), descriptors()
        for use in (False, True):
            store = self.open_store(backend, layout, 4 * layout.record_nbytes)
            if use:
                store.prefetch([(1, expert) for expert in range(EXPERTS)])
                assert len(list(store.acquire(0, [0, 1]))) == 2
            store.close()
            store.close()
            assert (threading.active_count(), descriptors()) == (threads, files)
            with pytest.raises(StoreError, match="closed"):
                list(store.acquire(0, [0]))
            assert store.prefetch([(0, 3)]) == 0

    def test_close_with_reads_in_flight(self, backend: Any, tmp_path: Path) -> None:
        with self.open(backend, tmp_path, slots=4) as o:
            o.io.gate.clear()
            o.store.prefetch([(1, 0), (1, 1)])
            items = o.store.acquire(0, [0, 1])
            until(lambda: o.io.begun != [])
            threading.Timer(0.02, o.io.gate.set).start()
            o.store.close()
            assert o.reader.queue_depth() == 0
            with pytest.raises(StoreError, match="closed"):
                list(items)
