"""Forecasts into reads: what a runner puts between its model and its store to prefetch.

In decode, a forecast made after block 0 goes through `plan` within the allowance of the
`PrefetchController`, which is told at every token what became of earlier prefetches; where the
waits they spared were shorter than the forecasting, that nothing did. In the prefill of a prompt,
each layer asks for the experts that the next one is forecast to use: with many tokens that is most
of them, and each is read once.
Works on ids and NumPy arrays, for any backend. Not covered: how a forecast is made.

Shape legend: J horizons (0 = this token), L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chronos.common.files import RangedReader
from chronos.common.routing.plan import Floats, Key, PrefetchController, expected_use, plan
from chronos.common.stats import StoreStats

# What a forecast costs, over planning alone: the LookaheadRouter and its softmax take three times
# as long as `expected_use` and `plan` (180 and 60 us, measured side by side on a busy CPU).
_PRICE = 4.0
_SMOOTHING = 0.1  # weight of the newest token in the average wait for a missing expert


class Store(Protocol):
    """What is used of an ExpertStore."""

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]: ...
    def record_fallback(self, weight: float) -> None: ...
    def prefetch(self, keys: Sequence[Key]) -> int: ...
    def resident(self) -> frozenset[Key]: ...
    def stats(self) -> StoreStats: ...


class Prefetcher:
    """A source of experts that reads ahead of their use. One sequence at a time."""

    def __init__(
        self,
        store: Store,
        *,
        shape: tuple[int, int],
        top_k: int,
        record_bytes: int,
        reader: RangedReader,
    ) -> None:
        """shape: (layers, experts). reader: the store's, asked for its rate and its backlog."""
        self.store, self.shape, self.top_k = store, shape, top_k
        self.controller = PrefetchController(record_bytes)
        self._record_bytes, self._reader = record_bytes, reader
        self._before = store.stats()
        self._asked: set[Key] = set()  # prefetched and not needed yet
        self._fresh: set[Key] = set()  # of these, asked for in this token: maybe still under way
        self._used = 0
        self._planning_s = 0.0
        self._wait_s: float | None = None  # average wait for an expert that is not there
        self._missing = True  # whether the last token found an expert missing
        self._next_layers: dict[int, list[Key]] = {}

    # As the model's source of experts.

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The store's iterator, its reads first in line; in a prompt, then the next layer's."""
        ready = self.store.acquire(layer, experts)
        if self._asked:
            for expert in experts:
                if (layer, expert) in self._asked:
                    self._asked.remove((layer, expert))
                    self._used += 1
        if keys := self._next_layers.pop(layer + 1, None):
            self.store.prefetch(keys)
        return ready

    def record_fallback(self, weight: float) -> None:
        self.store.record_fallback(weight)

    # What the runner tells.

    def wanted(self) -> bool:
        """Whether a forecast for this token could lead to a read: spares making it if not."""
        return self._missing and self._allowance() >= self._record_bytes

    def forecast(self, probs_JLE: Floats) -> None:
        """Router probabilities forecast after block 0 of a token: prefetch what is worth it."""
        begin = time.perf_counter()
        chosen = plan(
            expected_use(probs_JLE, self.top_k, after_layer=0),
            self._resident_LE(),
            budget_bytes=self._allowance(),
            record_bytes=self._record_bytes,
        )
        self._planning_s = time.perf_counter() - begin
        asked = self.store.prefetch(chosen) // self._record_bytes
        self._fresh.update(chosen[:asked])
        self._asked |= self._fresh

    def forecast_prompt(self, use_LE: Floats) -> None:
        """How much each expert is forecast to be used by a prompt's tokens; 0 is not at all.

        Layer 1 is asked for at once, every deeper one when the layer before it has its experts.
        """
        self._next_layers = {
            layer: [(layer, expert) for expert in _by_use(use_E)]
            for layer, use_E in enumerate(use_LE)
            if layer > 0
        }
        self.store.prefetch(self._next_layers.pop(1, []))

    def end_prompt(self) -> None:
        """Decode begins: what the prompt read is not held against the forecasts."""
        self._next_layers.clear()
        self._asked.clear()
        self._fresh.clear()
        self._used, self._before = 0, self.store.stats()

    def end_token(self, seconds: float) -> None:
        """One token took `seconds`: account for its reads and set the next allowance."""
        now, before = self.store.stats(), self._before
        missed = now.misses - before.misses
        absent = missed + now.late - before.late
        if now.bytes_wasted > before.bytes_wasted:  # evicted unused: a later need is a miss
            self._asked &= self.store.resident() | self._fresh
        prefetched = now.bytes_prefetched - before.bytes_prefetched
        paid = self._spared_s(absent, now.stall_s - before.stall_s) >= _PRICE * self._planning_s
        reads = self._reader.stats
        self.controller.end_token(
            token_s=seconds,
            link_bytes_per_s=reads.bytes_read / reads.busy_s if reads.busy_s else 0.0,
            demand_bytes=missed * self._record_bytes,
            prefetched_bytes=prefetched,
            used_bytes=self._used * self._record_bytes if paid else 0,
        )
        self._missing = absent > 0 or prefetched > 0
        self._fresh.clear()
        self._used, self._planning_s, self._before = 0, 0.0, now

    def _spared_s(self, absent: int, stall_s: float) -> float:
        """Seconds of waiting that this token's used prefetches spared, at what others waited."""
        if absent:
            wait_s = stall_s / absent
            mean = wait_s if self._wait_s is None else self._wait_s
            self._wait_s = mean + _SMOOTHING * (wait_s - mean)
        return self._used * (self._wait_s or 0.0)

    def _resident_LE(self) -> npt.NDArray[np.bool_]:
        held, experts = bytearray(self.shape[0] * self.shape[1]), self.shape[1]
        for layer, expert in self.store.resident():  # a third of the time of an array of tuples
            held[layer * experts + expert] = 1
        return np.frombuffer(held, np.bool_).reshape(self.shape)

    def _allowance(self) -> int:
        return self.controller.allowance(self._reader.in_flight_prefetch_bytes())


def _by_use(use_E: npt.NDArray[np.floating]) -> list[int]:
    order = np.argsort(-use_E, kind="stable")
    best: list[int] = order[use_E[order] > 0].tolist()
    return best
