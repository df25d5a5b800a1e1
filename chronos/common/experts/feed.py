"""The expert side of a running model as one object: ids in, leases out; facts in, policy inside.

A `Feed` owns the slots of a packed model's experts (an `Arena`, which a backend made), the reads
that fill them, the policy that ranks them and the prefetcher. A pass of the model is one `step`:

    with feed.step(work) as step:
        model(tokens, source=step)      # layers call step.acquire(layer, experts)

A step of one token closes with a report of what the token needed and what became of reads ahead. A
prompt may take several steps; it is over, once, with the piece that is its last. Everything runs on
the caller's thread under one lock. Not covered: how bytes reach a slot (`tiers`), what is worth
reading ahead (`prefetch`), what a record means (the backend).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from chronos.common.disk.io import CachedIO, FileIO
from chronos.common.disk.reader import READERS, RangedReader
from chronos.common.errors import UsageError
from chronos.common.experts.known import ANNOUNCED, KnownAhead
from chronos.common.experts.lease import Lease
from chronos.common.experts.prefetch import LOOKAHEAD, Prefetcher
from chronos.common.experts.residency import NOBODY, DecayedLFU, Policy
from chronos.common.experts.stats import PRELOAD, LayerStats, StoreStats
from chronos.common.experts.tier import Tier
from chronos.common.experts.tiers import CopyEngine, SlotTier, StagedTier
from chronos.common.layout.folder import slots_within
from chronos.common.model.weights import Key
from chronos.common.text.sampling import Work

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record

Floats = npt.NDArray[np.floating]
Foreseen = Floats | Sequence[int] | Callable[[], Floats]
# Shorter pieces of a prompt use few experts of a layer, and forecasts of single tokens are wrong
# half the time.
_PROMPT_AHEAD = 16


@dataclass(frozen=True)
class FeedOptions:
    """How a model's experts are held.

    top_k: experts one token needs in a layer; less room than that is a BudgetError. warm_bytes:
    host memory for experts behind the slots of an accelerator. device: the backend's name of where
    the slots are. miss: "exact" waits for an expert, "fallback" lets the shared ones stand in for
    one that is not ready. verify: check the digest of every record read. readers: threads that
    read. direct: past the page cache, where the file system can.
    """

    top_k: int = 1
    warm_bytes: int = 0
    device: Any = None
    miss: str = "exact"
    verify: bool = True
    readers: int = READERS
    direct: bool = True

    def __post_init__(self) -> None:
        if self.miss not in ("exact", "fallback"):
            raise UsageError(f"miss must be exact or fallback, not {self.miss!r}")


class Arena(Protocol):
    """A backend's memory for experts: `slots` that are computed with, and where reads land."""

    slots: int
    host: memoryview  # page-aligned, of whole records; the slots themselves, where `copies` is None
    copies: CopyEngine | None  # from host slots to slots, where these lie elsewhere

    def view(self, slot: int, record: Record) -> Any:
        """What a layer computes with, of a record that is in a slot."""

    def copy_rate(self) -> float | None:
        """Bytes per second from host memory to the slots, measured now; None where reads land
        there."""

    def close(self) -> None:
        """Give memory back that is not freed by itself. Safe to call twice."""


class OpenArena(Protocol):
    """A backend's `open_arena`. Raises BudgetError, UsageError or ShapeMismatch before anything is
    allocated."""

    def __call__(self, layout: Layout, slots: int, options: FeedOptions) -> Arena: ...


class Source(Protocol):
    """What a layer of a model asks for its experts: a step of a feed, or the model itself."""

    @property
    def exact(self) -> bool:
        """Whether every expert comes: no lease yields None."""

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease: ...

    def record_fallback(self, weight: float) -> None:
        """Routing weight that a shared expert stood in for."""

    def wants(self, source: str) -> bool:
        """Whether forecasts of a source could lead to a read now: spares making them if not."""

    def foresee(self, source: str, scores: Foreseen, layer: int = -1) -> None:
        """What a source of forecasts expects to be needed; see `FeedStep.foresee`."""

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """What a layer will need for the next token, of what is not always in memory: exact. Told
        before the layer acquires for this token, where `wants(ANNOUNCED)`."""


