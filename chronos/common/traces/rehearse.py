"""A run rehearsed from its trace: the tier, its policy and the prefetcher as they are, on a clock
and a disk that are numbers.

What a run decides (victims, prefetches, whether forecasts are on) follows from its routing, its
clock and the reader's numbers. Here the latter two follow from a `Pace`, so the same trace and pace
repeat every decision to the last key, on any machine and however busy it is. Demand comes before
prefetch and overtakes it after a chunk, as in `files`; the rate of the disk is shared by nobody and
never varies. What reads and forecasts cost the computation are numbers too.
Not covered: how long a prompt takes.

Shape legend: T tokens, S sequences, L layers, E experts, K top-k.
"""

from __future__ import annotations

import copy
import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from chronos.common.disk.reader import ReaderStats, Request
from chronos.common.experts.foresight.policy import PredictorPolicy
from chronos.common.experts.foresight.predictor import DISCOUNT, ByRouting, Scores
from chronos.common.experts.prefetch import Prefetcher
from chronos.common.experts.residency import Policy
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tiers import SlotTier
from chronos.common.layout import Layout, Record
from chronos.common.model.weights import Key
from chronos.common.traces.trace import RoutingTrace

_CHUNK = 1 << 20
_FORESIGHT = 8  # tokens an oracle looks ahead to


@dataclass(frozen=True)
class Pace:
    """How long things take. expert_share: part of a layer's time that its routed experts take.

    read_s_per_byte: what a byte read while the host computes takes from it (a CPU checks and
    copies it, a GPU does not notice). predict_s: what a token's forecasts take of the host.
    """

    record_bytes: int
    link_bytes_per_s: float
    token_s: float  # with everything resident
    expert_share: float = 0.6
    read_s_per_byte: float = 0.0
    predict_s: float = 0.0


@dataclass(frozen=True)
class Rehearsal:
    """token_s: seconds of each counted token, or of a pass with one of each sequence. decisions:
    the keys asked for ahead, in order."""

    token_s: npt.NDArray[np.float64]
    stats: StoreStats  # of the counted tokens
    decisions: list[list[Key]]
    sources: dict[str, Any]


class Link:
    """A reader whose reads take the time their bytes take, one chunk at a time, demand first."""

    def __init__(self, bytes_per_s: float, host_s_per_byte: float = 0.0) -> None:
        self.now = 0.0
        self.stats = ReaderStats()
        self._rate, self._host_s_per_byte = bytes_per_s, host_s_per_byte
        self._demand: deque[Request] = deque()
        self._prefetch: deque[Request] = deque()
        self._free_at = 0.0
        self._ended: list[tuple[float, int, Request]] = []  # a heap: read, not told yet
        self._prefetch_bytes = self._count = 0

    def submit_many(self, requests: Sequence[Request]) -> None:
        for request in requests:
            (self._demand if request.demand else self._prefetch).append(request)
            self._prefetch_bytes += 0 if request.demand else request.nbytes

    def promote(self, request: Request) -> None:
        if request in self._prefetch:
            self._prefetch.remove(request)
            self._demand.append(request)
            self._prefetch_bytes -= request.nbytes
        request.demand = True

    def cancel(self, request: Request) -> bool:
        if request not in self._prefetch or request._next:
            return False
        self._prefetch.remove(request)
        self._prefetch_bytes -= request.nbytes
        return True

    def in_flight_prefetch_bytes(self) -> int:
        return self._prefetch_bytes

    def pass_time(self, seconds: float) -> None:
        """The host computes; the disk reads meanwhile."""
        self.now += seconds
        while (self._demand or self._prefetch) and self._free_at < self.now:
            self.now += self._read_chunk() * self._host_s_per_byte
        self._free_at = max(self._free_at, self.now)
        while self._ended and self._ended[0][0] <= self.now:
            self._tell()

    def wait(self) -> None:
        """The host waits until some read has ended."""
        while not self._ended:
            self._read_chunk()
        self.now = max(self.now, self._ended[0][0])
        self._tell()

    def _read_chunk(self) -> int:
        """Bytes read."""
        queue = self._demand or self._prefetch
        request = queue[0]
        nbytes = min(_CHUNK, request.nbytes - request._next)
        request._next += nbytes
        self._free_at += nbytes / self._rate
        self.stats.busy_s += nbytes / self._rate
        self.stats.bytes_read += nbytes
        if request._next == request.nbytes:
            queue.popleft()
            self._prefetch_bytes -= 0 if request.demand else request.nbytes
            self._count += 1
            heapq.heappush(self._ended, (self._free_at, self._count, request))
        return nbytes

    def _tell(self) -> None:
        request = heapq.heappop(self._ended)[2]
        request.done = True
        assert request.on_done is not None
        request.on_done(request)


class _VirtualTier(SlotTier):
    """A tier that waits in the link's time. Its memory is never touched."""

    def __init__(self, layout: Layout, slots: int, link: Link, policy: Policy) -> None:
        super().__init__(layout, slots, cast(Any, link), policy, verify=False)
        self.link = link
        self.clock = lambda: link.now
        self.decisions: list[list[Key]] = []

    def prefetch(self, keys: Sequence[Key], asked_by: str = "") -> list[Key]:
        self.decisions.append(list(keys))
        return super().prefetch(keys, asked_by)

    def _wait(self) -> None:
        self.link.wait()


