"""The numbers of one generation: seconds, expert traffic, and the share of the limit.

A `Meter` is told of a sequence's passes and how long they took, and reads the feed's counters at
the ends of prompt and reply: what others read meanwhile is in them. The limit is that of the decode
phase, on the routing that was executed, from the experts resident when it began, at the run's own
pace of computing (`limits`). Not covered: printing; the key/value cache's bytes, small beside the
weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from chronos.common.disk.io import measure_read_rate
from chronos.common.disk.tensors import locate_tensors
from chronos.common.experts.stats import StoreStats
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import LARGE, dense_tensors
from chronos.common.traces.limits import limit_report
from chronos.common.traces.simulate import simulate
from chronos.common.traces.trace import TraceRecorder

if TYPE_CHECKING:
    from chronos.backends.protocol import RouteOverride, Session
    from chronos.common.experts.feed import Feed
    from chronos.common.layout import Layout
    from chronos.common.model.guest import Geometry
    from chronos.common.text.sampling import Work

_RATE_SAMPLE_BYTES = 64 << 20
# An accelerator's memory rate is not measured: its roofline stands aside for the kernel time.
_UNKNOWN_RATE = 1e18
_OF_TOKENS = (
    *("routed", "hits", "late", "misses", "prefetch_hits", "warm_hits", "fallbacks"),
    *("bytes_read", "bytes_copied", "bytes_prefetched", "bytes_loaded", "stall_s"),
)


@dataclass(frozen=True)
class Machine:
    """What bounds a streamed run: bytes, and rates in bytes per second.

    resident_token_s: seconds per token with all experts in the model, where that was measured.
    """

    record_bytes: int
    slots: int
    disk_rate: float
    memory_rate: float
    dense_bytes: int
    warm_slots: int = 0  # records in the warm tier behind an accelerator's slots
    copy_rate: float | None = None  # from there to the slots
    moe_layers: tuple[int, ...] | None = None  # the rows of a recorded routing; None: 0, 1, ...
    resident_token_s: float | None = None


def measure_machine(layout: Layout, config: Geometry, feed: Feed, device: str) -> Machine:
    """Read a little of the model's own files, cold, and time memory. A tenth of a second or so."""
    size, on_cpu = layout.record_nbytes, device.startswith("cpu")
    stats, records = feed.stats(), len(layout.records)
    return Machine(
        record_bytes=size,
        slots=min(stats.capacity_bytes // size, records),
        warm_slots=min(stats.warm_capacity_bytes // size, records),
        copy_rate=feed.copy_rate(),
        disk_rate=measure_read_rate(layout.files[0], size, max_bytes=_RATE_SAMPLE_BYTES),
        memory_rate=_memory_rate() if on_cpu else _UNKNOWN_RATE,
        dense_bytes=_dense_bytes(layout, config, on_cpu),
        moe_layers=layout.moe_layers,
    )


def _dense_bytes(layout: Layout, config: Geometry, on_cpu: bool) -> int:
    """What a token reads of the dense part: as stored, but for the smaller tensors of a native
    model, which a CPU holds in float32."""
    if isinstance(config, ModelConfig):
        widened = 4 if on_cpu else config.dtype_bytes
        sizes = [t.nbytes // config.dtype_bytes for t in dense_tensors(config)]
        return sum(n * (config.dtype_bytes if n >= LARGE else widened) for n in sizes)
    return sum(entry.nbytes for _, entry in locate_tensors(layout.folder).values())


class Meter:
    """Counts one sequence, from the meter's creation on. With `record`, `limit` can be asked for,
    where the sequence is alone."""

    def __init__(self, session: Session, feed: Feed | None, seq: int = 0, *, record: bool) -> None:
        self.session, self.feed, self.seq = session, feed, seq
        self.record = record and feed is not None
        self.prompt_tokens = self.decoded = 0
        self.prefill_s = self.decode_s = 0.0
        self._start = self._count()
        self._middle: StoreStats | None = None
        self._end: StoreStats | None = None
        self._routing: list[Any] = []
        self._resident = self._held = frozenset[tuple[int, int]]()

    def records(self, work: Work) -> bool:
        """Whether the pass that does this work is to keep its routing: the prompt's has no use."""
        return self.record and not work.prompt

    def run(self, work: Work, route_override: RouteOverride | None = None) -> int | None:
        """One pass for this sequence alone, counted. route_override: as `Session.run` takes it."""
        begin = time.perf_counter()
        [out] = self.session.run([work], record=self.records(work), route_override=route_override)
        self.note(work, time.perf_counter() - begin)
        if isinstance(out, Exception):
            raise out
        return out

    def note(self, work: Work, seconds: float, whole: bool = True) -> None:
        """A pass did this work of the sequence, or with `whole` false some layers of it."""
        if not work.prompt:
            self.decode_s += seconds
            self.decoded += 1
            return
        self.prefill_s += seconds
        if not whole:
            return
        self.prompt_tokens += len(work.tokens)
        if work.last:
            self._middle = self._count()
            if self.record and self.feed is not None:
                self._resident, self._held = self.feed.resident(), self.feed.held()

    def end(self) -> None:
        """The sequence has ended and is about to be dropped."""
        if self.record and self.decoded:
            self._routing = list(self.session.routing(self.seq))
        self._end = self._count()

    def stats(self) -> dict[str, Any]:
        """Counters of prompt and reply together under their own names, of the decoded tokens alone
        as decode_<name>: those never mix in one line."""
        now = self._end or self._count()
        decode = now.minus(self._middle or now).to_json()
        return {
            "ttft_s": self.prefill_s,
            "prefill_tps": _per_second(self.prompt_tokens, self.prefill_s),
            "decode_tps": _per_second(self.decoded, self.decode_s),
            "decode_s": self.decode_s,
            "decode_tokens": self.decoded,
            **{f"decode_{name}": decode[name] for name in _OF_TOKENS},
            **now.minus(self._start).to_json(),
        }

    def limit(self, config: Geometry, machine: Machine) -> dict[str, Any] | None:
        """The limit of the decoded tokens and the shares of it; None if there are none, or if some
        needs were answered without their expert. After `end`."""
        if not self.decoded or machine.slots < config.num_experts_per_tok:
            return None
        assert self._middle is not None and self._end is not None
        decode = self._end.minus(self._middle)
        if decode.fallbacks:
            return None
        recorder = TraceRecorder(
            config.num_experts, config.num_experts_per_tok, layers=machine.moe_layers
        )
        for ids_TLK, _ in self._routing:
            recorder.append(ids_TLK)
        trace = recorder.trace()
        # What was there at first: least worth keeping first, in some order that is always the same.
        resident = sorted(self._resident)
        held = sorted(self._held) if machine.warm_slots else resident  # staging is no cache
        slots = machine.slots + machine.warm_slots
        reads = {
            policy: simulate(trace, slots, policy, resident=held).reads_per_token
            for policy in ("min", "lru", "lfu")
        }
        copies = 0.0
        if machine.copy_rate:
            copies = simulate(trace, machine.slots, "min", resident=resident).reads_per_token
        stall_s, token_s = decode.stall_s / self.decoded, self.decode_s / self.decoded
        # What this run computed in is possible: a resident run that took longer was disturbed.
        resident_s = machine.resident_token_s and min(token_s - stall_s, machine.resident_token_s)
        report = limit_report(
            token_s=token_s,
            reads_per_token=decode.bytes_read / machine.record_bytes / self.decoded,
            min_reads_per_token=reads["min"],
            ref_reads_per_token=min(reads["lru"], reads["lfu"]),
            record_bytes=machine.record_bytes,
            slow_bytes_per_s=machine.disk_rate,
            fast_bytes_per_s=machine.memory_rate,
            dense_bytes=machine.dense_bytes,
            layers=trace.num_layers,
            top_k=trace.top_k,
            kernel_s=None if resident_s is None else max(0.0, resident_s),
            stall_s=stall_s,
            min_copies_per_token=copies,
            link_bytes_per_s=machine.copy_rate,
        )
        return report.to_json()

    def _count(self) -> StoreStats:
        return self.feed.stats() if self.feed else StoreStats()


@cache
def _memory_rate(nbytes: int = 32 << 20) -> float:
    """Bytes per second one core moves, read and written; the best of three copies."""
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return 2 * nbytes / best


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0
