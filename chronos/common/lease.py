"""A layer's hold on the experts it asked for, and a record on its way into a slot.

Both are plain state; what is done with it is `chronos.common.slots`' business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chronos.common.residency import Key

if TYPE_CHECKING:
    from chronos.common.layout import Record
    from chronos.common.slots import Tier

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
