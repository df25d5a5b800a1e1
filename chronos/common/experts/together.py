"""Several forward passes in one pass over the layers: reads are shared, and so are weights.

Each forward runs unchanged, as a greenlet with a source of its own. When all have asked for the
experts of a layer, their union is acquired once, and each expert goes to every forward that needs
it before the next is asked for. So an expert is read once however many sequences need it, with
fewer slots than the union too. A product that gives each row the same bits in any company is
computed for all who wait for the same weight (`jointly`), which then passes through the processor
once. So what a forward computes is what it computes alone, bit for bit.
All forwards take turns in the caller's thread. One that would take long goes on for some layers of
a pass and rests, where it asks for experts and holds none, until the next. Knows no framework, no
cache and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol

from greenlet import getcurrent, greenlet

from chronos.common.experts.known import ANNOUNCED

if TYPE_CHECKING:
    from chronos.common.experts.lease import Lease


class Source(Protocol):
    """What is used of a step of a feed."""

    @property
    def exact(self) -> bool: ...
    def acquire(
        self, layer: int, experts: Sequence[int], by: Mapping[int, Collection[int]]
    ) -> Lease:
        """by: what each forward needs of them, by its place."""

    def record_fallback(self, weight: float) -> None: ...
    def wants(self, source: str) -> bool: ...
    def announce(self, layer: int, experts: Sequence[int], place: int = 0) -> None:
        """place: of the forward whose next token needs them."""


Forward = Callable[[Any], Any]
# Rows to their products with a weight, each of which has the bits it has alone.
Product = Callable[[Sequence[Any]], Sequence[Any]]


def jointly(weight: Hashable, row: Any, product: Product) -> Any:
    """A row's product with a weight, made with those of all forwards that come to it meanwhile;
    outside of `together` with no other. What `product` raises is raised here."""
    lane = getattr(getcurrent(), "lane", None)
    return product([row])[0] if lane is None else lane.multiply(weight, row, product)


def together(
    source: Source | None, forwards: Sequence[Forward | Lane], room: int | None = None
) -> list[Any]:
    """Call each of `forwards` with a source to acquire experts from; what they return, in order.
    A `Lane` that is not over at the end of its layers is its own outcome, for a later call.

    A forward that raises an Exception has that as its outcome, and so has one whose experts could
    not be had; the others go on. Anything else that is raised (KeyboardInterrupt) ends all.

    source: None where forwards have their experts themselves. room: experts that can be held at
    once, where forwards take all of a lease before they compute. Those that need more than that
    between them then take turns.
    """
    lanes = [each if isinstance(each, Lane) else Lane(each) for each in forwards]
    try:
        for place, lane in enumerate(lanes):
            lane.enter(source, place)
        _multiply(lanes)
        while asking := [lane for lane in lanes if lane.asked is not None and not lane.rests]:
            layer = min(lane.layer for lane in asking)  # the others wait to be caught up with
            for group in _groups([lane for lane in asking if lane.layer == layer], room):
                assert source is not None
                _serve(source, layer, group)
    except BaseException:
        for lane in lanes:
            lane.close()
        raise
    return [lane if lane.asked is not None else lane.outcome for lane in lanes]


class Lane:
    """One forward: it runs until it asks for experts, or waits for the next one of them or for a
    product."""

    def __init__(self, forward: Forward, layers: int = 0) -> None:
        """layers: with experts, for which it goes on in one pass; 0 for all."""
        self._forward, self.layers = forward, layers
        self.source: Source | None = None
        self.place = -1
        self._left = 0
        self.layer = -1
        self.asked: list[int] | None = None  # `acquire` was called and has not returned
        self.pending: set[int] = set()  # asked for, not taken yet
        self.holds = False  # it keeps what it took of this layer until it asks again
        self.lease: Lease | None = None  # what it is served from
        # What it waits for to be multiplied: a weight, its row, and how.
        self.product: tuple[Hashable, Any, Product] | None = None
        self.outcome: Any = None
        self._greenlet = greenlet(self._run)
        self._greenlet.lane = self  # for `jointly`
        self._greenlet.gr_context = copy_context()

    def enter(self, source: Source | None, place: int) -> None:
        """A pass begins, in which it is at a place: run to where it asks, if it is not there."""
        self.source, self.place, self._left = source, place, self.layers
        if self.asked is None:
            self.switch()

    @property
    def rests(self) -> bool:
        """Whether it waits for the next pass."""
        return self.layers > 0 and self._left == 0

    def _run(self) -> None:
        try:
            self.outcome = self._forward(None if self.source is None else _Seen(self))
        except Exception as error:
            self.outcome = error
        self.asked, self.pending = None, set()

    # Called by the forward.

    def ask(self, layer: int, experts: Sequence[int]) -> None:
        self.layer, self.asked, self.pending = layer, list(experts), set()
        self.holds = False
        self.wait()

    def wait(self) -> Any:
        return self._greenlet.parent.switch()

    def multiply(self, weight: Hashable, row: Any, product: Product) -> Any:
        self.product = weight, row, product
        return self.wait()

    # Called by whoever serves it.

    @property
    def wanted(self) -> Iterable[int]:
        return self.pending if self.asked is None else self.asked

    def begin(self, lease: Lease) -> None:
        """`acquire` returns: reads have begun, and there may be something else to compute."""
        self.lease = lease
        if self.asked is not None:
            self._left -= 1
            self.pending, self.asked = set(self.asked), None
            self.switch()

    def take(self, expert: int, view: Any) -> None:
        """Hand over an expert, if it is needed here."""
        if expert in self.pending:
            self.pending.remove(expert)
            self.switch((expert, view))

    def end(self) -> None:
        """There are no more experts than those taken."""
        if self.pending:
            self.pending.clear()
            self.switch(None)

    def multiplied(self, out: Any) -> None:
        """The product it waits for, or the error that came of it."""
        self.product = None
        if isinstance(out, Exception):
            self._greenlet.throw(out)
        else:
            self.switch(out)

    def fail(self, error: Exception) -> None:
        self.asked, self.pending = None, set()
        self._greenlet.throw(error)

    def switch(self, *item: Any) -> None:
        self._greenlet.switch(*item)

    def close(self) -> None:
        """Leave a forward that has not ended, through its own `finally`."""
        if self._greenlet:
            self._greenlet.throw()


class _Seen:
    """The source as a forward sees it. What a model forecasts of itself is of one sequence, so it
    is not asked for; what it announces is kept by sequence."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def _source(self) -> Source:
        assert self._lane.source is not None
        return self._lane.source

    @property
    def exact(self) -> bool:
        return self._source.exact

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        self._lane.ask(layer, experts)
        return _Portion(self._lane)

    def record_fallback(self, weight: float) -> None:
        self._source.record_fallback(weight)

    def wants(self, source: str) -> bool:
        return source == ANNOUNCED and self._source.wants(source)

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        self._source.announce(layer, experts, self._lane.place)

    def foresee(self, source: str, scores: Any, layer: int = -1) -> None:
        pass


