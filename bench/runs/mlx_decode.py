"""Decoding on MLX: waits and graph nodes per token, and the store at budget `all` against resident.

Ceilings, stated before measuring: a resident token needs 1 wait (the sampled id), a streamed one
1 + L (each layer's ids must reach the host before its experts can be found); the store at budget
`all` does the resident model's arithmetic, so its speed is at most the resident one. Both run on
the same tokens in interleaved blocks; ratios are taken block by block. All experts are there before
timing starts. Not covered: Metal, where none of this has been measured.

    python -m bench.runs.mlx_decode [--model FOLDER] [--blocks 9] [--tokens 40] [--dtype float32]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import tiny_packed

GREEDY = SamplingParams()
PROMPT = [5, 80, 41, 7, 12, 200]
# Eight layers, so that waits per layer show; experts large enough to be the main work.
GEOMETRY: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
    "kv_latent_dim": 64, "rope_dim": 32, "vocab_size": 2048, "max_position_embeddings": 4096,
    "lookahead_hidden_size": 64, "initializer_range": 0.05,
}  # fmt: skip


class Counts:
    """Waits and the nodes of the graphs that were waited for."""

    def __init__(self) -> None:
        self.waits = self.started = self.nodes = 0

    def per_token(self, tokens: int) -> dict[str, float]:
        return {
            "waits": self.waits / tokens,
            "started_without_waiting": self.started / tokens,
            "graph_nodes": self.nodes / tokens,
        }


@contextmanager
def counted(counts: Counts) -> Iterator[None]:
    """Count calls of mx.eval and mx.async_eval, which are all the evaluations the backend makes."""
    evaluate, start = mx.eval, mx.async_eval

    def nodes(arrays: Any) -> int:
        text = io.StringIO()
        mx.export_to_dot(text, *(array for _, array in tree_flatten(list(arrays))))
        return text.getvalue().count("shape=rectangle")

    def counting_eval(*arrays: Any) -> None:
        counts.waits += 1
        counts.nodes += nodes(arrays)
        evaluate(*arrays)

    def counting_start(*arrays: Any) -> None:
        counts.started += 1
        counts.nodes += nodes(arrays)
        start(*arrays)

    mx.eval, mx.async_eval = counting_eval, counting_start
    try:
        yield
    finally:
        mx.eval, mx.async_eval = evaluate, start


def count(engine: Engine, tokens: int) -> dict[str, float]:
    counts, sequence = Counts(), OneSequence(engine.session)
    token = sequence.prefill(PROMPT, GREEDY)
    with counted(counts):
        for _ in range(tokens):
            token = sequence.decode(token, GREEDY)
    return counts.per_token(tokens)


def block(engine: Engine, tokens: int) -> tuple[float, float, list[int]]:
    """Wall and processor seconds per token, and the tokens."""
    sequence = OneSequence(engine.session)
    found = [sequence.prefill(PROMPT, GREEDY)]
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        found.append(sequence.decode(found[-1], GREEDY))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall / tokens, processor / tokens, found


def measure(folder: Path, blocks: int, tokens: int) -> dict[str, Any]:
    budgets = ("resident", "all", "25%")
    engines = {budget: load(folder, backend="mlx", budget=budget) for budget in budgets}
    layers = engines["all"].config.num_hidden_layers
    print(f"least possible waits a token: resident 1, streamed {1 + layers}")
    result: dict[str, Any] = {"layers": layers}
    result["counts"] = {budget: count(engines[budget], tokens) for budget in budgets}
    for budget, numbers in result["counts"].items():
        print(f"{budget:9}", "  ".join(f"{name} {value:.1f}" for name, value in numbers.items()))
    feed: Any = engines["all"].feed
    with feed.step() as step:
        for layer in range(layers):  # nothing is missing from here on
            list(step.acquire(layer, range(engines["all"].config.num_experts)))
    times: dict[str, list[tuple[float, float]]] = {"resident": [], "all": []}
    for number in range(blocks + 1):
        answers = []
        for budget in times if number % 2 else reversed(times):
            wall, processor, found = block(engines[budget], tokens)
            answers.append(found)
            if number:  # the first block warms up
                times[budget].append((wall, processor))
        assert answers[0] == answers[1], "streamed and resident tokens differ"
    for which, name in enumerate(("wall", "processor")):
        own = {b: [t[which] for t in times[b]] for b in times}
        ratios = [r / a for r, a in zip(own["resident"], own["all"], strict=True)]
        result[f"{name}_ms_per_token"] = {
            b: round(statistics.median(t) * 1e3, 3) for b, t in own.items()
        }
        result[f"{name}_speed_of_store_by_resident"] = round(statistics.median(ratios), 3)
        print(name, result[f"{name}_ms_per_token"], "ratio", round(statistics.median(ratios), 3))
    for engine in engines.values():
        engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a packed folder; default: a random model")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or tiny_packed(Path(scratch) / "model", dtype=args.dtype, **GEOMETRY)
        result = measure(folder, args.blocks, args.tokens)
    device = str(mx.default_device())
    print(json.dumps({"bench": "mlx_decode", "device": device, "dtype": args.dtype} | result))


if __name__ == "__main__":
    main()
