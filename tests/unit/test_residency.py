"""Slots, pins, victims and the two policies, without files or threads."""

from __future__ import annotations

import random

import numpy as np
import pytest

from chronos.common.experts.residency import LRU, DecayedLFU, Policy, Residency, State

L, E = 3, 8


def open_residency(slots: int, policy: Policy | None = None, **options: int) -> Residency:
    return Residency(L, E, slots, policy or LRU(L, E), **options)


def load(residency: Residency, *keys: tuple[int, int], demand: bool = True) -> list[int]:
    """Admit and finish keys; a demand is observed first, as a tier does."""
    slots = []
    for key in keys:
        if demand:
            residency.policy.observe(key[0], [key[1]])
        admission = residency.admit(key, demand=demand)
        assert admission is not None
        residency.mark_ready(admission.slot)
        slots.append(admission.slot)
    return slots


class Forecast:
    """A policy that ranks absent keys too."""

    forecasts = True

    def __init__(self) -> None:
        self.priority = np.zeros((L, E))

    def observe(self, layer: int, experts: object, by: object = None) -> None: ...
    def reconsider(self) -> None: ...
    def end_token(self) -> None: ...


def test_a_slot_goes_from_empty_to_loading_to_ready_and_back() -> None:
    residency = open_residency(1)
    admission = residency.admit((1, 2), demand=True)
    assert admission == (0, None, False)
    assert residency.state(0) is State.LOADING and residency.lookup((1, 2)) == 0
    assert residency.ready == {} and residency.live == 1
    residency.mark_ready(0)
    assert residency.state(0) is State.READY and residency.ready == {(1, 2): 0}
    assert residency.admit((2, 2), demand=True) == (0, (1, 2), False)
    residency.mark_failed(0)
    assert residency.state(0) is State.EMPTY and residency.lookup((2, 2)) is None
    assert (residency.live, residency.peak) == (0, 1)


def test_the_least_recently_used_goes_first() -> None:
    residency = open_residency(2)
    load(residency, (0, 1), (2, 5))
    residency.policy.observe(0, [1])
    admission = residency.admit((1, 1), demand=True)
    assert admission is not None and admission.evicted == (2, 5)


def test_frequency_fades() -> None:
    policy = DecayedLFU(L, E, decay=0.5)
    for _ in range(3):
        policy.observe(0, [1, 2])
    policy.observe(0, [2])
    assert policy.priority[0, 2] == 4.0 > policy.priority[0, 1] == 3.0
    for _ in range(2):
        policy.end_token()
    policy.observe(1, [7])
    policy.observe(1, [7])
    assert policy.priority[0, 2] == 1.0 < policy.priority[1, 7] == 2.0


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        DecayedLFU(L, E, decay)


def test_pinned_and_loading_slots_are_never_victims() -> None:
    residency = open_residency(3)
    first, second = load(residency, (0, 1), (0, 2))
    residency.admit((0, 3), demand=True)
    residency.pin(first)
    residency.pin(first)
    residency.pin(second)
    assert residency.admit((0, 4), demand=True) is None
    residency.unpin(first)
    assert residency.admit((0, 4), demand=True) is None
    residency.unpin(first)
    assert not residency.pinned(first)
    admission = residency.admit((0, 4), demand=True)
    assert admission is not None and admission.evicted == (0, 1)


def test_a_failed_load_drops_the_pins_on_it() -> None:
    residency = open_residency(1)
    residency.admit((0, 1), demand=True)
    residency.pin(0)
    residency.mark_failed(0)
    assert not residency.pinned(0)
    load(residency, (0, 2))
    assert residency.admit((0, 3), demand=True) is not None


def test_nothing_is_admitted_twice_or_out_of_range() -> None:
    residency = open_residency(2)
    load(residency, (0, 1))
    for key in ((0, 1), (L, 0), (0, E), (-1, 0), (0, -1)):
        with pytest.raises(AssertionError):
            residency.admit(key, demand=True)


