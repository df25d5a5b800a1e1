"""Which way of running a token is fastest, told by the clock: each in turns, then the best.

What forecasts and reads ahead cost shows in no count of bytes: on a CPU they take time from the
products they run beside, and two threads of a product wait for the one that was interrupted. So
the last word is the time of a token. Blocks of tokens alternate until every way is known; then the
best one runs, and another gets a block in nine, since text, disk and neighbours change. Numbers
in, a way out: no clock here.
"""

from __future__ import annotations

from collections import deque

BLOCK = 16  # tokens of one way at a time
_CARRIED = 6  # tokens at the beginning of a block that the way before still decides
_ENOUGH = 20  # tokens of each way before they are compared: two blocks
_LASTING = 8  # blocks of the best way for one of another
_OUTLIERS = 0.05  # share of the slowest tokens left out: the system's, not ours
_TIE = 1.005  # less than this apart says nothing: the earlier way


class Contest:
    """`way` says how the next token is to run, 0 to `ways` - 1; `end_token` how long it took."""

    def __init__(self, ways: int) -> None:
        assert ways > 1
        self.way = 0
        self._times: list[deque[float]] = [deque(maxlen=64) for _ in range(ways)]
        self._token, self._length, self._other = 0, BLOCK, 0

    def end_token(self, seconds: float) -> None:
        self._token += 1
        if self._token > _CARRIED:
            self._times[self.way].append(seconds)
        if self._token >= self._length:
            self._next_block()

    @property
    def best(self) -> int | None:
        """The way that took the least time; None before all are known."""
        if min(map(len, self._times)) < _ENOUGH:
            return None
        found = [_typical(times) * _TIE**way for way, times in enumerate(self._times)]
        return found.index(min(found))

    def _next_block(self) -> None:
        best, ways = self.best, len(self._times)
        self._token, self._length = 0, BLOCK
        if best is None:
            self.way = (self.way + 1) % ways
        elif self.way != best:
            self.way, self._length = best, _LASTING * BLOCK
        else:
            others = [way for way in range(ways) if way != best]
            self._other = (self._other + 1) % len(others)
            self.way = others[self._other]


def _typical(times: deque[float]) -> float:
    kept = sorted(times)[: len(times) - int(_OUTLIERS * len(times))]
    return sum(kept) / len(kept)
