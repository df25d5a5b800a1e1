"""Tokens per second of several sequences in one engine, by the number of sequences.

Recorded routing of a real model on a generated one of its geometry, as `chronos bench replay` has
it: each sequence follows a part of the trace of its own. A pass reads the union of what its
sequences need of a layer once, so reads per token fall as sequences share experts; the arithmetic
is not shared. Turns of a few passes by each number of sequences alternate, on engines of their own.

Ceiling, of N sequences, in times the speed of one: the time of a token alone over the larger of
what computing takes (the resident token's time, which no company shortens) and what reading takes
(the reads per token of N at the disk's rate). It is printed beside what was measured.

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

    def __init__(self, opened: engine.Engine, trace: RoutingTrace, count: int) -> None:
        self.engine, self.count = opened, count
        self.seconds: list[float] = []
        part = trace.num_tokens // _PARTS
        self._routing = [RecordedRouting(trace, seq % _PARTS * part) for seq in range(count)]
        for seq in range(count):
            self._run([Work(seq, [0], GREEDY, prompt=1)])

    def _run(self, work: list[Work]) -> None:
        override = lambda seq, layer: self._routing[seq](layer)  # noqa: E731
        for out in self.engine.session.run(work, route_override=override):
            if isinstance(out, Exception):
                raise out

    def passes(self, count: int) -> None:
        for _ in range(count):
            begin = time.perf_counter()
            self._run([Work(seq, [0], GREEDY) for seq in range(self.count)])
            self.seconds.append(time.perf_counter() - begin)

    def bytes_read(self) -> int:
        return self.engine.feed.stats().bytes_read if self.engine.feed else 0


def measure(args: argparse.Namespace, trace: RoutingTrace) -> dict[str, Any]:
    counts = [int(count) for count in args.sequences.split(",")]
    with ExitStack() as stack:

        def company(budget: str, count: int) -> Company:
            options = {"budget": budget, "prefetch": args.prefetch, "backend": args.backend}
            opened = stack.enter_context(engine.load(args.work, **options))
            return Company(opened, trace, count)

        resident = company("resident", 1)
        streamed = {count: company(args.budget, count) for count in counts}
        everyone = [resident, *streamed.values()]
        before: list[int] = []
        for warm, total in ((True, args.warmup), (False, args.tokens)):
            if not warm:
                before = [each.bytes_read() for each in everyone]
                for each in everyone:
                    each.seconds.clear()
            for _ in range(0, total, _TURN):
                for each in everyone:
                    each.passes(_TURN)
        layout = streamed[counts[0]].engine.layout
        assert layout is not None
        disk = measure_read_rate(layout.files[0], layout.record_nbytes)
        resident_s = statistics.median(resident.seconds)
        rows = []
        for each, start in zip(everyone[1:], before[1:], strict=True):
            tokens = each.count * len(each.seconds)
            rows.append(
                {
                    "sequences": each.count,
                    "token_s": statistics.median(each.seconds) / each.count,
                    "mean_token_s": sum(each.seconds) / tokens,
                    "reads_per_token": (each.bytes_read() - start) / layout.record_nbytes / tokens,
                }
            )
        one = rows[0]["token_s"]
        for row in rows:
            read_s = row["reads_per_token"] * layout.record_nbytes / disk
            row["ceiling"] = one / max(resident_s, read_s)
            row["times_one"] = one / row["token_s"]
            print(
                f"{row['sequences']} sequences: {1 / row['token_s']:6.1f} tokens/s, "
                f"{row['times_one']:.2f} times one (ceiling {row['ceiling']:.2f}), "
                f"{row['reads_per_token']:.1f} reads a token",
                flush=True,
            )
    return {"resident_token_s": resident_s, "disk_bytes_per_s": disk, "rows": rows}


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
