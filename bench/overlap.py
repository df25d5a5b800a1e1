"""How much of the reading each predictor hides, at disks of many speeds: rehearsed runs.

    python -m bench.overlap T.npz [--forecast FILE] [--budget 25%] [--token-ms 45] [--tokens 600]

Ceiling: an oracle that has read the trace. The store, the policy and the prefetcher are the real
ones, clock and disk are numbers (`common/rehearse.py`), so the figures are the same on any machine;
what reading costs the computation beside it is not in them. Test sequences only. `x bound` is time
per token by max(resident time, bytes read / disk rate). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chronos.common.rehearse import Oracle, Pace, rehearse
from chronos.common.residency import Policy
from chronos.common.routing.fit import split
from chronos.common.routing.forecast import ForecastModel
from chronos.common.routing.predictor import DecayedUse, PredictorPolicy, TokenTable
from chronos.common.routing.trace import RoutingTrace
from chronos.common.simulate import slots_for

_RECORD = 2_949_120
_RATES = (0.6e9, 1.2e9, 2.4e9, 4.8e9)
_WARMUP = 100


def policies(trace: RoutingTrace, forecast: Path | None) -> dict[str, Callable[[], Policy]]:
    shape = trace.num_layers, trace.num_experts
    found: dict[str, Callable[[], Policy]] = {"lfu": lambda: PredictorPolicy(DecayedUse(*shape))}
    if trace.tokens_T is not None:
        found["tokens"] = lambda: PredictorPolicy(TokenTable(*shape))
    if forecast is not None:
        model = ForecastModel.load(forecast)
        found["forecast"] = lambda: PredictorPolicy(model.predictor())
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
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--token-ms", type=float, default=45.0)
    parser.add_argument("--tokens", type=int, default=600)
    args = parser.parse_args()
    test = split(RoutingTrace.load(args.trace)).test
    trace = test.part(0, min(test.num_tokens, args.tokens + _WARMUP))
    slots = slots_for(trace, float(args.budget.strip("%")) / 100)
    found: dict[str, dict[str, Any]] = {}
    for rate in _RATES:
        pace = Pace(_RECORD, rate, args.token_ms / 1e3)
        for name, make in policies(trace, args.forecast).items():
            for prefetch in (False, True):
                label = f"{rate / 1e9:.1f} GB/s  {name:8s} {'on' if prefetch else 'off'}"
                row = found[label] = measure(trace, slots, make(), pace, prefetch)
                shown = (f"{key} {value:.2f}" for key, value in row.items() if value is not None)
                print(f"{label:26s}", "  ".join(shown), flush=True)
    print(json.dumps({"trace": args.trace.name, "slots": slots, "runs": found}))


if __name__ == "__main__":
    main()
