"""Forward passes side by side: what is read once, what stays apart, and who hears of an error."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import pytest

from chronos.common.errors import StoreError
from chronos.common.experts.residency import NOBODY
from chronos.common.experts.together import Lane, together

Forward = Callable[[Any], Any]
By = Mapping[int, Collection[int]]


class Taken:
    """A lease: what was yielded last is overwritten when the next is asked for, unless kept."""

    waits = True

    def __init__(self, items: Generator[tuple[int, Any], bool, None]) -> None:
        self._items, self._kept = items, None

    def __iter__(self) -> Taken:
        return self

    def __next__(self) -> tuple[int, Any]:
        kept, self._kept = self._kept, False
        return next(self._items) if kept is None else self._items.send(kept)

    def keep(self) -> None:
        self._kept = True


class Disk:
    """Experts that read "(layer, expert)" until the next is asked for."""

    def __init__(self, broken: Sequence[tuple[int, int]] = (), absent: Sequence[int] = ()) -> None:
        self.broken, self.absent = set(broken), set(absent)
        self.acquired: list[tuple[int, list[int]]] = []
        self.reads: list[tuple[int, int]] = []
        self.fallbacks: list[float] = []
        self.exact = not absent

    def acquire(self, layer: int, experts: Sequence[int], by: By = NOBODY) -> Taken:
        self.acquired.append((layer, list(experts)))
        if layer > 8:
            raise StoreError(f"no layer {layer}")
        return Taken(self._items(layer, list(experts)))

    def _items(self, layer: int, experts: list[int]) -> Generator[tuple[int, Any], bool, None]:
        for expert in experts[::-1]:  # in another order than asked for
            if (layer, expert) in self.broken:
                raise StoreError(f"cannot read {layer, expert}")
            if expert in self.absent:
                yield expert, None
                continue
            self.reads.append((layer, expert))
            view = [f"{layer}.{expert}"]
            kept = yield expert, view
            if not kept:
                view[0] = "overwritten"

    def record_fallback(self, weight: float) -> None:
        self.fallbacks.append(weight)


def forward(layers: dict[int, list[int]], log: list[str] | None = None, name: str = "") -> Forward:
    """Takes the experts of some layers; returns what it saw of them, in the order of its ids."""

    def run(source: Any) -> list[str]:
        seen = []
        for layer, experts in layers.items():
            ready = source.acquire(layer, experts)
            if log is not None:
                log.append(f"{name} waits")
            found = {}
            for expert, view in ready:
                if view is None:
                    source.record_fallback(0.5)
                    found[expert] = "shared"
                else:
                    found[expert] = str(view[0])
            seen += [found[expert] for expert in experts]
        return seen

    return run


PLANS = [
    {0: [1, 2], 1: [3, 4], 2: [0, 1]},
    {0: [2, 3], 1: [4, 3], 2: [1, 0]},
    {0: [2], 1: [9], 2: [7, 8, 1]},
]


def alone(plan: dict[int, list[int]]) -> list[str]:
    seen: list[str] = forward(plan)(Disk())
    return seen


@pytest.mark.parametrize("room", [None, 1, 2, 4, 100])
def test_one_that_rests_sees_what_it_sees_alone(room: int | None) -> None:
    """It takes so many layers in a pass, with whatever others are in it, from another source each
    time; those that do not rest see what they see alone too."""
    slow: Any = Lane(forward(PLANS[0]), layers=1)
    for turn, other in enumerate(PLANS):
        slow, found = together(Disk(), [slow, forward(other)], room)
        assert found == alone(other)
        assert isinstance(slow, Lane) == (turn < len(PLANS) - 1)
    assert slow == alone(PLANS[0])


@pytest.mark.parametrize("layers", [1, 2])
def test_one_that_rests_can_be_given_up_or_hurried(layers: int) -> None:
    left = []

    def leaving(source: Any) -> Any:
        try:
            return forward(PLANS[0])(source)
        finally:
            left.append(True)

    lanes = [Lane(leaving, layers=layers) for _ in range(2)]
    assert together(Disk(), lanes) == lanes and not left
    lanes[0].close()
    assert left == [True]
    lanes[1].layers = 0
    assert together(Disk(), [lanes[1]]) == [alone(PLANS[0])]


@pytest.mark.parametrize("room", [None, 1, 2, 4, 100])
def test_each_sees_what_it_sees_alone(room: int | None) -> None:
    found = together(Disk(), [forward(plan) for plan in PLANS], room)
    assert found == [alone(plan) for plan in PLANS]


def test_the_union_of_a_layer_is_acquired_and_read_once() -> None:
    disk = Disk()
    together(disk, [forward(plan) for plan in PLANS])
    assert disk.acquired == [(0, [1, 2, 3]), (1, [3, 4, 9]), (2, [0, 1, 7, 8])]
    assert len(disk.reads) == len(set(disk.reads)) == 10


@pytest.mark.parametrize("room", [None, 3])
def test_who_needs_what_is_told_by_place(room: int | None) -> None:
    """Of those that are served together, in every part of what they take in turns."""
    told: dict[tuple[int, int], list[int]] = {}

    class Told(Disk):
        def acquire(self, layer: int, experts: Sequence[int], by: By = NOBODY) -> Taken:
            assert set(experts) == {expert for needs in by.values() for expert in needs}
            told.update({(layer, place): [*needs] for place, needs in by.items()})
            return super().acquire(layer, experts, by)

    together(Told(), [forward(plan) for plan in PLANS], room)
    assert told == {(at, n): PLANS[n][at] for at in range(3) for n in range(3)}


def test_without_room_for_the_union_they_take_turns() -> None:
    """Where experts are held until all of a forward's are there (MLX), it must have room."""
    disk = Disk()
    together(disk, [forward(plan) for plan in PLANS], room=3)
    assert disk.acquired == [
        (0, [1, 2, 3]), (1, [3, 4, 9]), (2, [0, 1]), (2, [7, 8, 1]),
    ]  # fmt: skip


