"""A forecaster on a domain it never saw, and what a few recorded sequences of that mend.

A forecaster is trained without a domain of a trace. Part of the domain's own sequences (never of
the test part of `common.traces.fit.split`) is then given to its memory, to the trust in its votes
too, or to its training; the others are replayed at a quarter of the experts. Ceiling: MIN, 100 %.

    python -m bench.runs.forecast_domains TRACE DOMAIN [--epochs 10]

Prints one JSON line: hits and the share of the gap from the better of LRU and LFU to MIN.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from chronos.cli.simulate import result_json
from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.traces.fit import FitOptions, fit, known, split, trust
from chronos.common.traces.measure import measure
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace

SHARE, WARMUP = 0.25, 0.1


def of(trace: RoutingTrace, seqs: set[int]) -> RoutingTrace:
    return trace.select(np.isin(trace.seq_T, list(seqs)))


def replayed(trace: RoutingTrace, model: ForecastModel) -> dict[str, float]:
    slots = slots_for(trace, SHARE, pooled=True)
    (result,) = measure(trace, [slots], model, pooled=True, warmup=WARMUP)
    policies = result_json(*result, 1)["policies"]
    found = {name: policies[name]["hit_rate"] for name in ("lfu", "lru", "forecast", "min")}
    return found | {"share_of_gap": policies["forecast"]["eta_policy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("domain")
    parser.add_argument("--epochs", type=int, default=FitOptions.epochs)
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    inside = {
        entry["seq"] for entry in trace.meta["per_sequence"] if entry["domain"] == args.domain
    }
    parts, options = split(trace), FitOptions(epochs=args.epochs)
    own = [seq for part in parts[:2] for seq in dict.fromkeys(part.seq_T.tolist()) if seq in inside]
    given, asked = set(own[::2]), set(own[1::2])
    both = trace.select(~np.isin(trace.seq_T, list(set(parts.test.seq_T.tolist()))))
    few, asked_trace = of(both, given), of(both, asked)
    train = of(parts.train, set(parts.train.seq_T.tolist()) - inside)
    validation = of(parts.validation, set(parts.validation.seq_T.tolist()) - inside)
    without = fit(train, validation, options).model
    reminded = dataclasses.replace(
        without, known_TLK=np.concatenate([known(train), few.ids_TLK.astype(train.ids_TLK.dtype)])
    )
    params = {name: value.copy() for name, value in without.params.items()}
    trusted = dataclasses.replace(reminded, params=params)
    params["blend"] = trust(dataclasses.replace(without, params=params), few)
    found: dict[str, Any] = {}
    for name, model in (("without", without), ("in memory", reminded), ("and trust", trusted)):
        found[name] = replayed(asked_trace, model)
        print(name, found[name], file=sys.stderr, flush=True)
    joined = both.select(np.isin(both.seq_T, list(set(train.seq_T.tolist()) | given)))
    found["trained with"] = replayed(asked_trace, fit(joined, validation, options).model)
    sizes = {"given_tokens": few.num_tokens, "asked_tokens": asked_trace.num_tokens}
    print(json.dumps({"trace": args.trace.stem, "domain": args.domain, **sizes, "found": found}))


if __name__ == "__main__":
    main()
