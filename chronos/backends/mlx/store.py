"""The routed experts of a streamed model: slots of a fixed number of bytes, filled from disk.

Memory is unified, so the slots computed with are the bytes read: one array, allocated once, that
exports its buffer to the reader; stacks over it are views. Nothing is copied, nothing is allocated
while experts come and go (bench/LOG.md has what was tried instead). MLX is lazy: who computes with
a slot must have evaluated the result before the slot is given up, or `hold` it.
What to keep and evict is `chronos.common.residency`'s business, when to wait that of
`chronos.common.slots`. Not covered: experts in quantised formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from chronos.backends.mlx import model
from chronos.backends.mlx.moe import Expert
from chronos.common.budget import slots_within
from chronos.common.errors import ShapeMismatch, StoreError, UsageError
from chronos.common.files import ALIGN, RangedReader
from chronos.common.lease import Lease
from chronos.common.residency import DecayedLFU, Key, Policy
from chronos.common.stats import StoreStats
from chronos.common.tier import SlotTier
from chronos.common.weights import EXPERT_TENSORS, SAFETENSORS_DTYPE

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record
    from chronos.common.layout.manifest import RecordTensor

# safetensors' names of the dtypes MLX can compute with after widening.
DTYPES = {SAFETENSORS_DTYPE[name]: dtype for name, dtype in model.DTYPES.items()}


class ExpertStore:
    """Experts of a layout within `capacity_bytes`. Close it, or use it as a context.

    `stack` is all slots as one stack of experts, [S, 2F, D] and [S, D, F].
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
        record = _common_geometry(layout)
        self.exact = miss == "exact"
        self.policy = policy or DecayedLFU(layout.num_layers, layout.num_experts)
        self._capacity_bytes = capacity_bytes
        arena, room = _arena(slots * layout.record_nbytes)
        self.stack = _stack(arena, slots, record)
        # All made here: readers' threads, which may ask for a view, had better not evaluate.
        self._experts = [_expert(arena, slot, record) for slot in range(slots)]
        mx.eval(self.stack, self._experts)
        _check_shared(room, record, self.stack.gate_up_FD[0], self._experts[0].gate_up_FD)
        self._held: list[int] = []  # slots that computation not yet evaluated may use
        self._owns_reader = reader is None
        self._reader = reader or RangedReader()
        self._tier = SlotTier(
            layout, slots, self._reader, self.policy, arena=room, view=self._view, verify=verify
        )

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Ask for experts, best first; those already here are kept a while. A hint: what finds no
        room is dropped. Returns the bytes newly asked for."""
        return self._tier.prefetch(keys)

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Expert | None]]:
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

    def hold(
        self,
        layer: int,
        ready: Iterable[tuple[int, Expert | None]],
        meanwhile: mx.array | None,
    ) -> dict[int, int | None]:
        """Take all experts of `acquire(layer, ...)`: their indices in `stack`, which are theirs
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

    def resident(self) -> frozenset[Key]:
        return self._tier.resident()

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

    def _view(self, slot: int, record: Record) -> Expert:
        return self._experts[slot]


def _check_options(miss: str, warm_bytes: int) -> None:
    if miss not in ("exact", "fallback"):
        raise UsageError(f"miss must be exact or fallback, not {miss!r}")
    if warm_bytes:
        raise UsageError(
            "a warm tier needs an accelerator with memory of its own",
            "",
            "MLX shares one memory: add its bytes to the budget",
        )


def _common_geometry(layout: Layout) -> Record:
    """A record like all others: slots can only be a stack if every expert has the same tensors."""
    records = list(layout.records.values())
    first = records[0]
    for record in records:
        if (record.tensors, record.nbytes) != (first.tensors, first.nbytes):
            raise ShapeMismatch(f"expert {record.key} has other tensors than {first.key}")
    for entry in first.tensors:
        if entry.dtype not in DTYPES:
            raise ShapeMismatch(f"expert {first.key}: {entry.name} is {entry.dtype}")
    missing = set(EXPERT_TENSORS) - {entry.name for entry in first.tensors}
    if missing:
        raise ShapeMismatch(f"expert {first.key} has no {', '.join(sorted(missing))}")
    return first


def _arena(nbytes: int) -> tuple[mx.array, memoryview]:
    """Zeroed bytes as an array and as the writable memory it exports, aligned for direct reads.
    A page more than asked for, since MLX's own allocations are not aligned to one."""
    whole = mx.zeros((nbytes + ALIGN,), mx.uint8)
    mx.eval(whole)
    room = memoryview(whole).cast("B")
    start = -np.frombuffer(room, np.uint8).ctypes.data % ALIGN
    return whole[start : start + nbytes], room[start : start + nbytes]


def _tensors(record: Record) -> list[RecordTensor]:
    """The record's tensors in the order `Expert` has them."""
    entries = {entry.name: entry for entry in record.tensors}
    return [entries[name] for name in EXPERT_TENSORS]


def _stack(arena: mx.array, slots: int, record: Record) -> Expert:
    """All slots as strided views."""
    arrays = []
    for entry in _tensors(record):
        dtype, (rows, columns) = DTYPES[entry.dtype], entry.shape
        shape = (slots, rows, columns)
        strides = (arena.size // slots // dtype.size, columns, 1)
        flat = arena.view(dtype)
        arrays.append(mx.as_strided(flat, shape, strides, entry.offset // dtype.size))
    return Expert(*arrays)


def _expert(arena: mx.array, slot: int, record: Record) -> Expert:
    """One slot as contiguous views, which an index into the stack would copy."""
    arrays = []
    for entry in _tensors(record):
        start = slot * record.nbytes + entry.offset
        flat = arena[start : start + entry.nbytes].view(DTYPES[entry.dtype])
        arrays.append(flat.reshape(entry.shape))
    return Expert(*arrays)


def _check_shared(room: memoryview, record: Record, *views: mx.array) -> None:
    """That views of an array share its memory is how MLX works, not what it promises: look."""
    first = _tensors(record)[0].offset
    room[first] = 1
    seen = {memoryview(mx.contiguous(view[0])).cast("B")[0] for view in views}
    room[first] = 0
    if seen != {1}:
        raise StoreError("this version of MLX copies where a view was expected", "", "update mlx")
