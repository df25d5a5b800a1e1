"""The routed experts of a streamed model: slots of a fixed number of bytes, filled from disk.

Memory is unified, so the slots computed with are the bytes read: one array, allocated once, that
exports its buffer to the reader; stacks over it are views. Nothing is copied, nothing is allocated
while experts come and go (what was tried instead: bench/log/mlx.md). MLX is lazy: who computes
with a slot must have evaluated the result before the slot is given up, or `hold` it.
What to keep and evict is `chronos.common.experts.residency`'s business, when to wait that of
`chronos.common.experts.tier`. What a record's tensors mean is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from chronos.backends.mlx import model
from chronos.backends.mlx.moe import Expert
from chronos.backends.probe import memory_limits
from chronos.common.disk.io import ALIGN
from chronos.common.disk.reader import RangedReader
from chronos.common.errors import BudgetError, ShapeMismatch, StoreError, UsageError
from chronos.common.experts.residency import DecayedLFU, Policy
from chronos.common.experts.stats import StoreStats
from chronos.common.experts.tier import Lease
from chronos.common.experts.tiers import SlotTier
from chronos.common.layout.folder import slots_within
from chronos.common.model.weights import EXPERT_TENSORS, SAFETENSORS_DTYPE, Key

if TYPE_CHECKING:
    from chronos.common.layout import Layout, Record
    from chronos.common.layout.manifest import RecordTensor

    Tensors = tuple[RecordTensor, ...]

# safetensors' names of the dtypes MLX can compute with after widening, or take as quantised.
DTYPES = {SAFETENSORS_DTYPE[name]: dtype for name, dtype in model.DTYPES.items()} | {
    "U8": mx.uint8,
    "U32": mx.uint32,
}


class ExpertStore:
    """Experts of a layout within `capacity_bytes`. Close it, or use it as a context.

    `stacks` has, for each layer, all slots as one stack of each tensor that a record of this layer
    holds, [S, ...] by name; `stack` is the one of a native model, whose layers are alike.
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
        layers = _geometry(layout)
        self.exact = miss == "exact"
        self.policy = policy or DecayedLFU(layout.num_layers, layout.num_experts)
        self._capacity_bytes = capacity_bytes
        stride = layout.record_nbytes
        pages, room, start = _arena(slots * stride)
        kinds = {
            t: _views(pages, start, t, (slots, stride)) for t in dict.fromkeys(layers.values())
        }
        self.stacks = {layer: kinds[tensors] for layer, tensors in layers.items()}
        # All made here: readers' threads, which may ask for a view, had better not evaluate.
        self._experts = []
        if len(kinds) == 1 and set(EXPERT_TENSORS) <= next(iter(kinds.values())).keys():
            starts = range(start, start + slots * stride, stride)
            self._experts = [_expert(_views(pages, at, *kinds)) for at in starts]
        mx.eval(list(kinds.values()), self._experts)
        _check_shared(room[:stride], *kinds.values())
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

    @property
    def stack(self) -> Expert:
        return _expert(next(iter(self.stacks.values())))

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
        """Of a record that is not a native expert, its slot."""
        return self._experts[slot] if self._experts else slot


def _check_options(miss: str, warm_bytes: int) -> None:
    if miss not in ("exact", "fallback"):
        raise UsageError(f"miss must be exact or fallback, not {miss!r}")
    if warm_bytes:
        raise UsageError(
            "a warm tier needs an accelerator with memory of its own",
            "",
            "MLX shares one memory: add its bytes to the budget",
        )


def _geometry(layout: Layout) -> dict[int, Tensors]:
    """What each layer's records hold: slots can only be a stack if they all hold the same."""
    layers: dict[int, Tensors] = {}
    for (layer, _), record in layout.records.items():
        if layers.setdefault(layer, record.tensors) != record.tensors:
            raise ShapeMismatch(f"expert {record.key} has other tensors than others of its layer")
    for layer, tensors in layers.items():
        for entry in tensors:
            if entry.dtype not in DTYPES:
                raise ShapeMismatch(f"experts of layer {layer}: {entry.name} is {entry.dtype}")
    return layers


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


def _views(
    pages: mx.array, start: int, tensors: Tensors, slots: tuple[int, int] | None = None
) -> dict[str, mx.array]:
    """The tensors of the record at byte `start`; with `slots` (their number, and the bytes from one
    to the next) of that many records from there on, as stacks. No copies."""
    views = {}
    for entry in tensors:
        dtype, shape = DTYPES[entry.dtype], entry.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        if slots is not None:
            shape, strides = (slots[0], *shape), (slots[1] // dtype.size, *strides)
        first = (start + entry.offset) // dtype.size
        views[entry.name] = mx.as_strided(pages.view(dtype), shape, strides, first)
    return views


def _expert(views: Mapping[str, mx.array]) -> Expert:
    return Expert(*(views[name] for name in EXPERT_TENSORS))


def _check_shared(record: memoryview, *stacks: Mapping[str, mx.array]) -> None:
    """That views of an array share its memory is how MLX works, not what it promises: look."""
    record[:] = b"\x01" * len(record)
    views = [stack for kind in stacks for stack in kind.values()]
    seen = {memoryview(mx.contiguous(view[0])).cast("B")[0] for view in views}
    record[:] = bytes(len(record))
    if seen != {1}:
        raise StoreError("this version of MLX copies where a view was expected", "", "update mlx")
