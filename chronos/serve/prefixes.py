"""Beginnings of prompts that are kept, so that the next prompt with one reads only what follows.

Each is a sequence of its own in the session, forked where a whole piece of a prompt ended: from
there on the bits are those of a cold prompt. Which pieces: a prompt's last whole one, where the
conversation goes on, and where a prompt leaves one that is kept, which is then what both begin
with. The least recently used are given up first. With files they are written to disk when somebody
calls `write`, and read from there where a longer one lies there. On the thread of the session.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chronos.common.errors import ShapeMismatch
from chronos.common.text.sampling import PIECE

if TYPE_CHECKING:
    from chronos.backends.protocol import Session
    from chronos.serve.prefix_files import PrefixFiles

_log = logging.getLogger("chronos")
Ids = npt.NDArray[np.int64]


class Prefixes:
    """`nbytes` and `len` say what is held in memory."""

    def __init__(
        self,
        session: Session,
        most_bytes: int,
        numbers: Iterator[int],
        files: PrefixFiles | None = None,
    ) -> None:
        """most_bytes: of all that is kept in memory; 0 keeps nothing. numbers: of new sequences.
        files: where they are on disk."""
        self._session, self._most, self._numbers = session, most_bytes, numbers
        self._files = files if most_bytes else None
        self._kept: dict[int, tuple[Ids, int]] = {}  # by sequence, the least recently used first
        self._unwritten: list[int] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, prompt: Sequence[int], seq: int) -> int:
        """Begin sequence `seq` with the longest beginning of the prompt that is there; returns its
        tokens, fewer than the prompt has, and 0 where there is none."""
        ids, found, have = np.array(prompt, np.int64), -1, 0
        for number, (kept, _) in self._kept.items():
            if have < len(kept) < len(ids) and _common(kept, ids) == len(kept):
                found, have = number, len(kept)
        if read := self._read(ids, have, seq):
            return read
        if have:
            self._kept[found] = self._kept.pop(found)  # used last
            self._session.fork(found, seq)
        return have

    def places(self, prompt: Sequence[int]) -> set[int]:
        """Where in this prompt a beginning is worth keeping, in tokens."""
        if not self._most:
            return set()
        ids, last = np.array(prompt, np.int64), (len(prompt) - 1) // PIECE * PIECE
        shared = [_common(kept, ids) // PIECE * PIECE for kept, _ in self._kept.values()]
        return {min(last, max(shared, default=0)), last} - {0}

    def keep(self, seq: int, prompt: Sequence[int], tokens: int) -> None:
        """Keep what sequence `seq` has, the first `tokens` of its prompt, if there is room."""
        number = self._keep(seq, np.array(prompt[:tokens], np.int64))
        if number is not None and self._files is not None:
            self._unwritten.append(number)

    @property
    def unwritten(self) -> int:
        """How many are to be written to disk."""
        return len(self._unwritten)

    def write(self) -> None:
        """Write one of them."""
        assert self._files is not None
        number = self._unwritten.pop(0)
        tensors = self._session.save(number)
        if tensors is None:
            _log.warning("what this model keeps of a prompt cannot be written to disk")
            self._files, self._unwritten = None, []
        else:
            self._files.write(self._kept[number][0], tensors)

    def clear(self) -> None:
        for number in list(self._kept):
            self._drop(number)

    def _keep(self, seq: int, ids: Ids) -> int | None:
        """The number of the new one; None where it is kept already or has no room."""
        if any(np.array_equal(kept, ids) for kept, _ in self._kept.values()):
            return None
        nbytes = self._session.nbytes(seq)
        if nbytes > self._most:
            return None
        while self.nbytes + nbytes > self._most:
            self._drop(next(iter(self._kept)))
        number = next(self._numbers)
        self._session.fork(seq, number)
        self._kept[number] = ids, nbytes
        self.nbytes += nbytes
        return number

    def _read(self, ids: Ids, above: int, seq: int) -> int:
        """Begin sequence `seq` with more than `above` tokens of a prompt from disk, if there are;
        returns how many, 0 for none."""
        if self._files is None or not (tokens := self._files.find(ids, above)):
            return 0
        begun = ids[:tokens]
        if (tensors := self._files.read(begun)) is None:
            return 0
        try:
            self._session.restore(seq, begun.tolist(), tensors)
        except ShapeMismatch as error:
            _log.warning("a beginning of a prompt on disk is not used: %s", error)
            return 0
        self._keep(seq, begun)
        return tokens

    def _drop(self, number: int) -> None:
        _, nbytes = self._kept.pop(number)
        if number in self._unwritten:
            self._unwritten.remove(number)
        self.nbytes -= nbytes
        self._session.drop(number)


def _common(left: Ids, right: Ids) -> int:
    """How many ids both begin with."""
    size = min(len(left), len(right))
    differs = np.flatnonzero(left[:size] != right[:size])
    return int(differs[0]) if len(differs) else size
