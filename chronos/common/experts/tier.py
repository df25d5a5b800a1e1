"""Slots that experts are loaded into.

`Tier` is what all tiers share: counting needs, admitting, pinning, waiting, failing. How a record
gets into a slot is for its subclasses (`tiers`). It knows no framework: what it yields for a slot
is whatever `view(slot, record)` made of it.
A load goes reading -> landed -> (copying ->) ready, or it fails. Reader threads only append what
landed and wake who waits; all else happens under one lock, on the thread of whoever calls: policies
run there, and what they raise is raised there. Not covered: computing with experts, and the order
in which results are combined.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chronos.common.errors import StoreError
from chronos.common.experts.lease import HeldLease, Lease, Load, SlotLease
from chronos.common.experts.residency import NOBODY, Policy, Residency
from chronos.common.experts.stats import LayerStats, Ledger, StoreStats, TokenReport
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record

CANCELLED = StoreError("the prefetch was cancelled")
View = Callable[[int, "Record"], Any]
_DEMAND = ""  # who asked for a load that nobody asked for ahead of need


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
        self.ledger = Ledger(slots * layout.record_nbytes)
        self.lock = lock or threading.RLock()
        self.dropped: deque[SlotLease] = deque()
        self.closed = False
        self._loads: dict[Key, Load] = {}
        self._admitted: list[Load] = []  # in _loads, not begun yet
        self._view = view
        self._views: list[Any] = [None] * slots
        self._shapes: list[Any] = [None] * slots  # the record geometry a cached view was made for
        self._events: dict[int, Any] = {}  # slots whose copy nobody has waited for (see StagedTier)
        self._complete: dict[Key, Any] | None = None  # all views, once nothing can be missing
        self.stays: frozenset[Key] = frozenset()  # what the policy never lets go
        self._fixed: dict[Key, Any] = {}  # the views of those that are here

    # What consumers call.

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        by: Mapping[int, Collection[int]] = NOBODY,
        *,
        exact: bool = True,
    ) -> Lease:
        """Count the needs, start the missing reads now and return a lease on the experts. by: what
        each of several sequences needs of them.

        With more experts than slots the rest are read as slots come free. exact=False yields None
        for what is not ready and lets its read go on. A read that fails raises from the lease and
        leaves the tier usable. Raises StoreError for an expert the layout does not have.
        """
        wanted = dict.fromkeys(experts)
        with self.lock:
            if self._complete is not None:
                return self._from_complete(layer, wanted)
            self._check_open()
            self.settle()
            lease = SlotLease(self, layer)
            try:
                self._fill(lease, wanted, by, exact)
            except BaseException:
                lease.close()  # now: whoever keeps the error would keep its pins
                raise
            return lease

    def present(self, layer: int, experts: Sequence[int]) -> HeldLease | None:
        """A lease without pins on experts that are all here and were used before: valid until
        something is asked for or read ahead, which the caller sees to. None where one is not."""
        found = []
        with self.lock:
            if self.closed or self._complete is not None:
                return None
            if self._loads or self.dropped:
                self.settle()
            fixed, ready, asked_by = self._fixed, self.residency.ready, self.ledger.asked_by
            for expert in dict.fromkeys(experts):
                view = fixed.get((layer, expert))
                if view is None:
                    slot = ready.get((layer, expert))
                    if slot is None or slot in asked_by or slot in self._events:
                        return None
                    view = self._views[slot]
                found.append((expert, view))
            self.ledger.needs(layer, len(found), 0)
            self.policy.observe(layer, experts)
            self.residency.reconsider()
        return HeldLease(found)

    def prefetch(self, keys: Sequence[Key], asked_by: str = "ahead") -> list[Key]:
        """Ask for records ahead of need, best first; those already here are kept a while.

        asked_by: who is told in the token's report what came of them. Returns the keys now read.
        """
        asked: list[Key] = []
        with self.lock:
            if self.closed or self._complete is not None:
                return asked
            self.settle()
            self.residency.reconsider()
            for key in keys:
                slot = self.residency.lookup(key)
                if slot is not None:
                    self.residency.protect(slot)
                elif key in self._records:
                    load = self._admit(key, demand=False, asked_by=asked_by)
                    if load is None:
                        break
                    asked.append(key)
            self.ledger.token.of(asked_by).asked += len(asked)
            self._begin_all()
        return asked

    def ready(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts that need no wait now."""
        with self.lock:
            if self._complete is None:
                self.settle()
            slots = [(expert, self.residency.ready.get((layer, expert))) for expert in experts]
            return [
                expert
                for expert, slot in slots
                if slot is not None and (slot not in self._events or self._copied(slot))
            ]

    def end_token(self) -> TokenReport:
        """One decode step is over: histories fade. What it needed, and what became of reads ahead
        of need, since the last report."""
        with self.lock:
            self.ledger.total.tokens += 1
            if self._complete is None:
                self.settle()
                self.policy.end_token()
                self.residency.end_token()
            return self.ledger.end_token()

    def tell(self, about: Callable[[Policy], None]) -> None:
        """Let the policy know something that may change its ranks."""
        with self.lock:
            about(self.policy)
            self.residency.reconsider()

    def begin_prompt(self) -> None:
        """What is acquired from now on, pieces of a prompt need."""
        self.tell(lambda policy: policy.begin_prompt())

    def end_prompt(self, ids_TLK: Any, seq: int = 0) -> None:
        """A sequence's prompt is over; its tokens were routed like this. Its needs are in no
        report."""
        with self.lock:
            self.settle()
            self.tell(lambda policy: policy.end_prompt(ids_TLK, seq))
            self.ledger.end_token()

    def resident(self) -> frozenset[Key]:
        with self.lock:
            self.settle()
            return frozenset(self.residency.ready)

    def held(self) -> frozenset[Key]:
        """What needs no read, in this tier or in one behind it."""
        return self.resident()

    def stats(self) -> StoreStats:
        """A copy of the counters, with the gauges as they are now."""
        with self.lock:
            self.settle()
            nbytes = self.layout.record_nbytes
            live, peak = self.residency.live * nbytes, self.residency.peak * nbytes
            return dataclasses.replace(self.ledger.total, live_bytes=live, peak_expert_bytes=peak)

    def layer_stats(self) -> dict[int, LayerStats]:
        """A copy of what each layer's needs met, by its absolute index."""
        with self.lock:
            self.settle()
            return {n: dataclasses.replace(each) for n, each in self.ledger.layers.items()}

    def close(self) -> None:
        """Cancel what is queued and wait for the reads that run: they write into our memory."""
        with self.lock:
            if self.closed:
                return
            self.closed, self._complete = True, None
            for load in list(self._loads.values()):
                if not load.done and self._cancel(load):
                    self._finish(load, CANCELLED)
            self.settle()
            while self._loads:
                self._wait()
                self.settle()
            self.ledger.close(self._nbytes)
            self._wake()

    # What a lease calls, under the lock.

    def advance(self, lease: SlotLease) -> None:
        """Start what found no slot before; unless something is ready, wait until something is."""
        while True:
            self._check_open()
            self.settle()
            while lease.queued and self._claim(lease, lease.queued[0]):
                lease.queued.popleft()
            self._begin_all()
            if not lease.ready:
                self._collect(lease)
            if lease.ready or not (lease.loads or lease.queued):
                return
            if not self._loads:
                raise StoreError(
                    "no slot for an expert: other open leases hold all of them",
                    f"{self.residency.slots} slots",
                    "use up or close a lease before the next acquire, or raise the budget",
                )
            start = self.clock()
            self._wait()
            self.ledger.stalled(lease.layer, self.clock() - start)

    def taken(self, slot: int) -> Any:
        """What to yield for a slot of a lease (-1: nothing)."""
        return self._views[slot] if slot >= 0 else None

    # How a record gets into a slot: for subclasses, under the lock.

    @abstractmethod
    def _begin(self, loads: Sequence[Load]) -> None:
        """Start filling the slots of `loads`; `_finish` is called as each ends. Where this raises,
        those that `_cancel` can still cancel fail with it."""

    @abstractmethod
    def _advance(self) -> None:
        """Take note of what has landed since; `_finish` what is complete."""

    @abstractmethod
    def _wait(self) -> None:
        """Wait until some load has made progress."""

    @abstractmethod
    def _wake(self) -> None:
        """Other threads that wait look again."""

    @abstractmethod
    def _cancel(self, load: Load) -> bool:
        """Cancel a load that has not begun, or return False. The caller calls `_finish`. One that
        has no handle yet was never begun."""

    @abstractmethod
    def _promote(self, load: Load) -> None:
        """A read ahead is needed now."""

    @abstractmethod
    def _reused(self, slot: int) -> None:
        """A slot is about to be overwritten that consumers may still be computing with."""

    @abstractmethod
    def _copied(self, slot: int) -> bool:
        """Whether the copy behind `_events[slot]` is finished."""

    # The rest is shared.

    @property
    def moving(self) -> bool:
        """Whether some slot may still be copied to."""
        return bool(self._events)

    @property
    def loading(self) -> int:
        """Records on their way into a slot."""
        return len(self._loads)

    def settle(self) -> None:
        """Bring everything up to date: loads that have landed, leases that were dropped."""
        self._advance()
        while self.dropped:
            self.dropped.popleft().close()

    def _nbytes(self, slot: int) -> int:
        key = self.residency.key(slot)
        assert key is not None
        return self._records[key].nbytes

    def _try_complete(self) -> None:
        """All records are here, and nothing will ever be evicted: look no further than a table."""
        if all(self._copied(slot) for slot in list(self._events)):
            self._complete = {k: self._views[slot] for k, slot in self.residency.ready.items()}

    def _from_complete(self, layer: int, wanted: dict[int, None]) -> Lease:
        assert self._complete is not None
        views = self._complete
        try:
            experts = [(expert, views[layer, expert]) for expert in wanted]
        except KeyError as error:
            raise self._unknown(error.args[0]) from None
        self.ledger.needs(layer, len(experts), 0)
        if self.ledger.asked_by:
            slots = [self.residency.ready[layer, expert] for expert in wanted]
            for slot in slots:
                self.residency.touch(slot)
            self.ledger.forget(slots)
        return HeldLease(experts)

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError("the expert store is closed")

    def _fill(
        self,
        lease: SlotLease,
        wanted: dict[int, None],
        by: Mapping[int, Collection[int]],
        exact: bool,
    ) -> None:
        """Pin what is here for a lease, and seek the rest."""
        layer, ready, events = lease.layer, self.residency.ready, self._events
        asked_by = self.ledger.asked_by
        absent: list[int] = []
        late = 0
        for expert in wanted:
            key = (layer, expert)
            if key in self._fixed:
                lease.fixed.append((expert, self._fixed[key]))
                continue
            slot = ready.get(key)
            if slot is None:
                absent.append(expert)
                continue
            moving = slot in events and not self._copied(slot)
            late += moving
            if key in self.stays and slot not in events:
                self._fixed[key] = self._views[slot]  # from the next time on
            if slot in asked_by:
                self.ledger.found(slot, moving)
            self.residency.pin(slot)
            lease.ready.append((expert, slot))
        self.ledger.needs(layer, len(wanted) - len(absent) - late, late)
        if absent:
            self._check_known(layer, absent, exact)
        self.policy.observe(layer, wanted, by)
        self.residency.reconsider()
        try:
            if absent:
                self._seek(lease, absent, exact)
            elif len(ready) == len(self.layout.records):
                self._try_complete()
        finally:
            self.policy.reconsider()
            self.residency.reconsider()

    def _check_known(self, layer: int, experts: list[int], exact: bool) -> None:
        for key in [(layer, expert) for expert in experts]:
            if key not in self._records and (exact or key not in self.layout.missing):
                raise self._unknown(key)

    def _unknown(self, key: Key) -> StoreError:
        return StoreError(f"there is no expert {key[1]} in layer {key[0]}", str(self.layout.folder))

    def _seek(self, lease: SlotLease, absent: list[int], exact: bool) -> None:
        """Count and start what is not ready; late ones first, lest a miss takes their slots."""
        layer, loads = lease.layer, self._loads
        late = [expert for expert in absent if (layer, expert) in loads]
        missed = [expert for expert in absent if (layer, expert) not in loads]
        self.ledger.needs(layer, 0, len(late), len(missed))
        for expert in late:
            load = loads[layer, expert]
            self.ledger.awaited(load.slot, load.asked_by, load.record.nbytes, exact)
        if exact:
            lease.queued.extend(e for e in late + missed if not self._claim(lease, e))
        else:
            self.ledger.total.fallbacks += len(absent)
            lease.ready.extend((expert, -1) for expert in absent)
            for key in [(layer, expert) for expert in missed]:
                if key in self._records:
                    self._admit(key, demand=False)
        self._begin_all()

    def _claim(self, lease: SlotLease, expert: int) -> bool:
        """Pin the expert's slot for the lease, claiming one if need be. False: no slot is free."""
        key = (lease.layer, expert)
        slot = self.residency.ready.get(key)
        if slot is not None:  # landed for someone else since it was counted
            self.residency.pin(slot)
            lease.ready.append((expert, slot))
            return True
        load = self.load(key, demand=True)
        if load is None:
            return False
        lease.loads[expert] = load
        return True

    def load(self, key: Key, *, demand: bool) -> Load | None:
        """A load of an absent record with a pin on its slot: the one under way, or a new one, which
        `_begin_all` starts. None: no slot is free."""
        load = self._loads.get(key)
        if load is None:
            load = self._admit(key, demand=demand)
            if load is None:
                return None
        self.residency.pin(load.slot)  # first: what is promoted may end at once
        try:
            if demand and not load.demand:
                self._promote(load)
        except BaseException:
            if load.error is None:  # a failed load has dropped the pins on its slot
                self.residency.unpin(load.slot)
            raise
        return load

    def _admit(self, key: Key, *, demand: bool, asked_by: str = _DEMAND) -> Load | None:
        """Claim a slot; None if there is none to be had. `_begin_all` starts filling it.

        demand: someone waits for it. asked_by: a source of forecasts, if one asks; then it must not
        displace what is worth more.
        """
        admission = self.residency.admit(key, demand=not asked_by)
        while admission is None and demand and self._reclaim():
            admission = self.residency.admit(key, demand=True)
        if admission is None:
            return None
        slot, record = admission.slot, self._records[key]
        if admission.evicted is not None:
            self.ledger.evicted(slot, self._records[admission.evicted].nbytes)
            try:
                self._reused(slot)
            except BaseException:
                self.residency.restore(slot, admission.evicted)
                raise
        load = self._loads[key] = Load(key, record, slot, demand, asked_by)
        if asked_by:
            self.ledger.ahead(slot, asked_by, record.nbytes)
        self._admitted.append(load)
        return load

    def _begin_all(self) -> None:
        """Begin what was admitted. Only now: the first read begun wakes a thread, and from then on
        bookkeeping shares the interpreter with it and takes twice as long."""
        while self._admitted:
            admitted, self._admitted = self._admitted, []  # what ends at once may admit more
            try:
                self._begin([load for load in admitted if not load.done and self._make_view(load)])
            except Exception as error:
                self._give_up(admitted, error)
            except BaseException as error:
                self._give_up(admitted, StoreError(f"interrupted by {error!r}"))
                raise

    def _give_up(self, loads: Sequence[Load], error: Exception) -> None:
        """Fail those of `loads` that have not begun; the others end by themselves."""
        for load in loads:
            if not load.done and self._cancel(load):
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
        """Cancel the prefetch asked for last that has not begun: a demand needs its slot."""
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
        self._wake()
        if error is None:
            self.residency.mark_ready(load.slot)
            self.ledger.loaded(load.asked_by, load.record.nbytes)
            return
        self.ledger.failed(load.slot, load.asked_by, load.record.nbytes, error is CANCELLED)
        self.residency.mark_failed(load.slot)

    def _collect(self, lease: SlotLease) -> None:
        """Move what has landed from `loads` to `ready`; raise the first failure."""
        for expert, load in [item for item in lease.loads.items() if item[1].done]:
            if load.error is not None:
                raise load.error
            del lease.loads[expert]
            lease.ready.append((expert, load.slot))
