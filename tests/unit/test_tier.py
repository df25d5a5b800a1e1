"""The tiers with a scripted reader: reads end when the test says so, in the order it says.

`StoreTests` covers what a store promises with real reads; here is what takes exact control.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.reader import Request
from chronos.common.errors import StoreError
from chronos.common.experts.residency import LRU, Counts
from chronos.common.experts.stats import PRELOAD
from chronos.common.experts.tiers import SlotTier, StagedTier
from chronos.common.layout import Layout
from chronos.common.model.weights import Key
from chronos.testing.store_rig import EXPERTS, LAYERS, tiny_layout


class Read:
    """A submitted request; `end` is what a worker would do."""

    def __init__(self, request: Request) -> None:
        self.request, self.offset, self.buffer = request, request.offset, request.buffer

    @property
    def demand(self) -> bool:
        return self.request.demand

    @property
    def done(self) -> bool:
        return self.request.done

    def end(self, error: Any = None) -> None:
        assert not self.done
        self.buffer[:8] = self.offset.to_bytes(8, "little")
        self.request.done, self.request.error = True, error
        assert self.request.on_done is not None
        self.request.on_done(self.request)


class ScriptedReader:
    """Keeps requests in flight until the test ends them."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.refuse: Exception | None = None

    def submit_many(self, requests: Sequence[Request]) -> None:
        if self.refuse is not None:
            raise self.refuse
        for request in requests:
            busy = [read for read in self.flying() if read.buffer.obj is request.buffer.obj]
            assert request.offset not in [read.offset for read in busy], "read twice at once"
            self.reads.append(Read(request))

    def flying(self) -> list[Read]:
        return [read for read in self.reads if not read.done]

    def promote(self, request: Request) -> None:
        request.demand = True

    def cancel(self, request: Request) -> bool:
        if request.done:
            return False
        self.reads = [read for read in self.reads if read.request is not request]
        return True


class ScriptedTier(SlotTier):
    """When a consumer would wait, `on_wait` makes something happen instead."""

    on_wait: Callable[[], None]

    def _wait(self) -> None:
        self.on_wait()


class Bench:
    """A tier over a scripted reader. When a consumer waits, a demand read ends first."""

    def __init__(self, layout: Layout, slots: int) -> None:
        self.layout, self.reader = layout, ScriptedReader()
        policy = LRU(layout.num_layers, layout.num_experts)
        self.tier = ScriptedTier(layout, slots, self.reader, policy)  # type: ignore[arg-type]
        self.tier.on_wait = lambda: min(self.reader.flying(), key=lambda r: not r.demand).end()

    def take(self, layer: int, experts: Sequence[int], **options: bool) -> list[int]:
        order = []
        for expert, view in self.tier.acquire(layer, experts, **options):
            assert view is None or self.holds(view, (layer, expert))
            order.append(expert if view is not None else -1 - expert)
        return order

    def holds(self, view: memoryview, key: Key) -> bool:
        return int.from_bytes(view[:8], "little") == self.layout.records[key].offset

    def end_all(self) -> None:
        for read in self.reader.flying():
            read.end()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return tiny_layout(tmp_path)


@pytest.fixture
def bench(layout: Layout) -> Bench:
    return Bench(layout, 4)


def test_experts_come_in_the_order_their_reads_end(bench: Bench) -> None:
    items = bench.tier.acquire(0, [1, 2, 3])
    assert [read.demand for read in bench.reader.reads] == [True] * 3
    for index in (2, 0, 1):
        bench.reader.reads[index].end()
        assert next(items)[0] == index + 1
    assert next(items, None) is None


def test_a_policy_thinks_while_reads_are_on_their_way(layout: Layout) -> None:
    """It is told of a layer's needs before victims are chosen, and has time once reads began."""
    policy, bench = Ranking(), Bench(layout, 4)
    bench.tier = ScriptedTier(layout, 4, bench.reader, policy)  # type: ignore[arg-type]
    begun: dict[str, list[int]] = {"observe": [], "reconsider": []}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: begun[name].append(len(bench.reader.reads))

    policy.observe, policy.reconsider = note("observe"), note("reconsider")  # type: ignore[method-assign]
    bench.tier.acquire(0, [1, 2])
    bench.end_all()
    bench.tier.acquire(0, [1, 2])  # nothing to read: it is told all the same
    assert begun == {"observe": [0, 2], "reconsider": [2, 2]}


def test_nothing_that_is_promised_to_one_layer_is_given_to_another(bench: Bench) -> None:
    items = bench.tier.acquire(0, [0, 1])
    bench.end_all()
    assert bench.take(1, range(EXPERTS)) == list(range(EXPERTS))
    assert [expert for expert, view in items if bench.holds(view, (0, expert))] == [0, 1]


