"""Which sequences take part in the next pass of a model, and with what: values in, values out.

Every sequence that is decoding has its token in every pass; prompts join in pieces, as many as a
pass may have tokens, the earliest first. Tokens do not wait for a piece: beside them it goes on for
a few layers a pass. A sequence waits while all slots are taken. Sequences come and go between two
passes. Knows no model, no text and no clock: `batch` runs what it plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chronos.common.errors import UsageError
from chronos.common.text.sampling import AGAIN, PIECE, SamplingParams, Work, pieces

PASS_TOKENS = 4 * PIECE  # prompts that go through a layer together read its experts once
# Of prompts, through all layers, beside a token: what takes about as long as the token itself.
BESIDE_TOKENS = 16


@dataclass
class _Row:
    """A sequence: what is left of its prompt, then the token drawn last."""

    seq: int
    sampling: SamplingParams
    left: deque[Work]
    token: int | None = None


class Scheduler:
    """Sequences by number, in the order they were added."""

    def __init__(self, slots: int = 1, pass_tokens: int = PASS_TOKENS, layers: int = 0) -> None:
        """slots: sequences that are under way at a time. pass_tokens: of prompts, in one pass that
        reads no more than prompts. layers: with experts, of which a few may be in one pass; 0 where
        a pass is not parted: pass_tokens holds beside tokens then too."""
        self.slots, self.pass_tokens, self._layers = slots, pass_tokens, layers
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
        beside = bool(work) and self._layers > 0
        room = self.pass_tokens
        for row in rows:
            if not row.left:
                continue
            piece = row.left[0]
            if beside:
                layers = self._layers * BESIDE_TOKENS // len(piece.tokens)
                work.append(replace(piece, layers=max(1, layers)))
            elif room >= len(piece.tokens) or not work:
                work.append(piece)
                room -= len(piece.tokens)
        return work

    def took(self, work: Work, token: int | None) -> None:
        """A pass did this work, and drew `token` (None: the prompt goes on; AGAIN: the work)."""
        if token == AGAIN:
            return
        row = self._running[work.seq]
        if row.left:
            row.left.popleft()
        row.token = token
