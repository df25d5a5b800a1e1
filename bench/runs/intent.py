"""What a preload before the first token is worth, by what chooses it.

    python -m bench.runs.intent T.npz [--forecast FILE] [--budget 25%] [--seeds 0,1,2]

Ceiling: every need a hit. Each test sequence is cut into a prompt and a
reply; the cache holds what a ranking puts first, and the hits of the reply's first 1, 4 and 16
tokens are counted before anything else is read. Then the reply's first 4 and 16 tokens are
rehearsed (`rehearse`: the store, policy and prefetcher as they are, records of 2.95 MB, 45 ms a
token, a store that only the prompt has filled) with the forecaster alone and with the classifier
before it: milliseconds a token. Traces without prompts: a sequence's own beginning stands for one.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.experts.foresight.intent import shares
from chronos.common.experts.foresight.predictor import DecayedUse, PredictorPolicy
from chronos.common.experts.residency import LRU
from chronos.common.traces import intent
from chronos.common.traces.fit import split
from chronos.common.traces.rehearse import Pace, rehearse
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace


def last_used(trace: RoutingTrace, prompt_TLK: Any) -> Any:
    """What LRU would hold after the prompt, decoded token by token."""
    policy = LRU(trace.num_layers, trace.num_experts)
    for ids_LK in prompt_TLK.tolist():
        for layer, experts in enumerate(ids_LK):
            policy.observe(layer, experts)
    return policy.priority


def timed(
    test: RoutingTrace, slots: int, model: ForecastModel, use: intent.Ranking | None, disk: float
) -> list[float]:
    """Milliseconds a token of the replies' first 4 and 16 tokens."""
    pace, found = Pace(2_949_120, 1e9 * disk, 0.045), []
    for seq in dict.fromkeys(test.seq_T.tolist()):
        sequence = test.select(test.seq_T == seq)
        cut = min(64, sequence.num_tokens // 2)
        if cut >= 16 and sequence.num_tokens >= cut + 16:
            policy = PredictorPolicy(model.predictor(), intent=use)
            part = sequence.part(0, cut + 16)
            found.append(rehearse(part, slots, policy, pace, prompt=cut).token_s)
    return [1e3 * float(np.array(found)[:, :first].mean()) for first in (4, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--forecast", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    parts, shape = split(trace), (trace.num_layers, trace.num_experts)
    popular = shares(parts.train.ids_TLK, shape[1])
    rankings: dict[str, intent.Ranking] = {
        "popularity": lambda prompt: popular,
        "last used in the prompt": partial(last_used, trace),
        "prompt's decayed use": partial(intent.primed, partial(DecayedUse, *shape)),
        "prompt's shares": lambda prompt: shares(prompt, shape[1]),
    }
    if args.forecast:
        rankings["forecaster after the prompt"] = partial(
            intent.primed, ForecastModel.load(args.forecast).predictor
        )
    for seed in args.seeds.split(","):
        rankings[f"intent, seed {seed}"] = intent.fit_intent(parts.train, int(seed)).use
    slots = slots_for(trace, float(args.budget.strip("%")) / 100)
    found = intent.compare_preloads(parts.test, slots, rankings)
    for name, rates in found.items():
        print(f"{name:30s}", "  ".join(f"{100 * rate:5.1f} %" for rate in rates))
    times: dict[str, Any] = {}
    if args.forecast:
        model, use = ForecastModel.load(args.forecast), intent.fit_intent(parts.train, 0).use
        for budget, disk in product((0.125, 0.25, 0.5), (0.5, 1.5, 4.5)):
            slots = slots_for(trace, budget)
            pair = [timed(parts.test, slots, model, by, disk) for by in (None, use)]
            label = f"{100 * budget} % {disk} GB/s"
            times[label] = dict(zip(("forecaster", "intent"), pair, strict=True))
            ratio = [b / a for a, b in zip(*pair, strict=True)]
            print(label, times[label], "by forecaster", [round(r, 3) for r in ratio], flush=True)
    result = {"trace": args.trace.name, "slots": slots, "hits of 1, 4, 16": found, "ms": times}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
