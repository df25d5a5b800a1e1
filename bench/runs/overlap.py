"""How much of the reading each predictor hides, at disks of many speeds: rehearsed runs.

    python -m bench.runs.overlap T.npz [--forecast FILE] [--budgets 25%] [--rates 0.6,1.2] ...

Ceiling: an oracle that has read the trace. The store, the policy and the prefetcher are the real
ones, clock and disk are numbers (`common/traces/rehearse.py`), so figures repeat anywhere.
What reads and forecasts cost the computation beside them is nothing, as on a GPU, unless
--read-ms-per-mb and --predict-ms say what: then `auto`, whose ways compete, is the row to look at.
Test sequences only. `x bound` is time per token by max(resident time, bytes read / disk rate).
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import DecayedUse, TokenTable
from chronos.common.experts.residency import Policy
from chronos.common.traces.fit import split
from chronos.common.traces.rehearse import Oracle, Pace, rehearse
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace

_RECORD = 2_949_120
_WARMUP = 130  # the bandit's first comparison comes after 80 tokens


def policies(trace: RoutingTrace, forecast: Path | None) -> dict[str, Callable[[], Policy]]:
    shape = trace.num_layers, trace.num_experts
    found: dict[str, Callable[[], Policy]] = {"lfu": lambda: PredictorPolicy(DecayedUse(*shape))}
    if trace.tokens_T is not None:
        found["tokens"] = lambda: PredictorPolicy(TokenTable(*shape))
    if forecast is not None:
        model = ForecastModel.load(forecast)
        found["forecast"] = lambda: PredictorPolicy(model.predictor())
        found["auto"] = lambda: SwitchablePolicy(model.predictor())
    found["oracle"] = lambda: PredictorPolicy(Oracle(trace))
    return found


def measure(
    trace: RoutingTrace, slots: int, policy: Policy, pace: Pace, prefetch: bool
) -> dict[str, Any]:
    run = rehearse(trace, slots, policy, pace, prefetch=prefetch, warmup=_WARMUP)
    stats, tokens = run.stats, len(run.token_s)
    token_s, read = float(run.token_s.mean()), stats.bytes_read / tokens
    return {
        "ms": 1e3 * token_s,
        "x_bound": token_s / max(pace.token_s, read / pace.link_bytes_per_s),
        "mb": read / 1e6,
        "stall_ms": 1e3 * stats.stall_s / tokens,
        "hits": stats.hits / stats.routed,
        "ahead": stats.prefetch_recall,
        "right": stats.prefetch_precision,
        "late_mb": stats.late * pace.record_bytes / tokens / 1e6,
        "wasted_mb": stats.bytes_wasted / tokens / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--forecast", type=Path)
    parser.add_argument("--budgets", default="25%")
    parser.add_argument("--rates", default="0.6,1.2,2.4,4.8", help="GB/s")
    parser.add_argument("--token-ms", type=float, default=45.0)
    parser.add_argument("--read-ms-per-mb", type=float, default=0.0)
    parser.add_argument("--predict-ms", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=600)
    args = parser.parse_args()
    test = split(RoutingTrace.load(args.trace)).test
    trace = test.part(0, min(test.num_tokens, args.tokens + _WARMUP))
    found: dict[str, dict[str, Any]] = {}
    for budget, rate in product(args.budgets.split(","), args.rates.split(",")):
        slots = slots_for(trace, float(budget.strip("%")) / 100)
        pace = Pace(
            _RECORD,
            1e9 * float(rate),
            args.token_ms / 1e3,
            read_s_per_byte=args.read_ms_per_mb * 1e-9,
            predict_s=args.predict_ms / 1e3,
        )
        for name, make in policies(trace, args.forecast).items():
            its_pace = pace if name in ("forecast", "auto") else replace(pace, predict_s=0.0)
            for prefetch in (False, True) if name != "auto" else (True,):
                label = f"{budget} {rate} GB/s  {name:8s} {'on' if prefetch else 'off'}"
                row = found[label] = measure(trace, slots, make(), its_pace, prefetch)
                shown = (f"{key} {value:.2f}" for key, value in row.items() if value is not None)
                print(f"{label:32s}", "  ".join(shown), flush=True)
    print(json.dumps({"trace": args.trace.name, "runs": found}))


if __name__ == "__main__":
    main()