class FeedStep:
    """One pass of the model. Layers acquire in order; each lease ends with the next one's start."""

    def __init__(self, feed: Feed, work: Sequence[Work]) -> None:
        self._feed, self.work = feed, work
        self._lease: Lease | None = None
        self.finished: list[tuple[Work, npt.NDArray[Any] | None]] = []
        self._deferred: Callable[[], Floats] | None = None
        # By layer and place: what was announced a token before, for this one.
        self._due: dict[tuple[int, int], Sequence[int]] = {}
        self.in_prompt = any(map(feed.reads_prompt, work))

    def acquire(
        self, layer: int, experts: Sequence[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> Lease:
        """Start the missing reads now; a lease on the experts, those that are here first.

        by: what each work of several needs of them, by its place. Ends the lease before: the caller
        has computed with what it held. Raises what the read of a needed expert raised, and the feed
        stays usable.
        """
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        token = self.work and not self.in_prompt
        if self._feed.known is not None and token and not (by or self._feed.unread):
            # Most of a token's layers: nothing to wait for and, until the next asks, to be read.
            here = self._feed.tier.present(layer, experts)
            if here is not None:
                self._lease = here
                self._count_announced(self._feed.known, layer, {0: experts}, here)
                return here
        needs = {self.work[place].seq: wanted for place, wanted in by.items()} if by else NOBODY
        self._lease = lease = self._feed.tier.acquire(layer, experts, needs, exact=self._feed.exact)
        if self._feed.known is not None and token:
            self._count_announced(self._feed.known, layer, by or {0: experts}, lease)
        self._feed.read_announced()
        if (ahead := self._feed.ahead) is not None:
            ahead.acquired(layer, experts)
            if self._deferred is not None:
                probs, self._deferred = self._deferred, None
                ahead.forecast(probs())
        return lease

    @property
    def exact(self) -> bool:
        return self._feed.exact

    def record_fallback(self, weight: float) -> None:
        self._feed.tier.ledger.total.fallback_weight += weight

    def wants(self, source: str) -> bool:
        """Whether forecasts of a source could lead to a read now: spares making them if not."""
        ahead = self._feed.ahead
        if source == ANNOUNCED:
            return self._feed.known is not None and bool(self.work)
        if ahead is None or not self.work:
            return False
        if self.in_prompt:
            return source == LOOKAHEAD and len(self.work[0].tokens) >= _PROMPT_AHEAD
        return ahead.wanted(source)

    def foresee(self, source: str, scores: Foreseen, layer: int = -1) -> None:
        """What a source expects to be needed.

        LOOKAHEAD, of a token: router probabilities [J, L, E] after block 0, or a function that
        gives them once the next layer's ids have come. Of a prompt's piece: how much each expert is
        expected to be used, [L, E]. NEXT_GATE: the experts of `layer`, best first.
        """
        ahead = self._feed.ahead
        if ahead is None:
            return
        if callable(scores):
            self._deferred = scores
        elif source != LOOKAHEAD:
            ahead.forecast_next(layer, [int(expert) for expert in scores])
        elif self.in_prompt:
            ahead.forecast_prompt(np.asarray(scores))
        else:
            ahead.forecast(np.asarray(scores))

    def announce(self, layer: int, experts: Sequence[int], place: int = 0) -> None:
        """What a layer will need for the next token, of what is not always in memory: exact. place:
        of the work whose token that is. It is read once the layer has acquired."""
        assert self._feed.known is not None
        seq = self.work[place].seq
        with self._feed.tier.lock:
            before = self._due[layer, place] = self._feed.known.announce(seq, layer, experts)
        if before != tuple(experts):
            self._feed.unread += [(layer, expert) for expert in experts]

    def _count_announced(
        self, known: KnownAhead, layer: int, by: Mapping[int, Collection[int]], lease: Lease
    ) -> None:
        """by: what each work needs, by its place; several count what they share once. lease: on
        all of it, whose reads have just begun."""
        counters = self._feed.tier.ledger.total
        if len(by) == 1 and not lease.waits and not self._feed.tier.moving and self._feed.exact:
            ((place, experts),) = by.items()
            needed = known.streamed(layer, experts)
            if tuple(needed) == self._due.get((layer, place), ()):
                counters.announced += len(needed)
                return
        said, unsaid = set[int](), set[int]()
        for place, experts in by.items():
            due = self._due.get((layer, place), ())
            for expert in known.streamed(layer, experts):
                (said if expert in due else unsaid).add(expert)
        said -= unsaid
        tier = self._feed.tier
        counters.announced += len(said)
        counters.unannounced += len(unsaid)
        if lease.waits or tier.moving or not self._feed.exact:
            counters.announced_late += len(said) - len(tier.ready(layer, said))

    def done(self, work: Work, ids_TLK: npt.NDArray[Any] | None = None) -> None:
        """A sequence's work went through. ids_TLK: the experts that its tokens were routed to, in
        order; asked for of prompts."""
        self.finished.append((work, ids_TLK))

    def __enter__(self) -> FeedStep:
        self._feed._begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        if kind is None:
            self._feed._end(self)
            if self._feed.known is not None:
                self._feed.unread = self._feed.known.announced  # those evicted meanwhile too
                self._feed.read_announced()


class Feed:
    """The experts of a layout within a number of bytes. Close it, or use it as a context."""

    def __init__(
        self,
        layout: Layout,
        capacity_bytes: int,
        arena: Arena,
        reader: RangedReader,
        options: FeedOptions,
        *,
        policy: Policy | None = None,
        prefetch: bool = False,
    ) -> None:
        """reader, arena: the feed's from now on. prefetch: whether what the policy or a model
        forecasts or announces is read ahead."""
        self.layout, self.exact = layout, options.miss == "exact"
        self._capacity_bytes, self._warm_bytes = capacity_bytes, options.warm_bytes
        self._arena, self._reader = arena, reader
        self.predictor = policy.name if policy is not None else None  # that ranks the experts
        self.tier = make_tier(layout, arena, reader, policy, verify=options.verify)
        self.ahead: Prefetcher | None = None
        self.known = policy if isinstance(policy, KnownAhead) else None
        self.unread: list[Key] = []  # announced, no slot found yet
        self._reads_announced = prefetch and self.known is not None
        self._top_k = options.top_k
        if prefetch and self.known is None:
            rate = arena.copy_rate()
            self.ahead = Prefetcher(
                self.tier,
                shape=(layout.num_layers, layout.num_experts),
                top_k=options.top_k,
                record_bytes=layout.record_nbytes,
                capacity_bytes=capacity_bytes,
                copy_s=layout.record_nbytes / rate if rate else 0.0,
                reader=reader,
                policy=policy,
            )
        # Of sequences whose prompt is being read: the pieces that went through.
        self._prompts: dict[int, list[tuple[Sequence[int], npt.NDArray[Any]]]] = {}
        self._decoding: set[int] = set()  # sequences whose prompt is over
        self._reading_prompt = False
        if self.known is not None:
            self.tier.stays = frozenset(self.known.resident)
            if self._reads_announced:
                self.preload(self.known.resident)

    @property
    def slots(self) -> int:
        """Experts that can be held at once."""
        return self._arena.slots

    @property
    def room(self) -> int:
        """Experts of one layer that can be held at once, whatever else stays."""
        always = 0 if self.known is None else len(self.known.resident)
        return max(self._top_k, self.slots - always)

    def step(self, work: Sequence[Work] = ()) -> FeedStep:
        """One pass of the model, as a context. Without `work` it is neither prompt nor token: needs
        are met and counted, and say nothing of what comes next."""
        return FeedStep(self, work)

    def preload(self, keys: Sequence[Key]) -> int:
        """Read records ahead of any need, best first, as far as there is room. Returns how many."""
        return len(self.tier.prefetch(keys, PRELOAD))

    def resident(self) -> frozenset[Key]:
        return self.tier.resident()

    def held(self) -> frozenset[Key]:
        """What needs no read: resident, or in host memory behind an accelerator's slots."""
        return self.tier.held()

    def copy_rate(self) -> float | None:
        """Bytes per second from host memory to the slots, measured now; None where reads land
        there."""
        return self._arena.copy_rate()

    def stats(self) -> StoreStats:
        """Counters since the feed was opened, and gauges of its memory."""
        stats = self.tier.stats()
        stats.capacity_bytes, stats.warm_capacity_bytes = self._capacity_bytes, self._warm_bytes
        return stats

    def layer_stats(self) -> list[dict[str, Any]]:
        """`layer`, hits, late, misses, bytes_read and stall_s of each layer with experts, since the
        feed was opened, as JSON. What no layer asked for yet is 0."""
        found = self.tier.layer_stats()
        return [
            {"layer": layer, **dataclasses.asdict(found.get(layer, LayerStats()))}
            for layer in self.layout.moe_layers
        ]

    def prefetch_stats(self) -> dict[str, Any]:
        """What each source of forecasts came to since the feed was opened, as JSON."""
        return {} if self.ahead is None else {"prefetch": self.ahead.to_json()}

    def drop(self, seq: int) -> None:
        """A sequence is given up, perhaps in the middle of its prompt."""
        self._decoding.discard(seq)
        pieces = self._prompts.pop(seq, None)
        if pieces is not None and not self._prompts and self._reading_prompt:
            self._reading_prompt = False
            self.tier.end_prompt(self._routing(pieces), seq)
        self.tier.tell(lambda policy: policy.drop(seq))

    def fork(self, seq: int, new: int) -> None:
        """A sequence `new` begins where `seq` is."""
        if seq in self._decoding:
            self._decoding.add(new)
        if seq in self._prompts:
            self._prompts[new] = [*self._prompts[seq]]
        self.tier.tell(lambda policy: policy.fork(seq, new))

    def reads_prompt(self, work: Work) -> bool:
        """Whether a sequence's next tokens are a piece of a prompt."""
        decoding = work.last and work.seq in self._decoding and not work.prompt
        return len(work.tokens) > 1 or not decoding

    def close(self) -> None:
        """End the reads and free the memory, whatever fails of it. Safe to call twice."""
        with ExitStack() as stack:
            stack.callback(self._arena.close)
            stack.callback(self._reader.close)
            stack.callback(self.tier.close)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a step calls.

    def read_announced(self) -> None:
        """Read what is announced, as far as there are slots that hold nothing certain. Most of it
        is here already: that it is certain keeps it, and the tier need not be asked."""
        lookup, unread = self.tier.residency.lookup, self.unread
        self.unread = []
        if not unread or not self._reads_announced:
            return
        with self.tier.lock:
            self.tier.residency.reconsider()  # announcements change ranks
            absent = [key for key in unread if lookup(key) is None]
        if absent:
            self.tier.prefetch(absent, ANNOUNCED)
            self.unread = [key for key in absent if lookup(key) is None]

    def _begin(self, step: FeedStep) -> None:
        if step.in_prompt:
            for work in filter(self.reads_prompt, step.work):
                self._prompts.setdefault(work.seq, [])
            if not self._reading_prompt:
                self.tier.begin_prompt()
            self._reading_prompt = True
        elif step.work:
            seqs = [work.seq for work in step.work]
            self.tier.tell(lambda policy: policy.follow(seqs))
            if self.ahead is not None:
                self.ahead.begin_token(*(work.tokens[0] for work in step.work))

    def _end(self, step: FeedStep) -> None:
        if not step.finished:
            return
        if not step.in_prompt:  # several sequences' tokens are one that needs what all need
            report = self.tier.end_token()
            if self.ahead is not None:
                self.ahead.end_token(report)
            return
        for work, ids_TLK in step.finished:
            if not self.reads_prompt(work):
                continue
            pieces = self._prompts[work.seq]
            if ids_TLK is not None:
                pieces.append((work.tokens, ids_TLK))
            if work.last:
                self._decoding.add(work.seq)
                self._end_prompt(work.seq, self._prompts.pop(work.seq))

    def _end_prompt(self, seq: int, pieces: list[tuple[Sequence[int], npt.NDArray[Any]]]) -> None:
        self._reading_prompt = False
        self.tier.end_prompt(self._routing(pieces), seq)
        if self.ahead is not None:
            for tokens, ids_TLK in pieces:
                self.ahead.learn(tokens, ids_TLK)
            self.ahead.end_prompt()

    def _routing(self, pieces: list[tuple[Sequence[int], npt.NDArray[Any]]]) -> npt.NDArray[Any]:
        """Ids [T, L, K] of a prompt, T = 0 where none of it went through."""
        none = np.empty((0, len(self.layout.moe_layers), 0), np.intp)
        return np.concatenate([ids_TLK for _, ids_TLK in pieces]) if pieces else none


def make_tier(
    layout: Layout,
    arena: Arena,
    reader: RangedReader,
    policy: Policy | None = None,
    *,
    verify: bool = True,
) -> Tier:
    """The tier, or the two of them, over an arena."""
    policy = policy or DecayedLFU(layout.num_layers, layout.num_experts)
    # Memory behind a device's may be too small for all that must stay there.
    behind = policy
    if isinstance(policy, KnownAhead) and arena.copies is not None:
        behind = policy.counts
    host_slots = len(arena.host) // layout.record_nbytes
    view = arena.view if arena.copies is None else None
    host = SlotTier(layout, host_slots, reader, behind, arena=arena.host, view=view, verify=verify)
    if arena.copies is None:
        return host
    return StagedTier(host, arena.slots, arena.copies, policy, arena.view)


def open_feed(
    open_arena: OpenArena,
    layout: Layout,
    capacity_bytes: int,
    options: FeedOptions | None = None,
    *,
    policy: Policy | None = None,
    prefetch: bool = False,
    reader: RangedReader | None = None,
    io: FileIO | None = None,
) -> Feed:
    """A feed over memory that a backend opens. io: how the experts' files are read.

    Raises BudgetError (naming the minimum), UsageError or ShapeMismatch before anything is
    allocated.
    """
    options = options or FeedOptions()
    slots = room_for(layout, capacity_bytes, options.top_k, policy)
    with ExitStack() as undo:
        arena = open_arena(layout, slots, options)
        undo.callback(arena.close)
        if reader is None:
            reads = io or (FileIO() if options.direct else CachedIO())
            reader = RangedReader(options.readers, io=reads)
        undo.callback(reader.close)
        feed = Feed(
            layout, capacity_bytes, arena, reader, options, policy=policy, prefetch=prefetch
        )
        undo.pop_all()
    return feed


def room_for(layout: Layout, capacity_bytes: int, top_k: int, policy: Policy | None) -> int:
    """Slots in a number of bytes. Raises BudgetError, naming the minimum, where a token has no room
    in them, or what a model announces could not be kept until it is used."""
    if not isinstance(policy, KnownAhead):
        return slots_within(layout, capacity_bytes, top_k)
    why = "what always stays and what is known to come take"
    return slots_within(layout, capacity_bytes, policy.least, why=why)
