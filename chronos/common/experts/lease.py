"""The lease a layer takes its experts with, and the load that an absent one waits for.

A lease yields experts as they become ready and holds their slots meanwhile. How needs are counted
and loads move on is the tier's business (`tier`); what a lease yields is whatever a backend made of
a slot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from chronos.common.experts.residency import Residency
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Record


class Load:
    """A record on its way into a slot. `done` once; `error` is then None or why it failed.

    asked_by: the source of forecasts that asked for it ahead of need, or "". demand: somebody waits
    for it now. handle: what the layer below knows it by.
    """

    __slots__ = ("asked_by", "demand", "done", "error", "handle", "key", "record", "slot")

    def __init__(self, key: Key, record: Record, slot: int, demand: bool, asked_by: str) -> None:
        self.key, self.record, self.slot = key, record, slot
        self.demand, self.asked_by = demand, asked_by
        self.done = False
        self.error: Exception | None = None
        self.handle: Any = None


class Lease(Protocol):
    """A layer's hold on the experts it asked for; what every source of experts gives."""

    @property
    def waits(self) -> bool:
        """Whether some of them are still on their way."""

    def __iter__(self) -> Lease: ...

    def __next__(self) -> tuple[int, Any]:
        """(expert, weights) as they become ready, each once: valid until the next is asked for.
        None stands for one that is not ready, where misses may fall back."""

    def all(self) -> dict[int, Any]:
        """All that were not taken yet, waited for: valid until `close`, or until the step that gave
        the lease asks for the next layer."""

    def keep(self) -> None:
        """What was yielded last is valid as long as what `all` gives."""

    def close(self) -> None:
        """Give everything back. Reads under way go on."""


class HeldLease:
    """The lease of experts that are all here and stay."""

    waits = False

    def __init__(self, experts: Sequence[tuple[int, Any]]) -> None:
        self._experts = iter(experts)

    def __iter__(self) -> HeldLease:
        return self

    def __next__(self) -> tuple[int, Any]:
        return next(self._experts)

    def all(self) -> dict[int, Any]:
        return dict(self._experts)

    def keep(self) -> None:
        pass

    def close(self) -> None:
        self._experts = iter(())


class Holder(Protocol):
    """What a lease uses of the tier that gave it."""

    lock: threading.RLock
    residency: Residency
    dropped: deque[SlotLease]  # given up half-way: the holder closes them

    def advance(self, lease: SlotLease) -> None:
        """Unless something is ready for it, wait until something is."""

    def taken(self, slot: int) -> Any:
        """What to yield for a slot."""


class SlotLease:
    """What `Tier.acquire` returns while something may be missing.

    Experts not yielded yet are pinned, the one yielded last too, until the next is asked for or
    the lease is closed. An error closes it; one dropped half-way is closed by the tier's next call.
    """

    __slots__ = ("_held", "_kept", "_tier", "fixed", "layer", "loads", "queued", "ready")

    def __init__(self, tier: Holder, layer: int) -> None:
        self._tier, self.layer = tier, layer
        self.fixed: list[tuple[int, Any]] = []  # (expert, view) of what is never evicted
        self.ready: deque[tuple[int, int]] = deque()  # (expert, slot), slot -1 for a fallback
        self.loads: dict[int, Load] = {}
        self.queued: deque[int] = deque()  # experts that found no slot yet
        self._held = -1
        self._kept: list[int] = []  # slots of `all`

    @property
    def waits(self) -> bool:
        return bool(self.loads or self.queued)

    def __iter__(self) -> SlotLease:
        return self

    def __next__(self) -> tuple[int, Any]:
        if self.fixed:  # first, while nothing is held that a wait would keep from others
            return self.fixed.pop()
        tier = self._tier
        with tier.lock:
            if self._held >= 0:
                tier.residency.unpin(self._held)
                self._held = -1
            if self.queued or (self.loads and not self.ready):
                try:
                    tier.advance(self)
                except BaseException:
                    self.close()
                    raise
            if not self.ready:
                raise StopIteration
            expert, slot = self.ready.popleft()
            self._held = slot
            return expert, tier.taken(slot)

    def all(self) -> dict[int, Any]:
        views = {}
        for expert, view in self:
            views[expert] = view
            self.keep()
        return views

    def keep(self) -> None:
        if self._held >= 0:
            self._kept.append(self._held)
            self._held = -1

    def close(self) -> None:
        with self._tier.lock:
            slots = [self._held, *self._kept, *(slot for _, slot in self.ready)]
            # a failed load has dropped the pins on its slot
            slots += [load.slot for load in self.loads.values() if load.error is None]
            for slot in slots:
                if slot >= 0:
                    self._tier.residency.unpin(slot)
            self._held = -1
            self._kept.clear()
            self.fixed.clear()
            self.ready.clear()
            self.loads.clear()
            self.queued.clear()

    def __del__(self) -> None:
        # May run anywhere, even inside the tier's own bookkeeping: only leave a note.
        if self._held >= 0 or self.ready or self.loads or self._kept:
            self._tier.dropped.append(self)
