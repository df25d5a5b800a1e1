"""Forward passes side by side: what is read once, what stays apart, and who hears of an error."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from chronos.common.errors import StoreError
from chronos.common.experts.together import together

Forward = Callable[[Any], Any]


class Disk:
    """Experts that read "(layer, expert)" until the next is asked for."""

    def __init__(self, broken: Sequence[tuple[int, int]] = (), absent: Sequence[int] = ()) -> None:
        self.broken, self.absent = set(broken), set(absent)
        self.acquired: list[tuple[int, list[int]]] = []
        self.reads: list[tuple[int, int]] = []
        self.fallbacks: list[float] = []
        self.label = "a disk"

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        self.acquired.append((layer, list(experts)))
        if layer > 8:
            raise StoreError(f"no layer {layer}")
        return self._items(layer, list(experts))

    def _items(self, layer: int, experts: list[int]) -> Iterator[tuple[int, Any]]:
        for expert in experts[::-1]:  # in another order than asked for
            if (layer, expert) in self.broken:
                raise StoreError(f"cannot read {layer, expert}")
            if expert in self.absent:
                yield expert, None
                continue
            self.reads.append((layer, expert))
            view = [f"{layer}.{expert}"]
            yield expert, view
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
def test_each_sees_what_it_sees_alone(room: int | None) -> None:
    found = together(Disk(), [forward(plan) for plan in PLANS], room)
    assert found == [alone(plan) for plan in PLANS]


def test_the_union_of_a_layer_is_acquired_and_read_once() -> None:
    disk = Disk()
    together(disk, [forward(plan) for plan in PLANS])
    assert disk.acquired == [(0, [1, 2, 3]), (1, [3, 4, 9]), (2, [0, 1, 7, 8])]
    assert len(disk.reads) == len(set(disk.reads)) == 10


def test_without_room_for_the_union_they_take_turns() -> None:
    """Where experts are held until all of a forward's are there (MLX), it must have room."""
    disk = Disk()
    together(disk, [forward(plan) for plan in PLANS], room=3)
    assert disk.acquired == [
        (0, [1, 2, 3]), (1, [3, 4, 9]), (2, [0, 1]), (2, [7, 8, 1]),
    ]  # fmt: skip


def test_what_is_held_is_used_before_the_next_acquire() -> None:
    """A forward that took all it asked for runs on until it asks again: nothing that it holds is
    needed when the next group begins."""
    log: list[str] = []

    class Noting(Disk):
        def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
            log.append(f"acquire {layer}")
            return super().acquire(layer, experts)

    def holds(name: str, plan: dict[int, list[int]]) -> Forward:
        def run(source: Any) -> None:
            for layer, experts in plan.items():
                taken = list(source.acquire(layer, experts))
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
        def _items(self, layer: int, experts: list[int]) -> Iterator[tuple[int, Any]]:
            for item in super()._items(layer, experts):
                log.append(f"expert {item[0]}")
                yield item

        def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
            log.append("reads begin")
            return self._items(layer, list(experts))

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


@pytest.mark.parametrize("room", [None, 100])
def test_a_read_that_fails_fails_those_who_need_it(room: int | None) -> None:
    plans = [{0: [1, 2], 1: [1]}, {0: [2, 3]}, {0: [4, 1], 1: [5]}]
    disk = Disk(broken=[(1, 5), (0, 3)])
    found = together(disk, [forward(plan) for plan in plans], room)
    assert isinstance(found[1], StoreError) and "(0, 3)" in str(found[1])
    assert isinstance(found[2], StoreError)  # of layer 1, or of 0 where it held what it took
    if room is None:
        assert found[0] == alone(plans[0])
        assert "(1, 5)" in str(found[2])


def test_what_one_holds_is_not_kept_behind_a_failed_read() -> None:
    """With `room` a new acquire ends the holding: who has some experts of a layer fails too."""
    forwards = [forward({0: [2]}), forward({0: [3]}), forward({0: [2, 4]})]  # 4 comes first
    found = together(Disk(broken=[(0, 3)]), forwards, room=9)
    assert [isinstance(outcome, StoreError) for outcome in found] == [False, True, True]
    found = together(Disk(broken=[(0, 3)]), forwards)
    assert [isinstance(outcome, StoreError) for outcome in found] == [False, True, False]
    assert found[2] == ["0.2", "0.4"]


def test_a_refused_acquire_is_that_of_those_who_asked() -> None:
    found = together(Disk(), [forward({0: [1], 9: [1]}), forward({0: [1], 3: [1]})])
    assert isinstance(found[0], StoreError)
    assert found[1] == ["0.1", "3.1"]


def test_experts_that_never_come_end_the_iteration_as_they_do_alone() -> None:
    class Forgetful(Disk):
        def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
            return super().acquire(layer, list(experts)[:-1])

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


def test_the_source_is_otherwise_its_own() -> None:
    found = together(Disk(), [lambda s: s.label, lambda s: hasattr(s, "places")])
    assert found == ["a disk", False]


def test_an_expert_that_one_replaced_is_what_the_next_get() -> None:
    """Packed weights: the memory they were made of is given back."""

    class Replacing(Disk):
        def replace(self, layer: int, expert: int, view: Any) -> None:
            self.reads.append((-layer, -expert))

    def packs(source: Any) -> list[Any]:
        seen = []
        for expert, view in source.acquire(1, [2]):
            seen.append(view)
            if isinstance(view, list):
                view[0] = "freed"
                source.replace(1, expert, "packed")
        return seen

    disk = Replacing()
    assert together(disk, [packs, packs, packs]) == [[["overwritten"]], ["packed"], ["packed"]]
    assert disk.reads == [(1, 2), (-1, -2)]


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
