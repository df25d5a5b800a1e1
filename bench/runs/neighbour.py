"""Speed beside busy neighbours, by number of threads and by how threads wait for each other.

Ceiling: the same run on a quiet machine. Each run is a process of its own, since a framework reads
these settings once; runs take turns. Neighbours are processes that count. Linux, macOS.

    python -m bench.runs.neighbour [--neighbours 0,1,4] [--threads 1,2] [--rounds 3] [--tokens 100]

Prints a table and one JSON line: tokens a second, the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

# libgomp's default while there are no more threads than cores; asleep; and what Chronos chooses.
_SPIN = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
    "default": {},
}
_DECODE = """
import sys
from chronos import load
with load(sys.argv[1], backend="torch", budget=sys.argv[2], own_process=True) as engine:
    prompt = engine.tokenizer.encode("def read_lines(path):\\n")
    engine.generate(prompt, max_tokens=16).result
    print(engine.generate(prompt, max_tokens=int(sys.argv[3])).result.stats["decode_tps"])
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that count, as long as the body runs."""
    code = "i = 0\nwhile True: i += 1"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def measure(args: argparse.Namespace, threads: int, waiting: str) -> float:
    """Tokens a second of one process."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    }
    environment |= {"OMP_NUM_THREADS": str(threads)} | _SPIN[waiting]
    code = [sys.executable, "-c", _DECODE, args.model, args.budget, str(args.tokens)]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="all")
    parser.add_argument("--neighbours", default="0,1,4")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    ways = list(product(map(int, args.threads.split(",")), _SPIN))
    rows = []
    for count in map(int, args.neighbours.split(",")):
        found: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
        with busy(count):
            for _ in range(args.rounds):
                for way in ways:
                    found[way].append(measure(args, *way))
        for (threads, waiting), speeds in found.items():
            middle = statistics.median(speeds)
            spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
            print(f"{count} neighbours, {threads} threads, {waiting:7}: {middle:7.1f} ({spread})")
            rows.append({"neighbours": count, "threads": threads, "waiting": waiting,
                         "tokens_per_s": round(middle, 1)})  # fmt: skip
    print(json.dumps({"bench": "neighbour", "model": args.model, "budget": args.budget,
                      "tokens": args.tokens, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
