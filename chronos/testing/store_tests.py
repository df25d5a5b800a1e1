"""StoreTests: what every backend's expert store must do. Subclass it with a `backend` fixture.

`backend` needs `open_arena(layout, slots, options)`. Here is what a
store delivers, keeps, reads ahead and counts; that it survives failures is inherited
(`store_faults`), and both stand on `store_rig`.
Not covered: speed, and how bytes reach an accelerator.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import BudgetError, StoreError
from chronos.testing.store_faults import StoreFaultTests
from chronos.testing.store_rig import EXPERTS, LAYERS, Ranking, check, tiny_layout, until


class StoreTests(StoreFaultTests):
    """All that is asked of a store; `open` and `open_store` may be overridden."""

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
