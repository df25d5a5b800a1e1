"""Rows of whole examples: packed by best fit, or side by side as pairs. No example is ever cut.

Shape legend: B batch, T tokens, P pairs.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.data.answers import Example, Pair, lengths
from chronos.common.data.packing import IGNORE, Batch, Rows, order
from chronos.common.errors import UsageError


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Items by number in bins of `room`: the largest first, each into the fullest bin that has
    room for it (best-fit decreasing; 2404.10830 packs documents so).

    Raises UsageError for an item that is larger than a bin.
    """
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room that is left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[item]
        if size > room:
            raise UsageError(f"an item of {size} does not fit a bin of {room}")
        at = bisect_left(left, (size, -1))
        free, number = left.pop(at) if at < len(left) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        insort(left, (free - size, number))
    return bins


class FittedRows(Rows):
    """Rows of `seq_len` tokens that hold one or more whole examples each, a segment every one."""

    def __init__(
        self, examples: Sequence[Example], *, seq_len: int, pad_id: int, seed: int, packed: bool
    ) -> None:
        """packed: several examples a row; else each has its own, as long as the batch needs."""
        self.seed, self._examples, self._pad_id = seed, examples, pad_id
        sizes = lengths(examples)
        self._rows = best_fit(sizes, seq_len) if packed else [[i] for i in range(len(sizes))]
        self._length = seq_len if packed else 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self._examples)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        used = sum(lengths(self._examples))
        return used / (len(self) * self._length) if self._length else 1.0

    def fingerprint(self) -> str:
        return digest(self._examples, self._length, self._pad_id, self.seed)

    def assemble(self, rows: npt.NDArray[np.int64]) -> Batch:
        chosen = [[self._examples[i] for i in self._rows[row]] if row >= 0 else [] for row in rows]
        return join(chosen, self._pad_id, self._length)


class PairBatches:
    """The updates of a run over pairs: `accumulate` micro-batches of `batch_size` pairs, rows
    chosen, rejected, chosen, ...

    Pairs of like length stay together for the whole run, and only the order of these groups is
    drawn: little padding, and what a reference says of a group is said once, to the last bit.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        accumulate: int,
        pad_id: int,
        seed: int,
        prompts: bool = False,
    ) -> None:
        """prompts: they have labels too, and `answer` says which are an answer's."""
        self._pairs, self._accumulate, self._pad_id = pairs, accumulate, pad_id
        self._seed, self._prompts = seed, prompts
        by_length = sorted(range(len(pairs)), key=lambda i: (max(lengths(pairs[i])), i))
        self._groups = [
            by_length[first : first + batch_size] for first in range(0, len(pairs), batch_size)
        ]
        self.extra: dict[int, Mapping[str, npt.NDArray[Any]]] = {}
        """Arrays to add to a group's batch, by its number."""
        self.refer: Callable[[Batch], Mapping[str, npt.NDArray[Any]]] | None = None
        """What gives them anew each time, in place of `extra`."""

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def fingerprint(self) -> str:
        examples = [example for pair in self._pairs for example in pair]
        return digest(examples, len(self._groups), self._pad_id, self._seed, self._prompts)

    def at(self, number: int) -> list[Batch]:
        batches = [self.group(i) for i in self.groups(number)]
        return [b.with_extra(self.refer(b)) for b in batches] if self.refer else batches

    def groups(self, number: int) -> list[int]:
        """The groups of an update's micro-batches."""
        visits = order(self._seed, len(self), number * self._accumulate, self._accumulate)
        return [int(group) for group in visits]

    def group(self, number: int) -> Batch:
        rows = [[example] for i in self._groups[number] for example in self._pairs[i]]
        batch = join(rows, self._pad_id, answers=True, prompts=self._prompts)
        return batch.with_extra(self.extra.get(number, {}))

    def __iter__(self) -> Iterator[Batch]:
        """Every group once, the shortest first."""
        return map(self.group, range(len(self)))

    def notes(self) -> Mapping[str, float]:
        return {}


def join(
    rows: Sequence[Sequence[Example]],
    pad_id: int,
    length: int = 0,
    *,
    answers: bool = False,
    prompts: bool = False,
) -> Batch:
    """A batch of rows of examples. An example's last token is a label only, its first none.

    length: of the rows; 0: as the longest needs. answers: with an array `answer`, which labels are
    an answer's. prompts: what is not is a label too.
    """
    length = length or max((sum(lengths(row)) for row in rows), default=1)
    ids = np.full((len(rows), length), pad_id, np.int32)
    labels, segments = np.full_like(ids, IGNORE), np.full_like(ids, -1)
    answer = np.zeros(ids.shape, bool)
    for b, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            place = slice(at, at + len(example.ids) - 1)
            ids[b, place], segments[b, place] = example.ids[:-1], number
            answer[b, place] = example.trained[1:]
            labels[b, place] = np.where(prompts | example.trained[1:], example.ids[1:], IGNORE)
            at = place.stop
    return Batch(ids, labels, segments, {"answer": answer} if answers else {})


def digest(examples: Sequence[Example], *numbers: float) -> str:
    """A digest of examples and of what else batches depend on."""
    found = hashlib.blake2b(repr(numbers).encode(), digest_size=16)
    for ids, trained in examples:
        found.update(len(ids).to_bytes(8, "little"))
        found.update(np.ascontiguousarray(ids, np.int32).data)
        found.update(np.ascontiguousarray(trained, bool).data)
    return found.hexdigest()
