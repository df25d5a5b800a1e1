"""The torch store with an accelerator: slots on the device, page-locked slots in host memory.

Everything but the copies themselves runs on a CPU, through a FakeCopyEngine whose copies and
computation are late and out of step with the host. The tests marked `cuda` repeat it on a GPU.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chronos.backends.torch.arena import Arena, CudaCopies
from chronos.common.disk.reader import RangedReader
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, FeedOptions
from chronos.common.experts.known import KnownAhead
from chronos.common.layout import Layout
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import Key
from chronos.common.text.sampling import SamplingParams, Work
from chronos.testing.copies import FakeCopyEngine, FakeEvent
from chronos.testing.store_rig import (
    EXPERTS,
    LAYERS,
    Driver,
    Opened,
    check,
    expected,
    feed_over,
    tiny_layout,
)
from chronos.testing.store_tests import StoreTests

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")


class Waiting(Driver):
    """A feed whose consumer waits for the device at every expert, to look at it from the host."""

    synchronize: Callable[[], None]

    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        return WaitingItems(super().acquire(layer, experts), self.synchronize)


class WaitingItems:
    def __init__(self, items: Any, wait: Callable[[], None]) -> None:
        self._items, self._wait = items, wait
        self.close = items.close

    def __iter__(self) -> WaitingItems:
        return self

    def __next__(self) -> tuple[int, Any]:
        expert, weights = next(self._items)
        self._wait()
        return expert, weights and tuple(tensor.cpu() for tensor in weights)


class FakeCuda:
    """Stands for the torch backend with a device of its own; `warm` is in experts."""

    def __init__(self, engine: FakeCopyEngine, warm: int, waiting: bool = True) -> None:
        self.engine, self.warm = engine, warm
        self.driver = self._waiting if waiting else Driver

    def open_arena(self, layout: Layout, slots: int, options: FeedOptions) -> Arena:
        warm = dataclasses.replace(options, warm_bytes=self.warm * layout.record_nbytes)
        return Arena(layout, slots, warm, self.engine.over)

    def _waiting(self, feed: Feed) -> Waiting:
        driver = Waiting(feed)
        driver.synchronize = self.engine.synchronize
        driver.drain = self.engine.drain  # type: ignore[method-assign]
        return driver


class TestStagedStore(StoreTests):
    """All of the conformance suite with copies in between."""

    @pytest.fixture(params=[(24, 0.0), (8, 0.001)], ids=["warm tier", "staging area"])
    def backend(self, request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
        warm, latency_s = request.param
        engine = FakeCopyEngine(latency_s)
        yield FakeCuda(engine, warm)
        engine.close()


@dataclass
class Device(Opened):
    """A store and the fake accelerator it copies to."""

    engine: FakeCopyEngine

    def queue(self, layer: int, experts: Sequence[int], seconds: float = 0.0) -> None:
        """Acquire, and queue a check of every expert for when the device gets there."""
        for expert, weights in self.store.acquire(layer, experts):
            assert weights is not None
            self.engine.compute(partial(self._kernel, (layer, expert), weights, seconds))

    def verify(self) -> None:
        self.engine.synchronize()
        assert self.engine.failures == []

    def _kernel(self, key: Key, weights: Any, seconds: float) -> None:
        time.sleep(seconds)
        check(key, weights)


@contextmanager
def open_device(
    folder: Path, slots: int, warm: int, engine: FakeCopyEngine | None = None
) -> Iterator[Device]:
    engine = engine or FakeCopyEngine()
    with closing(engine), StoreTests().open(FakeCuda(engine, warm, False), folder, slots) as o:
        try:
            yield Device(o.store, o.layout, o.io, o.reader, engine)
        finally:
            engine.gate.set()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """Four device slots; all experts fit into the warm tier."""
    with open_device(tmp_path, slots=4, warm=LAYERS * EXPERTS) as device:
        yield device


def hammer(device: Device, steps: int = 60) -> None:
    """The host runs ahead of slow computation, evicting what is still to be computed with."""
    draw = random.Random(5)
    for _ in range(steps):
        device.store.prefetch([(draw.randrange(LAYERS), draw.randrange(EXPERTS)) for _ in "12"])
        device.queue(draw.randrange(LAYERS), draw.sample(range(EXPERTS), 3), 0.0005)
        device.store.end_token()
    device.verify()


@pytest.mark.parametrize("warm", [1, 3, 24])
def test_slots_are_reused_only_after_the_computation_that_used_them(
    tmp_path: Path, warm: int
) -> None:
    with open_device(tmp_path, 4, warm, FakeCopyEngine(0.0002)) as device:
        hammer(device)
        stats = device.store.stats()
        assert stats.routed == 180
        assert stats.peak_expert_bytes <= 4 * device.layout.record_nbytes
        assert device.engine.copies >= device.engine.demand_copies > 0


class ForgetsComputation(FakeCopyEngine):
    def mark(self) -> FakeEvent:
        event = FakeEvent()
        event.set()
        return event


class ForgetsCopies(FakeCopyEngine):
    def wait(self, event: FakeEvent) -> None:
        pass


@pytest.mark.parametrize(
    ("engine", "copying_s", "computing_s"),
    [(ForgetsComputation, 0.0, 0.002), (ForgetsCopies, 0.005, 0.0)],
)
def test_that_test_notices_a_missing_fence(
    tmp_path: Path, engine: type[FakeCopyEngine], copying_s: float, computing_s: float
) -> None:
    with open_device(tmp_path, 4, 24, engine(copying_s)) as device:
        for layer in range(LAYERS):
            device.queue(layer, range(EXPERTS), computing_s)
        with pytest.raises(AssertionError):
            device.verify()


def test_the_host_does_not_wait_for_copies(device: Device) -> None:
    for layer in range(LAYERS):
        device.queue(layer, range(EXPERTS))  # all in the warm tier now
    device.verify()
    device.engine.gate.clear()
    stall = device.store.stats().stall_s
    for layer in range(LAYERS):
        device.queue(layer, range(EXPERTS))  # four slots, twenty-four copies queued
    assert device.store.stats().stall_s == stall
    device.engine.gate.set()
    device.verify()


def test_a_copy_under_way_is_late_and_a_finished_one_a_hit(device: Device) -> None:
    device.engine.gate.clear()
    device.store.prefetch([(0, 1), (0, 2)])
    device.settle()
    device.queue(0, [1])
    device.engine.gate.set()
    device.engine.drain()
    device.queue(0, [1, 2])
    stats = device.store.stats()
    assert (stats.late, stats.hits, stats.misses, stats.bytes_wasted) == (1, 2, 0, 0)


def test_warm_hits_are_misses_without_a_read(device: Device) -> None:
    for _ in range(2):
        for layer in range(LAYERS):
            device.queue(layer, range(EXPERTS))
    device.verify()
    stats = device.store.stats()
    assert stats.bytes_read == device.layout.total_bytes == device.reader.stats.bytes_read
    assert stats.misses - stats.warm_hits == LAYERS * EXPERTS
    assert stats.warm_hits > 0
    assert stats.bytes_copied == device.layout.record_nbytes * stats.misses


def test_the_warm_tier_is_counted(tmp_path: Path) -> None:
    layout = tiny_layout(tmp_path)
    room = {"warm_bytes": layout.total_bytes, "top_k": 2}
    with closing(FakeCopyEngine()) as engine:
        backend = FakeCuda(engine, LAYERS * EXPERTS)
        with feed_over(backend, layout, layout.total_bytes // 2, **room) as feed:
            assert feed.stats().warm_capacity_bytes == layout.total_bytes


def test_what_host_memory_holds_needs_no_read(tmp_path: Path) -> None:
    with open_device(tmp_path, slots=4, warm=6) as device:
        device.queue(1, range(EXPERTS))
        device.verify()
        resident, held = device.store.resident(), device.store.feed.held()
        assert len(resident) == 4 and len(held) >= 6 and resident < held
        before = device.store.stats()
        for layer, expert in held - resident:
            device.queue(layer, [expert])
        device.verify()
        after = device.store.stats()
        assert after.bytes_copied > before.bytes_copied
        assert after.bytes_read == before.bytes_read


def test_the_rate_of_copies_is_measured_where_there_are_some(device: Device) -> None:
    device.queue(0, [1, 2])
    copies = device.engine.copies
    assert device.store.feed.copy_rate() > 0
    assert device.engine.copies > copies
    device.queue(0, [1, 2, 3])  # nothing was overwritten
    device.verify()
    on_cpu = Arena(device.layout, LAYERS * EXPERTS, FeedOptions())
    assert on_cpu.copy_rate() is None


def test_an_evicted_prefetch_may_still_be_on_its_way(tmp_path: Path) -> None:
    with open_device(tmp_path, 1, 8) as device:
        device.engine.gate.clear()
        device.store.prefetch([(0, 1)])
        device.settle()
        device.queue(1, [2])  # its only slot, while the first copy waits
        device.engine.gate.set()
        device.verify()
        assert device.store.stats().bytes_wasted == device.layout.record_nbytes


def test_a_prefetch_goes_on_as_staging_slots_come_free(tmp_path: Path) -> None:
    with open_device(tmp_path, 8, 1) as device:
        keys = [(1, expert) for expert in range(6)]
        assert device.store.prefetch(keys) == 6 * device.layout.record_nbytes
        device.settle()
        device.queue(1, range(6))
        device.verify()
        stats = device.store.stats()
        assert (stats.hits + stats.late, stats.misses) == (6, 0)
        assert stats.bytes_read == stats.bytes_prefetched


def test_a_copy_that_cannot_start_raises_and_is_forgotten(device: Device) -> None:
    def refuse(*args: Any, **options: Any) -> FakeEvent:
        raise RuntimeError("no memory for the copy")

    copy, device.engine.copy = device.engine.copy, refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no memory"):
        device.queue(0, [1, 2])
    device.settle()
    device.engine.copy = copy  # type: ignore[method-assign]
    device.queue(0, [1, 2, 3, 4, 5])
    device.verify()


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    layout, threads = tiny_layout(tmp_path), threading.active_count()
    with pytest.raises(UsageError, match="warm tier"):
        Arena(layout, LAYERS * EXPERTS, FeedOptions(warm_bytes=layout.total_bytes))
    with pytest.raises(UsageError, match="miss"):
        FeedOptions(miss="drop")
    assert threading.active_count() == threads


# On a GPU


class Cuda:
    def open_arena(self, layout: Layout, slots: int, options: FeedOptions) -> Arena:
        return Arena(layout, slots, dataclasses.replace(options, device="cuda"))

    def driver(self, feed: Feed) -> Waiting:
        driver = Waiting(feed)
        driver.synchronize = torch.cuda.synchronize
        driver.drain = torch.cuda.synchronize  # type: ignore[method-assign]
        return driver


@pytest.mark.cuda
@needs_cuda
class TestCudaStore(StoreTests):
    @pytest.fixture
    def backend(self) -> Cuda:
        return Cuda()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20])
def test_the_device_computes_with_the_right_bytes(tmp_path: Path, chunk_bytes: int) -> None:
    """Queued sums of every expert while slots are overwritten behind them; one wait at the end."""
    layout, draw = tiny_layout(tmp_path), random.Random(6)
    options = FeedOptions(device="cuda")
    arena = Arena(layout, 3, options, partial(CudaCopies, chunk_bytes=chunk_bytes))
    busy, sums = torch.randn(2048, 2048, device="cuda"), []
    feed = Feed(layout, 3 * layout.record_nbytes, arena, RangedReader(), options)
    with closing(Driver(feed)) as store:
        for _ in range(200):
            layer = draw.randrange(LAYERS)
            store.prefetch([(draw.randrange(LAYERS), draw.randrange(EXPERTS))])
            for expert, weights in store.acquire(layer, draw.sample(range(EXPERTS), 3)):
                busy = busy @ busy * 1e-3
                assert weights is not None
                sums.append(((layer, expert), [tensor.double().sum() for tensor in weights]))
        torch.cuda.synchronize()
    for key, have in sums:
        assert [float(s) for s in have] == [float(w.astype("f8").sum()) for w in expected(key)]


def test_a_small_host_tier_behind_what_always_stays(tmp_path: Path) -> None:
    """Three slots of host memory, and nine experts that never leave the device: nothing blocks."""
    config = ModelConfig(
        num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=3,
        routing_source="history", num_resident_experts=3, num_resident_experts_per_tok=1,
    )  # fmt: skip
    policy, engine, layout = KnownAhead(config), FakeCopyEngine(), tiny_layout(tmp_path)
    work = [Work(0, [1], SamplingParams())]
    capacity = policy.least * layout.record_nbytes
    with (
        closing(engine),
        feed_over(
            FakeCuda(engine, warm=3), layout, capacity, policy=policy, prefetch=True, top_k=3
        ) as feed,
    ):
        for turn in range(4):
            with feed.step(work) as step:
                for layer in range(LAYERS):
                    step.announce(layer, [4 + turn % 2, 6 + turn % 2])
                    now = [4 + (turn + 1) % 2, 6 + (turn + 1) % 2]
                    for expert, weights in step.acquire(layer, [0, *now]):
                        engine.compute(partial(check, (layer, expert), weights))
                engine.synchronize()
                step.done(work[0])
        assert not engine.failures
        stats = feed.stats()
        assert stats.announced == 3 * 2 * LAYERS and stats.unannounced == 0
        assert {(layer, 0) for layer in range(LAYERS)} <= feed.resident()