def test_open_leases_that_hold_every_slot_are_an_error_not_a_deadlock(bench: Bench) -> None:
    items = bench.tier.acquire(0, [0, 1, 2, 3])
    bench.end_all()
    with pytest.raises(StoreError, match="other open leases"):
        bench.take(1, [0])
    assert [expert for expert, _ in items] == [0, 1, 2, 3]
    assert bench.take(1, [0]) == [0]


def test_a_read_that_cannot_begin_raises_where_the_expert_is_needed(bench: Bench) -> None:
    bench.reader.refuse = StoreError("the reader is closed")
    assert bench.tier.prefetch([(0, 1)]) == [(0, 1)]
    items = bench.tier.acquire(0, [1, 2])
    with pytest.raises(StoreError, match="reader is closed"):
        next(items)
    bench.reader.refuse = None
    assert bench.tier.stats().live_bytes == 0
    assert bench.take(0, [1, 2]) == [1, 2]


def test_two_consumers_of_one_read_share_it(bench: Bench) -> None:
    first, second = bench.tier.acquire(0, [5]), bench.tier.acquire(0, [5])
    assert len(bench.reader.reads) == 1
    bench.reader.reads[0].end(StoreError("gone"))
    for items in (first, second):
        with pytest.raises(StoreError, match="gone"):
            next(items)
    stats = bench.tier.stats()
    assert (stats.misses, stats.late, stats.read_errors, stats.live_bytes) == (1, 1, 1, 0)


