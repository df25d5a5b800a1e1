"""What recorded steps and the next gate gain a guest on torch: with and without, in turns.

    OMP_NUM_THREADS=1 python -m bench.runs.guest_parts PACKED [--budgets all,25%] [--disk 500MB]

Ceiling: the same engine without the part would be as fast. Engines that differ in one part decode
the same greedy tokens in turns of a few, so a busy machine slows each alike; every round of turns
begins with another prompt, and the median of the turns' ratios counts. Experts of budget `all` are
in memory before the first turn; smaller budgets read past the file cache, or as from a slower disk.
Prints a line a way (speed by the engine as it is) and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import chronos
from chronos.common.budget import parse_size
from chronos.common.data.documents import split_documents, stdlib_documents
from chronos.common.disk.io import FileIO, PacedIO
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()
_AS_IT_IS = "as it is"


def without_steps(engine: chronos.Engine) -> None:
    engine.session.model.steps = None


def without_next_gate(engine: chronos.Engine) -> None:
    for module in engine.session.model.core.modules():
        if hasattr(module, "chronos"):
            module.chronos._ahead = None


def turn(engine: chronos.Engine, prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
    """Seconds and CPU seconds a decoded token after a prompt, and the tokens."""
    sequence = OneSequence(engine.session)
    made = [sequence.prefill(prompt, GREEDY)]
    for _ in range(4):  # the library's own steps, which are recorded
        made.append(sequence.decode(made[-1], GREEDY))
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(tokens):
        made.append(sequence.decode(made[-1], GREEDY))
    cpu_s = (time.process_time() - cpu) / tokens
    return (time.perf_counter() - begin) / tokens, cpu_s, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--budgets", default="all,25%")
    parser.add_argument("--disk", help="bytes a second, such as 500MB")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    ways = {_AS_IT_IS: lambda engine: None, "without recorded steps": without_steps}
    documents, _ = split_documents(stdlib_documents())
    report: dict[str, Any] = {}
    for budget in args.budgets.split(","):
        if budget != "all":
            ways["without next gate"] = without_next_gate
        with ExitStack() as stack:
            engines: dict[str, chronos.Engine] = {}
            for name, alter in ways.items():
                io = FileIO() if args.disk is None else PacedIO(parse_size(args.disk, "a rate"))
                engine = stack.enter_context(
                    chronos.load(args.packed, backend="torch", budget=budget, warm="0", io=io)
                )
                if budget == "all" and engine.feed and engine.layout:
                    engine.feed.preload(sorted(engine.layout.records))
                alter(engine)
                engines[name] = engine
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            cpus: dict[str, list[float]] = {name: [] for name in engines}
            same = True
            for number in range(args.turns + 1):
                text = documents[7 * number % len(documents)].text[:300]
                tokenizer = engine.tokenizer
                assert tokenizer is not None
                made = []
                order = list(engines)
                for name in order[number % len(order) :] + order[: number % len(order)]:
                    engine = engines[name]
                    took, cpu_s, tokens = turn(engine, tokenizer.encode_prompt(text), args.tokens)
                    made.append(tokens)
                    if number:  # the first warms up
                        seconds[name].append(took)
                        cpus[name].append(cpu_s)
                same = same and all(tokens == made[0] for tokens in made)
            base = seconds[_AS_IT_IS]
            for name, own in seconds.items():
                ratios = [b / s for b, s in zip(base, own, strict=True)]
                report[f"{budget}, {name}"] = found = {
                    "ms_per_token": 1e3 * statistics.median(own),
                    "speed": statistics.median(ratios),
                    "cpu_ms": 1e3 * statistics.median(cpus[name]),
                    "least_cpu_ms": 1e3 * min(cpus[name]),
                    "replayed": getattr(engines[name].session.model.steps, "replayed", 0),
                    "least": min(ratios),
                    "most": max(ratios),
                    "same_tokens": same,
                    "sources": engines[name].prefetch_stats(),
                }
                told = f"{found['ms_per_token']:7.1f} ms  speed {found['speed']:.3f}"
                print(
                    f"{budget:4} {name:24} {told} ({min(ratios):.2f} to {max(ratios):.2f})  "
                    f"CPU {found['cpu_ms']:.1f} ms, least {found['least_cpu_ms']:.1f}  "
                    f"replayed {found['replayed']}  same tokens {same}  {found['sources']}",
                    flush=True,
                )
    print(json.dumps({"disk": args.disk, "ways": report}))


if __name__ == "__main__":
    main()
