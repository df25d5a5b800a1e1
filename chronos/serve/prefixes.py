"""Beginnings of prompts that are kept, so that the next prompt with one reads only what follows.

Each is a sequence of its own in the session, forked where a whole piece of a prompt ended: from
there on the bits are those of a cold prompt. Which pieces: a prompt's last whole one, where the
conversation goes on, and where a prompt leaves one that is kept, which is then what both begin
with. The least recently used are given up first. On the thread of the session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chronos.common.text.sampling import PIECE

if TYPE_CHECKING:
    from chronos.backends.protocol import Session

Ids = npt.NDArray[np.int64]


class Prefixes:
    """`nbytes` and `len` say what is held."""

    def __init__(self, session: Session, most_bytes: int, numbers: Iterator[int]) -> None:
        """most_bytes: of all that is kept; 0 keeps nothing. numbers: of new sequences."""
        self._session, self._most, self._numbers = session, most_bytes, numbers
        self._kept: dict[int, tuple[Ids, int]] = {}  # by sequence, the least recently used first
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, prompt: Sequence[int], seq: int) -> int:
        """Begin sequence `seq` with the longest beginning of the prompt that is there; returns its
        tokens, fewer than the prompt has, and 0 where there is none."""
        ids, found = np.array(prompt, np.int64), -1
        for number, (kept, _) in self._kept.items():
            longer = found < 0 or len(kept) > len(self._kept[found][0])
            if len(kept) < len(ids) and longer and _common(kept, ids) == len(kept):
                found = number
        if found < 0:
            return 0
        self._kept[found] = self._kept.pop(found)  # used last
        self._session.fork(found, seq)
        return len(self._kept[found][0])

    def places(self, prompt: Sequence[int]) -> set[int]:
        """Where in this prompt a beginning is worth keeping, in tokens."""
        if not self._most:
            return set()
        ids, last = np.array(prompt, np.int64), (len(prompt) - 1) // PIECE * PIECE
        shared = [_common(kept, ids) // PIECE * PIECE for kept, _ in self._kept.values()]
        return {min(last, max(shared, default=0)), last} - {0}

    def keep(self, seq: int, prompt: Sequence[int], tokens: int) -> None:
        """Keep what sequence `seq` has, the first `tokens` of its prompt, if there is room."""
        ids = np.array(prompt[:tokens], np.int64)
        if any(np.array_equal(kept, ids) for kept, _ in self._kept.values()):
            return
        nbytes = self._session.nbytes(seq)
        if nbytes > self._most:
            return
        while self.nbytes + nbytes > self._most:
            self._drop(next(iter(self._kept)))
        number = next(self._numbers)
        self._session.fork(seq, number)
        self._kept[number] = ids, nbytes
        self.nbytes += nbytes

    def clear(self) -> None:
        for number in list(self._kept):
            self._drop(number)

    def _drop(self, number: int) -> None:
        _, nbytes = self._kept.pop(number)
        self.nbytes -= nbytes
        self._session.drop(number)


def _common(left: Ids, right: Ids) -> int:
    """How many ids both begin with."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size
