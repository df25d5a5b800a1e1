"""Pretraining on MLX: our mixture of experts, our dense twin, MLX-LM's own tuner on a dense model.

All of equal active size, on the same random rows. The tuner's step is its `default_loss` with
value_and_grad and AdamW under mx.compile, as its `train` has it, on a Llama with the geometry of
the twin. Steps are interleaved. On a CPU the processor's seconds count, those of all threads;
elsewhere the clock on the wall. On a CPU MLX gathers an expert's rows one product a row, so what
is learnt here of a GPU is little.

    python -m bench.runs.mlx_train [--rounds 3] [--rows 2] [--length 128] [--recipe demo]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import AdamW
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss

from bench.runs.train import dense_twin
from chronos.backends import mlx as backend
from chronos.common.data import Batch
from chronos.common.model.config import ModelConfig
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import OptimizerRecipe, load_recipe
from chronos.train.pretrain import PretrainRecipe

Step = Callable[[np.ndarray, int], None]  # ids [B, T], number


def ours(config: ModelConfig) -> Step:
    step = backend.train_step(backend.build(config, seed=0), OptimizerRecipe())

    def run(ids_BT: np.ndarray, number: int) -> None:
        batch = Batch(ids_BT, np.roll(ids_BT, -1, 1), np.zeros_like(ids_BT))
        step.step([batch], NextToken(config.loss_weights), 1e-4, number)

    return run


def tuners(config: ModelConfig) -> Step:
    """MLX-LM's, on a dense model of this geometry."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.moe_intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
    )
    model, optimizer = llama.Model(args), AdamW(1e-4)
    mx.eval(model.parameters())
    by = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = by(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss

    def run(ids_BT: np.ndarray, number: int) -> None:
        lengths = mx.array([[0, ids_BT.shape[1]]] * len(ids_BT))
        first = mx.array(ids_BT)[:, :1]
        mx.eval(step(mx.concatenate([mx.array(ids_BT), first], axis=1), lengths), state)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--recipe", type=Path, default=Path("demo"))
    args = parser.parse_args()
    moe = load_recipe(args.recipe, PretrainRecipe).model
    dense = dense_twin(moe)
    steps = {"ours, MoE": ours(moe), "ours, dense": ours(dense), "mlx-lm, dense": tuners(dense)}
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    random = np.random.default_rng(0)
    for number in range(args.rounds + 2):
        ids_BT = random.integers(0, moe.vocab_size, (args.rows, args.length)).astype(np.int32)
        for name, step in steps.items():
            begin = clock()
            step(ids_BT, number)
            if number > 1:  # two warm up: the second compiles what the optimizer's state changed
                times[name].append(clock() - begin)
    tokens = args.rows * args.length
    speed = {name: tokens / statistics.median(found) for name, found in times.items()}
    print(", ".join(f"{name} {rate:,.0f} tok/s" for name, rate in speed.items()))
    ratios = {name: speed[name] / speed["mlx-lm, dense"] for name in ("ours, MoE", "ours, dense")}
    print(", ".join(f"{name} / mlx-lm, dense {ratio:.2f}" for name, ratio in ratios.items()))
    report = {"bench": "mlx-train", "tokens_per_s": speed, "ratios": ratios}
    where = {"device": backend.devices(), "clock": clock.__name__, "args": vars(args)}
    print(json.dumps(report | where, default=str))


if __name__ == "__main__":
    main()
