"""Whether something pays, told by the clock: tokens with it and tokens without it, in turns.

What reading ahead costs does not show in any count of bytes: on a CPU the reads take time from the
products they run beside, and two threads of a product wait for the one that was interrupted. So the
last word is the time of a token. Blocks alternate until both ways are known; then the better one
runs, and the other gets a block in nine, since text, disk and neighbours change. Numbers in, a yes
or no out: no clock here.
"""

from __future__ import annotations

from collections import deque

BLOCK = 8  # tokens of one way at a time
_CARRIED = 2  # tokens at the beginning of a block that the other way still decides
_ENOUGH = 24  # tokens of each way before they are compared: four blocks
_LASTING = 8  # blocks of the better way for one of the other
_OUTLIERS = 0.05  # share of the slowest tokens left out: the system's, not ours
_TIE = 1.005  # less than this apart says nothing: on


class Duel:
    """`on` says which way the next token is to go; `end_token` how long it took."""

    def __init__(self) -> None:
        self.on = True
        self._times: dict[bool, deque[float]] = {way: deque(maxlen=64) for way in (True, False)}
        self._token, self._length = 0, BLOCK

    def end_token(self, seconds: float) -> None:
        self._token += 1
        if self._token > _CARRIED:
            self._times[self.on].append(seconds)
        if self._token >= self._length:
            self._next_block()

    @property
    def better(self) -> bool | None:
        """The way that took less time; None before both are known."""
        if min(map(len, self._times.values())) < _ENOUGH:
            return None
        return _typical(self._times[True]) <= _TIE * _typical(self._times[False])

    def _next_block(self) -> None:
        better = self.better
        if better is None or self.on == better:
            self.on, self._length = not self.on, BLOCK
        else:
            self.on, self._length = better, _LASTING * BLOCK
        self._token = 0


def _typical(times: deque[float]) -> float:
    kept = sorted(times)[: len(times) - int(_OUTLIERS * len(times))]
    return sum(kept) / len(kept)
