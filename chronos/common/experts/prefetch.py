"""Forecasts into reads: what a session puts between its model and its store to prefetch.

Forecasts come from several sources: the store's own predictor, a few times in a token and at its
end; the model's LookaheadRouter after block 0; the next layer's gate. What they name goes through
`plan` within what the source's `PrefetchController` allows, which is told at every token what
became of earlier prefetches, so each source is judged by its own share of used bytes; where the
waits it spared were shorter than its planning, that is nothing. In the prefill of a prompt, each
layer asks for the experts that the next one is forecast to use: with many tokens that is most of
them, and each is read once.
Decisions follow from the routing, the clock and the reader's numbers alone: `rehearse` repeats a
run of them from its trace. Works on ids and NumPy arrays, for any backend.

Shape legend: J horizons (0 = this token), L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chronos.common.experts.contest import Contest
from chronos.common.experts.plan import Floats, LinkUse, PrefetchController, expected_use, plan
from chronos.common.experts.residency import Policy
from chronos.common.experts.stats import TokenReport
from chronos.common.model.weights import Key

PREDICTOR, LOOKAHEAD, NEXT_GATE = "predictor", "lookahead", "next gate"
# What a forecast costs, over planning alone: the LookaheadRouter and its softmax take three times
# as long as `expected_use` and `plan` (180 and 60 us, measured side by side on a busy CPU).
_PRICE = {PREDICTOR: 1.0, LOOKAHEAD: 4.0, NEXT_GATE: 4.0}
# Tokens without a missing expert after which a source is not asked until one is missing again.
_CALM = {PREDICTOR: 8, LOOKAHEAD: 0, NEXT_GATE: 0}
_SMOOTHING = 0.1  # weight of the newest token in the average wait for a missing expert
_LONG_AGO = 64  # tokens: an expert not used for so long is as new as one never used
_PRELOAD = 0.25  # of the capacity may be asked for at a prompt's end
_MOMENTS = 4  # plans a token from the predictor, the one at its end included


class Store(Protocol):
    """What is used of a tier."""

    def prefetch(self, keys: Sequence[Key], asked_by: str) -> list[Key]: ...
    def resident(self) -> frozenset[Key]: ...


class Reads(Protocol):
    """What a reader has read so far, in bytes and in seconds with a read under way."""

    bytes_read: int
    busy_s: float


class Reader(Protocol):
    """What is used of a RangedReader."""

    @property
    def stats(self) -> Reads: ...
    def in_flight_prefetch_bytes(self) -> int: ...


class Source:
    """One origin of forecasts: what it may ask for, and what came of it."""

    def __init__(self, name: str, record_bytes: int) -> None:
        self.name, self.controller = name, PrefetchController(record_bytes)
        self.total_asked = self.total_used = 0  # records
        self.planning_s = 0.0  # in this token

    def to_json(self) -> dict[str, float]:
        return {
            "records": self.total_asked,
            "used": self.total_used,
            "share_of_idle_link": self.controller.share,
        }


class Prefetcher:
    """Decides what is read ahead of need, and when. One sequence at a time."""

    def __init__(
        self,
        store: Store,
        *,
        shape: tuple[int, int],
        top_k: int,
        record_bytes: int,
        capacity_bytes: int,
        reader: Reader,
        copy_s: float = 0.0,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.perf_counter,
        contest: bool = True,
    ) -> None:
        """shape: (layers, experts). reader: the store's, asked for its rate and its backlog.
        copy_s: seconds that a record's copy to an accelerator takes. policy: the store's, asked
        where it forecasts. clock: seconds. contest: some tokens go without prefetch, and without
        forecasts; what makes tokens fastest goes on."""
        self.store, self.shape, self.top_k = store, shape, top_k
        self.sources = {name: Source(name, record_bytes) for name in _PRICE}
        self._record_bytes, self._reader, self._clock = record_bytes, reader, clock
        self._preload_bytes = int(_PRELOAD * capacity_bytes)
        self._use = LinkUse()
        self._read_before = reader.stats.bytes_read
        forecasts = policy if policy is not None and policy.forecasts else None
        self._forecasts = forecasts
        layers = shape[0]
        self._moments = {round((i + 1) * layers / _MOMENTS) - 1 for i in range(_MOMENTS - 1)}
        self._asked = 0  # records asked for in this token
        self._wait_s: float | None = None  # average wait for an expert that is not there
        # The host does not wait for a copy, but the device does before it computes.
        self._copy_s = copy_s
        self._from_disk = 1.0  # average share of misses that host memory did not hold
        self._calm = 0  # tokens since one found an expert missing or prefetched any
        self._begun: float | None = None  # when the token under way began
        self._needed: list[int] = []  # in this token, as layer * experts + expert
        self._used_at, self._tokens = np.full(shape[0] * shape[1], -_LONG_AGO), 0
        self._horizon = 1
        self._next_layers: dict[int, list[Key]] = {}
        ways = 3 if forecasts is not None and forecasts.can_rest else 2
        self._contest = Contest(ways) if contest else None  # 1: no prefetch; 2: nor forecasts

    def acquired(self, layer: int, experts: Sequence[int]) -> None:
        """A layer's reads are on their way: ask for what its turn suggests."""
        if self._begun is not None:
            self._needed += [layer * self.shape[1] + expert for expert in experts]
        if keys := self._next_layers.pop(layer + 1, None):
            self.store.prefetch(keys, LOOKAHEAD)
        if layer in self._moments and self._begun is not None:
            self._forecast_from_policy()

    def begin_token(self, token: int) -> None:
        """The token with this id is to be decoded."""
        self._begun = self._clock()
        self._needed.clear()
        if self._forecasts is not None and self._forecasts.by_token:
            self._forecasts.begin_token(token)
            self._forecast_from_policy()

    def wanted(self, source: str = LOOKAHEAD) -> bool:
        """Whether a forecast now could lead to a read: spares making it if not."""
        calm = self._calm > _CALM[source]
        return not calm and self._room(self.sources[source]) >= self._record_bytes

    def forecast(self, probs_JLE: Floats) -> None:
        """Router probabilities forecast after block 0 of a token: prefetch what is worth it."""
        source, begin = self.sources[LOOKAHEAD], self._clock()
        chosen = plan(
            expected_use(probs_JLE, self.top_k, after_layer=0),
            self._resident_LE(),
            budget_bytes=self._room(source),
            record_bytes=self._record_bytes,
            floor=self._use.floor,
        )
        self._ask(source, chosen, begin)

    def forecast_next(self, layer: int, experts: Sequence[int]) -> None:
        """Experts a layer is about to need, best first, by its own gate on an earlier state."""
        source, begin = self.sources[NEXT_GATE], self._clock()
        held, room = self.store.resident(), self._room(source) // self._record_bytes
        absent = [key for expert in experts if (key := (layer, expert)) not in held]
        self._ask(source, absent[: max(0, room)], begin)

    def forecast_prompt(self, use_LE: Floats) -> None:
        """How much each expert is forecast to be used by a prompt's tokens; 0 is not at all.

        Layer 1 is asked for at once, every deeper one when the layer before it has its experts.
        """
        self._next_layers = {
            layer: [(layer, expert) for expert in _by_use(use_E)]
            for layer, use_E in enumerate(use_LE)
            if layer > 0
        }
        self.store.prefetch(self._next_layers.pop(1, []), LOOKAHEAD)

    def learn(self, tokens: Sequence[int], ids_TLK: npt.NDArray[Any]) -> None:
        """A chunk of a prompt was routed like this."""
        if self._forecasts is not None:
            self._forecasts.learn(tokens, ids_TLK)

    def end_prompt(self) -> None:
        """Decode begins: what the prompt read is not held against the forecasts, and what it
        promises is read while the reply's first token is made. Tell the store first."""
        self._next_layers.clear()
        self._asked = 0
        self._read_before = self._reader.stats.bytes_read
        self._forecast_from_policy(self._preload_bytes)

    def end_token(self, report: TokenReport) -> None:
        """The token is decoded: account for its reads, set the next allowances, read ahead."""
        seconds = self._clock() - self._begun if self._begun is not None else 0.0
        missed, absent = report.misses, report.absent
        self._note_wait(absent, report.stall_s + absent * self._copy_s)
        reads = self._reader.stats
        link = self._link(reads, missed, report.warm_hits)
        moved = reads.bytes_read - self._read_before
        if self._copy_s:
            moved = report.copied * self._record_bytes
        self._use.end_token(seconds * link, moved - report.wasted * self._record_bytes)
        self._read_before = reads.bytes_read
        for source in self.sources.values():
            self._account(source, report, seconds, link)
        # A read that takes longer than a token can only serve the tokens after the next.
        carried = link * seconds
        self._horizon = 1 + int(min(7.0, self._record_bytes / carried)) if carried else 1
        if self._contest is not None:
            self._contest.end_token(seconds, self._news())
            if self._forecasts is not None:
                self._forecasts.rest(self._contest.way == 2)
        stirred = absent > 0 or report.prefetched > 0
        self._calm = 0 if stirred else self._calm + 1
        self._asked, self._begun = 0, None
        if self._forecasts is not None and not self._forecasts.by_token:
            self._forecast_from_policy()

    def to_json(self) -> dict[str, Any]:
        """What each source that was asked came to."""
        return {s.name: s.to_json() for s in self.sources.values() if s.total_asked}

    def _forecast_from_policy(self, granted: int = 0) -> None:
        source = self.sources[PREDICTOR]
        if self._forecasts is None or not (granted or self.wanted(PREDICTOR)):
            return
        begin = self._clock()
        chance_LE = self._forecasts.next_uses()
        chosen = plan(
            1.0 - (1.0 - chance_LE) ** self._horizon if self._horizon > 1 else chance_LE,
            self._resident_LE(),
            budget_bytes=granted or self._room(source),
            record_bytes=self._record_bytes,
            floor=self._use.floor,
            order_LE=self._forecasts.priority,
        )
        self._ask(source, chosen, begin)

    def _ask(self, source: Source, keys: list[Key], begin: float) -> None:
        source.planning_s += self._clock() - begin
        self._asked += len(self.store.prefetch(keys, source.name))

    def _account(self, source: Source, report: TokenReport, seconds: float, link: float) -> None:
        came = report.of(source.name)
        spared_s = came.used * (self._wait_s or 0.0)
        paid = spared_s >= _PRICE[source.name] * source.planning_s
        source.controller.end_token(
            token_s=seconds,
            link_bytes_per_s=link,
            demand_bytes=report.misses * self._record_bytes,
            prefetched_bytes=came.asked * self._record_bytes,
            used_bytes=came.used * self._record_bytes if paid else 0,
        )
        source.total_asked += came.asked
        source.total_used += came.used
        source.planning_s = 0.0

    def _link(self, reads: Reads, missed: int, warm: int) -> float:
        """Bytes per second that bring a record here: the disk's for the part that comes from it,
        the device's link for all of it, the slower of the two. 0: nothing was read yet."""
        if missed:
            self._from_disk += _SMOOTHING * (1.0 - warm / missed - self._from_disk)
        if not reads.busy_s:
            return 0.0
        disk_s = self._from_disk * self._record_bytes * reads.busy_s / max(1, reads.bytes_read)
        return self._record_bytes / max(disk_s, self._copy_s)

    def _note_wait(self, absent: int, stall_s: float) -> None:
        """What others waited, a prefetch that is used spares."""
        if absent:
            wait_s = stall_s / absent
            mean = wait_s if self._wait_s is None else self._wait_s
            self._wait_s = mean + _SMOOTHING * (wait_s - mean)

    def _news(self) -> float:
        """How new the token's routing is: of each expert, log2 of the tokens since its last use."""
        ages = np.clip(self._tokens - self._used_at[self._needed], 1, _LONG_AGO)
        self._used_at[self._needed] = self._tokens
        self._tokens += 1
        return float(np.log2(ages).sum())

    def _resident_LE(self) -> npt.NDArray[np.bool_]:
        held, experts = bytearray(self.shape[0] * self.shape[1]), self.shape[1]
        for layer, expert in self.store.resident():  # a third of the time of an array of tuples
            held[layer * experts + expert] = 1
        return np.frombuffer(held, np.bool_).reshape(self.shape)

    def _room(self, source: Source) -> int:
        """Bytes the source may ask for: its allowance, without what is under way or was asked; none
        in tokens that show how long they take without."""
        if self._contest is not None and self._contest.way:
            return 0
        asked = self._asked * self._record_bytes
        return source.controller.allowance(max(asked, self._reader.in_flight_prefetch_bytes()))


def _by_use(use_E: npt.NDArray[np.floating]) -> list[int]:
    order = np.argsort(-use_E, kind="stable")
    best: list[int] = order[use_E[order] > 0].tolist()
    return best
