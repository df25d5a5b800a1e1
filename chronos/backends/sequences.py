"""What a session keeps of its sequences between two passes, and how a pass ends for each.

The sessions of both backends stand on this; what touches an array of a framework is theirs.

Shape legend: T tokens, V vocabulary, L layers, K top-k.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.experts.feed import Feed, FeedStep, Source
from chronos.common.experts.together import Lane, together
from chronos.common.text.sampling import AGAIN, PIECE, Work

# Recorded routing is compacted after this many calls: a tensor per layer and token costs 300 bytes,
# which over a long generation would outgrow the experts' budget.
_COMPACT_EVERY = 32

# (ids_TLK, weights_TLK); weights are None where the model does not show them.
Recorded = tuple[np.ndarray, np.ndarray | None]


class RoutingRecord:
    """The routing of many calls, compacted on the way by `joined`: of calls, one Routing a layer
    each, all tokens' in host memory."""

    def __init__(self, joined: Callable[[list[list[Any]]], Recorded]) -> None:
        self._joined = joined
        self._done: list[Recorded] = []
        self._calls: list[list[Any]] = []

    def add(self, routing: list[Any]) -> None:
        self._calls.append([r._replace(probs_TE=r.ids_TK) for r in routing])  # drops the wide part
        if len(self._calls) >= _COMPACT_EVERY:
            self._compact()

    def take(self) -> list[Recorded]:
        self._compact()
        done, self._done = self._done, []
        return done

    def _compact(self) -> None:
        if self._calls:
            self._done.append(self._joined(self._calls))
            self._calls.clear()


@dataclass
class Row:
    """What one sequence keeps between two passes."""

    cache: Any
    logits_V: Any
    record: RoutingRecord
    every_TV: Any = None  # of the tokens of the last pass, where it was to keep them
    ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    random: random.Random = field(default_factory=random.Random)
    decoding: bool = False  # its prompt is over
    whole: int = 0  # tokens of the prompt's pieces from the first on that were whole
    halfway: bool = False  # a pass has begun and not ended: its tokens are in some caches only

    def check_sound(self) -> None:
        if self.halfway:
            raise UsageError("an error ended this sequence in the middle of a step", "", "drop it")

    def take(self, part: Part) -> None:
        """The cache has the tokens of a pass."""
        tokens, sampling = part.work.tokens, part.work.sampling
        if part.prompt and len(tokens) == PIECE and self.whole == len(self.ids):
            self.whole += PIECE
        self.ids += tokens
        self.decoding = part.work.last
        if part.prompt and part.work.last:  # a seed's draws start here
            self.prompt_tokens, self.random = len(self.ids), random.Random(sampling.seed)


@dataclass
class Part:
    """What a pass does for one sequence. prompt: its tokens are of a prompt."""

    work: Work
    row: Row
    prompt: bool