def rehearse(
    trace: RoutingTrace,
    slots: int,
    policy: Policy,
    pace: Pace,
    *,
    prefetch: bool = True,
    warmup: int = 0,
    prompt: int = 0,
    beside: Sequence[RoutingTrace] = (),
    alter: Callable[[Prefetcher], None] = lambda prefetcher: None,
) -> Rehearsal:
    """Decode the trace's tokens; the first `warmup` are not counted. 2 ms a token or so.

    prompt: so many tokens at the beginning are one, and not counted either. beside: routing of
    other sequences, at least as long, of which a token is run in every pass too: reads are shared,
    computing is not. alter: changes the prefetcher before the first token, to rehearse without a
    part of it.
    """
    company = [trace, *beside]
    assert not (prompt and beside), "prompts are read alone"
    link = Link(pace.link_bytes_per_s, pace.read_s_per_byte)
    tier = _VirtualTier(_layout(trace, pace.record_bytes), slots, link, policy)
    prefetcher = Prefetcher(
        tier,
        shape=(trace.num_layers, trace.num_experts),
        top_k=trace.top_k,
        record_bytes=pace.record_bytes,
        capacity_bytes=slots * pace.record_bytes,
        reader=link,
        policy=policy,
        clock=lambda: link.now,
    )
    alter(prefetcher)
    layer_s = pace.token_s / trace.num_layers
    expert_s = layer_s * pace.expert_share / trace.top_k
    tokens = [_token_ids(each) for each in company]
    tier.policy.follow(range(len(company)))
    seconds: list[float] = []
    before = tier.stats()
    if prompt:
        _read_prompt(trace.part(0, prompt), tier, prefetcher if prefetch else None)
    for token in range(prompt, trace.num_tokens):
        ids_SLK = [each.ids_TLK[token].tolist() for each in company]
        if token == prompt + warmup:
            before = tier.stats()
        begin = link.now
        if prefetch:
            prefetcher.begin_token(*(ids[token] for ids in tokens))
        for layer in range(trace.num_layers):
            by = {seq: ids_LK[layer] for seq, ids_LK in enumerate(ids_SLK)}
            uses = Counter(expert for ids_K in by.values() for expert in ids_K)
            link.pass_time(layer_s * (1.0 - pace.expert_share) * len(by))
            lease = tier.acquire(layer, list(uses), by)
            if prefetch:
                prefetcher.acquired(layer, list(uses))
            for expert, _ in lease:
                link.pass_time(expert_s * uses[expert])
        if not (isinstance(policy, PredictorPolicy) and policy.disabled):
            link.pass_time(pace.predict_s * len(company))
        report = tier.end_token()
        if prefetch:
            prefetcher.end_token(report)
        seconds.append(link.now - begin)
    return Rehearsal(
        np.array(seconds[warmup:]), tier.stats().minus(before), tier.decisions, prefetcher.to_json()
    )


def _token_ids(trace: RoutingTrace) -> list[int]:
    """Ids of its tokens; 0 where they are not known."""
    return [0] * trace.num_tokens if trace.tokens_T is None else trace.tokens_T.tolist()


def _read_prompt(prompt: RoutingTrace, tier: _VirtualTier, prefetcher: Prefetcher | None) -> None:
    """In one piece, layer by layer; only its reads take time."""
    tier.begin_prompt()
    for layer in range(prompt.num_layers):
        for _ in tier.acquire(layer, np.unique(prompt.ids_TLK[:, layer]).tolist()):
            pass
    tier.end_prompt(prompt.ids_TLK)
    if prefetcher is not None:
        prefetcher.learn(_token_ids(prompt), prompt.ids_TLK)
        prefetcher.end_prompt()


def _layout(trace: RoutingTrace, record_bytes: int) -> Layout:
    """As much of a layout as a tier looks at."""
    keys = [(layer, e) for layer in range(trace.num_layers) for e in range(trace.num_experts)]
    records = {
        key: Record(key, "", at * record_bytes, record_bytes, b"", ())
        for at, key in enumerate(keys)
    }
    known = {
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "record_nbytes": record_bytes,
        "records": records,
        "missing": frozenset(),
        "folder": Path(),
        "path": lambda key: Path(),
    }
    return cast(Layout, SimpleNamespace(**known))


class Oracle(ByRouting):
    """A `Predictor` that has read the trace: the upper line of every forecast."""

    name = "oracle"

    def __init__(self, trace: RoutingTrace, foresight: int = _FORESIGHT) -> None:
        tokens, layers, _ = trace.ids_TLK.shape
        self._needed_TLE = np.zeros((tokens + foresight + 1, layers, trace.num_experts), np.float32)
        np.put_along_axis(self._needed_TLE[:tokens], trace.ids_TLK.astype(np.intp), 1.0, axis=2)
        self._foresight, self._token, self._served = foresight, 0, 0

    def observe(self, layer: int, experts: object) -> None:
        self._served = layer + 1

    def reconsider(self) -> None:
        pass

    def end_token(self) -> None:
        self._token, self._served = self._token + 1, 0

    def prime(self, ids_TLK: npt.NDArray[Any]) -> None:
        self._token += len(ids_TLK)

    def fork(self) -> Self:
        return copy.copy(self)

    def next_uses(self) -> Scores:
        return self._at(0).astype(np.float64)

    def scores(self) -> Scores:
        """Each use counts by how far ahead it lies, to a fraction of a token."""
        layers = self._needed_TLE.shape[1]
        place_L = (np.arange(layers) - self._served) % layers / layers
        ahead = sum(DISCOUNT**step * self._at(step) for step in range(self._foresight))
        return np.asarray(DISCOUNT ** place_L[:, None] * ahead, np.float64)

    def _at(self, step: int) -> npt.NDArray[np.float32]:
        """Each layer's needs at its turn after `step` more."""
        now, later = self._needed_TLE[self._token + step], self._needed_TLE[self._token + step + 1]
        return np.concatenate([later[: self._served], now[self._served :]])