def test_those_wider_than_the_room_take_what_they_need_one_by_one_together() -> None:
    disk, wide = Disk(), {0: [1, 2, 3, 4]}
    found = together(
        disk, [forward(wide), forward({0: [1, 5]}), forward({0: [2, 3, 4, 6]})], room=3
    )
    assert found == [alone(wide), ["0.1", "0.5"], alone({0: [2, 3, 4, 6]})]
    assert disk.acquired == [(0, [1, 5]), (0, [1, 2, 3, 4, 6])]


def test_what_is_held_is_used_before_the_next_acquire() -> None:
    """A forward that took all it asked for runs on until it asks again: nothing that it holds is
    needed when the next group begins."""
    log: list[str] = []

    class Noting(Disk):
        def acquire(self, layer: int, experts: Sequence[int], by: By = NOBODY) -> Taken:
            log.append(f"acquire {layer}")
            return super().acquire(layer, experts, by)

    def holds(name: str, plan: dict[int, list[int]]) -> Forward:
        def run(source: Any) -> None:
            for layer, experts in plan.items():
                taken = source.acquire(layer, experts).all()
                assert [taken[e] for e in experts] == [[f"{layer}.{e}"] for e in experts]
                log.append(f"{name} computes {layer} with {len(taken)}")

        return run

    forwards = [holds("a", {0: [1, 2], 1: [3]}), holds("b", {0: [3, 4], 1: [3]})]
    together(Noting(), forwards, room=2)
    assert log == [
        "acquire 0", "a computes 0 with 2", "acquire 0", "b computes 0 with 2",
        "acquire 1", "a computes 1 with 1", "b computes 1 with 1",
    ]  # fmt: skip


def test_reads_have_begun_when_acquire_returns_to_each() -> None:
    log: list[str] = []

    class Noting(Disk):
        def _items(self, layer: int, experts: list[int]) -> Generator[tuple[int, Any], bool, None]:
            for item in super()._items(layer, experts):
                log.append(f"expert {item[0]}")
                yield item

        def acquire(self, layer: int, experts: Sequence[int], by: By = NOBODY) -> Taken:
            log.append("reads begin")
            return super().acquire(layer, experts, by)

    together(Noting(), [forward({0: [1]}, log, "a"), forward({0: [1, 2]}, log, "b")])
    assert log == ["reads begin", "a waits", "b waits", "expert 2", "expert 1"]


def test_layers_that_one_does_not_visit_and_passes_of_other_lengths() -> None:
    disk = Disk()
    plans: list[dict[int, list[int]]] = [{0: [1], 1: [2], 3: [5]}, {1: [2]}, {}, {3: [5, 6]}]
    found = together(disk, [forward(plan) for plan in plans])
    assert found == [alone(plan) for plan in plans]
    assert disk.acquired == [(0, [1]), (1, [2]), (3, [5, 6])]


