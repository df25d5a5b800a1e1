"""Sequences of one session in company and alone, for tests that compare their bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from chronos.common.disk.header import TensorEntry
from chronos.common.text.sampling import AGAIN, SamplingParams, Work, pieces
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()


def alone(session: Any, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Logits after a prompt and after each of some tokens, [1 + tokens, V]."""
    sequence = OneSequence(session, seq=99)
    sequence.prefill(prompt, GREEDY)
    found = [sequence.logits()]
    for token in tokens:
        sequence.decode(token, GREEDY)
        found.append(sequence.logits())
    sequence.reset()
    return np.stack(found)


def together(
    session: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
) -> list[np.ndarray]:
    """The same of several sequences, each of which begins a pass after the one before, so that
    pieces of prompts and single tokens meet; then all are dropped. Every second prompt goes on for
    a layer in each pass."""
    work = [
        [
            *(replace(piece, layers=seq % 2) for piece in pieces(seq, prompt, GREEDY)),
            *(Work(seq, [token], GREEDY) for token in tokens),
        ]
        for seq, prompt in enumerate(prompts)
    ]
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for turn in itertools.count():
        now = [todo.pop(0) for seq, todo in enumerate(work) if todo and turn >= seq]
        if not now:
            break
        for each, out in zip(now, session.run(now), strict=True):
            if isinstance(out, Exception):
                raise out
            if out == AGAIN:
                work[each.seq].insert(0, each)
            elif each.last:
                found[each.seq].append(session.logits(each.seq))
    for seq in range(len(prompts)):
        session.drop(seq)
    return [np.stack(rows) for rows in found]


def as_read(tensors: Any) -> list[tuple[TensorEntry, memoryview]]:
    """What `Session.save` gave, as it comes back from a file: bytes of its own."""
    return [
        (TensorEntry(name, dtype, shape, 0, 0), memoryview(bytearray(data)))
        for name, dtype, shape, data in tensors
    ]


def kept_and_forked(session: Any, prompt: Sequence[int], whole: int) -> tuple[int, int, int]:
    """Check that a sequence cut, forked or saved after `whole` tokens of its prompt, which are
    whole pieces, has the bits of a cold one. Returns the tokens a cut kept, those of the fork and
    those of one that was restored, 0 where nothing could be saved."""
    other, tokens = [*prompt[:whole], 3, 4, 5], (6, 7, 8)
    cold = alone(session, other, tokens)
    for work in pieces(0, prompt, GREEDY):
        if session.position(0) == whole:
            session.fork(0, 1)
            saved = session.save(0)
            if saved is not None:
                session.restore(2, prompt[:whole], as_read(saved))
        session.run([work])
    session.run([Work(0, [9], GREEDY)])
    forked, kept, restored = session.position(1), session.keep(0, whole), session.position(2)
    for seq, start in ((1, forked), (0, kept), (2, restored)):
        found = []
        for work in [
            *pieces(seq, other, GREEDY, start=start),
            *(Work(seq, [token], GREEDY) for token in tokens),
        ]:
            [out] = session.run([work])
            assert not isinstance(out, Exception), out
            if work.last:
                found.append(session.logits(seq))
        np.testing.assert_array_equal(found, cold, f"sequence {seq}")
        session.drop(seq)
    return kept, forked, restored
