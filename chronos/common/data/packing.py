"""Documents packed into rows of equal length, and batches that depend on the step number alone.

Documents are joined in the order given, each closed by the end token, and cut every `seq_len`
tokens. A row's labels are the tokens that follow its ids; no label crosses a document's border, and
the last row is padded. An epoch visits every row once, in an order drawn from (seed, epoch), so a
resumed run needs its step number and nothing else.

Shape legend: N tokens of all documents, R rows, B batch, T seq_len.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.errors import DataError, UsageError

IGNORE = -100
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """ids, labels (position t's target; -100 where there is none) and the document's number within
    the row (-1 for padding), all int32 [B, T]; and what else an objective needs, by name."""

    ids_BT: Ints
    labels_BT: Ints
    segments_BT: Ints
    extra: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def with_extra(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Batch:
        """The same batch with more arrays."""
        return replace(self, extra={**self.extra, **arrays})

    @property
    def tokens(self) -> int:
        """Positions that carry a label."""
        return int((self.labels_BT != IGNORE).sum())


class Rows(ABC):
    """Rows by number, in an order drawn anew for each epoch. `len()` is their number."""

    seed: int

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of all documents, end tokens included."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of everything batches depend on, for a run that wants to know its data again."""

    @abstractmethod
    def assemble(self, rows: npt.NDArray[np.int64]) -> Batch:
        """The batch of these rows; -1 is a row of padding."""

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of one step: the same whenever and however often it is asked for."""
        if step < 0 or batch_size < 1:
            raise UsageError(f"no batch at step {step} of {batch_size} rows")
        return self.assemble(order(self.seed, len(self), step * batch_size, batch_size))

    def first(self, batch_size: int, most: int) -> list[Batch]:
        """At most `most` batches, at least one, as the first steps have them: what an evaluation
        takes."""
        count = max(1, min(most, len(self) // batch_size))
        return [self.batch(step, batch_size) for step in range(count)]

    def sweep(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in document order; the last batch is filled up with padding."""
        for first in range(0, len(self), batch_size):
            rows = np.arange(first, min(first + batch_size, len(self)))
            yield self.assemble(np.pad(rows, (0, batch_size - len(rows)), constant_values=-1))


class PackedDataset(Rows):
    """Rows over one token stream. Immutable."""

    def __init__(
        self,
        tokens_N: Ints,
        trained_N: npt.NDArray[np.bool_],
        starts: npt.NDArray[np.int64],
        *,
        seq_len: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self.seq_len, self.pad_id, self.seed = seq_len, pad_id, seed
        self._tokens_N, self._trained_N, self._starts = tokens_N, trained_N, starts
        # A row is kept if it trains something; a batch can then never be without labels.
        labelled = np.flatnonzero(self._has_label())
        rows_R = np.unique(labelled // seq_len)
        self._rows_R = rows_R.astype(np.int64)
        self.dropped_rows = -(-max(len(tokens_N) - 1, 0) // seq_len) - len(rows_R)
        if not len(rows_R):
            raise DataError(
                f"nothing to learn from: of {len(tokens_N)} tokens none is to be predicted",
                "",
                "give longer texts: a token needs one before it, and a row an answer",
            )

    def __len__(self) -> int:
        return len(self._rows_R)

    @property
    def tokens(self) -> int:
        return len(self._tokens_N)

    def fingerprint(self) -> str:
        numbers = f"{self.seq_len} {self.pad_id} {self.seed}"
        digest = hashlib.blake2b(numbers.encode(), digest_size=16)
        for array in (self._tokens_N, self._trained_N, self._starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _has_label(self) -> npt.NDArray[np.bool_]:
        """True at positions whose next token is trained and in the same document. [N - 1]"""
        inside = np.ones(len(self._tokens_N), bool)
        inside[self._starts] = False
        result: npt.NDArray[np.bool_] = self._trained_N[1:] & inside[1:]
        return result

    def assemble(self, rows: npt.NDArray[np.int64]) -> Batch:
        rows = np.where(rows < 0, -1, self._rows_R[rows])
        last = len(self._tokens_N) - 1
        at_BT = rows[:, None] * self.seq_len + np.arange(self.seq_len)
        real_BT = (rows[:, None] >= 0) & (at_BT <= last)
        at_BT = np.where(real_BT, at_BT, 0)
        next_BT = np.minimum(at_BT + 1, last)
        document_BT = np.searchsorted(self._starts, at_BT, "right")
        same_BT = np.searchsorted(self._starts, next_BT, "right") == document_BT
        labelled_BT = real_BT & same_BT & self._trained_N[next_BT] & (at_BT < last)
        return Batch(
            np.where(real_BT, self._tokens_N[at_BT], self.pad_id).astype(np.int32),
            np.where(labelled_BT, self._tokens_N[next_BT], IGNORE).astype(np.int32),
            np.where(real_BT, document_BT - document_BT[:, :1], -1).astype(np.int32),
        )


@dataclass(frozen=True)
class PackedBatches:
    """The updates of a run over packed rows: `accumulate` micro-batches of `batch_size` rows."""

    dataset: Rows
    batch_size: int
    accumulate: int = 1

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def at(self, number: int) -> list[Batch]:
        """The micro-batches of an update, counted from 0."""
        first = number * self.accumulate
        return [self.dataset.batch(first + i, self.batch_size) for i in range(self.accumulate)]

    def notes(self) -> Mapping[str, float]:
        return {}


def pack_documents(
    documents: Sequence[Sequence[int] | npt.NDArray[Any]],
    *,
    seq_len: int,
    eos_id: int,
    pad_id: int = 0,
    seed: int = 0,
    trained: Sequence[Sequence[bool] | npt.NDArray[np.bool_]] | None = None,
) -> PackedDataset:
    """Join token lists into rows. `trained` marks, per document, the tokens that may be labels
    (default: all); the end token counts as trained if the token before it does.

    Raises DataError if no row has a label.
    """
    if seq_len < 1:
        raise UsageError(f"seq_len must be at least 1, not {seq_len}")
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    tokens_N, trained_N = np.full(total, eos_id, np.int32), np.ones(total, bool)
    for i, document in enumerate(documents):
        start, end = int(ends[i] - lengths[i]), int(ends[i]) - 1
        tokens_N[start:end] = document
        if trained is not None:
            trained_N[start:end] = trained[i]
            trained_N[end] = end > start and trained_N[end - 1]
    return PackedDataset(
        tokens_N, trained_N, ends - lengths, seq_len=seq_len, pad_id=pad_id, seed=seed
    )


def order(seed: int, rows: int, first: int, count: int) -> npt.NDArray[np.int64]:
    """Rows by number: `count` visits from visit `first` on, each epoch in an order of its own."""
    epochs, places = np.divmod(first + np.arange(count), rows)
    visits = zip(epochs, places, strict=True)
    return np.array([_epoch_order(seed, int(e), rows)[p] for e, p in visits], np.int64)


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    """A permutation from raw generator output: NumPy keeps that stream the same across versions,
    which it does not promise for `Generator.permutation`."""
    keys = np.random.PCG64(np.random.SeedSequence([seed % (1 << 64), epoch])).random_raw(rows)
    return np.argsort(keys, kind="stable")


def check_single(segments_BT: Ints) -> None:
    """Raises UsageError unless each row holds one document and padding behind it: models of other
    libraries do not keep the documents of a row apart."""
    real_BT, first_B1 = segments_BT >= 0, segments_BT[:, :1]
    mixed_BT = real_BT & (segments_BT != first_B1)
    if mixed_BT.any() or (real_BT[:, 1:] > real_BT[:, :-1]).any():
        raise UsageError(
            "a model of another library takes one document a row, this batch has several",
            "",
            "make batches without packing",
        )
