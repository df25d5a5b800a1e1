"""Slots that experts are loaded into, and the iterator a layer takes its experts from.

`Tier` is what all tiers share: counting needs, admitting, pinning, waiting, failing. How a record
gets into a slot is for its subclasses (`tiers`). It knows no framework: what it yields for a slot
is whatever `view(slot, record)` made of it.
One lock per stack of tiers guards everything: consumers call from any thread, loads end on the
reader's. Not covered: computing with experts, and the order in which results are combined.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from chronos.common.errors import StoreError
from chronos.common.experts.residency import Policy, Residency
from chronos.common.experts.stats import StoreStats
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record

CANCELLED = StoreError("the prefetch was withdrawn")
View = Callable[[int, "Record"], Any]
Then = Callable[[int, Exception | None], None]  # (slot, error), under the tier's lock


class Load:
    """A record on its way into a slot. `done` once; `error` is then None or why it failed."""

    __slots__ = ("demand", "done", "error", "guest", "key", "record", "request", "slot", "then")

    def __init__(self, key: Key, record: Record, slot: int, demand: bool, guest: bool) -> None:
        self.key, self.record, self.slot, self.demand = key, record, slot, demand
        self.guest = guest  # asked for by prefetch()
        self.done = False
        self.error: Exception | None = None
        self.request: Any = None  # the reader's, where there is one
        self.then: list[Then] = []


class Lease:
    """What `Tier.acquire` returns: yields (expert, view) as they become ready, each once.

    Experts not yielded yet are pinned, the one yielded last too, until the next is asked for or
    the lease is closed. A lease dropped half-way is closed by the tier's next call.
    """

    __slots__ = ("_held", "_tier", "layer", "loads", "queued", "ready")

    def __init__(self, tier: Tier, layer: int) -> None:
        self._tier, self.layer = tier, layer
        self.ready: deque[tuple[int, int]] = deque()  # (expert, slot), slot -1 for a fallback
        self.loads: dict[int, Load] = {}
        self.queued: deque[int] = deque()  # experts that found no slot yet
        self._held = -1

    def __iter__(self) -> Lease:
        return self

    def __next__(self) -> tuple[int, Any]:
        tier = self._tier
        with tier.lock:
            if self._held >= 0:
                tier.residency.unpin(self._held)
                self._held = -1
            if self.queued or (self.loads and not self.ready):
                tier.advance(self)
            if not self.ready:
                raise StopIteration
            expert, slot = self.ready.popleft()
            self._held = slot
            return expert, tier.taken(slot)

    def close(self) -> None:
        """Give every pin back. Reads under way go on."""
        with self._tier.lock:
            slots = [self._held, *(slot for _, slot in self.ready)]
            # a failed load has dropped the pins on its slot
            slots += [load.slot for load in self.loads.values() if load.error is None]
            for slot in slots:
                if slot >= 0:
                    self._tier.residency.unpin(slot)
            self._held = -1
            self.ready.clear()
            self.loads.clear()
            self.queued.clear()

    def __del__(self) -> None:
        # May run anywhere, even inside the tier's own bookkeeping: only leave a note.
        if self._held >= 0 or self.ready or self.loads:
            self._tier.dropped.append(self)


class Tier(ABC):
    """A fixed number of slots over a layout. Subclasses say how a record gets into a slot."""

    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        layout: Layout,
        slots: int,
        policy: Policy,
        view: View,
        lock: threading.RLock | None = None,
    ) -> None:
        self.layout, self.policy = layout, policy
        self.residency = Residency(layout.num_layers, layout.num_experts, slots, policy)
        self._records = {k: r for k, r in layout.records.items() if k not in layout.missing}
        self.counters = StoreStats(capacity_bytes=slots * layout.record_nbytes)
        self.lock = lock or threading.RLock()
        self.dropped: deque[Lease] = deque()
        self.closed = False
        self._changed = threading.Condition(self.lock)
        self._loads: dict[Key, Load] = {}
        self._admitted: list[Load] = []  # in _loads, not begun yet
        self._view = view
        self._views: list[Any] = [None] * slots
        self._shapes: list[Any] = [None] * slots  # the record geometry a cached view was made for
        self._events: dict[int, Any] = {}  # slots whose copy nobody has waited for (see StagedTier)
        self._complete: dict[Key, Any] | None = None  # all views, once nothing can be missing

    # What consumers call.

    def acquire(
        self, layer: int, experts: Sequence[int], *, exact: bool = True
    ) -> Iterator[tuple[int, Any]]:
        """Count the needs, start the missing reads now and return a Lease on the experts.

        With more experts than slots the rest are read as slots come free. exact=False yields None
        for what is not ready and lets its read go on. A read that fails raises from the iterator
        and leaves the tier usable. Raises StoreError for an expert the layout does not have.
        """
        wanted = dict.fromkeys(experts)
        with self.lock:
            if self._complete is not None:
                return self._from_complete(layer, wanted)
            self._check_open()
            self._close_dropped()
            ready, events, lease = self.residency.ready, self._events, Lease(self, layer)
            unused = self.residency.unused
            absent: list[int] = []
            late = 0
            for expert in wanted:
                slot = ready.get((layer, expert))
                if slot is None:
                    absent.append(expert)
                    continue
                late += slot in events and not self._copied(slot)
                if slot in unused:
                    self.counters.prefetch_hits += 1
                self.residency.pin(slot)
                lease.ready.append((expert, slot))
            self.counters.late += late
            self.counters.hits += len(wanted) - len(absent) - late
            if absent:
                self._check_known(lease, absent, exact)
            self.policy.observe(layer, wanted)
            try:
                if absent:
                    self._seek(lease, absent, exact)
                elif len(ready) == len(self.layout.records):
                    self._try_complete()
            finally:
                self.policy.reconsider()
            return lease

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Ask for records, best first; those already here are kept a while. Returns new bytes."""
        asked = 0
        with self.lock:
            if self.closed or self._complete is not None:
                return 0
            self._close_dropped()
            for key in keys:
                slot = self.residency.lookup(key)
                if slot is not None:
                    self.residency.protect(slot)
                elif key in self._records:
                    load = self._admit(key, demand=False, guest=True)
                    if load is None:
                        break
                    asked += load.record.nbytes
            self.counters.bytes_prefetched += asked
            self._begin_all()
        return asked

    def end_token(self) -> None:
        with self.lock:
            self.counters.tokens += 1
            if self._complete is None:
                self.policy.end_token()
                self.residency.end_token()

    def begin_prompt(self) -> None:
        """What is acquired from now on, chunks of a prompt need."""
        with self.lock:
            self.policy.begin_prompt()

    def end_prompt(self, ids_TLK: NDArray[Any]) -> None:
        """Decode begins, after tokens that were routed like this."""
        with self.lock:
            self.policy.end_prompt(ids_TLK)

    def resident(self) -> frozenset[Key]:
        with self.lock:
            return frozenset(self.residency.ready)

    def held(self) -> frozenset[Key]:
        """What needs no read, in this tier or in one behind it."""
        return self.resident()

    def stats(self) -> StoreStats:
        """A copy of the counters, with the gauges as they are now."""
        with self.lock:
            nbytes = self.layout.record_nbytes
            live, peak = self.residency.live * nbytes, self.residency.peak * nbytes
            return dataclasses.replace(self.counters, live_bytes=live, peak_expert_bytes=peak)

    def close(self) -> None:
        """Withdraw what is queued and wait for the reads that run: they write into our memory."""
        with self.lock:
            if self.closed:
                return
            self.closed, self._complete = True, None
            for load in list(self._loads.values()):
                if self._cancel(load):
                    self._finish(load, CANCELLED)
            while self._loads:
                self._changed.wait()
            for key in map(self.residency.key, self.residency.unused):
                assert key is not None
                self.counters.bytes_wasted += self._records[key].nbytes
            self._changed.notify_all()

    # What a lease calls, under the lock.

    def advance(self, lease: Lease) -> None:
        """Start what found no slot before; unless something is ready, wait until something is."""
        while True:
            self._check_open()
            while lease.queued and self._claim(lease, lease.queued[0]):
                lease.queued.popleft()
            self._begin_all()
            if not lease.ready:
                self._collect(lease)
            if lease.ready or not (lease.loads or lease.queued):
                return
            if not self._loads:
                lease.close()
                raise StoreError(
                    "no slot for an expert: other open iterators hold all of them",
                    f"{self.residency.slots} slots",
                    "use up or close an iterator before the next acquire, or raise the budget",
                )
            start = self.clock()
            self._wait()
            self.counters.stall_s += self.clock() - start

    def taken(self, slot: int) -> Any:
        """What to yield for a slot of a lease (-1: nothing)."""
        return self._views[slot] if slot >= 0 else None

    # How a record gets into a slot: for subclasses, under the lock.

    @abstractmethod
    def _begin(self, loads: Sequence[Load]) -> None:
        """Start filling the slots of `loads`, all or none; `_finish` is called as each ends."""

    @abstractmethod
    def _cancel(self, load: Load) -> bool:
        """Withdraw a load that has not begun, or return False. The caller calls `_finish`."""

    @abstractmethod
    def _urge(self, load: Load) -> None:
        """A prefetch is needed now."""

    @abstractmethod
    def _reused(self, slot: int) -> None:
        """A slot is about to be overwritten that consumers may still be computing with."""

    @abstractmethod
    def _copied(self, slot: int) -> bool:
        """Whether the copy behind `_events[slot]` is finished."""

    def _wait(self) -> None:
        """Wait until some load has made progress."""
        self._changed.wait()

    # The rest is shared.

    def _try_complete(self) -> None:
        """All records are here, and nothing will ever be evicted: look no further than a table."""
        if all(self._copied(slot) for slot in list(self._events)):
            self._complete = {k: self._views[slot] for k, slot in self.residency.ready.items()}

    def _from_complete(self, layer: int, wanted: dict[int, None]) -> Iterator[tuple[int, Any]]:
        assert self._complete is not None
        views = self._complete
        try:
            experts = [(expert, views[layer, expert]) for expert in wanted]
        except KeyError as error:
            raise self._unknown(error.args[0]) from None
        self.counters.hits += len(experts)
        if self.residency.unused:
            for expert in wanted:
                self.residency.touch(self.residency.ready[layer, expert])
        return (item for item in experts)

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError("the expert store is closed")

    def _check_known(self, lease: Lease, experts: list[int], exact: bool) -> None:
        for key in [(lease.layer, expert) for expert in experts]:
            if key not in self._records and (exact or key not in self.layout.missing):
                lease.close()
                raise self._unknown(key)

    def _unknown(self, key: Key) -> StoreError:
        return StoreError(f"there is no expert {key[1]} in layer {key[0]}", str(self.layout.folder))

    def _close_dropped(self) -> None:
        while self.dropped:
            self.dropped.popleft().close()

    def _seek(self, lease: Lease, absent: list[int], exact: bool) -> None:
        """Count and start what is not ready; late ones first, lest a miss takes their slots."""
        layer, loads = lease.layer, self._loads
        late = [expert for expert in absent if (layer, expert) in loads]
        missed = [expert for expert in absent if (layer, expert) not in loads]
        self.counters.late += len(late)
        self.counters.bytes_late += sum(self._records[layer, expert].nbytes for expert in late)
        self.counters.misses += len(missed)
        if exact:
            lease.queued.extend(e for e in late + missed if not self._claim(lease, e))
        else:
            self.counters.fallbacks += len(absent)
            lease.ready.extend((expert, -1) for expert in absent)
            for key in [(layer, expert) for expert in missed]:
                if key in self._records:
                    self._admit(key, demand=False)
        self._begin_all()

    def _claim(self, lease: Lease, expert: int) -> bool:
        """Pin the expert's slot for the lease, claiming one if need be. False: no slot is free."""
        key = (lease.layer, expert)
        slot = self.residency.ready.get(key)
        if slot is not None:  # landed for someone else since it was counted
            self.residency.pin(slot)
            lease.ready.append((expert, slot))
            return True
        load = self._loads.get(key)
        if load is None:
            load = self._admit(key, demand=True)
            if load is None:
                return False
        elif not load.demand:
            self._urge(load)
        self.residency.pin(load.slot)
        lease.loads[expert] = load
        return True

    def _admit(self, key: Key, *, demand: bool, guest: bool = False) -> Load | None:
        """Claim a slot; None if there is none to be had. `_begin_all` starts filling it.

        demand: someone waits for it. guest: it must not displace what is worth more.
        """
        admission = self.residency.admit(key, demand=not guest)
        while admission is None and demand and self._reclaim():
            admission = self.residency.admit(key, demand=True)
        if admission is None:
            return None
        slot, record = admission.slot, self._records[key]
        if admission.evicted is not None:
            self._reused(slot)
            if admission.wasted:
                self.counters.bytes_wasted += self._records[admission.evicted].nbytes
        load = self._loads[key] = Load(key, record, slot, demand, guest)
        self._admitted.append(load)
        return load

    def _begin_all(self) -> None:
        """Begin what was admitted. Only now: the first read begun wakes a thread, and from then on
        bookkeeping shares the interpreter with it and takes twice as long."""
        while self._admitted:
            admitted, self._admitted = self._admitted, []  # what ends at once may admit more
            loads = [load for load in admitted if self._make_view(load)]
            try:
                self._begin(loads)
            except Exception as error:
                for load in loads:
                    self._finish(load, error)

    def _make_view(self, load: Load) -> bool:
        slot, record = load.slot, load.record
        try:
            shape = record.encoding, record.tensors
            if self._shapes[slot] != shape:
                self._views[slot] = self._view(slot, record)
                self._shapes[slot] = shape
        except Exception as error:
            self._finish(load, error)
            return False
        return True

    def _reclaim(self) -> bool:
        """Withdraw the prefetch asked for last that has not begun: a demand needs its slot."""
        for load in reversed(self._loads.values()):
            if not load.demand and self._cancel(load):
                self._finish(load, CANCELLED)
                return True
        return False

    def _finish(self, load: Load, error: Exception | None) -> None:
        if load.done:
            return
        load.done, load.error = True, error
        del self._loads[load.key]
        if error is None:
            self.residency.mark_ready(load.slot)
        else:
            if error is CANCELLED and load.guest:
                self.counters.bytes_prefetched -= load.record.nbytes
            self.residency.mark_failed(load.slot)
        for then in load.then:
            then(load.slot, error)
        self._changed.notify_all()

    def _collect(self, lease: Lease) -> None:
        """Move what has landed from `loads` to `ready`; raise the first failure."""
        for expert, load in [item for item in lease.loads.items() if item[1].done]:
            if load.error is not None:
                lease.close()
                raise load.error
            del lease.loads[expert]
            lease.ready.append((expert, load.slot))