class Sequences:
    """The sequences of one model, by number; one is there from its first work on."""

    def __init__(
        self, feed: Feed | None, new_cache: Callable[[], Any], new_row: Callable[[Any], Row]
    ) -> None:
        """new_row: a sequence without a token, of its cache."""
        self.feed = feed
        self._new_cache, self._new_row = new_cache, new_row
        self._sequences: dict[int, Row] = {}
        self._resting: dict[int, Lane] = {}  # forwards that are not over, by sequence

    def position(self, seq: int) -> int:
        """Tokens the sequence has, 0 for one that is not there."""
        return self._sequences[seq].cache.position if seq in self._sequences else 0

    def routing(self, seq: int) -> list[Recorded]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens; weights are
        None where the model does not show them."""
        return self._known(seq).record.take()

    def nbytes(self, seq: int) -> int:
        """Bytes of the arrays that the sequence's caches hold, spare room included."""
        return _nbytes(self._known(seq).cache, set())

    def keep(self, seq: int, tokens: int) -> int:
        """Forget what came after the first `tokens`; returns how many are there, a multiple of
        PIECE: whole pieces of its prompt, or 0 where the cache cannot go back (`fork` before)."""
        row = self._known(seq)
        kept = min(tokens, row.whole) // PIECE * PIECE
        fresh = self._new_row(row.cache)
        all_there = kept == row.cache.position
        if row.halfway or not (all_there or (kept and row.cache.cut(kept))):
            kept, fresh.cache = 0, self._new_cache()
        fresh.ids, fresh.whole = row.ids[:kept], kept
        self._give_up(seq)
        if self.feed is not None:
            self.feed.drop(seq)
        self._sequences[seq] = fresh
        return kept

    def fork(self, seq: int, new: int) -> None:
        """Make sequence `new` of one that is there: the same tokens, draws and caches, its own from
        here on."""
        if new in self._sequences:
            raise UsageError(f"there is a sequence {new} already", "", "drop it")
        row = self._known(seq)
        row.check_sound()
        fork = self._new_row(row.cache.copied())
        fork.ids, fork.prompt_tokens, fork.whole = [*row.ids], row.prompt_tokens, row.whole
        fork.random, fork.logits_V, fork.decoding = deepcopy(row.random), row.logits_V, row.decoding
        self._sequences[new] = fork
        if self.feed is not None:
            self.feed.fork(seq, new)

    def _arrays(self, seq: int) -> dict[str, Any] | None:
        """The arrays of a sequence's caches, by name."""
        row = self._known(seq)
        row.check_sound()
        arrays: dict[str, Any] | None = row.cache.arrays()
        return arrays

    def _restore(self, new: int, ids: Sequence[int], arrays: dict[str, Any]) -> None:
        """Make sequence `new` of whole pieces of a prompt and their arrays. It is there at the end,
        when all of them fit."""
        if new in self._sequences:
            raise UsageError(f"there is a sequence {new} already", "", "drop it")
        cache = self._new_cache()
        try:
            cache.restore(len(ids), arrays)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ShapeMismatch(f"what was kept of a sequence does not fit: {error}") from error
        if _forms(cache.arrays() or {}) != _forms(arrays):
            raise ShapeMismatch("what was kept of a sequence does not fit this model")
        row = self._new_row(cache)
        row.ids, row.whole = list(ids), len(ids)
        self._sequences[new] = row

    def drop(self, seq: int) -> None:
        """Forget a sequence, if it is there; the experts stay where they are."""
        self._give_up(seq)
        if self._sequences.pop(seq, None) is not None and self.feed is not None:
            self.feed.drop(seq)

    def _known(self, seq: int) -> Row:
        if seq not in self._sequences:
            raise UsageError(f"there is no sequence {seq}")
        return self._sequences[seq]

    def _give_up(self, seq: int) -> None:
        """What is not over of a sequence's pass."""
        if (lane := self._resting.pop(seq, None)) is not None:
            lane.close()

    def _together(
        self,
        source: FeedStep | None,
        parts: Sequence[Part],
        forwards: Sequence[Callable[[Any], Any]],
        room: int | None = None,
    ) -> list[Any]:
        """The outcomes of forwards in one pass, those that rested since the last one with their
        first halves; AGAIN of those that rest now."""
        lanes = []
        for part, forward in zip(parts, forwards, strict=True):
            lane = self._resting.pop(part.work.seq, None) or Lane(forward)
            lane.layers = part.work.layers
            lanes.append(lane)
        outs = together(source, lanes, room)
        for at, out in enumerate(outs):
            if isinstance(out, Lane):
                self._resting[parts[at].work.seq], outs[at] = out, AGAIN
        return outs

    def _part(self, work: Work) -> Part:
        row = self._sequences.get(work.seq)
        if row is None:
            row = self._sequences[work.seq] = self._new_row(self._new_cache())
        single = row.decoding and len(work.tokens) == 1 and not work.prompt
        return Part(work, row, prompt=not single)


def _forms(arrays: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {name: (tuple(x.shape), x.dtype) for name, x in arrays.items()}


def _nbytes(value: Any, seen: set[int]) -> int:
    """Of all arrays that can be reached from a cache: libraries keep theirs in objects of many
    kinds."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return int(value.nbytes)
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        value = list(getattr(value, "__dict__", {}).values())
    return sum(_nbytes(each, seen) for each in value)


def tell(
    step: FeedStep | None,
    parts: Sequence[Part],
    outs: Sequence[Any],
    ids_TLK: Callable[[list[Any]], np.ndarray],
) -> None:
    """Tell a step what went through, and what a prompt was routed to. outs: a model's output, AGAIN
    or an error of each part; ids_TLK: the ids of its layers' routing in host memory."""
    for part, out in zip(parts, outs, strict=True):
        if step is not None and not isinstance(out, int | Exception):
            step.done(part.work, ids_TLK(out.routing) if part.prompt else None)


def ended(parts: Sequence[Part], outs: Sequence[Any]) -> None:
    """The pass has ended for all: nothing can be raised any more that would repeat its tokens."""
    for part, out in zip(parts, outs, strict=True):
        part.row.halfway = isinstance(out, int | Exception)


def outcome(forward: Callable[[Source | None], Any], source: Source | None) -> Any:
    """What `together` makes of one forward: its output or its error."""
    try:
        return forward(source)
    except Exception as error:
        return error
