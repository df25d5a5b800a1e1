"""Orders of trials by several values, all of which are better when they are less."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]


def dominates(one: Point, other: Point) -> bool:
    """Whether no value of it is worse and one is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def front(points: Sequence[Point]) -> list[int]:
    """The places of those that no other one dominates."""
    return [at for at, own in enumerate(points) if not any(dominates(p, own) for p in points)]


def order(points: Sequence[Point]) -> list[int]:
    """Places from the best on: by how often the front must be taken off until they are in it, then
    by the first value."""
    left, ordered = list(range(len(points))), list[int]()
    while left:
        best = [left[at] for at in front([points[place] for place in left])]
        ordered += sorted(best, key=lambda place: points[place][0])
        left = [place for place in left if place not in best]
    return ordered


def goes_on(own: Point, others: Sequence[Point], eta: int) -> bool:
    """Successive halving that waits for nobody (ASHA, 1810.05934, in its stopping form): whether a
    trial is among the best 1/eta of all that have come to its rung so far, itself included."""
    place = order([own, *others]).index(0)
    return place < math.ceil((len(others) + 1) / eta)
