"""What tests of expert stores stand on: a layout of tiny experts, and reads that a test commands.

Reads go through a `GatedIO`, which holds them back, fails them or delays them, so "in flight" is a
state a test sets up and not a matter of timing. Experts are float32 and differ in every value.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from chronos.common.disk.io import ALIGN, FileIO
from chronos.common.disk.reader import RangedReader
from chronos.common.experts.feed import Feed, FeedOptions, open_feed
from chronos.common.experts.lease import Lease
from chronos.common.experts.residency import Counts, Policy
from chronos.common.experts.stats import StoreStats, TokenReport
from chronos.common.layout.folder import Layout
from chronos.common.layout.manifest import TENSOR_ALIGN, Manifest, Record, RecordTensor
from chronos.common.model.weights import EXPERT_TENSORS, Key

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


class Ranking(Counts):
    """A forecasting policy whose ranks a test sets; `told` is what it was told."""

    name, forecasts = "ranking", True

    def __init__(self) -> None:
        self.priority = np.zeros((LAYERS, EXPERTS))
        self.told: list[Any] = []

    def observe(self, layer: int, experts: object, by: object = None) -> None:
        self.told.append(layer)

    def end_token(self) -> None:
        self.told.append("token")

    def begin_prompt(self) -> None:
        self.told.append("begin")

    def end_prompt(self, ids_TLK: np.ndarray, seq: int = 0) -> None:
        self.told.append("end")


class Driver:
    """A feed that a test drives by hand: needs of layers, ends of tokens and prompts, hints."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self._step = feed, feed.step()

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        return self._step.acquire(layer, experts)

    def record_fallback(self, weight: float) -> None:
        self._step.record_fallback(weight)

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Bytes newly asked for."""
        asked = self.feed.tier.prefetch(keys, "test")
        return sum(self.feed.layout.records[key].nbytes for key in asked)

    def end_token(self) -> TokenReport:
        return self.feed.tier.end_token()

    def begin_prompt(self) -> None:
        self.feed.tier.begin_prompt()

    def end_prompt(self, ids_TLK: np.ndarray, seq: int = 0) -> None:
        self.feed.tier.end_prompt(ids_TLK)

    def idle(self) -> bool:
        """Whether no load is under way, after a look at what has landed."""
        with self.feed.tier.lock:
            self.feed.tier.settle()
            return not self.feed.tier.loading

    def drain(self) -> None:
        """Wait for the copies that were started, where there are any."""

    def resident(self) -> frozenset[Key]:
        return self.feed.resident()

    def stats(self) -> StoreStats:
        return self.feed.stats()

    def close(self) -> None:
        self.feed.close()


def feed_over(
    backend: Any,
    layout: Layout,
    capacity_bytes: int,
    *,
    policy: Policy | None = None,
    prefetch: bool = False,
    reader: RangedReader | None = None,
    **options: Any,
) -> Feed:
    """A feed over a backend's arena. options: fields of `FeedOptions`."""
    return open_feed(
        backend.open_arena,
        layout,
        capacity_bytes,
        FeedOptions(**options),
        policy=policy,
        prefetch=prefetch,
        reader=reader,
    )


@dataclass
class Opened:
    """A feed under test, driven by hand, and what surrounds it."""

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
        """Wait until no load is under way, and no copy where the feed under test has copies."""
        until(lambda: self.reader.queue_depth() == 0 and self.store.idle())
        self.store.drain()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must become true."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def check(key: Key, weights: Any) -> None:
    assert weights is not None, f"{key} was not delivered"
    weights = getattr(weights, "expert", weights)  # what says where an expert is has it too
    for have, want in zip(weights, expected(key), strict=True):
        np.testing.assert_array_equal(np.asarray(have), want, err_msg=f"bytes of {key}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


class StoreRig:
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
        """A `Driver`, or what stands for one."""
        driver = getattr(backend, "driver", Driver)
        return driver(feed_over(backend, layout, capacity, **options))
