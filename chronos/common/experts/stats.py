"""What a feed of experts did, counted at the moment of need.

Every routed need of a (layer, expert) is exactly one of hit (ready), late (its read or copy was
under way) and miss (nothing was under way), so `routed` adds up by construction.
A tier keeps a `Ledger`: counters in all, a report a token, and who asked for what ahead of need.
Not covered: time per token and the limits; the engine and `bench` derive those.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

PRELOAD = "preload"  # who asks for all at the start, where all have room
_GAUGES = ("peak_expert_bytes", "capacity_bytes", "warm_capacity_bytes", "live_bytes")


@dataclass
class StoreStats:
    """Counters since the feed was opened, and gauges of its memory (bytes)."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    prefetch_hits: int = 0  # of the hits, those that a prefetch had ready, at their first use
    warm_hits: int = 0  # misses of the fast tier that the warm tier held: no disk read
    fallbacks: int = 0  # needs not ready and answered with None (miss="fallback")
    fallback_weight: float = 0.0  # routing weight those needs carried
    bytes_read: int = 0  # from disk, verified
    bytes_copied: int = 0  # from host memory to an accelerator's slots
    bytes_prefetched: int = 0  # asked for ahead of need and not cancelled
    bytes_late: int = 0  # of the late ones: read for, but not in time
    bytes_wasted: int = 0  # prefetched, then evicted or closed without ever being used
    bytes_loaded: int = 0  # read since the model was opened, where all experts have room
    late_loading: int = 0  # of the late ones, those that were being loaded so
    announced: int = 0  # needs of decoded tokens that the model had said a token before
    announced_late: int = 0  # of these, those not ready when needed
    unannounced: int = 0  # needs it should have said and had not: 0
    read_errors: int = 0
    stall_s: float = 0.0  # the consumer waiting for reads
    tokens: int = 0
    peak_expert_bytes: int = 0  # slots being filled count like full ones
    capacity_bytes: int = 0
    warm_capacity_bytes: int = 0  # of the warm tier asked for, behind an accelerator's slots
    live_bytes: int = 0

    @property
    def routed(self) -> int:
        return self.hits + self.late + self.misses

    @property
    def prefetch_recall(self) -> float | None:
        """Of the needs that were not resident anyway, those prefetched: ready or under way. Loading
        what all have room for is no prefetch."""
        prefetched = self.prefetch_hits + self.late - self.late_loading
        absent = prefetched + self.misses
        return prefetched / absent if absent else None

    @property
    def prefetch_precision(self) -> float | None:
        """Share of what prefetch asked for that was not evicted (or closed) unused."""
        if not self.bytes_prefetched:
            return None
        return 1.0 - min(1.0, self.bytes_wasted / self.bytes_prefetched)

    def minus(self, earlier: StoreStats) -> StoreStats:
        """What happened since `earlier`; gauges keep their present value."""
        change = {
            name: value if name in _GAUGES else value - getattr(earlier, name)
            for name, value in dataclasses.asdict(self).items()
        }
        return StoreStats(**change)

    def to_json(self) -> dict[str, int | float | None]:
        shares = {
            "prefetch_precision": self.prefetch_precision,
            "prefetch_recall": self.prefetch_recall,
        }
        return {**dataclasses.asdict(self), "routed": self.routed, **shares}


@dataclass
class LayerStats:
    """What the needs of one layer met since the feed was opened; sums to those of StoreStats."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0


@dataclass
class Asked:
    """What came of one source's reads ahead of need, in records.

    used: needed for the first time, in time or not; late: of these, still on their way then;
    wasted: evicted before any need; cancelled: taken back for a need before its read began.
    """

    asked: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0


@dataclass
class TokenReport:
    """What the needs of one token met, in records, and what became of reads ahead by source."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    warm_hits: int = 0  # of the misses, those in host memory behind an accelerator's slots
    copied: int = 0  # from there to the slots
    sources: dict[str, Asked] = field(default_factory=dict)

    @property
    def absent(self) -> int:
        """Needs that were not met at once."""
        return self.late + self.misses

    @property
    def wasted(self) -> int:
        return sum(source.wasted for source in self.sources.values())

    @property
    def prefetched(self) -> int:
        return sum(source.asked - source.cancelled for source in self.sources.values())

    def of(self, source: str) -> Asked:
        found = self.sources.get(source)
        if found is None:
            found = self.sources[source] = Asked()
        return found


class Ledger:
    """What a tier counts, in all and of the token under way, and who asked for which slot ahead of
    need. Called under the tier's lock."""

    def __init__(self, capacity_bytes: int) -> None:
        self.total, self.token = StoreStats(capacity_bytes=capacity_bytes), TokenReport()
        self.layers: defaultdict[int, LayerStats] = defaultdict(LayerStats)
        self.asked_by: dict[int, str] = {}  # of slots read ahead and not needed yet

    def needs(self, layer: int, hits: int, late: int, misses: int = 0) -> None:
        for counts in (self.total, self.token, self.layers[layer]):
            counts.hits += hits
            counts.late += late
            counts.misses += misses

    def read(self, layer: int, nbytes: int) -> None:
        self.total.bytes_read += nbytes
        self.layers[layer].bytes_read += nbytes

    def stalled(self, layer: int, seconds: float) -> None:
        self.total.stall_s += seconds
        self.layers[layer].stall_s += seconds

    def ahead(self, slot: int, source: str, nbytes: int) -> None:
        """A slot is to be filled because a source of forecasts asked for it."""
        self.asked_by[slot] = source
        if source != PRELOAD:
            self.total.bytes_prefetched += nbytes

    def found(self, slot: int, moving: bool) -> None:
        """An expert that was read ahead is needed; moving: and about to be copied there."""
        source = self.asked_by.pop(slot)
        self.token.of(source).used += 1
        self.total.late_loading += moving and source == PRELOAD
        self.total.prefetch_hits += not moving and source != PRELOAD

    def awaited(self, slot: int, source: str, nbytes: int, exact: bool) -> None:
        """An expert that is needed is being read. source: who asked for it, or ""."""
        self.total.bytes_late += nbytes
        self.total.late_loading += source == PRELOAD
        if exact and (asked_by := self.asked_by.pop(slot, None)) is not None:
            asked = self.token.of(asked_by)
            asked.used += 1
            asked.late += 1

    def evicted(self, slot: int, nbytes: int) -> None:
        if (source := self.asked_by.pop(slot, None)) is not None:
            self.total.bytes_wasted += nbytes
            self.token.of(source).wasted += 1

    def loaded(self, source: str, nbytes: int) -> None:
        if source == PRELOAD:
            self.total.bytes_loaded += nbytes

    def failed(self, slot: int, source: str, nbytes: int, cancelled: bool) -> None:
        """The slot is empty again. source: who had asked for it, or ""."""
        if cancelled and source:
            if source != PRELOAD:
                self.total.bytes_prefetched -= nbytes
            self.token.of(source).cancelled += 1
        self.asked_by.pop(slot, None)

    def forget(self, slots: Iterable[int]) -> None:
        """What is in these slots was needed; who asked for it no longer counts."""
        for slot in slots:
            self.asked_by.pop(slot, None)

    def close(self, nbytes: Callable[[int], int]) -> None:
        """What was never needed is wasted. nbytes: of a slot's record."""
        for slot, source in self.asked_by.items():
            if source != PRELOAD:
                self.total.bytes_wasted += nbytes(slot)
        self.asked_by.clear()

    def end_token(self) -> TokenReport:
        """The report of the token, and a new one begins."""
        report, self.token = self.token, TokenReport()
        return report
