"""A time limit for a measurement: how much of it is left, and how much of the work fits in.

The pace of a machine is known only once it works, so nothing is planned beforehand: work goes on
piece by piece until it is done or the time is up. It knows no engine and measures nothing itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple


class Timebox:
    """So many seconds from now on."""

    def __init__(
        self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """clock: seconds, for tests."""
        self.seconds, self._clock, self._begin = seconds, clock, clock()

    @property
    def elapsed_s(self) -> float:
        """Returns the seconds since it began."""
        return self._clock() - self._begin

    @property
    def left_s(self) -> float:
        """Returns the seconds left, never less than 0."""
        return max(0.0, self.seconds - self.elapsed_s)

    @property
    def over(self) -> bool:
        return self.left_s == 0.0

    def part(self, share: float, least_s: float = 0.0) -> Timebox:
        """Returns a box of its own from now on: this share of what is left, `least_s` at least."""
        return Timebox(max(share * self.left_s, least_s), self._clock)

    def fitting(self, done: int, least: int, most: int) -> int:
        """Returns how many of `most` pieces will be done when the time is up, `least` at least, if
        `done` of them have taken the time since it began."""
        if not done or math.isinf(self.seconds) or self.elapsed_s <= 0:
            return most
        pace = done / self.elapsed_s
        return min(most, max(least, done, int(pace * self.seconds)))


class Count(NamedTuple):
    """How many pieces are worked: between the two, as time allows."""

    least: int
    most: int

    def up_to(self, most: int) -> Count:
        return Count(min(self.least, most), min(self.most, most))


class Pace:
    """Warm-up and counted tokens of one group of runs within a time box.

    The first third of the box is for warming up; what that leaves is for counting.
    """

    def __init__(self, warmup: Count, tokens: Count, box: Timebox) -> None:
        self._wanted, self._box = (warmup, tokens), box
        self._done = [0, 0]
        self._counted = False

    @property
    def tokens(self) -> int:
        """Returns how many are done, warm-up included."""
        return sum(self._done)

    @property
    def expected(self) -> int:
        """Returns how many there will be in all."""
        least, most = map(sum, zip(*self._wanted, strict=True))
        if self._counted:  # the warm-up may have ended early
            most += self._done[0] - self._wanted[0].most
        return self._box.fitting(self.tokens, least, most)

    def next(self, counted: bool, most: int) -> int:
        """Returns how many tokens come next, `most` at most; 0: go on to the next part."""
        self._counted = counted
        wanted, done = self._wanted[counted], self._done[counted]
        share = 1.0 if counted else 1 / 3
        over = self._box.elapsed_s >= share * self._box.seconds
        return max(0, min(most, (wanted.least if over else wanted.most) - done))

    def done(self, tokens: int) -> None:
        self._done[self._counted] += tokens
