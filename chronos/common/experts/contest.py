"""Which way of running a token is fastest, told by the clock: each in turns, then the best.

What forecasts and reads ahead cost shows in no count of bytes: on a CPU they take time from the
products they run beside, and two threads of a product wait for the one that was interrupted. So
the last word is the time of a token. Blocks of tokens alternate until every way is known; then the
best one runs, and another gets a block in nine, since text, disk and neighbours change. As long as
the same way stays best the others get ever fewer: each of their blocks leaves the cache to the next
one, so one in nine cost up to a tenth of all time where the best way was clear. Numbers in, a way
out: no clock here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

BLOCK = 16  # tokens of one way at a time
_CARRIED = 6  # tokens at the beginning of a block that the way before still decides
_ENOUGH = 20  # tokens of each way before they are compared: two blocks
_LASTING, _LONGEST = 8, 64  # blocks of the best way for one of another: twice as many each time
_OUTLIERS = 0.05  # share of the slowest tokens left out: the system's, not ours

Token = tuple[float, float]  # seconds, news


class Contest:
    """`way` says how the next token is to run, 0 to `ways` - 1; `end_token` how long it took."""

    def __init__(self, ways: int) -> None:
        assert ways > 1
        self.way = 0
        self._tokens: list[deque[Token]] = [deque(maxlen=64) for _ in range(ways)]
        self._token, self._length, self._other = 0, BLOCK, 0
        self._winner, self._lasting = -1, _LASTING

    def end_token(self, seconds: float, news: float) -> None:
        """news: how long ago the token's experts were needed last, in any one unit."""
        self._token += 1
        if self._token > _CARRIED:
            self._tokens[self.way].append((seconds, news))
        if self._token >= self._length:
            self._next_block()

    @property
    def best(self) -> int | None:
        """The way that took the least time; None before all are known.

        The last one does least beside computing, so it runs unless another is faster by more than
        one standard error: text and machine alone set two ways apart by 5 % (20 tokens of each).
        """
        if min(map(len, self._tokens)) < _ENOUGH:
            return None
        seconds, error = _compared(self._tokens)
        fastest = seconds.index(min(seconds))
        return fastest if seconds[fastest] + error < seconds[-1] else len(seconds) - 1

    def _next_block(self) -> None:
        best, ways = self.best, len(self._tokens)
        self._token, self._length = 0, BLOCK
        if best is None:
            self.way = (self.way + 1) % ways
        elif self.way != best:
            stays = best == self._winner
            self._lasting = min(2 * self._lasting, _LONGEST) if stays else _LASTING
            self.way = self._winner = best
            self._length = self._lasting * BLOCK
        else:
            others = [way for way in range(ways) if way != best]
            self._other = (self._other + 1) % len(others)
            self.way = others[self._other]


def _compared(tokens: Sequence[Collection[Token]]) -> tuple[list[float], float]:
    """Seconds of a token of average news in each way, and the standard error of the difference
    between two: one line per way, all of one slope."""
    kept = [sorted(way)[: len(way) - int(_OUTLIERS * len(way))] for way in tokens]
    ways = np.repeat(np.eye(len(kept)), [len(way) for way in kept], axis=0)
    seconds, news = np.array([token for way in kept for token in way]).T
    known = np.c_[ways, news - news.mean()]
    lines = np.linalg.lstsq(known, seconds, rcond=None)[0]
    spread = float(np.std(seconds - known @ lines))
    error = spread * float(np.sqrt(2.0 / min(map(len, kept))))
    return [float(at) for at in lines[:-1]], error
