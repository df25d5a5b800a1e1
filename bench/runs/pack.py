"""Packing a guest checkpoint against plain copying of the same files, durable and not.

Ceiling: `cp` of the checkpoint followed by `fsync` of the copies, which is what packing promises
too; `cp` alone, whose end may be in memory only, is printed beside it. Generated checkpoints shaped
like Qwen3-MoE (experts one by one, in shards) and gpt-oss (experts stacked). The source is dropped
from the page cache before each run, and target folders are removed after it; runs are interleaved.
Packing also searches for NaN and hashes every record. Linux.

    python -m bench.runs.pack [--work bench/scratch/pack] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.lib.shards import Shape, random_tensors, write_shards
from chronos.common.disk.header import tensor_nbytes

LAYERS, EXPERTS, D, F = 8, 32, 1024, 768  # records of 4.7 MB in bfloat16, 1.2 GB in all
SHARDS = 4  # or one more: a tensor is not parted


def tensors(style: str) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (32_000, D)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        yield at + "self_attn.q_proj.weight", (D, D)
        yield at + "mlp.gate.weight", (EXPERTS, D)
        if style == "stacked":
            yield at + "mlp.experts.gate_up_proj", (EXPERTS, D, 2 * F)
            yield at + "mlp.experts.down_proj", (EXPERTS, F, D)
            continue
        for expert in range(EXPERTS):
            one = f"{at}mlp.experts.{expert}."
            yield one + "down_proj.weight", (D, F)  # in order of names, as libraries save them
            yield one + "gate_proj.weight", (F, D)
            yield one + "up_proj.weight", (F, D)


def make(folder: Path, style: str) -> Path:
    """A checkpoint of random finite values; one that is there is used again."""
    if (folder / "config.json").exists():
        return folder
    shapes = list(tensors(style))
    nbytes = sum(tensor_nbytes("BF16", shape) for _, shape in shapes)
    write_shards(folder, random_tensors(shapes), "bfloat16", nbytes // SHARDS)
    config = {
        "model_type": "bench", "vocab_size": 32_000, "max_position_embeddings": 4096,
        "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 4,
        "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path, durable: bool) -> float:
    """Seconds of `cp`, and of flushing what it wrote."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir() if durable else ():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - begin


def packed(source: Path, target: Path) -> tuple[float, int]:
    """Seconds of the command's work in a process of its own, and its peak memory."""
    code = (
        "import json, re, sys\n"
        "from chronos.common.layout import pack\n"
        "r = pack(sys.argv[1], sys.argv[2])\n"
        # Not getrusage: a child's begins with its parent's, which wrote the checkpoint.
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(json.dumps([r.seconds, int(peak) * 1024]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, target], check=True, stdout=subprocess.PIPE
    )
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def timed(source: Path, target: Path, work: Callable[[Path, Path], float]) -> float:
    drop(source)
    try:
        return work(source, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()


def compare(source: Path, work: Path, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds: bytes per second and ratios pair by pair."""
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    rates: dict[str, list[float]] = {"pack": [], "cp_fsync": [], "cp": []}
    peaks: list[int] = []

    def pack_it(source: Path, target: Path) -> float:
        seconds, peak = packed(source, target)
        peaks.append(peak)
        return seconds

    for number in range(rounds):
        for name, run in (
            ("pack", pack_it),
            ("cp_fsync", lambda s, t: copied(s, t, True)),
            ("cp", lambda s, t: copied(s, t, False)),
        ):
            rates[name].append(nbytes / timed(source, work / "target", run))
        shown = ", ".join(f"{name} {rate[-1] / 1e6:.0f}" for name, rate in rates.items())
        print(f"  round {number + 1}: {shown} MB/s", file=sys.stderr)
    result = {f"{name}_mb_s": statistics.median(rate) / 1e6 for name, rate in rates.items()}
    for name in ("cp_fsync", "cp"):
        pairs = zip(rates["pack"], rates[name], strict=True)
        result[f"share_of_{name}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return result | {"bytes": nbytes, "peak_mb": max(peaks) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("bench/scratch/pack"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = {}
    for style in ("one_by_one", "stacked"):
        source = make(options.work / style, style)
        results[style] = compare(source, options.work, options.rounds)
        print(style, {k: round(v, 2) for k, v in results[style].items()})
    print(json.dumps({"bench": "pack", "caches": "cold", **results}))


if __name__ == "__main__":
    main()
