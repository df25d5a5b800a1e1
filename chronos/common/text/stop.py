"""Stop strings in text that arrives in pieces, whatever the cuts between tokens.

Text that may be the beginning of a stop string is held back until it is known not to be one, so
nothing shown ever has to be taken back. Knows no tokens and no model.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopText:
    """`push` pieces, show what it returns, end when `found`; `which` is the stop string then."""

    def __init__(self, stop: Iterable[str]) -> None:
        self.stop = tuple(stop)
        self.found, self.which = False, ""
        self._held = ""
        self._beginnings = {text[:size] for text in self.stop for size in range(1, len(text))}
        self._longest = max(map(len, self._beginnings), default=0)

    def push(self, piece: str) -> str:
        """The text that is final now: ends before a stop string, leaves out what may begin one."""
        if not self.stop:
            return piece
        self._held += piece
        starts = [(at, stop) for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if starts:
            at, self.which = min(starts)
            self.found = True
            shown, self._held = self._held[:at], ""
            return shown
        keep = len(self._held) - self._beginning()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def flush(self) -> str:
        """What is still held, once no more text will come; "" after a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for size in range(min(self._longest, len(self._held)), 0, -1):
            if self._held[-size:] in self._beginnings:
                return size
        return 0