def test_one_that_goes_over_the_layers_several_times() -> None:
    """Pieces of a prompt that a library takes token by token, beside a single token."""

    def twice(source: Any) -> list[str]:
        return [*forward(PLANS[0])(source), *forward(PLANS[0])(source)]

    found = together(Disk(), [twice, forward(PLANS[1])])
    assert found == [2 * alone(PLANS[0]), alone(PLANS[1])]


def test_experts_that_are_not_there_fall_back_for_each() -> None:
    disk = Disk(absent=[2])
    found = together(disk, [forward({0: [1, 2]}), forward({0: [2, 3]})])
    assert found == [["0.1", "shared"], ["shared", "0.3"]]
    assert disk.fallbacks == [0.5, 0.5]


def test_an_error_of_one_is_its_own_outcome() -> None:
    def fails(source: Any) -> None:
        next(iter(source.acquire(0, [1, 2])))
        raise ZeroDivisionError

    found = together(Disk(), [forward(PLANS[0]), fails, forward(PLANS[1])])
    assert (found[0], found[2]) == (alone(PLANS[0]), alone(PLANS[1]))
    assert isinstance(found[1], ZeroDivisionError)


def test_a_read_that_fails_fails_those_who_need_it() -> None:
    plans = [{0: [1, 2], 1: [1]}, {0: [2, 3]}, {0: [4, 1], 1: [5]}]
    disk = Disk(broken=[(1, 5), (0, 3)])
    found = together(disk, [forward(plan) for plan in plans])
    assert found[0] == alone(plans[0])
    assert isinstance(found[1], StoreError) and "(0, 3)" in str(found[1])
    assert isinstance(found[2], StoreError) and "(1, 5)" in str(found[2])


def test_what_one_holds_is_not_kept_behind_a_failed_read() -> None:
    """A new acquire ends the holding: who has kept some experts of the layer fails too."""

    def holds(experts: list[int]) -> Forward:
        return lambda source: source.acquire(0, experts).all()

    forwards = [holds([2]), holds([3]), holds([2, 4])]  # 4 comes first
    found = together(Disk(broken=[(0, 3)]), forwards, room=9)
    assert [isinstance(outcome, StoreError) for outcome in found] == [False, True, True]
    assert found[0] == {2: ["0.2"]}
    forwards = [forward({0: [2]}), forward({0: [3]}), forward({0: [2, 4]})]
    found = together(Disk(broken=[(0, 3)]), forwards)
    assert [isinstance(outcome, StoreError) for outcome in found] == [False, True, False]
    assert found[2] == ["0.2", "0.4"]


def test_a_refused_acquire_is_that_of_those_who_asked() -> None:
    found = together(Disk(), [forward({0: [1], 9: [1]}), forward({0: [1], 3: [1]})])
    assert isinstance(found[0], StoreError)
    assert found[1] == ["0.1", "3.1"]


def test_experts_that_never_come_end_the_iteration_as_they_do_alone() -> None:
    class Forgetful(Disk):
        def acquire(self, layer: int, experts: Sequence[int], by: By = NOBODY) -> Taken:
            return super().acquire(layer, list(experts)[:-1], by)

    found = together(Forgetful(), [forward({0: [1, 2]}), forward({0: [1]})])
    assert isinstance(found[0], KeyError)
    assert found[1] == ["0.1"]


def test_an_interrupt_ends_all_and_each_leaves_through_its_finally() -> None:
    left = []

    def waits(source: Any) -> None:
        try:
            list(source.acquire(1, [1]))
        finally:
            left.append("waits")

    def stops(source: Any) -> None:
        list(source.acquire(0, [1]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(Disk(), [waits, stops, waits])
    assert left == ["waits", "waits"]


def test_forecasts_are_not_asked_for() -> None:
    def asks(source: Any) -> tuple[bool, bool, bool]:
        lease = source.acquire(0, [1])
        source.foresee("lookahead", [1.0])
        return source.exact, source.wants("lookahead"), lease.waits

    assert together(Disk(), [asks, asks]) == 2 * [(True, False, True)]


def test_context_variables_are_each_ones_own() -> None:
    now = contextvars.ContextVar("now", default="outside")

    def sets(name: str) -> Forward:
        def run(source: Any) -> list[str]:
            before = now.get()
            now.set(name)
            list(source.acquire(0, [1]))
            return [before, now.get()]

        return run

    now.set("caller")
    assert together(Disk(), [sets("a"), sets("b")]) == [["caller", "a"], ["caller", "b"]]
    assert now.get() == "caller"


def test_nothing_to_do() -> None:
    assert together(Disk(), []) == []
