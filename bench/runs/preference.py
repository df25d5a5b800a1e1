"""Time of a DPO update with a precomputed reference against an SFT update of the same tokens.

The shipped model, both objectives on the same rows (half prompt, half answer, random ids): what
differs is the loss. Updates are interleaved and compared pair by pair, on one thread by its own
clock, which others on the machine stop less than the clock on the wall. Scoring by the reference
before the first update is printed beside it, a token of the rows.

    python -m bench.runs.preference [--rounds 5] [--rows 16] [--length 256] [--backend torch]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import numpy as np

from chronos import backends
from chronos.common.data import IGNORE, Batch
from chronos.common.layout import read_weights
from chronos.common.model.config import ModelConfig
from chronos.common.training.objectives import NO_ROUTING, NextToken, Preference
from chronos.common.training.recipe import OptimizerRecipe
from chronos.run.models import resolve_model


def rows(config: ModelConfig, count: int, length: int, seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (count, length))
    labels = np.roll(ids, -1, 1)
    labels[:, : length // 2] = labels[:, -1] = IGNORE
    none = np.zeros(ids.shape, np.int32)
    return Batch(ids.astype(np.int32), labels.astype(np.int32), none, {"answer": labels != IGNORE})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    backend = backends.load(args.backend)
    alone = backend.set_threads(1) == 1  # else the frameworks' own threads compute
    clock = time.thread_time if alone else time.perf_counter
    folder = resolve_model("demo")
    config = dataclasses.replace(ModelConfig.from_json(folder), fallback_mask_prob=0.0)
    objectives = {"sft": NextToken(details=True, routing=NO_ROUTING), "dpo": Preference()}
    steps = {
        name: backend.train_step(
            backend.build(config, seed=0, weights=read_weights(folder, config)), OptimizerRecipe()
        )
        for name in objectives
    }
    times: dict[str, list[float]] = {name: [] for name in (*objectives, "score")}
    for number in range(args.rounds + 1):
        data, begin = rows(config, args.rows, args.length, number), clock()
        known = backend.score(steps["sft"].model, data).log_probs_BT
        spent = {"score": clock() - begin}
        for name, objective in objectives.items():
            begin = clock()
            steps[name].step([data.with_extra({"reference": known})], objective, 1e-6, number)
            spent[name] = clock() - begin
        if number:  # the first warms up
            for name, seconds in spent.items():
                times[name].append(seconds)
    ratios = [dpo / sft for dpo, sft in zip(times["dpo"], times["sft"], strict=True)]
    tokens, ratio = args.rows * args.length, statistics.median(ratios)
    each = {name: statistics.median(found) / tokens * 1e6 for name, found in times.items()}
    print(", ".join(f"{name} {micros:.0f} us a token" for name, micros in each.items()))
    print(f"dpo / sft, pair by pair: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    report = {"bench": "preference", "us_a_token": each, "ratio": ratio, "clock": clock.__name__}
    print(json.dumps(report | {"range": [min(ratios), max(ratios)], "args": vars(args)}))


if __name__ == "__main__":
    main()
