"""Packed experts of gpt-oss-20b's widths: beside llama.cpp, and beside bfloat16 at equal bytes.

Makes what is missing below WORK: a checkpoint in MXFP4 as gpt-oss is published, of as many layers
as are asked for, packed and as the GGUF that `chronos export` writes; llama.cpp and Chronos then
run it as in `bench.runs.peers`, each in a process under a memory cap, caches cold. For the second
table engines take turns of a few tokens in one process: each format with the bytes that hold a
quarter of the experts in bfloat16, and the bfloat16 of the same model. The seconds of the process's
own clock are printed too: a busy machine moves them less. Ceilings: the memory's rate
(`bench.runs.kernels`) where all is in memory, else bytes read a token / the disk's rate. Linux as
root for caps; a layer takes 0.42 GB three times, and with --formats 4 GB for a while.

    python -m bench.runs.packed --install
    python -m bench.runs.packed --layers 5 --formats ""      # under a cap fewer do not run at all
    python -m bench.runs.packed --caps "" --formats mxfp4,fp8,int4
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import chronos
from bench.lib import published
from bench.runs import peers
from chronos.common.layout import open_layout
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence

_RUNTIMES = ["chronos", "llamacpp"]
_GREEDY = SamplingParams()
_PROMPT = list(range(64))
_TURN = 4  # tokens of one engine before the next has its turn


def cli(*words: object) -> None:
    command = [sys.executable, "-m", "chronos", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make(work: Path, coding: str, layers: int) -> None:
    """model: the checkpoint; packed: for Chronos."""
    if not (work / "packed").exists():
        shutil.rmtree(work / "model", ignore_errors=True)
        published.write(work / "model", coding, layers)
        cli("pack", work / "model", "-o", work / "packed")


def make_gguf(work: Path) -> None:
    if not (work / "model.gguf").exists():
        cli("export", work / "packed", "--to", "gguf", "-o", work / "gguf")
        (work / "gguf" / "model.gguf").rename(work / "model.gguf")
        (work / "gguf").rmdir()


def make_plain(work: Path) -> None:
    """The bfloat16 model that a packed one stands for."""
    if not (work / "plain").exists():
        cli("unpack", work / "packed", "-o", work / "unpacked", "--dequantize")
        cli("pack", work / "unpacked", "-o", work / "plain")
        shutil.rmtree(work / "unpacked")


def beside_llama(work: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    make(work, "mxfp4", args.layers)
    make_gguf(work)
    peers.write_prompts(work)
    rows = []
    with peers.read_ahead(work, peers.READ_AHEAD_KIB):
        for cap in args.caps.split(","):
            rows += peers.at_cap(work, _RUNTIMES, cap, args)
    peers.show(rows)
    return rows


class Turns:
    """An engine, and the seconds of its tokens."""

    def __init__(self, engine: chronos.Engine) -> None:
        self.engine, self.sequence = engine, OneSequence(engine.session)
        self.token = self.sequence.prefill(_PROMPT, _GREEDY)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def run(self, counted: bool) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(_TURN):
            self.token = self.sequence.decode(self.token, _GREEDY)
        if counted:
            self.wall.append((time.perf_counter() - wall) / _TURN)
            self.cpu.append((time.process_time() - cpu) / _TURN)


def at_equal_bytes(work: Path, coding: str, args: argparse.Namespace) -> dict[str, Any]:
    """A format and its bfloat16, with as many bytes for experts, and all of them in memory."""
    make(work, coding, args.layers)
    make_plain(work)
    share = open_layout(work / "plain").total_bytes // 4
    report: dict[str, Any] = {"bench": "packed", "format": coding, "layers": args.layers}
    with ExitStack() as stack:
        contenders: dict[str, Turns] = {}
        for name, folder in ((coding, "packed"), ("bf16", "plain")):
            for budget in (share, "all"):
                options = {"budget": budget, "backend": "torch", "prefetch": "off"}
                engine = stack.enter_context(chronos.load(work / folder, **options))
                if budget == "all" and engine.feed is not None:
                    engine.feed.preload(sorted(open_layout(work / folder).records))
                contenders[f"{name}, {'25 % of bf16' if budget == share else 'all'}"] = Turns(
                    engine
                )
        for turn in range(args.turns + 4):  # recordings are made in the first
            for each in contenders.values():
                each.run(turn >= 4)
        for name, each in contenders.items():
            stats = each.engine.feed.stats() if each.engine.feed else None
            report[name] = {
                "ms": 1e3 * statistics.median(each.wall),
                "cpu_ms": 1e3 * statistics.median(each.cpu),
                "read_bytes_a_token": stats.bytes_read / stats.tokens if stats else 0,
            }
    packed, plain = (contenders[f"{name}, 25 % of bf16"] for name in (coding, "bf16"))
    times = [b / a for a, b in zip(packed.wall, plain.wall, strict=True)]
    report["times_bf16"] = statistics.median(times)
    for name, row in report.items():
        if isinstance(row, dict):
            print(f"{name:24} {row['ms']:8.1f} ms a token, {row['cpu_ms']:8.1f} of the processors'")
    print(f"{coding} by bf16 at equal bytes: {report['times_bf16']:.2f} times as fast")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/scratch/packed"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--caps", default="none,75,55,40", help='"" for no llama.cpp')
    parser.add_argument("--formats", default="mxfp4", help=f"of {', '.join(published.CODINGS)}")
    parser.add_argument("--tokens", type=int, default=33, help="per prompt, beside llama.cpp")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run beside it")
    parser.add_argument("--turns", type=int, default=12, help=f"of {_TURN} tokens, at equal bytes")
    parser.add_argument("--install", action="store_true", help="llama.cpp's environment, and stop")
    parser.add_argument("--out", type=Path, default=Path("bench/results/packed.jsonl"))
    args = parser.parse_args()
    root = args.work.resolve()
    if args.install:
        root.mkdir(parents=True, exist_ok=True)
        peers.install(root, "llamacpp")
        return
    rows = []
    if args.caps:
        work = root / f"mxfp4-{args.layers}"
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "venv-llamacpp").exists():
            (work / "venv-llamacpp").symlink_to(root / "venv-llamacpp")
        rows += [row | {"layers": args.layers} for row in beside_llama(work, args)]
    for coding in filter(None, args.formats.split(",")):
        rows.append(at_equal_bytes(root / f"{coding}-{args.layers}", coding, args))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
    with args.out.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
