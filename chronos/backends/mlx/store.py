"""The routed experts of a streamed model: slots of a fixed number of bytes, filled from disk.

Memory is unified, so the slots computed with are the bytes read: one array, allocated once, that
exports its buffer to the reader; stacks over it are views. Nothing is copied, nothing is allocated
while experts come and go (what was tried instead: bench/log/mlx.md). MLX is lazy: who computes
with a slot must have evaluated the result before the slot is given up, or `hold` it.
What to keep and evict is `chronos.common.experts.residency`'s business, when to wait that of
`chronos.common.experts.tier`. What a record's tensors mean is not known here, but in `codecs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from chronos.backends.mlx.codecs import Raw, codec_of
from chronos.backends.probe import memory_limits
from chronos.common.disk.io import ALIGN
from chronos.common.disk.reader import RangedReader
from chronos.common.errors import BudgetError, ShapeMismatch, StoreError, UsageError
from chronos.common.experts.residency import DecayedLFU, Policy
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tier import Lease
from chronos.common.experts.tiers import SlotTier
from chronos.common.layout.folder import slots_within
from chronos.common.model.weights import Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record
    from chronos.common.layout.manifest import RecordTensor

    Kind = tuple[str, tuple[RecordTensor, ...]]  # of records: encoding and tensors


class ExpertStore:
    """Experts of a layout within `capacity_bytes`. Close it, or use it as a context.

    `stacks` has, for each layer, all slots as a stack of experts [S, ...], as the layer's codec
    sees them.
    """

    def __init__(
        self,
        layout: Layout,
        capacity_bytes: int,
        *,
        top_k: int = 1,
        warm_bytes: int = 0,
        device: str | None = None,
        miss: str = "exact",
        policy: Policy | None = None,
        reader: RangedReader | None = None,
        verify: bool = True,
    ) -> None:
        """top_k: experts one token needs in a layer; less room than that is a BudgetError.
        device: any, they share one memory; for the same reason warm_bytes must be 0.
        miss: "exact" waits for an expert, "fallback" yields None for one that is not ready.
        reader: stays the caller's to close.
        Raises BudgetError, UsageError or ShapeMismatch before anything is allocated.
        """
        slots = slots_within(layout, capacity_bytes, top_k)
        _check_options(miss, warm_bytes)
        kinds = _geometry(layout)
        self.exact = miss == "exact"
        self.policy = policy or DecayedLFU(layout.num_layers, layout.num_experts)
        self._capacity_bytes = capacity_bytes
        stride = layout.record_nbytes
        pages, room, start = _arena(slots * stride)
        # All made here: readers' threads, which may ask for a view, had better not evaluate.
        stacks = {kind: _view(Raw(pages, start, (slots, stride)), r) for kind, r in kinds.items()}
        self.stacks = {i: stacks[_kind(layout.records[i, 0])] for i in layout.moe_layers}
        starts = range(start, start + slots * stride, stride)
        self._experts = {
            kind: [_view(Raw(pages, at), record) for at in starts]
            for kind, record in kinds.items()
            if not codec_of(record.encoding).stacked
        }
        mx.eval(list(stacks.values()), list(self._experts.values()))
        _check_shared(room[:stride], list(stacks.values()))
        self._held: list[int] = []  # slots that computation not yet evaluated may use
        self._owns_reader = reader is None
        self._reader = reader or RangedReader()
        self._tier = SlotTier(
            layout,
            slots,
            self._reader,
            self.policy,
            arena=room,
            view=self._view,
            verify=verify,
        )

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Ask for experts, best first; those already here are kept a while. A hint: what finds no
        room is dropped. Returns the bytes newly asked for."""
        return self._tier.prefetch(keys)

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Start the missing reads now; yield each expert once, ready ones first, then as they land.

        An expert is valid until the next one is asked for. None: not ready, with miss="fallback".
        Raises what the read of a needed expert raised, and stays usable. Ends what `hold` promised:
        the caller has evaluated all that was computed before.
        """
        if self._held:
            with self._tier.lock:
                for slot in self._held:
                    self._tier.residency.unpin(slot)
            self._held.clear()
        return self._tier.acquire(layer, experts, exact=self.exact)

    def places(
        self, layer: int, ready: Iterable[tuple[int, Any]]
    ) -> Iterator[tuple[int, int | None]]:
        """The experts of `acquire(layer, ...)` by their indices in `stacks`, valid as they are."""
        for expert, weights in ready:
            yield expert, None if weights is None else self._tier.residency.ready[layer, expert]

    def hold(
        self,
        layer: int,
        ready: Iterable[tuple[int, Any]],
        meanwhile: mx.array | None,
    ) -> dict[int, int | None]:
        """Take all experts of `acquire(layer, ...)`: their indices in `stacks`, which are theirs
        until the next `acquire` (None: not ready, with miss="fallback"). If one has to be waited
        for, the evaluation of `meanwhile` is started first."""
        if meanwhile is not None and isinstance(ready, Lease) and (ready.loads or ready.queued):
            mx.async_eval(meanwhile)
        places: dict[int, int | None] = {}
        residency, lock = self._tier.residency, self._tier.lock
        for expert, weights in ready:
            if weights is None:
                places[expert] = None
                continue
            with lock:
                places[expert] = slot = residency.ready[layer, expert]
                residency.pin(slot)
            self._held.append(slot)
        return places

    def record_fallback(self, weight: float) -> None:
        """Routing weight that a None of `acquire` stood for."""
        self._tier.counters.fallback_weight += weight

    def end_token(self) -> None:
        """One decode step is over: histories fade, unused prefetches lose their protection."""
        self._tier.end_token()

    def begin_prompt(self) -> None:
        """From now on whole chunks of a prompt ask for their experts."""
        self._tier.begin_prompt()

    def end_prompt(self, ids_TLK: np.ndarray) -> None:
        """The prompt is over; its tokens were routed like this, which predictors begin from."""
        self._tier.end_prompt(ids_TLK)

    def resident(self) -> frozenset[Key]:
        return self._tier.resident()

    def held(self) -> frozenset[Key]:
        return self.resident()

    def copy_rate(self) -> None:
        """Records are computed with where they were read to."""

    def stats(self) -> StoreStats:
        stats = self._tier.stats()
        stats.capacity_bytes = self._capacity_bytes
        return stats

    def close(self) -> None:
        """End the reads, join the threads, close the files. Safe to call twice."""
        self._tier.close()
        if self._owns_reader:
            self._reader.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _view(self, slot: int, record: Record) -> Any:
        """The expert where it lies; its slot, where layers compute with stacks alone."""
        experts = self._experts.get(_kind(record))
        return slot if experts is None else experts[slot]


def _check_options(miss: str, warm_bytes: int) -> None:
    if miss not in ("exact", "fallback"):
        raise UsageError(f"miss must be exact or fallback, not {miss!r}")
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
    room = memoryview(pages).cast("B")  # MLX exports its buffer for writing
    start = -np.frombuffer(room, np.uint8).ctypes.data % ALIGN
    return pages, room[start : start + nbytes], start


def _no_room(nbytes: int, where: str) -> BudgetError:
    return BudgetError(f"there is no room for {nbytes} bytes of experts", where, "lower the budget")


def _check_shared(record: memoryview, stacks: Any) -> None:
    """That views of an array share its memory is how MLX works, not what it promises: look."""
    record[:] = b"\x01" * len(record)
    views = [stack for _, stack in tree_flatten(stacks)]
    seen = {memoryview(mx.contiguous(view[0])).cast("B")[0] for view in views}
    record[:] = bytes(len(record))
    if seen != {1}:
        raise StoreError("this version of MLX copies where a view was expected", "", "update mlx")
