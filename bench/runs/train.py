"""Training throughput of a mixture of experts against a dense model of equal active size.

Ceiling: 6 * active parameters floating-point operations per token / the machine's own float32
matrix rate, measured here on products of the shape the experts have. Runs are interleaved (MoE,
dense, MoE, ...) and compared pair by pair. With one thread its own clock counts, which others on
the machine stop less than the clock on the wall. Nothing is read from disk.

`--parts` says how long each part of an update takes in either; a part that calls another holds it.
`--scale 4` is a model four times as wide.

    python -m bench.runs.train [--rounds 5] [--recipe demo] [--scale 1] [--threads 1] [--parts]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chronos import backends
from chronos.common.data import Batch
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import dense_tensors
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import load_recipe
from chronos.train.pretrain import PretrainRecipe

Clock = Callable[[], float]


def dense_twin(config: ModelConfig) -> ModelConfig:
    """One expert as wide as the experts a token visits: equal active parameters, no choice."""
    visited = config.num_experts_per_tok + config.num_shared_experts
    return dataclasses.replace(
        config,
        num_experts=1,
        num_experts_per_tok=1,
        num_shared_experts=0,
        moe_intermediate_size=visited * config.moe_intermediate_size,
        fallback_mask_prob=0.0,
        routing_source="gate",
    )


def active_parameters(config: ModelConfig) -> int:
    """Parameters a token's matrix products touch; the embedding counts once, as output head."""
    dense = sum(int(np.prod(spec.shape)) for spec in dense_tensors(config))
    chosen = config.num_hidden_layers * config.num_experts_per_tok * config.expert_parameters
    return dense + chosen


def random_batch(config: ModelConfig, stage: PretrainRecipe, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (stage.batch_size, stage.seq_len)
    ids = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    return Batch(ids, np.roll(ids, -1, 1), np.zeros(shape, np.int32))


def scaled(config: ModelConfig, by: int) -> ModelConfig:
    """As wide by so much: as many layers, experts and tokens."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size",
             "kv_latent_dim")  # fmt: skip
    return dataclasses.replace(config, **{name: by * getattr(config, name) for name in names})


def seconds_per_step(
    step: Any, config: ModelConfig, stage: PretrainRecipe, number: int, clock: Clock
) -> float:
    batch, begin = random_batch(config, stage, number), clock()
    step.step([batch], NextToken(config.loss_weights), 1e-4, number)
    return clock() - begin


def watch_parts(clock: Clock) -> Counter[str]:
    """Seconds that parts of updates take from now on, summed; empty it between two."""
    import torch

    from chronos.backends.torch import moe, optimizers, products, train

    taken: Counter[str] = Counter()
    for owner, name, label in (
        (train, "losses", "forward"),
        (moe.MoE, "forward", "  layers of experts"),
        (moe.MoE, "decide", "    routing"),
        (moe.MoE, "_shared", "    shared experts"),
        (moe, "routed_experts", "    routed experts"),
        (torch.Tensor, "backward", "backward"),
        (products._Experts, "backward", "  routed experts back"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (optimizers.Optimizer, "update", "optimizer"),
    ):
        setattr(owner, name, _watched(getattr(owner, name), label, taken, clock))
    return taken


def _watched(call: Any, label: str, taken: Counter[str], clock: Clock) -> Any:
    def watched(*args: Any, **options: Any) -> Any:
        begin = clock()
        found = call(*args, **options)
        taken[label] += clock() - begin
        return found

    return watched


def matrix_rate(config: ModelConfig, stage: PretrainRecipe) -> float:
    """float32 operations per second of one expert's first product at its mean number of rows."""
    import torch

    from chronos.backends.torch.products import linear

    rows = stage.batch_size * stage.seq_len * config.num_experts_per_tok // config.num_experts
    x = torch.randn(rows, config.hidden_size, requires_grad=True)
    w = torch.randn(2 * config.moe_intermediate_size, config.hidden_size)
    work, best = 2 * x.shape[0] * w.numel(), 0.0
    for _ in range(50):
        begin = time.perf_counter()
        linear(x, w)
        best = max(best, work / (time.perf_counter() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=Path("demo"))
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, PretrainRecipe)
    backend = backends.load("torch")
    backend.set_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    model = scaled(recipe.model, args.scale)
    configs = {"moe": model, "dense": dense_twin(model)}
    taken = watch_parts(clock) if args.parts else Counter()
    steps = {
        name: backend.train_step(backend.build(config, seed=0), recipe.optimizer)
        for name, config in configs.items()
    }
    rate = matrix_rate(model, recipe.stage)
    work = 6 * active_parameters(model)
    print(f"active parameters: {work // 6:,}")
    print(f"ceiling {rate / work:,.0f} tok/s at {rate / 1e9:.0f} GFLOP/s")
    times: dict[str, list[float]] = {name: [] for name in configs}
    parts: dict[str, list[Counter[str]]] = {name: [] for name in configs}
    for number in range(args.rounds + 1):
        for name, config in configs.items():
            taken.clear()
            seconds = seconds_per_step(steps[name], config, recipe.stage, number, clock)
            if number:  # the first step of each warms up
                times[name].append(seconds)
                parts[name].append(Counter(taken))
    if args.parts:
        print(f"{'ms, the least of all rounds':28} {'MoE':>7} {'dense':>7}")
        for label in parts["moe"][0]:
            moe, dense = (1e3 * min(each[label] for each in parts[n]) for n in configs)
            print(f"{label:28} {moe:7.1f} {dense:7.1f}")
    tokens = recipe.stage.batch_size * recipe.stage.seq_len
    speed = {name: tokens / statistics.median(taken) for name, taken in times.items()}
    ratios = [d / m for m, d in zip(times["moe"], times["dense"], strict=True)]
    print(f"MoE {speed['moe']:,.0f} tok/s, dense of equal active size {speed['dense']:,.0f} tok/s")
    print(f"ratio MoE/dense, pair by pair: median {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    report = {
        "bench": "train",
        "tokens_per_s": speed,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ceiling_tokens_per_s": rate / work,
        "experts": model.num_experts,
        "top_k": model.num_experts_per_tok,
        "threads": args.threads,
        "scale": args.scale,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