def test_prefetches_spare_each_other_and_half_of_the_slots() -> None:
    residency = open_residency(4)
    load(residency, (0, 0), (0, 1), (0, 2), (0, 3))
    load(residency, (1, 0), (1, 1), demand=False)
    assert residency.admit((1, 2), demand=False) is None
    assert set(residency.ready) == {(0, 2), (0, 3), (1, 0), (1, 1)}


def test_empty_slots_are_free_for_any_number_of_prefetches() -> None:
    residency = open_residency(4)
    load(residency, (1, 0), (1, 1), (1, 2), (1, 3), demand=False)
    assert residency.admit((1, 4), demand=False) is None


def test_a_demand_takes_unprotected_slots_first_then_prefetched_ones() -> None:
    residency = open_residency(2)
    load(residency, (1, 0), demand=False)
    load(residency, (0, 0), (0, 1))
    assert set(residency.ready) == {(1, 0), (0, 1)}
    residency.pin(residency.ready[0, 1])
    admission = residency.admit((0, 2), demand=True)
    assert admission is not None and admission.evicted == (1, 0) and admission.wasted


def test_a_prefetch_that_was_used_is_not_wasted() -> None:
    residency = open_residency(1)
    (slot,) = load(residency, (1, 0), demand=False)
    residency.pin(slot)
    residency.unpin(slot)
    assert residency.unused == set()
    admission = residency.admit((0, 0), demand=True)
    assert admission is not None and not admission.wasted


def test_protection_ends() -> None:
    residency = open_residency(2, patience=2)
    load(residency, (0, 0), (0, 1))
    load(residency, (1, 0), demand=False)
    residency.end_token()
    assert residency.admit((1, 1), demand=False) is None
    residency.end_token()
    admission = residency.admit((1, 1), demand=False)
    assert admission is not None and admission.wasted and admission.evicted == (1, 0)


def test_what_is_expected_is_spared() -> None:
    residency = open_residency(2)
    first, _ = load(residency, (0, 0), (0, 1))
    residency.protect(first)
    admission = residency.admit((1, 1), demand=False)
    assert admission is not None and admission.evicted == (0, 1)


def test_under_a_forecast_a_prefetch_must_outrank_its_victim() -> None:
    policy = Forecast()
    residency = open_residency(2, policy)
    policy.priority[0, :4] = [0.5, 0.7, 0.5, 0.9]
    load(residency, (0, 0), (0, 1))
    assert residency.admit((0, 2), demand=False) is None
    admission = residency.admit((0, 3), demand=False)
    assert admission is not None and admission.evicted == (0, 0)


@pytest.mark.parametrize("make", [LRU, DecayedLFU])
def test_random_work_keeps_the_books(make: type[LRU] | type[DecayedLFU]) -> None:
    draw, slots = random.Random(0), 5
    residency = open_residency(slots, make(L, E))
    loading: list[int] = []
    pinned: list[int] = []
    for _ in range(3000):
        key = (draw.randrange(L), draw.randrange(E))
        held = {residency.key(slot) for slot in pinned + loading}
        match draw.randrange(6):
            case 0 | 1 if residency.lookup(key) is None:
                admission = residency.admit(key, demand=draw.random() < 0.6)
                if admission is not None:
                    assert admission.evicted is None or admission.evicted not in held
                    loading.append(admission.slot)
            case 2 if loading:
                slot = loading.pop(draw.randrange(len(loading)))
                (residency.mark_ready if draw.random() < 0.8 else residency.mark_failed)(slot)
            case 3 if residency.ready and len(pinned) < slots:
                pinned.append(draw.choice(list(residency.ready.values())))
                residency.pin(pinned[-1])
                residency.policy.observe(key[0], [key[1]])
            case 4 if pinned:
                residency.unpin(pinned.pop(draw.randrange(len(pinned))))
            case 5:
                residency.end_token()
                residency.policy.end_token()
        assert residency.live == len(residency.ready) + len(loading) <= residency.peak <= slots
        assert len(set(residency.ready.values())) == len(residency.ready)
        assert all(residency.state(slot) is State.READY for slot in residency.ready.values())
        assert all(residency.key(slot) in residency.ready for slot in pinned)
