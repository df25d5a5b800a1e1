"""Whether forecasts make tokens faster, told by the clock: a bandit with two arms.

A token runs with forecasts, or without them and without reads ahead. What forecasts cost shows in
no count of bytes: on a CPU they take time from the products they run beside. So the time of a token
decides. Forecasts are the prior: they run first, and are left only where the other arm is faster by
one standard error. Exploring has a price, since a block of one arm leaves its cache to the next; so
the better arm is exploited ever longer between two blocks of the other, which is still tried now
and then because text, disk and neighbours change.
Numbers in, an arm out: no clock and no ids here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

BLOCK = 16  # tokens of one arm at a time
FORECASTS, PLAIN = 0, 1
_CARRIED = 6  # tokens at the beginning of a block that the arm before still decides
_FIRST = 4  # blocks with forecasts before the other arm is explored
# Blocks of the better arm between two explorations: after it has changed, and at most. The number
# doubles each time the same arm stays better.
_EXPLOIT, _LONGEST = 8, 64
_KEPT = 64  # tokens of each arm that are compared
_OUTLIERS = 0.05  # share of the slowest tokens left out: the system made them slow

Token = tuple[float, float]  # seconds, reuse distance


class Bandit:
    """`arm` says how the next token is to run, FORECASTS or PLAIN; `end_token` how long it took."""

    def __init__(self) -> None:
        self.arm = self.best = FORECASTS
        self._tokens: tuple[deque[Token], ...] = deque(maxlen=_KEPT), deque(maxlen=_KEPT)
        self._token, self._length = 0, _FIRST * BLOCK
        self._exploit = _EXPLOIT  # blocks

    def end_token(self, seconds: float, reuse_distance: float) -> None:
        """reuse_distance: how long ago the token's experts were needed last, in any one unit. It
        tells an easy text from a fast arm."""
        self._token += 1
        if self._token > _CARRIED:
            self._tokens[self.arm].append((seconds, reuse_distance))
        if self._token >= self._length:
            self._next_block()

    def _next_block(self) -> None:
        self._token, self._length = 0, BLOCK
        if self.arm == self.best:
            self.arm = PLAIN if self.best == FORECASTS else FORECASTS
            return
        (ahead_s, plain_s), error_s = _compared(self._tokens)
        best = FORECASTS if ahead_s <= plain_s + error_s else PLAIN
        self._exploit = min(2 * self._exploit, _LONGEST) if best == self.best else _EXPLOIT
        self.arm = self.best = best
        self._length = self._exploit * BLOCK


def _compared(tokens: Sequence[Collection[Token]]) -> tuple[list[float], float]:
    """Seconds of a token of average reuse distance in each arm, and the standard error of the
    difference between two: one line per arm, all of one slope."""
    kept = [sorted(arm)[: len(arm) - int(_OUTLIERS * len(arm))] for arm in tokens]
    arms = np.repeat(np.eye(len(kept)), [len(arm) for arm in kept], axis=0)
    seconds, distance = np.array([token for arm in kept for token in arm]).T
    known = np.c_[arms, distance - distance.mean()]
    lines = np.linalg.lstsq(known, seconds, rcond=None)[0]
    spread = float(np.std(seconds - known @ lines))
    error = spread * float(np.sqrt(2.0 / min(map(len, kept))))
    return [float(at) for at in lines[:-1]], error
