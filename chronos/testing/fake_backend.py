"""A backend without a framework: a correct arena in NumPy, and feeds that are wrong.

`FakeBackend` offers `open_arena` as a backend module does. `FakeArena` shows what is left to write
for a backend whose slots are host memory: the views. Each wrong store breaks one promise, and
`WRONG` names the test of `StoreTests` that must notice. Not covered: models and sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from chronos.common.errors import ChronosError, StoreError
from chronos.common.experts.feed import Feed, FeedOptions
from chronos.common.experts.lease import Load
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tiers import CopyEngine, SlotTier
from chronos.common.layout import Layout, Record
from chronos.common.model.weights import Key
from chronos.testing.store_rig import Driver


class Expert(NamedTuple):
    """One expert's weights: gate_up [2F, D] and down [D, F]."""

    gate_up_FD: np.ndarray
    down_DF: np.ndarray


class FakeArena:
    """Experts as NumPy views of the slots they were read into (float32 only)."""

    copies: CopyEngine | None = None

    def __init__(self, layout: Layout, slots: int, options: FeedOptions) -> None:
        self.slots = slots
        self._slots_SN = np.zeros((slots, layout.record_nbytes), np.uint8)
        self.host = self._slots_SN.reshape(-1).data

    def view(self, slot: int, record: Record) -> Expert:
        parts = [
            self._slots_SN[slot, t.offset : t.offset + t.nbytes].view(np.float32).reshape(t.shape)
            for t in record.tensors
        ]
        return Expert(*parts)

    def copy_rate(self) -> None:
        """Records are computed with where they were read to."""

    def close(self) -> None:
        """Memory is freed by itself."""


class FakeStore(Driver):
    """A feed over a `FakeArena`, driven by hand. What is wrong with one is said by its class."""

    tier_class = SlotTier
    extra_slots, verify = 0, True

    def __init__(self, feed: Feed) -> None:
        super().__init__(feed)
        self.tier: Any = feed.tier
        self.tier.__class__ = self.tier_class
        vars(self.tier)["_verify"] = self.verify  # as FeedOptions.verify would say


class FakeBackend:
    """What stands for a backend module in a test."""

    name = "fake"

    def __init__(self, driver: type[FakeStore] = FakeStore) -> None:
        self.driver = driver

    def open_arena(self, layout: Layout, slots: int, options: FeedOptions) -> FakeArena:
        return FakeArena(layout, slots + self.driver.extra_slots, options)


class TakesOneSlotMore(FakeStore):
    extra_slots = 1


class IgnoresDigests(FakeStore):
    verify = False


class EvictsWhatIsHeld(FakeStore):
    def __init__(self, feed: Feed) -> None:
        super().__init__(feed)
        self.tier.residency.pin = self.tier.residency.unpin = lambda slot: None


class YieldsTwice(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        return (item for item in super().acquire(layer, experts) for _ in range(2))


class ForgetsTheLast(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        return super().acquire(layer, experts[:-1])


class MixesUpExperts(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        items = list(super().acquire(layer, experts))
        return iter([(items[-1 - i][0], expert) for i, (_, expert) in enumerate(items)])


class DeliversUnfinished(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        self.tier.prefetch([(layer, expert) for expert in experts], "test")
        for expert in experts:
            slot = self.tier.residency.lookup((layer, expert))
            yield expert, None if slot is None else self.tier.taken(slot)


class StartsLazily(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        yield from super().acquire(layer, experts)


class WaitsForAll(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        return iter(list(super().acquire(layer, experts)))


class FallsBackSilently(FakeStore):
    def __init__(self, feed: Feed) -> None:
        super().__init__(feed)
        feed.exact = False


class HidesFailures(FakeStore):
    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        try:
            yield from super().acquire(layer, experts)
        except ChronosError:
            return


class StaysBroken(FakeStore):
    failure: ChronosError | None = None

    def acquire(self, layer: int, experts: Sequence[int]) -> Any:
        if self.failure is not None:
            raise self.failure
        try:
            yield from super().acquire(layer, experts)
        except ChronosError as error:
            self.failure = error
            raise


class ReadsAgain(SlotTier):
    def _promote(self, load: Load) -> None:
        self._cancel(load)
        super()._begin([load])


class RereadsLateOnes(FakeStore):
    tier_class = ReadsAgain


class WithoutUrgency(SlotTier):
    def _begin(self, loads: Sequence[Load]) -> None:
        for load in loads:
            load.demand = False
        super()._begin(loads)

    def _promote(self, load: Load) -> None:
        pass


class QueuesDemands(FakeStore):
    tier_class = WithoutUrgency


class WithoutReclaim(SlotTier):
    def _reclaim(self) -> bool:
        return False


class LetsPrefetchesBlock(FakeStore):
    tier_class = WithoutReclaim


class PrefetchesAgain(FakeStore):
    def prefetch(self, keys: Sequence[Key]) -> int:
        super().prefetch(keys)
        return sum(self.feed.layout.records[key].nbytes for key in keys)


class CountsLateAsHits(FakeStore):
    def stats(self) -> StoreStats:
        stats = super().stats()
        stats.hits += stats.late
        return stats


class NeverWastes(FakeStore):
    def stats(self) -> StoreStats:
        stats = super().stats()
        stats.bytes_wasted = 0
        return stats


class LeaksItsReader(FakeStore):
    def close(self) -> None:
        self.tier.close()


class CannotCloseTwice(FakeStore):
    def close(self) -> None:
        if self.tier.closed:
            raise StoreError("closed twice")
        super().close()


# A wrong store and the test that must fail on it.
WRONG: dict[type[FakeStore], str] = {
    TakesOneSlotMore: "test_capacity_is_never_exceeded",
    IgnoresDigests: "test_corrupt_bytes_are_never_delivered",
    EvictsWhatIsHeld: "test_what_is_held_is_not_evicted",
    YieldsTwice: "test_each_expert_once_with_its_bytes",
    ForgetsTheLast: "test_each_expert_once_with_its_bytes",
    MixesUpExperts: "test_each_expert_once_with_its_bytes",
    DeliversUnfinished: "test_exact_waits_however_long_it_takes",
    StartsLazily: "test_all_missing_reads_start_when_called",
    WaitsForAll: "test_ready_ones_come_before_any_read_ends",
    FallsBackSilently: "test_exact_waits_however_long_it_takes",
    HidesFailures: "test_a_failed_read_leaves_the_store_usable",
    StaysBroken: "test_a_failed_read_leaves_the_store_usable",
    RereadsLateOnes: "test_a_late_prefetch_is_awaited_not_reread",
    QueuesDemands: "test_a_demand_overtakes_prefetches",
    LetsPrefetchesBlock: "test_queued_prefetches_never_block_a_demand",
    PrefetchesAgain: "test_prefetch_is_idempotent",
    CountsLateAsHits: "test_counters_add_up_to_the_needs",
    NeverWastes: "test_bytes_never_used_are_wasted",
    LeaksItsReader: "test_close_leaks_no_thread_and_no_file",
    CannotCloseTwice: "test_close_leaks_no_thread_and_no_file",
}
