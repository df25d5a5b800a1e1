"""What reading an expert costs the host, beside the wait for the disk.

Floor: the processor time of a bare direct read of the same bytes, which is the kernel's. Ours adds
the consumer's part (finding what is missing, choosing victims, taking what has landed) and the
readers' (queue, pieces, checksum). Processor time of all threads is counted, not the clock, so a
busy neighbour changes little. A layer's experts are asked for together, as a token asks, and every
one of them has to be read.

    python -m bench.runs.read_cost FOLDER [--record 2.95MB] [--tokens 40] [--top-k 6]

FOLDER: where a generated model of about a gigabyte is, or is to be. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from chronos.common.budget import parse_size
from chronos.common.disk.io import touched_buffers
from chronos.common.experts.feed import Feed, FeedOptions, open_feed
from chronos.common.experts.residency import DecayedLFU
from chronos.common.layout import Layout, Record, open_layout
from chronos.common.model.config import ModelConfig
from chronos.common.text.sampling import SamplingParams, Work
from chronos.measure.recorded import make_model

_LAYERS, _HIDDEN = 4, 1024


class Bytes:
    """An arena whose slots are bytes that were touched before: no page is new while it is timed."""

    copies = None

    def __init__(self, layout: Layout, slots: int, options: FeedOptions) -> None:
        self.slots = slots
        self.host = touched_buffers(1, slots * layout.record_nbytes)[0]

    def view(self, slot: int, record: Record) -> int:
        return slot

    def copy_rate(self) -> None:
        """Reads land where they are used."""

    def close(self) -> None: ...


def generated(folder: Path, record_bytes: int) -> Layout:
    width = record_bytes // (6 * _HIDDEN) // 32 * 32
    config = ModelConfig(
        hidden_size=_HIDDEN, num_hidden_layers=_LAYERS, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, vocab_size=256, num_experts=64,
        num_experts_per_tok=6, moe_intermediate_size=width, sliding_window=64,
        lookahead_steps=0, dtype="bfloat16",
    )  # fmt: skip
    return open_layout(make_model(folder, config))


def bare(layout: Layout, order: list[Record]) -> float:
    """Processor seconds of a read of one record, by itself."""
    buffer = touched_buffers(1, layout.record_nbytes)[0]
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in layout.files}
    begin = time.process_time()
    for record in order:
        os.preadv(files[layout.path(record.key)], [buffer[: record.nbytes]], record.offset)
    spent = time.process_time() - begin
    for fd in files.values():
        os.close(fd)
    return spent / len(order)


def streamed(layout: Layout, tokens: int, top_k: int, verify: bool) -> dict[str, float]:
    """Seconds of a record through a feed: of all threads' processor time, of the consumer's own,
    and by the clock."""
    options = FeedOptions(top_k=top_k, verify=verify)
    capacity = 2 * top_k * layout.record_nbytes  # two layers: every need is a miss
    arena: Any = Bytes
    # What was needed ten tokens ago, and before, must not outrank what is needed now.
    policy = DecayedLFU(layout.num_layers, layout.num_experts, decay=0.5)
    with open_feed(arena, layout, capacity, options, policy=policy) as feed:
        _run(feed, 4, top_k)
        reads = feed.stats().misses
        clock = time.perf_counter()
        begin, own = time.process_time(), time.thread_time()
        _run(feed, tokens, top_k)
        spent, own = time.process_time() - begin, time.thread_time() - own
        clock = time.perf_counter() - clock
        reads = feed.stats().misses - reads
    assert reads == tokens * _LAYERS * top_k
    return {"all_s": spent / reads, "consumer_s": own / reads, "clock_s": clock / reads}


def _run(feed: Feed, tokens: int, top_k: int) -> None:
    for token in range(tokens):
        work = Work(0, [token], SamplingParams())
        with feed.step([work]) as step:
            for layer in range(_LAYERS):
                first = token * top_k
                for _ in step.acquire(layer, [(first + i) % 64 for i in range(top_k)]):
                    pass
            step.done(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", default="2.95MB")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    layout = generated(args.folder, parse_size(args.record, "--record"))
    order = [layout.records[layer, e] for e in range(64) for layer in range(_LAYERS)]
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        rows = {
            "bare read": bare(layout, order),
            **{f"feed, {k[:-2]}": v for k, v in _both(layout, args, True).items()},
            **{f"no checksum, {k[:-2]}": v for k, v in _both(layout, args, False).items()},
        }
        for name, value in rows.items():
            found.setdefault(name, []).append(1e3 * value)
    medians = {name: round(statistics.median(values), 4) for name, values in found.items()}
    for name, value in medians.items():
        spread = f"{min(found[name]):.3f} to {max(found[name]):.3f}"
        print(f"{name:24} {value:7.3f} ms a record   ({spread})")
    ours = medians["feed, all"] - medians["bare read"]
    print(f"{'beside the bare read':24} {ours:7.3f} ms a record of {layout.record_nbytes} bytes")
    print(json.dumps({"bench": "read_cost", "record_bytes": layout.record_nbytes,
                      "beside_bare_ms": round(ours, 4), "ms": medians}))  # fmt: skip


def _both(layout: Layout, args: Any, verify: bool) -> dict[str, float]:
    return streamed(layout, args.tokens, args.top_k, verify)


if __name__ == "__main__":
    main()
