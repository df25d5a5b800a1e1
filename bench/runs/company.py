"""What a predictor for each sequence is worth where several run together, rehearsed.

Each of N sequences follows a part of the trace of its own; a pass reads the union of what they need
of a layer (`bench.runs.many` measures that on a model). `one for all`: a single predictor is told
what all of them need, and the first one's token. `one each`: as it runs. `sum` and `max`: how the
scores of several are joined into ranks, of which the tree has the sum. On a clock and a disk that
are numbers, so it repeats anywhere, and in minutes.

    python -m bench.runs.company T.npz [--forecast FILE] [--budget 25] [--tokens 300]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.policy import PredictorPolicy
from chronos.common.experts.foresight.predictor import DecayedUse, Predictor, Scores, TokenTable
from chronos.common.experts.residency import NOBODY
from chronos.common.traces.fit import split
from chronos.common.traces.rehearse import Pace, Rehearsal, rehearse
from chronos.common.traces.trace import RoutingTrace

RECORD = 3_000_000
PACE = Pace(RECORD, RECORD / 1e-3, 0.04)


class OneForAll(PredictorPolicy):
    """A predictor that takes several sequences for one."""

    def follow(self, seqs: Sequence[int]) -> None:
        super().follow(seqs[:1])

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        super().observe(layer, experts)

    def begin_token(self, *tokens: int) -> None:
        super().begin_token(tokens[0])


class ByMaximum(PredictorPolicy):
    """Ranks an expert as the sequence does that it is worth most to."""

    def _rank(self) -> Scores:
        return np.maximum.reduce([predictor.scores() for predictor in self._now.values()])


KINDS: dict[str, type[PredictorPolicy]] = {
    "one for all": OneForAll,
    "one each, max": ByMaximum,
    "one each, sum": PredictorPolicy,
}


def run(
    parts: Sequence[RoutingTrace], policy: PredictorPolicy, budget: float, warmup: int
) -> Rehearsal:
    first, *beside = parts
    slots = int(budget / 100 * first.num_layers * first.num_experts)
    return rehearse(first, slots, policy, PACE, warmup=warmup, beside=beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--forecast", type=Path, help="then only its test sequences are run")
    parser.add_argument("--budget", type=float, default=25.0, help="percent of the experts")
    parser.add_argument("--sequences", default="1,2,4")
    parser.add_argument("--tokens", type=int, default=300, help="passes, of which a third warms up")
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    shape = (trace.num_layers, trace.num_experts)
    makers: dict[str, Callable[[], Predictor]] = {"lfu": lambda: DecayedUse(*shape)}
    if trace.tokens_T is not None:
        makers["token-table"] = lambda: TokenTable(*shape)
    if args.forecast is not None:
        trace = split(trace).test
        makers["forecast"] = ForecastModel.load(args.forecast).predictor
    warmup, rows = args.tokens // 3, []
    for count in map(int, args.sequences.split(",")):
        each = trace.num_tokens // count
        starts = [each * number for number in range(count)]
        parts = [trace.part(start, start + min(each, args.tokens)) for start in starts]
        for name, make in makers.items():
            for kind, policy in KINDS.items():
                found = run(parts, policy(make()), args.budget, warmup)
                stats, tokens = found.stats, count * len(found.token_s)
                row = {
                    "sequences": count,
                    "predictor": name,
                    "kind": kind,
                    "hits": stats.hits / stats.routed,
                    "reads_per_token": stats.bytes_read / RECORD / tokens,
                    "token_ms": 1e3 * float(found.token_s.sum()) / tokens,
                }
                rows.append(row)
                print(
                    f"{count} {name:12} {kind:14} {100 * row['hits']:5.1f} % hits, "
                    f"{row['reads_per_token']:5.1f} reads and {row['token_ms']:5.1f} ms a token",
                    flush=True,
                )
    print(json.dumps({"bench": "company", "trace": args.trace.name, "budget": args.budget,
                      "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