def test_an_iterator_left_half_way_gives_its_slots_back(bench: Bench) -> None:
    items = bench.tier.acquire(0, [0, 1, 2, 3])
    bench.end_all()
    next(items)
    del items
    assert bench.take(1, [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_a_prefetch_keeps_what_it_names_and_is_here_already(bench: Bench) -> None:
    bench.take(0, [0, 1, 2, 3])
    bench.tier.prefetch([(0, 0), (1, 7)])
    assert (0, 0) in bench.tier.resident() and (0, 1) not in bench.tier.resident()


def test_what_is_here_and_was_used_can_be_had_without_a_lease_of_its_own(bench: Bench) -> None:
    tier = bench.tier
    assert tier.present(0, [0]) is None  # absent: nothing is read, nothing counted
    assert (tier.stats().routed, bench.reader.reads) == (0, [])
    bench.take(0, [0, 1])
    lease = tier.present(0, [1, 0])
    assert lease is not None and not lease.waits
    assert all(bench.holds(view, (0, expert)) for expert, view in lease)
    tier.prefetch([(1, 2)])
    assert tier.present(0, [0]) is not None  # that other reads are under way is no matter
    bench.end_all()
    assert tier.present(1, [2]) is None  # its first use is counted as what was read ahead
    assert bench.take(1, [2]) == [2] and tier.present(1, [2]) is not None
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.prefetch_hits) == (2 + 1 + 1 + 1, 2, 1)


def test_a_withdrawn_prefetch_is_neither_prefetched_nor_wasted(bench: Bench) -> None:
    bench.tier.prefetch([(1, expert) for expert in range(4)])
    assert bench.take(0, [0]) == [0]
    bench.tier.close()
    stats = bench.tier.stats()
    assert (stats.bytes_prefetched, stats.bytes_wasted) == (0, 0)


def test_everything_here_and_not_everything_used(layout: Layout) -> None:
    bench = Bench(layout, len(layout.records))
    bench.tier.prefetch(list(layout.records))
    bench.end_all()
    for _ in range(3):
        assert bench.take(1, [4, 2]) == [4, 2]
    assert bench.tier.stats().hits == 6
    bench.tier.close()
    assert bench.tier.stats().bytes_wasted == layout.total_bytes - 2 * layout.record_nbytes


def test_experts_of_absent_files_fall_back_or_raise(layout: Layout) -> None:
    bench = Bench(dataclasses.replace(layout, missing=frozenset({(0, 3)})), 4)
    assert bench.tier.prefetch([(0, 3)]) == []
    bench.take(0, [1, 2])
    assert bench.take(0, [1, 3, 2], exact=False) == [1, 2, -4]
    assert bench.reader.flying() == []
    with pytest.raises(StoreError, match="expert 3 in layer 0"):
        bench.take(0, [3])


def test_a_tier_above_gets_slots_pinned_once(bench: Bench) -> None:
    tier = bench.tier
    with tier.lock:
        load = tier.claim((0, 1), demand=False)
        assert load is not None and not load.done and not bench.reader.reads[0].demand
        tier.promote(load)
        assert bench.reader.reads[0].demand
        bench.end_all()
        tier.settle()
        assert load.done and load.error is None and tier.residency.pinned(load.slot)
        for expert in range(2, 5):
            assert tier.claim((0, expert), demand=True) is not None
        assert tier.claim((0, 5), demand=True) is None
        tier.residency.unpin(load.slot)
        later = tier.claim((0, 5), demand=False)
        assert later is not None and tier.cancel(later) and not tier.cancel(load)
        again = tier.claim((0, 1), demand=True)
        assert again is not None and not again.done  # it lost its slot to (0, 5)


def keys(draw: random.Random, count: int) -> list[Key]:
    return [(draw.randrange(LAYERS), draw.randrange(EXPERTS)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_delivers_the_right_bytes(layout: Layout, seed: int) -> None:
    """Two open iterators, hints, and reads that end or fail at random, also between two items."""
    draw = random.Random(seed)
    bench = Bench(layout, 5)
    tier, reader = bench.tier, bench.reader

    def end_one() -> None:
        error = StoreError("at random") if draw.random() < 0.1 else None
        draw.choice(reader.flying()).end(error)

    def consume(layer: int, experts: list[int]) -> Iterator[None]:
        seen = set()
        for expert, view in tier.acquire(layer, experts):
            assert expert not in seen and bench.holds(view, (layer, expert))
            seen.add(expert)
            yield
            assert bench.holds(view, (layer, expert)), "overwritten while held"
        assert seen == set(experts)

    tier.on_wait = end_one
    needs = 0
    for _ in range(60):
        running = []
        for _ in range(2):
            experts = draw.sample(range(EXPERTS), draw.randrange(1, 3))
            needs += len(experts)
            running.append(consume(draw.randrange(LAYERS), experts))
        while running:
            consumer = draw.choice(running)
            try:
                next(consumer)
            except (StopIteration, StoreError):
                running.remove(consumer)
            tier.prefetch(keys(draw, 2))
            if reader.flying() and draw.random() < 0.5:
                end_one()
            stats = tier.stats()
            assert stats.live_bytes <= stats.peak_expert_bytes <= stats.capacity_bytes
        tier.end_token()
    bench.end_all()
    assert tier.stats().routed == needs
    assert tier.stats().live_bytes == len(tier.resident()) * layout.record_nbytes


class DirectCopies:
    """Copies that end at once, and count the slots they went to."""

    def __init__(self, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        self._sources, self._targets = sources, targets
        self.copied: list[int] = []

    def start(self, source: int, target: int, *, demand: bool, after: Sequence[Any]) -> Any:
        self._targets[target][:] = self._sources[source]
        self.copied.append(target)
        return self

    def mark(self) -> Any:
        return self

    wait = mark
    query = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)


def test_a_staged_tier_moves_records_through_one_host_slot(layout: Layout) -> None:
    """Demands overtake the backlog, and what cannot be withdrawn is awaited."""
    host = Bench(layout, 1)
    nbytes = layout.record_nbytes
    rows = [memoryview(bytearray(nbytes)) for _ in range(6)]
    source = [host.tier._bytes_of(0, layout.records[0, 0])]
    copies, policy = DirectCopies(source, rows), LRU(LAYERS, EXPERTS)
    copies.wait = lambda event: None  # type: ignore[method-assign]
    tier = StagedTier(host.tier, 6, copies, policy, lambda slot, _: rows[slot])
    tier.prefetch([(1, expert) for expert in range(4)])
    assert [read.demand for read in host.reader.reads] == [False]
    items = tier.acquire(1, [3, 7])
    order = []
    while host.reader.flying():
        order.append(host.reader.flying()[0].offset)
        host.reader.flying()[0].end()
        with tier.lock:
            tier.settle()  # as the next call of a consumer would
    assert {expert for expert, view in items if host.holds(view, (1, expert))} == {3, 7}
    demanded = {layout.records[1, 3].offset, layout.records[1, 7].offset}
    assert set(order[:2]) == demanded, "a queued prefetch went first"
    stats = tier.stats()
    assert (stats.late, stats.misses) == (1, 1)
    assert stats.bytes_read == len(copies.copied) * nbytes
    tier.close()


class Ranking(Counts):
    """A forecasting policy whose ranks a test sets."""

    name, forecasts = "ranking", True

    def __init__(self) -> None:
        self.priority = np.zeros((LAYERS, EXPERTS))

    def observe(self, layer: int, experts: object, by: object = None) -> None: ...
    def reconsider(self) -> None: ...
    def end_token(self) -> None: ...
    def begin_prompt(self) -> None: ...
    def end_prompt(self, ids_TLK: np.ndarray, seq: int = 0) -> None: ...


def test_a_forecast_ranks_the_warm_tier_too(layout: Layout) -> None:
    """Device slots and host slots: in both, what the forecast ranks lowest goes first."""
    policy, host = Ranking(), Bench(layout, 3)
    host.tier = ScriptedTier(layout, 3, host.reader, policy)  # type: ignore[arg-type]
    rows = [memoryview(bytearray(layout.record_nbytes)) for _ in range(2)]
    sources = [host.tier._bytes_of(slot, layout.records[0, 0]) for slot in range(3)]
    copies = DirectCopies(sources, rows)
    copies.wait = lambda event: None  # type: ignore[method-assign]
    tier = StagedTier(host.tier, 2, copies, policy, lambda slot, _: rows[slot])
    policy.priority[0, [1, 2, 3, 4]] = 1.0, 9.0, 5.0, 7.0
    for expert in (1, 2, 3):
        items = tier.acquire(0, [expert])
        host.end_all()
        assert [got for got, _ in items] == [expert]
    assert tier.resident() == {(0, 2), (0, 3)}
    assert host.tier.resident() == {(0, 1), (0, 2), (0, 3)}
    assert tier.prefetch([(0, 4)]) == [(0, 4)]  # 7 outranks 5 here, 1 in host memory
    host.end_all()
    assert tier.resident() == {(0, 2), (0, 4)}
    assert host.tier.resident() == {(0, 2), (0, 3), (0, 4)}
    assert [got for got, _ in tier.acquire(0, [3])] == [3]
    assert tier.stats().warm_hits == 1
    tier.close()


class Impatient(LRU):
    """A policy that fails when it is asked what to evict."""

    @property
    def priority(self) -> np.ndarray:  # type: ignore[override]
        if self.fails:
            raise ZeroDivisionError("a policy's own fault")
        return self._ranks

    @priority.setter
    def priority(self, ranks: np.ndarray) -> None:
        self._ranks, self.fails = ranks, False


def test_what_a_policy_raises_reaches_the_consumer(layout: Layout) -> None:
    """Readers only say what has landed: policies run on the thread of whoever asks."""
    bench = Bench(layout, 2)
    policy = Impatient(layout.num_layers, layout.num_experts)
    bench.tier.policy = bench.tier.residency.policy = policy
    assert bench.take(0, [1, 2]) == [1, 2]
    policy.fails = True
    with pytest.raises(ZeroDivisionError, match="own fault"):
        bench.take(0, [3])
    policy.fails = False
    assert bench.take(0, [3]) == [3]


def test_a_token_closes_with_a_report_by_source(bench: Bench) -> None:
    tier = bench.tier
    assert tier.prefetch([(0, 1), (0, 2)], "a") == [(0, 1), (0, 2)]
    assert tier.prefetch([(1, 1)], "b") == [(1, 1)]
    bench.end_all()
    assert bench.take(0, [1]) == [1]
    tier.prefetch([(2, 5)], "b")
    assert bench.take(2, [5, 6]) == [5, 6]  # (2, 5) was on its way
    report = tier.end_token()
    assert (report.hits, report.late, report.misses) == (1, 1, 1)
    assert dataclasses.astuple(report.of("a"))[:3] == (2, 1, 0)
    assert dataclasses.astuple(report.of("b"))[:3] == (2, 1, 1)
    assert report.prefetched == 4
    bench.take(0, [2, 3, 4, 5])  # the first was read ahead for an earlier token; (1, 1) goes
    after = tier.end_token()
    assert dataclasses.astuple(after.of("a")) == (0, 1, 0, 0, 0)
    assert (after.of("b").used, after.of("b").wasted) == (0, 1)
    assert tier.stats().bytes_wasted == bench.layout.record_nbytes


def test_loading_what_all_have_room_for_is_no_prefetch(bench: Bench) -> None:
    """Counted when it lands, told apart from forecasts, and never called wasted."""
    tier, size = bench.tier, bench.layout.record_nbytes
    assert tier.prefetch([(0, 1), (0, 2), (1, 3)], PRELOAD) == [(0, 1), (0, 2), (1, 3)]
    assert tier.stats().bytes_loaded == 0
    lease = tier.acquire(0, [1])
    bench.end_all()
    assert [expert for expert, _ in lease] == [1]
    assert bench.take(0, [2]) == [2]
    stats = tier.stats()
    assert (stats.hits, stats.late, stats.misses) == (1, 1, 0)
    assert (stats.bytes_loaded, stats.late_loading) == (3 * size, 1)
    assert stats.bytes_read == stats.bytes_loaded
    assert (stats.prefetch_hits, stats.bytes_prefetched, stats.prefetch_recall) == (0, 0, None)
    tier.close()
    assert tier.stats().bytes_wasted == 0
