"""The part of StoreTests where something breaks: reads that fail, bytes that are wrong, the end.

A failed read leaves the store usable, wrong bytes are never delivered, and a store closed at any
moment leaves no thread and no file behind.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from chronos.common.errors import CorruptClusterError, StoreError
from chronos.testing.store_rig import EXPERTS, LAYERS, StoreRig, descriptors, tiny_layout, until


class StoreFaultTests(StoreRig):
    """Inherited by `StoreTests`, which is what a backend subclasses."""

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
