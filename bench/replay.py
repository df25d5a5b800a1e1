"""Overlap of reads and compute on real routing: a generated model of over 2 GB of experts.

The model is random, its geometry that of the trace (gpt-oss-20b: 24 layers, 32 experts, top-4) with
records of 3 MiB; each token takes the experts the trace says. Blocks of tokens are run in turn on
the resident model and on the expert store, which reads with O_DIRECT, so no block finds its experts
in the page cache. The disk's own rate at the size of a record is measured between the blocks.

Ceilings: resident time is the model's weights of one token through memory; no exact streamed run is
faster than max(resident, R* records / disk rate), R* from Belady's MIN on the same tokens.

    python -m bench.replay make bench/work/replay            # 2.5 GB
    python -m bench.replay time bench/work/replay --trace T.npz
    python -m bench.replay memory bench/work/replay --trace T.npz     # root, memory cgroup v1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import capped
from chronos import backends
from chronos.common.budget import parse_budget
from chronos.common.config import ModelConfig
from chronos.common.fileio import measure_read_rate
from chronos.common.layout import open_layout
from chronos.common.layout.ctsr import write_experts
from chronos.common.layout.folder import FINGERPRINT
from chronos.common.limits import limit_report
from chronos.common.routing.trace import RoutingTrace
from chronos.common.simulate import simulate
from chronos.common.tensorfile import write_tensors
from chronos.common.weights import SAFETENSORS_DTYPE, dense_tensors, expert_tensors

CONFIG = ModelConfig(
    hidden_size=512,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=8192,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
)
_DENSE_HEADROOM = 600 << 20


def make(folder: Path) -> None:
    """A packed folder of random weights, written with the memory of one expert."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(CONFIG.dumps())
    rng = np.random.default_rng(0)

    def random(shape: Sequence[int]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return (rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(np.float32)

    def experts(keys: Sequence[tuple[int, int]]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        for key in keys:
            yield key, {s.name: memoryview(random(s.shape)).cast("B") for s in expert_tensors(CONFIG)}

    dense = [
        (s.name, SAFETENSORS_DTYPE[s.dtype], s.shape, memoryview(random(s.shape)).cast("B"))
        for s in dense_tensors(CONFIG)
    ]
    write_tensors(folder / "model.safetensors", dense, {"format": "pt", FINGERPRINT: "0" * 32})
    layers = [
        [(layer, e) for e in range(CONFIG.num_experts)] for layer in range(CONFIG.num_hidden_layers)
    ]
    written = write_experts(
        folder, layers, expert_tensors(CONFIG), experts, fingerprint="0" * 32, finite=False
    )
    print(f"{folder}: {sum(written.manifest.files.values()) / 1e9:.2f} GB of experts")


class Replayer:
    """Runs tokens whose routing comes from a trace, on a store or on the resident experts."""

    def __init__(self, model: Any, store: Any) -> None:
        import torch

        self.model, self.store, self.torch = model, store, torch
        self.seconds: list[float] = []

    def run(self, trace: RoutingTrace) -> list[float]:
        """Seconds of each token."""
        torch, taken = self.torch, []
        cache = self.model.new_cache()
        ids_TLK = torch.from_numpy(trace.ids_TLK.astype(np.int64))
        weights_TLK = torch.full(ids_TLK.shape, 1.0 / trace.top_k)
        with torch.inference_mode():
            for t in range(trace.num_tokens):
                token = torch.tensor([[t % CONFIG.vocab_size]])
                begin = time.perf_counter()
                self.model(
                    token,
                    cache=cache,
                    source=self.store,
                    replay=lambda layer, t=t: (ids_TLK[t, layer][None], weights_TLK[t, layer][None]),
                    last_only=True,
                )
                if self.store is not None:
                    self.store.end_token()
                taken.append(time.perf_counter() - begin)
        return taken


def time_it(folder: Path, trace: RoutingTrace, args: argparse.Namespace) -> dict[str, Any]:
    backend: Any = backends.load("torch")
    layout = open_layout(folder, config=CONFIG)
    capacity = parse_budget(args.budget, layout.total_bytes)
    store = backend.open_store(layout, capacity, top_k=CONFIG.num_experts_per_tok)
    streamed = Replayer(backend.load(folder, device="cpu", resident=False), store)
    resident = Replayer(backend.load(folder, device="cpu", resident=True), None)
    step, warm = args.tokens, args.warmup
    streamed.run(trace.part(0, warm))
    resident.run(trace.part(0, min(warm, 8)))
    rows, held = [], store.resident()
    for number in range(args.rounds):
        part = trace.part(warm + number * step, warm + (number + 1) * step)
        before, rate_before = store.stats(), disk_rate(layout)
        taken = streamed.run(part)
        rate = (rate_before + disk_rate(layout)) / 2
        spent = store.stats().minus(before)
        rows.append(
            {
                "token_s": statistics.mean(taken),
                "p50_s": statistics.median(taken),
                "p95_s": float(np.quantile(taken, 0.95)),
                "resident_s": statistics.mean(resident.run(part)),
                "disk_bytes_per_s": rate,
                "bytes_per_token": spent.bytes_read / step,
                "stall_s": spent.stall_s / step,
                "hit_rate": spent.hits / spent.routed,
            }
        )
        show(rows[-1])
    measured = trace.part(warm, warm + args.rounds * step)
    report = summary(rows, measured, layout, store, held)
    store.close()
    return report


def disk_rate(layout: Any) -> float:
    return measure_read_rate(layout.files[0], layout.record_nbytes, 4, max_bytes=96 << 20)


def show(row: dict[str, float]) -> None:
    read_s = row["bytes_per_token"] / row["disk_bytes_per_s"]
    print(
        f"token {1e3 * row['token_s']:.1f} ms | resident {1e3 * row['resident_s']:.1f} + reads "
        f"{1e3 * read_s:.1f} ms at {row['disk_bytes_per_s'] / 1e9:.2f} GB/s: ratio "
        f"{ratio(row):.3f} | stall {1e3 * row['stall_s']:.1f} ms, "
        f"{row['bytes_per_token'] / 1e6:.1f} MB, hits {row['hit_rate']:.1%}",
        flush=True,
    )


def ratio(row: dict[str, float]) -> float:
    """Time per token over what it would be without any overlap."""
    reading = row["bytes_per_token"] / row["disk_bytes_per_s"]
    return row["token_s"] / (row["resident_s"] + reading)


def summary(
    rows: list[dict[str, float]], trace: RoutingTrace, layout: Any, store: Any, held: Any
) -> dict[str, Any]:
    def middle(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    slots = store.stats().capacity_bytes // layout.record_nbytes
    reads = {p: simulate(trace, slots, p, resident=held).reads_per_token for p in ("min", "lru", "lfu")}
    fast = CONFIG.num_hidden_layers * CONFIG.num_experts_per_tok * layout.record_nbytes
    limit = limit_report(
        token_s=middle("token_s"),
        reads_per_token=statistics.mean(r["bytes_per_token"] for r in rows) / layout.record_nbytes,
        min_reads_per_token=reads["min"],
        ref_reads_per_token=min(reads["lru"], reads["lfu"]),
        record_bytes=layout.record_nbytes,
        slow_bytes_per_s=middle("disk_bytes_per_s"),
        fast_bytes_per_s=fast / middle("resident_s"),
        dense_bytes=0,
        layers=CONFIG.num_hidden_layers,
        top_k=CONFIG.num_experts_per_tok,
        kernel_s=middle("resident_s"),
        stall_s=middle("stall_s"),
    )
    ratios = [ratio(row) for row in rows]
    print(f"time / (resident + bytes / disk rate): median {statistics.median(ratios):.3f}, "
          f"{min(ratios):.3f} to {max(ratios):.3f}")  # fmt: skip
    print("limit: " + ", ".join(f"{k} {v:.3f}" for k, v in limit.to_json().items() if v is not None))
    return {
        "bench": "replay",
        "expert_bytes": layout.total_bytes,
        "record_bytes": layout.record_nbytes,
        "capacity_bytes": store.stats().capacity_bytes,
        "ratio_to_sum_median": statistics.median(ratios),
        "ratio_to_sum": ratios,
        "reads_per_token_simulated": reads,
        "limit": limit.to_json(),
        "rounds": rows,
    }


def memory(folder: Path, trace: RoutingTrace, args: argparse.Namespace) -> dict[str, Any]:
    """The streamed run alone, in a process of its own that runs under the cap."""
    layout = open_layout(folder, config=CONFIG)
    capacity = parse_budget(args.budget, layout.total_bytes)
    dense = (folder / "model.safetensors").stat().st_size
    cap = dense + capacity + _DENSE_HEADROOM
    command = ["-m", "bench.replay", "stream", str(folder), "--trace", str(args.trace)]
    command += ["--budget", args.budget, "--tokens", str(args.tokens)]
    report = capped.run_python(command, cap)
    print(f"peak of the process {report['peak_bytes'] / 1e6:.0f} MB, cap {cap / 1e6:.0f} MB = dense "
          f"{dense / 1e6:.0f} + budget {capacity / 1e6:.0f} + 600 MiB, exit {report['rc']}")  # fmt: skip
    return {"bench": "replay-memory", "dense_bytes": dense, "capacity_bytes": capacity, **report}


def stream(folder: Path, trace: RoutingTrace, args: argparse.Namespace) -> dict[str, Any]:
    backend: Any = backends.load("torch")
    layout = open_layout(folder, config=CONFIG)
    capacity = parse_budget(args.budget, layout.total_bytes)
    with backend.open_store(layout, capacity, top_k=CONFIG.num_experts_per_tok) as store:
        model = backend.load(folder, device="cpu", resident=False)
        Replayer(model, store).run(trace.part(0, args.tokens))
        stats = store.stats()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_peak_bytes": peak, **stats.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("make", "time", "memory", "stream"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace", type=Path, help="routing of 24 layers x 32 experts, top-4")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=48, help="in a round")
    parser.add_argument("--warmup", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", type=int, default=1000, help="first token of the trace")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder)
        return
    if args.trace is None:
        parser.error("--trace is needed")
    trace = RoutingTrace.load(args.trace)
    trace = trace.part(args.start, trace.num_tokens)
    report = {"time": time_it, "memory": memory, "stream": stream}[args.what](args.folder, trace, args)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
