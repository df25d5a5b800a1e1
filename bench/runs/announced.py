"""Decoding a model whose streamed experts are known a token ahead, at the size of a real one.

A generated model (random weights, records of 3 MB, the tiers of the recipe `demo`) writes
sampled text, resident and within a budget in turns. Its text means nothing; which experts it needs
follows from its own gates, and no recorded routing is put in their place. Random gates change
their minds less than trained ones: with the recipe's 0.9 one need in 200 is not in memory, of the
shipped model's one in 20. --decay 0.3 has one in 24 ("prefetch off" shows them).

Ceiling: the larger of the resident token's time and of the time its bytes take at the disk's rate;
`x bound` is the time of a token over that. share of the limit: by `Engine.limit`, the same for
perfect foresight. Both are printed for this disk and for a slower one (--disk).

    python -m bench.runs.announced --work bench/scratch/announced [--budget 25%] [--disk 1GB]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from chronos.common.budget import parse_size
from chronos.common.disk.io import PacedIO, measure_read_rate
from chronos.common.model.config import ModelConfig
from chronos.common.text.sampling import SamplingParams
from chronos.common.training.recipe import load_recipe
from chronos.measure.recorded import make_model
from chronos.run.engine import RESIDENT, Engine, load
from chronos.train.pretrain import PretrainRecipe

_TURN = 10  # tokens of one engine before the next has its turn
_WIDE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 480, "vocab_size": 2048,
    "kv_latent_dim": 128,
}  # fmt: skip


def config(layers: int, decay: float) -> ModelConfig:
    """The recipe's tiers in a model of 24 x 32 records of 2.95 MB: 2.3 GB."""
    routing = load_recipe("demo", PretrainRecipe).model
    return replace(routing, history_decay=decay, **(_WIDE | {"num_hidden_layers": layers}))


class Writer:
    """One engine, one long reply; `tokens` draws the next few of it and says how long each took."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine = engine
        sampling = SamplingParams(temperature=1.0, seed=0)
        self.steps = engine.generate(range(64), sampling, max_tokens=count, record=True)
        self.text = iter(self.steps)
        self.seconds: list[float] = []

    def tokens(self, count: int) -> None:
        for _ in range(count):
            begin = time.perf_counter()
            if not list(islice(self.text, 1)):
                return
            self.seconds.append(time.perf_counter() - begin)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each way in turns on the same text; the first turns warm up and count for none."""
    folder = make_model(args.work, config(args.layers, args.decay))
    slow = parse_size(args.disk, "a disk's rate")
    ways: dict[str, dict[str, Any]] = {
        RESIDENT: {"budget": RESIDENT},
        "streamed": {"budget": args.budget},
        f"streamed, {args.disk}/s": {"budget": args.budget, "io": PacedIO(slow)},
        "streamed, prefetch off": {"budget": args.budget, "prefetch": "off"},
    }
    total = args.warmup + args.tokens
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for name, options in ways.items():
            engine = stack.enter_context(load(folder, backend=args.backend, **options))
            engine.stop_ids = frozenset()
            writers[name] = Writer(engine, total + 1)
        for _ in range(0, total, _TURN):
            for writer in writers.values():
                writer.tokens(_TURN)
        layout = writers["streamed"].engine.layout
        assert layout is not None
        rate = measure_read_rate(layout.files[0], layout.record_nbytes)
        resident_s = statistics.median(writers[RESIDENT].seconds[args.warmup :])
        texts = {name: list(writer.steps.result.tokens) for name, writer in writers.items()}
        rows = []
        for name, writer in list(writers.items())[1:]:
            stats = writer.steps.result.stats
            token_s = statistics.mean(writer.seconds[args.warmup :])
            read = stats["decode_bytes_read"] / stats["decode_tokens"]
            bound = max(resident_s, read / (min(slow, rate) if args.disk in name else rate))
            limit = writer.engine.limit(writer.steps.result, resident_s) or {}
            rows.append(
                {
                    "way": name,
                    "token_s": token_s,
                    "bytes_per_token": read,
                    "hits": stats["decode_hits"] / stats["decode_routed"],
                    "announced": stats["announced"],
                    "announced_late": stats["announced_late"],
                    "unannounced": stats["unannounced"],
                    "times_bound": token_s / bound,
                    "of_resident": resident_s / token_s,
                    "eta_limit": limit.get("eta_limit"),
                    "same": texts[name] == texts[RESIDENT],
                }
            )
    return {
        "expert_bytes": layout.total_bytes, "record_bytes": layout.record_nbytes,
        "disk_bytes_per_s": rate, "resident_token_s": resident_s, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the generated model")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--decay", type=float, default=0.3, help="of the past, see above")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--disk", default="1GB", help="bytes a second of a slower disk")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    found = measure(args)
    print(f"resident: {1e3 * found['resident_token_s']:.1f} ms a token, "
          f"disk {found['disk_bytes_per_s'] / 1e9:.2f} GB/s")  # fmt: skip
    for row in found["rows"]:
        eta = "-" if row["eta_limit"] is None else f"{row['eta_limit']:.2f}"
        print(f"{row['way']:24} {1e3 * row['token_s']:7.1f} ms, {row['times_bound']:.2f} x bound, "
              f"{eta} of the limit, hits {row['hits']:.3f}, "
              f"{row['bytes_per_token'] / 1e6:.1f} MB a token, "
              f"late {row['announced_late']} of {row['announced']} announced, "
              f"unannounced {row['unannounced']}, same text {row['same']}")  # fmt: skip
    print(json.dumps({"bench": "announced", "budget": args.budget, "disk": args.disk} | found))


if __name__ == "__main__":
    main()
