"""The order of training passes: what is kept at the turn, and what is read ahead."""

from __future__ import annotations

import random

import pytest

from chronos.common.experts.passes import UpAndDown
from chronos.common.experts.residency import LRU, DecayedLFU, Policy, Residency

LAYERS, EXPERTS = 3, 4
EVERY = range(EXPERTS)


def order(layers: int = LAYERS) -> UpAndDown:
    return UpAndDown(range(layers), (layers, EXPERTS))


def passes(policy: Policy, slots: int, count: int, used: list[list[int]]) -> list[int]:
    """Hits of each pass, up and down, without reading ahead."""
    residency, found = Residency(len(used), EXPERTS, slots, policy), []
    for _ in range(count):
        if isinstance(policy, UpAndDown):
            policy.begin()
        hits = 0
        for layer in [*range(len(used)), *reversed(range(len(used)))]:
            policy.observe(layer, used[layer])
            residency.reconsider()
            for expert in used[layer]:
                if residency.lookup((layer, expert)) is not None:
                    hits += 1
                    continue
                admission = residency.admit((layer, expert), demand=True)
                assert admission is not None
                residency.mark_ready(admission.slot)
        found.append(hits)
    return found


def belady(slots: int, count: int, used: list[list[int]]) -> int:
    """Hits of MIN over all passes, which knows every use."""
    once = [*range(len(used)), *reversed(range(len(used)))] * count
    uses = [(layer, expert) for layer in once for expert in used[layer]]
    held: set[tuple[int, int]] = set()
    hits = 0
    for at, key in enumerate(uses):
        if key in held:
            hits += 1
            continue
        if len(held) == slots:
            rest = uses[at:]
            held.remove(max(held, key=lambda k: rest.index(k) if k in rest else len(uses)))
        held.add(key)
    return hits


@pytest.mark.parametrize("slots", [4, 6, 8, 12])
def test_the_share_that_fits_is_saved_at_each_turn(slots: int) -> None:
    used = [list(EVERY)] * LAYERS
    first, second = passes(order(), slots, 2, used)
    assert first == slots  # at the upper turn
    assert second == (2 * slots if slots < LAYERS * EXPERTS else 2 * LAYERS * EXPERTS)
    assert first + second == belady(slots, 2, used)
    others = [
        passes(policy, slots, 2, used)
        for policy in (LRU(LAYERS, EXPERTS), DecayedLFU(LAYERS, EXPERTS))
    ]
    assert all(sum(found) <= first + second for found in others)


def test_it_is_nearly_min_where_layers_use_some_experts() -> None:
    draw = random.Random(1)
    for slots in (4, 5, 7):
        used = [sorted(draw.sample(range(EXPERTS), 3)) for _ in range(5)]
        policy = UpAndDown(range(5), (5, EXPERTS))
        assert sum(passes(policy, slots, 4, used)) >= 0.9 * belady(slots, 4, used)


def test_what_comes_next_is_known_on_the_way_down() -> None:
    policy = order(4)
    policy.begin()
    for layer in range(4):
        policy.observe(layer, [layer, 0])
        assert policy.upcoming() == []  # nothing is known of what lies above
    policy.observe(3, [3, 0])
    assert policy.upcoming() == [(2, 2), (2, 0), (1, 1), (1, 0)]
    policy.observe(0, [0])
    assert policy.upcoming() == []
    policy.begin()
    policy.observe(0, [0])
    assert policy.upcoming() == [(1, 1), (1, 0), (2, 2), (2, 0)]  # as in the pass before


def test_a_pass_that_stops_half_way_down_is_followed_by_one_up() -> None:
    policy = order()
    policy.begin()
    for layer in (0, 1, 2, 2, 1):
        policy.observe(layer, EVERY)
    policy.begin()
    policy.observe(0, EVERY)
    policy.observe(1, EVERY)
    assert policy.priority[2, 0] > policy.priority[1, 0] > policy.priority[0, 0]


def test_layers_without_experts_are_left_out() -> None:
    policy = UpAndDown([1, 3], (4, EXPERTS))
    policy.begin()
    for layer in (1, 3):
        policy.observe(layer, [2])
    policy.observe(3, [2])
    assert policy.upcoming() == [(1, 2)]
