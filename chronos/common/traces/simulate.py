"""A routing trace run through cache policies, to learn how many expert reads each would need.

A token's k experts of one layer are one request: all are looked up, then the cache changes. The
cache starts cold (or with given residents) and is carried across sequences. `pooled`: one pool of
slots over all layers, as a feed has it; otherwise `slots` in every layer. Policies:

- lru, lfu (uses fading by `decay` per token): every requested expert is admitted, as a feed must;
  equal ranks go by slot number like `residency`, so counts equal the feed's without prefetch;
- min: Belady's MIN with bypass - a missed expert need not be kept; its reads are R*, the least any
  cache of this size needs;  min-admit: MIN that admits all k;
- min-w<W>: as min, but only the next W tokens are known; what they do not use is ranked by lfu.

Not covered: time, prefetch, more than one read of an expert per request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chronos.common.errors import UsageError
from chronos.common.experts.residency import LFU_DECAY, Policy, Residency
from chronos.common.model.weights import Key
from chronos.common.traces.caches import Stream, missing_keys, window_of
from chronos.common.traces.limits import eta_policy
from chronos.common.traces.trace import RoutingTrace

POLICIES = ("lru", "lfu", "min-w1", "min-w2", "min-w4", "min-w8", "min")


@dataclass(frozen=True)
class CacheRun:
    """What one policy would have done. Counts leave out the warm-up tokens."""

    policy: str
    pooled: bool
    slots: int  # of the pool, or of every layer
    tokens: int
    requests: int  # routed needs of single experts
    misses: int  # each one read

    @property
    def hits(self) -> int:
        return self.requests - self.misses

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    @property
    def reads_per_token(self) -> float:
        return self.misses / self.tokens


@dataclass(frozen=True)
class Comparison:
    """Several policies on one trace and one number of slots."""

    runs: tuple[CacheRun, ...]

    @property
    def min_reads_per_token(self) -> float:
        """R*."""
        return self._reads("min")

    @property
    def ref_reads_per_token(self) -> float:
        """R_ref: the better of LRU and decayed LFU."""
        return min(self._reads("lru"), self._reads("lfu"))

    def eta_policy(self, reads_per_token: float) -> float | None:
        """Share of the gap between R_ref and R* closed by a policy with that many reads."""
        return eta_policy(reads_per_token, self.ref_reads_per_token, self.min_reads_per_token)

    def to_json(self) -> dict[str, Any]:
        first = self.runs[0]
        return {
            "slots": first.slots,
            "pooled": first.pooled,
            "tokens": first.tokens,
            "r_min": self.min_reads_per_token,
            "r_ref": self.ref_reads_per_token,
            "policies": {
                run.policy: {
                    "hits": run.hits,
                    "misses": run.misses,
                    "hit_rate": run.hit_rate,
                    "reads_per_token": run.reads_per_token,
                    "eta_policy": self.eta_policy(run.reads_per_token),
                }
                for run in self.runs
            },
        }

    def _reads(self, policy: str) -> float:
        return next(run.reads_per_token for run in self.runs if run.policy == policy)


def slots_for(trace: RoutingTrace, share: float, *, pooled: bool = True) -> int:
    """Slots that hold a share of the experts: floor(share E) per layer, floor(share L E) pooled."""
    experts = trace.num_experts * (trace.num_layers if pooled else 1)
    return math.floor(share * experts + 1e-9)


def check_slots(trace: RoutingTrace, slots: int) -> None:
    """Raises UsageError for a cache that cannot hold one request."""
    if slots < trace.top_k:
        raise UsageError(
            f"{slots} slots cannot hold the {trace.top_k} experts of one request",
            "",
            "raise the budget",
        )


def simulate(
    trace: RoutingTrace,
    slots: int,
    policy: str,
    *,
    pooled: bool = True,
    decay: float = LFU_DECAY,
    warmup: float = 0.0,
    resident: Collection[Key] = (),
) -> CacheRun:
    """Run the trace through `slots` slots (in every layer unless pooled).

    The first `warmup` share of the tokens fills the cache and is not counted. `resident` keys are
    in the cache from the start, least worth keeping first. About 3 microseconds per routed expert.
    Raises UsageError for an unknown policy or fewer slots than top_k.
    """
    _check(trace, slots, policy, decay, warmup)
    first = int(warmup * trace.num_tokens)
    misses = 0
    for stream in _streams(trace, pooled, resident):
        if len(stream.start) > slots:
            raise UsageError(f"{len(stream.start)} resident experts do not fit in {slots} slots")
        missing = missing_keys(stream, slots, policy, decay)
        counts = np.fromiter(map(len, missing), np.int64, len(stream.keys_NK))
        misses += int(counts[first * stream.events_per_token :].sum())
    tokens = trace.num_tokens - first
    requests = tokens * trace.num_layers * trace.top_k
    return CacheRun(policy, pooled, slots, tokens, requests, misses)


def compare(
    trace: RoutingTrace,
    slots: int,
    policies: Sequence[str] = POLICIES,
    *,
    pooled: bool = True,
    decay: float = LFU_DECAY,
    warmup: float = 0.0,
) -> Comparison:
    """Run several policies; lru, lfu and min are always among them, for R_ref and R*."""
    names = dict.fromkeys([*policies, "lru", "lfu", "min"])
    return Comparison(
        tuple(
            simulate(trace, slots, name, pooled=pooled, decay=decay, warmup=warmup)
            for name in names
        )
    )


Caches = Sequence[Sequence[Residency]]
Watch = Callable[[int, Caches], None]


def simulate_policy(
    trace: RoutingTrace,
    slots: int,
    policy: Policy,
    *,
    pooled: bool = True,
    warmup: float = 0.0,
    name: str = "",
) -> CacheRun:
    """Run any `residency` policy, through the bookkeeping that feeds use.

    `slots` in one pool, else in every layer. For rankings that `caches` has no array of, such as
    forecasts; some five times slower.
    """
    return simulate_sizes(trace, [slots], policy, pooled=pooled, warmup=warmup, name=name)[0]


def simulate_sizes(
    trace: RoutingTrace,
    sizes: Sequence[int],
    policy: Policy,
    *,
    pooled: bool = True,
    warmup: float = 0.0,
    name: str = "",
    watch: Watch = lambda token, caches: None,
) -> list[CacheRun]:
    """As `simulate_policy` for caches of several sizes side by side: the policy is told and asked
    once for all. `watch` is called before each token with each size's caches (one, or one a
    layer)."""
    layers, experts, count = trace.num_layers, trace.num_experts, 1 if pooled else trace.num_layers
    for slots in sizes:
        _check(trace, slots, "lru", LFU_DECAY, warmup)
    caches = [[Residency(layers, experts, n, policy) for _ in range(count)] for n in sizes]
    first, misses = int(warmup * trace.num_tokens), [0] * len(sizes)
    for token, ids_LK in enumerate(trace.ids_TLK):
        watch(token, caches)
        for layer, needed in enumerate(ids_LK.tolist()):
            served = _serve([group[layer % count] for group in caches], layer, needed, policy)
            if token >= first:
                misses = [total + missed for total, missed in zip(misses, served, strict=True)]
        policy.end_token()
        for cache in (cache for group in caches for cache in group):
            cache.end_token()
    tokens, label = trace.num_tokens - first, name or type(policy).__name__
    requests = tokens * layers * trace.top_k
    return [
        CacheRun(label, pooled, slots, tokens, requests, missed)
        for slots, missed in zip(sizes, misses, strict=True)
    ]


def _serve(
    caches: Sequence[Residency], layer: int, experts: list[int], policy: Policy
) -> list[int]:
    """One request as feeds do it: pin what is there, rank, then make room for the rest. Misses of
    each cache."""
    held = [_pin(cache, layer, experts) for cache in caches]
    policy.observe(layer, experts)
    missed = [_admit(cache, layer, experts, at) for cache, at in zip(caches, held, strict=True)]
    policy.reconsider()
    return missed


def _pin(cache: Residency, layer: int, experts: list[int]) -> list[int]:
    held = [slot for e in experts if (slot := cache.ready.get((layer, e))) is not None]
    for slot in held:
        cache.pin(slot)
    return held


def _admit(cache: Residency, layer: int, experts: list[int], held: list[int]) -> int:
    absent = [expert for expert in experts if (layer, expert) not in cache.ready]
    for expert in absent:
        admission = cache.admit((layer, expert), demand=True)
        assert admission is not None, "fewer slots than one request needs"
        cache.mark_ready(admission.slot)
        cache.pin(admission.slot)
        held.append(admission.slot)
    for slot in held:
        cache.unpin(slot)
    return len(absent)


def missed_keys(trace: RoutingTrace, slots: int, policy: str) -> Iterator[list[int]]:
    """Per (token, layer) in order, what a pool would read, as flat indices row * E + expert."""
    _check(trace, slots, policy, LFU_DECAY, 0.0)
    return missing_keys(_streams(trace, True, ())[0], slots, policy, LFU_DECAY)


def _streams(trace: RoutingTrace, pooled: bool, resident: Collection[Key]) -> list[Stream]:
    ids, experts, layers = trace.ids_TLK, trace.num_experts, trace.num_layers
    rows = {layer: row for row, layer in enumerate(trace.layers)}
    for layer, expert in resident:
        if layer not in rows or not 0 <= expert < experts:
            raise UsageError(f"resident expert {(layer, expert)} is not in the trace")
    start = [(rows[layer], expert) for layer, expert in dict.fromkeys(resident)]
    if not pooled:
        return [
            Stream(ids[:, row], experts, 1, [expert for at, expert in start if at == row])
            for row in range(layers)
        ]
    keys_TLK = ids + np.arange(layers, dtype=np.int32)[:, None] * experts
    flat = [row * experts + expert for row, expert in start]
    return [Stream(keys_TLK.reshape(-1, trace.top_k), layers * experts, layers, flat)]


def _check(trace: RoutingTrace, slots: int, policy: str, decay: float, warmup: float) -> None:
    if policy not in ("lru", "lfu", "min", "min-admit") and not window_of(policy):
        raise UsageError(f"unknown policy {policy!r}", "", f"one of {', '.join(POLICIES)}")
    check_slots(trace, slots)
    if not 0.0 < decay <= 1.0 or not 0.0 <= warmup < 1.0:
        raise UsageError(f"decay {decay} must be in (0, 1], warmup {warmup} in [0, 1)")
