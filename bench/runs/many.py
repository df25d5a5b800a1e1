"""Tokens per second of several sequences in one engine, by the number of sequences.

Recorded routing of a real model on a generated one of its geometry, as `chronos bench replay` has
it: each sequence follows a part of the trace of its own. A pass reads the union of what its
sequences need of a layer once, so reads per token fall as sequences share experts, and so do
weights on their way through the processor: rows that come to one together are multiplied at once.
Turns of a few passes by each number of sequences alternate, on engines of their own.

Ceiling, of N sequences, in times the speed of one: the time of a token alone over the larger of
what computing takes (a pass of N sequences of the resident model, by N) and what reading takes
(the reads per token of N at the disk's rate). It is printed beside what was measured, and so is the
time of the thread that computes by its own clock, which a busy machine moves less. With
CHRONOS_KERNEL=off nothing but reads is shared.

    python -m bench.runs.many T.npz --work bench/scratch/replay [--budget 25%] [--tokens 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.disk.io import measure_read_rate
from chronos.common.text.sampling import SamplingParams, Work
from chronos.common.traces.trace import RoutingTrace
from chronos.measure.recorded import RecordedRouting, config_for, make_model
from chronos.run import engine

GREEDY = SamplingParams()
_PARTS = 4  # of the trace, one a sequence
_TURN = 5  # passes of one number of sequences before the next has its turn


class Company:
    """So many sequences on an engine, each on its own part of a trace."""

    def __init__(
        self, opened: engine.Engine, trace: RoutingTrace, count: int, first: int = 0
    ) -> None:
        """first: number of the first sequence, where others are on the engine."""
        self.engine, self.count = opened, count
        self._seqs = range(first, first + count)
        self.seconds: list[float] = []
        self.thread_seconds: list[float] = []
        part = trace.num_tokens // _PARTS
        self._routing = {
            seq: RecordedRouting(trace, at % _PARTS * part) for at, seq in enumerate(self._seqs)
        }
        for seq in self._seqs:
            self._run([Work(seq, [0], GREEDY, prompt=1)])

    def _run(self, work: list[Work]) -> None:
        override = lambda seq, layer: self._routing[seq](layer)  # noqa: E731
        for out in self.engine.session.run(work, route_override=override):
            if isinstance(out, Exception):
                raise out

    def passes(self, count: int) -> None:
        for _ in range(count):
            begin, of_thread = time.perf_counter(), time.thread_time()
            self._run([Work(seq, [0], GREEDY) for seq in self._seqs])
            self.seconds.append(time.perf_counter() - begin)
            self.thread_seconds.append(time.thread_time() - of_thread)

    def bytes_read(self) -> int:
        return self.engine.feed.stats().bytes_read if self.engine.feed else 0


def union(trace: RoutingTrace, count: int, passes: int) -> float:
    """Experts that a pass of so many sequences needs, of which each is read and multiplied once."""
    starts, ids_TLK = trace.num_tokens // _PARTS * np.arange(count), trace.ids_TLK
    needs = (ids_TLK[starts + at] for at in range(passes))  # each [N, L, K]
    found = [
        sum(len(np.unique(ids_NLK[:, at])) for at in range(trace.num_layers)) for ids_NLK in needs
    ]
    return float(np.mean(found))


def measure(args: argparse.Namespace, trace: RoutingTrace) -> dict[str, Any]:
    counts = [int(count) for count in args.sequences.split(",")]
    with ExitStack() as stack:

        def opened(budget: str) -> engine.Engine:
            options = {"budget": budget, "prefetch": args.prefetch, "backend": args.backend}
            return stack.enter_context(engine.load(args.work, **options))

        whole = opened("resident")
        resident = [Company(whole, trace, count, first=100 * count) for count in counts]
        streamed = [Company(opened(args.budget), trace, count) for count in counts]
        everyone = [*streamed, *resident]
        before: list[int] = []
        for warm, total in ((True, args.warmup), (False, args.tokens)):
            if not warm:
                before = [each.bytes_read() for each in everyone]
                for each in everyone:
                    each.seconds.clear()
                    each.thread_seconds.clear()
            for _ in range(0, total, _TURN):
                for each in everyone:
                    each.passes(_TURN)
        layout = streamed[0].engine.layout
        assert layout is not None
        disk = measure_read_rate(layout.files[0], layout.record_nbytes)
        rows = []
        for each, held, start in zip(streamed, resident, before, strict=False):
            tokens = each.count * len(each.seconds)
            rows.append(
                {
                    "sequences": each.count,
                    "token_s": statistics.median(each.seconds) / each.count,
                    "mean_token_s": sum(each.seconds) / tokens,
                    "thread_token_s": statistics.median(each.thread_seconds) / each.count,
                    "resident_token_s": statistics.median(held.seconds) / each.count,
                    "experts_per_pass": union(trace, each.count, args.warmup + args.tokens),
                    "reads_per_token": (each.bytes_read() - start) / layout.record_nbytes / tokens,
                }
            )
        one = rows[0]["token_s"]
        for row in rows:
            read_s = row["reads_per_token"] * layout.record_nbytes / disk
            row["ceiling"] = one / max(row["resident_token_s"], read_s)
            row["times_one"] = one / row["token_s"]
            print(
                f"{row['sequences']} sequences: {1 / row['token_s']:6.1f} tokens/s, "
                f"{row['times_one']:.2f} times one (ceiling {row['ceiling']:.2f}), "
                f"{row['reads_per_token']:.1f} reads a token, "
                f"{row['experts_per_pass']:.0f} experts a pass; ms a token: "
                f"{1e3 * row['token_s']:.1f}, its thread {1e3 * row['thread_token_s']:.1f}, "
                f"resident {1e3 * row['resident_token_s']:.1f}",
                flush=True,
            )
    return {"disk_bytes_per_s": disk, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the generated model")
    parser.add_argument("--expert-bytes", type=int, default=3_000_000)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--sequences", default="1,2,4")
    parser.add_argument("--tokens", type=int, default=60, help="passes that are counted")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--prefetch", default="auto")
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    make_model(args.work, config_for(trace, args.expert_bytes))
    found = measure(args, trace)
    print(json.dumps({"bench": "many", "budget": args.budget, "prefetch": args.prefetch} | found))


if __name__ == "__main__":
    main()
