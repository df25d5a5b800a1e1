"""Forecasts into reads: what a session puts between its model and its store to prefetch.

Forecasts come from several sources: the store's own predictor, a few times in a token and at its
end; the model's LookaheadRouter after block 0; the next layer's gate. What they name goes through
`plan`, which takes what is likely enough for how busy the link is (`LinkUse`); at most a quarter of
the slots may be asked for and not yet be here, of each source few before some were used
(`SlowStart`). Where the policy's forecasts can be switched off, a
`Bandit` does so while tokens are faster without. In the prefill of a prompt, each layer asks for
the experts that the next one is forecast to use: with many tokens that is most of them, and each is
read once.
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

from chronos.common.experts.bandit import PLAIN, Bandit
from chronos.common.experts.plan import Floats, LinkUse, SlowStart, expected_use, plan
from chronos.common.experts.residency import Policy
from chronos.common.experts.stats import Asked, TokenReport
from chronos.common.model.weights import Key

PREDICTOR, LOOKAHEAD, NEXT_GATE = "predictor", "lookahead", "next gate"
# Tokens without a missing expert after which a source is not asked until one is missing again.
_IDLE = {PREDICTOR: 8, LOOKAHEAD: 0, NEXT_GATE: 0}
_SMOOTHING = 0.1  # weight of the newest token in the share of misses that come from the disk
_LONG_AGO = 64  # tokens: an expert not used for so long is as new as one never used
# One in so many slots may be asked for and not be here yet: in a token, or at a prompt's end.
_SLOTS_PER_READ_AHEAD = 4
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


class Prefetcher:
    """Decides what is read ahead of need, and when. Tokens that several sequences run together are
    one that needs what all need."""

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
    ) -> None:
        """shape: (layers, experts). reader: the store's, asked for its rate and its backlog.
        copy_s: seconds that a record's copy to an accelerator takes. policy: the store's, asked
        where it forecasts. clock: seconds."""
        self.store, self.shape, self.top_k = store, shape, top_k
        self._totals = {name: Asked() for name in (PREDICTOR, LOOKAHEAD, NEXT_GATE)}
        self._starts = {name: SlowStart() for name in self._totals}
        self._record_bytes, self._reader, self._clock = record_bytes, reader, clock
        slots = capacity_bytes // record_bytes
        self._most_bytes = slots // _SLOTS_PER_READ_AHEAD * record_bytes
        self._use = LinkUse()
        self._read_before = reader.stats.bytes_read
        forecasts = policy if policy is not None and policy.forecasts else None
        self._forecasts = forecasts
        layers = shape[0]
        self._moments = {round((i + 1) * layers / _MOMENTS) - 1 for i in range(_MOMENTS - 1)}
        self._asked = 0  # records asked for in this token
        # The host does not wait for a copy, but the device does before it computes.
        self._copy_s = copy_s
        self._from_disk = 1.0  # average share of misses that host memory did not hold
        self._idle = 0  # tokens since one found an expert missing or prefetched any
        self._begun: float | None = None  # when the token under way began
        self._needed: list[int] = []  # in this token, as layer * experts + expert
        self._used_at, self._tokens = np.full(shape[0] * shape[1], -_LONG_AGO), 0
        self._horizon = 1
        self._next_layers: dict[int, list[Key]] = {}
        can_disable = forecasts is not None and forecasts.can_disable
        self._bandit = Bandit() if can_disable else None

    def acquired(self, layer: int, experts: Sequence[int]) -> None:
        """A layer's reads are on their way: ask for what its turn suggests."""
        if self._bandit is not None and self._begun is not None:
            self._needed += [layer * self.shape[1] + expert for expert in experts]
        if keys := self._next_layers.pop(layer + 1, None):
            self.store.prefetch(keys, LOOKAHEAD)
        if layer in self._moments and self._begun is not None:
            self._forecast_from_policy()

    def begin_token(self, *tokens: int) -> None:
        """The tokens with these ids, one a sequence, are to be decoded."""
        self._begun = self._clock()
        self._needed.clear()
        if self._forecasts is not None and self._forecasts.by_token:
            self._forecasts.begin_token(*tokens)
            self._forecast_from_policy()

    def wanted(self, source: str = LOOKAHEAD) -> bool:
        """Whether a forecast now could lead to a read: spares making it if not."""
        idle = self._idle > _IDLE[source] or not self._starts[source].room
        return not idle and self._room() >= self._record_bytes

    def forecast(self, probs_JLE: Floats) -> None:
        """Router probabilities forecast after block 0 of a token: prefetch what is worth it."""
        chosen = plan(
            expected_use(probs_JLE, self.top_k, after_layer=0),
            self._resident_LE(),
            budget_bytes=self._room(),
            record_bytes=self._record_bytes,
            floor=self._use.floor,
        )
        self._ask(LOOKAHEAD, chosen)

    def forecast_next(self, layer: int, experts: Sequence[int]) -> None:
        """Experts a layer is about to need, best first, by its own gate on an earlier state."""
        held, room = self.store.resident(), self._room() // self._record_bytes
        absent = [key for expert in experts if (key := (layer, expert)) not in held]
        self._ask(NEXT_GATE, absent[:room])

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
        """Decode begins. The prompt's reads do not count as load of the link, and what the policy
        expects now is read while the reply's first token is computed. Tell the store first."""
        self._next_layers.clear()
        self._asked = 0
        for start in self._starts.values():
            start.end_prompt()
        self._read_before = self._reader.stats.bytes_read
        self._forecast_from_policy(self._most_bytes)

    def end_token(self, report: TokenReport) -> None:
        """The token is decoded: account for its reads, choose the next one's arm, read ahead."""
        seconds = self._clock() - self._begun if self._begun is not None else 0.0
        reads = self._reader.stats
        link = self._link(reads, report.misses, report.warm_hits)
        moved = reads.bytes_read - self._read_before
        if self._copy_s:
            moved = report.copied * self._record_bytes
        self._use.end_token(seconds * link, moved - report.wasted * self._record_bytes)
        self._read_before = reads.bytes_read
        for name, total in self._totals.items():
            came = report.of(name)
            total.asked += came.asked
            total.used += came.used
            self._starts[name].end_token(came.used, came.wasted + came.cancelled)
        # A read that takes longer than a token can only serve the tokens after the next.
        carried = link * seconds
        self._horizon = 1 + int(min(7.0, self._record_bytes / carried)) if carried else 1
        if self._bandit is not None and self._forecasts is not None:
            self._bandit.end_token(seconds, self._reuse_distance())
            self._forecasts.disable(self._bandit.arm == PLAIN)
        reading = report.absent > 0 or report.prefetched > 0
        self._idle = 0 if reading else self._idle + 1
        self._asked, self._begun = 0, None
        if self._forecasts is not None and not self._forecasts.by_token:
            self._forecast_from_policy()

    def to_json(self) -> dict[str, Any]:
        """Records that each source asked for, and those of them that were used."""
        return {
            name: {"records": total.asked, "used": total.used}
            for name, total in self._totals.items()
            if total.asked
        }

    def _forecast_from_policy(self, granted: int = 0) -> None:
        if self._forecasts is None or not (granted or self.wanted(PREDICTOR)):
            return
        chance_LE = self._forecasts.next_uses()
        chosen = plan(
            1.0 - (1.0 - chance_LE) ** self._horizon if self._horizon > 1 else chance_LE,
            self._resident_LE(),
            budget_bytes=granted or self._room(),
            record_bytes=self._record_bytes,
            floor=self._use.floor,
            order_LE=self._forecasts.priority,
        )
        self._ask(PREDICTOR, chosen, len(chosen) if granted else None)

    def _ask(self, source: str, keys: list[Key], most: int | None = None) -> None:
        start = self._starts[source]
        asked = len(self.store.prefetch(keys[: start.room if most is None else most], source))
        self._asked += asked
        start.asked(asked)

    def _link(self, reads: Reads, missed: int, warm: int) -> float:
        """Bytes per second that bring a record here: the disk's for the part that comes from it,
        the device's link for all of it, the slower of the two. 0: nothing was read yet."""
        if missed:
            self._from_disk += _SMOOTHING * (1.0 - warm / missed - self._from_disk)
        if not reads.busy_s:
            return 0.0
        disk_s = self._from_disk * self._record_bytes * reads.busy_s / max(1, reads.bytes_read)
        return self._record_bytes / max(disk_s, self._copy_s)

    def _reuse_distance(self) -> float:
        """Of the token's experts, log2 of the tokens since each one's last use; their sum."""
        ages = np.clip(self._tokens - self._used_at[self._needed], 1, _LONG_AGO)
        self._used_at[self._needed] = self._tokens
        self._tokens += 1
        return float(np.log2(ages).sum())

    def _resident_LE(self) -> npt.NDArray[np.bool_]:
        held, experts = bytearray(self.shape[0] * self.shape[1]), self.shape[1]
        for layer, expert in self.store.resident():  # a third of the time of an array of tuples
            held[layer * experts + expert] = 1
        return np.frombuffer(held, np.bool_).reshape(self.shape)

    def _room(self) -> int:
        """Bytes that may be asked for now: what is left of a quarter of the slots after what this
        token has asked for, or what is still on its way; none while forecasts are disabled."""
        if self._bandit is not None and self._bandit.arm == PLAIN:
            return 0
        asked = self._asked * self._record_bytes
        pending = max(asked, self._reader.in_flight_prefetch_bytes())
        return max(0, self._most_bytes - pending)


def _by_use(use_E: npt.NDArray[np.floating]) -> list[int]:
    order = np.argsort(-use_E, kind="stable")
    best: list[int] = order[use_E[order] > 0].tolist()
    return best