class _Portion:
    """What one forward gets of a lease on the union."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def waits(self) -> bool:
        return self._lane.lease is not None and self._lane.lease.waits

    def __iter__(self) -> _Portion:
        return self

    def __next__(self) -> tuple[int, Any]:
        item: tuple[int, Any] | None = self._lane.wait() if self._lane.pending else None
        if item is None:
            raise StopIteration
        return item

    def all(self) -> dict[int, Any]:
        views = {}
        for expert, view in self:
            views[expert] = view
            self.keep()
        return views

    def keep(self) -> None:
        self._lane.holds = True
        if self._lane.lease is not None:
            self._lane.lease.keep()

    def close(self) -> None:
        """The lease itself is closed by whoever made it."""
        self._lane.pending.clear()


def _serve(source: Source, layer: int, lanes: Sequence[Lane]) -> None:
    """Give lanes that wait at a layer what they asked for."""
    begun = False
    try:
        by = {lane.place: list(lane.wanted) for lane in lanes}
        union = dict.fromkeys(expert for wanted in by.values() for expert in wanted)
        lease = source.acquire(layer, list(union), by)
        begun = True
        for lane in lanes:
            lane.begin(lease)
        _multiply(lanes)
        for expert, view in lease:
            for lane in lanes:
                lane.take(expert, view)
            _multiply(lanes)
    except Exception as error:  # the source's: those of a forward are its outcome
        _part(source, layer, [x for x in lanes if x.pending or not begun], error)
        return
    for lane in lanes:
        lane.end()
    _multiply(lanes)


def _multiply(lanes: Sequence[Lane]) -> None:
    """Give lanes the products they wait for, the rows of one weight at once, until none waits."""
    while waiting := [lane for lane in lanes if lane.product is not None]:
        groups: dict[Hashable, list[tuple[Lane, Any, Product]]] = {}
        for lane in waiting:
            assert lane.product is not None
            weight, row, product = lane.product
            groups.setdefault(weight, []).append((lane, row, product))
        for group in groups.values():
            (_, _, product), rows = group[0], [row for _, row, _ in group]
            outs: Sequence[Any]
            try:
                outs = product(rows)
            except Exception as error:
                outs = [error] * len(group)
            for (lane, _, _), out in zip(group, outs, strict=True):
                lane.multiplied(out)


def _part(source: Source, layer: int, lanes: Sequence[Lane], error: Exception) -> None:
    """An expert cannot be had: serve each alone, so that only those that need it fail. What one
    holds is its own until the next acquire only, so one that holds some fails too."""
    for lane in lanes:
        if len(lanes) == 1 or lane.holds:
            lane.fail(error)
    _multiply(lanes)
    for lane in lanes:
        if lane.asked is not None or lane.pending:
            _serve(source, layer, [lane])


def _groups(lanes: Sequence[Lane], room: int | None) -> list[list[Lane]]:
    """Lanes that are served at once: all, or as many as there is room for what they need. Those
    that have no room for all they need, even alone, take it one by one."""
    if room is None:
        return [list(lanes)]
    groups: list[list[Lane]] = []
    union: set[int] = set()
    wide = [lane for lane in lanes if len(set(lane.wanted)) > room]
    for lane in [lane for lane in lanes if lane not in wide]:
        joined = union | set(lane.wanted)
        if groups and len(joined) <= room:
            groups[-1].append(lane)
            union = joined
        else:
            groups.append([lane])
            union = set(lane.wanted)
    return [*groups, wide] if wide else groups
