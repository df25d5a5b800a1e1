"""Speed beside busy neighbours, by number of threads and by how threads wait for each other.

Ceiling: the same run on a quiet machine. Each run is a process of its own, since a framework reads
these settings once; runs take turns. Neighbours are processes that count; Chronos sees those that
are there when it starts, with --late they begin when the model has answered once. Linux, macOS.

    python -m bench.runs.neighbour [--model demo] [--budget all] [--neighbours 0,1,4] [--late]
        [--threads 1,2] [--waiting spin,asleep,default] [--rounds 3] [--tokens 100]

--model takes any folder: the replay model, a packed guest (`bench.runs.packed` makes some). Prints
a table and one JSON line: tokens a second, the median of the rounds, and its share of the quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

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
    text = engine.tokenizer  # a generated model has none
    prompt = text.encode("def read_lines(path):\\n") if text else list(range(2, 26))
    engine.generate(prompt, max_tokens=16).result
    print("ready", flush=True)
    sys.stdin.readline()
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


def measure(args: argparse.Namespace, count: int, threads: int, waiting: str) -> float:
    """Tokens a second of one process beside `count` others."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    }
    environment |= {"OMP_NUM_THREADS": str(threads)} | _SPIN[waiting]
    code = [sys.executable, "-c", _DECODE, args.model, args.budget, str(args.tokens)]
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        if not args.late:
            stack.enter_context(busy(count))
        run = subprocess.Popen(code, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert run.stdin is not None and run.stdout is not None
        if run.stdout.readline() != "ready\n":
            raise SystemExit(f"{args.model} does not run")
        if args.late:
            stack.enter_context(busy(count))
        output, _ = run.communicate("go\n")
    return float(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="all")
    parser.add_argument("--neighbours", default="0,1,4")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--waiting", default=",".join(_SPIN))
    parser.add_argument(
        "--late", action="store_true", help="neighbours begin after the first reply"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()
    ways = list(product(map(int, args.threads.split(",")), args.waiting.split(",")))
    rows: list[dict[str, Any]] = []
    quiet: dict[tuple[int, str], float] = {}
    for count in map(int, args.neighbours.split(",")):
        found: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way in ways:
                found[way].append(measure(args, count, *way))
        for (threads, waiting), speeds in found.items():
            middle = statistics.median(speeds)
            if not count:
                quiet[threads, waiting] = middle
            share = middle / quiet[threads, waiting] if quiet else None
            spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
            of_quiet = "" if share is None else f", {share:.2f} of the quiet"
            print(
                f"{count} neighbours, {threads} threads, {waiting:7}: "
                f"{middle:7.1f} ({spread}){of_quiet}"
            )
            rows.append({"neighbours": count, "threads": threads, "waiting": waiting,
                         "tokens_per_s": round(middle, 1), "of_quiet": share})  # fmt: skip
    print(json.dumps({"bench": "neighbour", "model": args.model, "budget": args.budget,
                      "late": args.late, "tokens": args.tokens, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
