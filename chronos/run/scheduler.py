"""Which sequences take part in the next pass of a model, and with what: values in, values out.

Every sequence that is decoding has its token in every pass; prompts join in pieces, as many as a
pass may have tokens, the earliest first; beside tokens one piece's worth, which they wait for. A
sequence waits while all slots are taken. Sequences come and go between two passes. Knows no model,
no text and no clock: `batch` runs what it plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from chronos.common.errors import UsageError
from chronos.common.text.sampling import PIECE, SamplingParams, Work, pieces

PASS_TOKENS = 4 * PIECE  # prompts that go through a layer together read its experts once


@dataclass
class _Row:
    """A sequence: what is left of its prompt, then the token drawn last."""

    seq: int
    sampling: SamplingParams
    left: deque[Work]
    token: int | None = None


class Scheduler:
    """Sequences by number, in the order they were added."""

    def __init__(self, slots: int = 1, pass_tokens: int = PASS_TOKENS) -> None:
        """slots: sequences that are under way at a time. pass_tokens: of prompts, in a pass; PIECE
        at most beside tokens."""
        self.slots, self.pass_tokens = slots, pass_tokens
        self._waiting: deque[_Row] = deque()
        self._running: dict[int, _Row] = {}

    def add(
        self, seq: int, prompt: Sequence[int], sampling: SamplingParams, start: int = 0
    ) -> None:
        """start: tokens of the prompt that the sequence has already, whole pieces of it and not all
        of it: the token after the prompt comes from its last piece."""
        left = deque(pieces(seq, prompt, sampling, start=start))
        if not left:
            raise UsageError(
                f"nothing is left to read of a prompt of {len(prompt)} tokens",
                f"sequence {seq}",
                "keep fewer tokens than it has",
            )
        self._waiting.append(_Row(seq, sampling, left))

    def drop(self, seq: int) -> None:
        """Forget a sequence, if it is there."""
        if self._running.pop(seq, None) is None:
            self._waiting = deque(row for row in self._waiting if row.seq != seq)

    def next(self) -> list[Work]:
        """What the next pass does; nothing where no sequence is left."""
        while self._waiting and len(self._running) < self.slots:
            row = self._waiting.popleft()
            self._running[row.seq] = row
        rows = list(self._running.values())
        work = [Work(r.seq, [r.token], r.sampling) for r in rows if r.token is not None]
        room = min(self.pass_tokens, PIECE) if work else self.pass_tokens
        for row in rows:
            if row.left and (room >= len(row.left[0].tokens) or not work):
                work.append(row.left[0])
                room -= len(row.left[0].tokens)
        return work

    def took(self, work: Work, token: int | None) -> None:
        """A pass did this work, and drew `token` (None: the prompt goes on)."""
        row = self._running[work.seq]
        if row.left:
            row.left.popleft()
        row.token = token
