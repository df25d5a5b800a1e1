"""Memory for the routed experts of a streamed model: slots of a fixed number of bytes.

Memory is unified, so the slots computed with are the bytes read: one array, allocated once, that
exports its buffer to the reader; stacks over it are views. Nothing is copied, nothing is allocated
while experts come and go (what was tried instead: bench/log/mlx.md). MLX is lazy: who computes
with a slot must have evaluated the result before its lease is given up.
What is read, kept and evicted is the business of `chronos.common.experts`; what a record's tensors
mean, that of `codecs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from chronos.backends.mlx.codecs import Raw, codec_of, memory
from chronos.backends.probe import memory_limits
from chronos.common.disk.io import ALIGN
from chronos.common.errors import BudgetError, ShapeMismatch, StoreError, UsageError

if TYPE_CHECKING:
    from chronos.common.experts.feed import FeedOptions
    from chronos.common.experts.tiers import CopyEngine
    from chronos.common.layout import Layout, Record
    from chronos.common.layout.manifest import RecordTensor

    Kind = tuple[str, tuple[RecordTensor, ...]]  # of records: encoding and tensors


class Place(NamedTuple):
    """An expert in a slot: the slot's index, all slots as a stack of experts [S, ...] as the
    layer's codec sees them, and the expert itself, unless layers compute with stacks alone."""

    slot: int
    stack: Any
    expert: Any


class Arena:
    """`slots` experts to compute with, which reads land in."""

    def __init__(self, layout: Layout, slots: int, options: FeedOptions) -> None:
        """Raises BudgetError, UsageError or ShapeMismatch before anything is allocated."""
        _check_warm(options.warm_bytes)
        kinds = _geometry(layout)
        self.copies: CopyEngine | None = None
        self.slots, stride = slots, layout.record_nbytes
        pages, self.host, start = _arena(slots * stride)
        stacks = {kind: _view(Raw(pages, start, (slots, stride)), r) for kind, r in kinds.items()}
        starts = range(start, start + slots * stride, stride)
        experts = {
            kind: [_view(Raw(pages, at), record) for at in starts]
            for kind, record in kinds.items()
            if not codec_of(record.encoding).stacked
        }
        mx.eval(list(stacks.values()), list(experts.values()))
        _check_shared(self.host[:stride], list(stacks.values()))
        # All made here, once: MLX would make them anew at each load.
        self._places = {
            kind: [Place(slot, stack, experts[kind][slot] if kind in experts else None)
                   for slot in range(slots)]
            for kind, stack in stacks.items()
        }  # fmt: skip

    def view(self, slot: int, record: Record) -> Place:
        """Where the record is."""
        return self._places[_kind(record)][slot]

    def copy_rate(self) -> None:
        """Records are computed with where they were read to."""

    def close(self) -> None:
        """Memory is freed with the last array that looks at it."""


def _check_warm(warm_bytes: int) -> None:
    if warm_bytes:
        raise UsageError(
            "a warm tier needs an accelerator with memory of its own",
            "",
            "MLX shares one memory: add its bytes to the budget",
        )


def _kind(record: Record) -> Kind:
    return record.encoding, record.tensors


def _view(raw: Raw, record: Record) -> Any:
    return codec_of(record.encoding).view(raw, record)


def _geometry(layout: Layout) -> dict[Kind, Record]:
    """A record of each kind: slots can only be a stack if a layer's records all hold the same."""
    for (layer, _), record in layout.records.items():
        if record.tensors != layout.records[layer, 0].tensors:
            raise ShapeMismatch(f"expert {record.key} has other tensors than others of its layer")
    firsts = [layout.records[layer, 0] for layer in layout.moe_layers]
    kinds = {_kind(record): record for record in firsts}
    for record in kinds.values():  # of dtypes that MLX has: before anything is allocated
        _view(Raw(mx.zeros((ALIGN,), mx.uint8), 0), record)
    return kinds


def _arena(nbytes: int) -> tuple[mx.array, memoryview, int]:
    """Memory as an array of pages and as writable bytes, the latter from a boundary of the
    machine's pages on; and at which byte of the array that is.

    Pages, because MLX counts a dimension in 31 bits; one more than asked for, because direct reads
    need a page's boundary to begin at and MLX's allocations do not lie on one.
    """
    limit = memory_limits().limit
    if nbytes > limit:  # without this MLX dies of a null pointer on a CPU
        raise _no_room(nbytes, f"there are {limit} bytes")
    try:
        pages = mx.zeros((nbytes // ALIGN + 1, ALIGN), mx.uint8)
        mx.eval(pages)
    except RuntimeError as error:
        raise _no_room(nbytes, str(error)) from error
    room = memory(pages)
    start = -np.frombuffer(room, np.uint8).ctypes.data % ALIGN
    return pages, room[start : start + nbytes], start


def _no_room(nbytes: int, where: str) -> BudgetError:
    return BudgetError(f"there is no room for {nbytes} bytes of experts", where, "lower the budget")


def _check_shared(record: memoryview, stacks: Any) -> None:
    """That views of an array share its memory is how MLX works, not what it promises: look."""
    record[:] = b"\x01" * len(record)
    views = [stack for _, stack in tree_flatten(stacks)]
    seen = {memory(mx.contiguous(view[0]))[0] for view in views}
    record[:] = bytes(len(record))
    if seen != {1}:
        raise StoreError("this version of MLX copies where a view was expected", "", "update mlx")
