"""A guest's decode on torch, by budget, beside Transformers' own: same weights, same dtype.

The ceiling is the library's forward with its cache, greedy, without the rest of `generate`; beside
it runs its eager experts. Turns of a few tokens alternate between all contenders, so a busy machine
slows each alike, and the median of the turns' ratios counts. Weights and the experts of budget
`all` are in memory before the first turn; smaller budgets read from disk past the file cache.

    python -m bench.runs.guest_decode MODEL PACKED [--budgets all,50%,25%] [--turns 12] [--tokens 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

import chronos
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()
PROMPT = "The history of the town begins with a small settlement on the river, where"
Step = Callable[[int], int]


def library(folder: Path, prompt: list[int], kernel: str | None, device: str) -> tuple[Step, int]:
    """The library's own model: a step of decode, and the first token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, experts_implementation=kernel
    )
    model = model.to(device).eval()
    cache = transformers.DynamicCache(config=model.config)

    def step(*ids: int) -> int:
        with torch.inference_mode():
            out = model(torch.tensor([ids], device=device), past_key_values=cache, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return step, step(*prompt)


def measure(contenders: dict[str, tuple[Step, int]], turns: int, tokens: int) -> dict[str, Any]:
    """Seconds per token of every turn, and the tokens each contender made."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    made = {name: [first] for name, (_, first) in contenders.items()}
    for turn in range(turns + 1):
        for name, (step, _) in contenders.items():
            begin = time.perf_counter()
            for _ in range(tokens):
                made[name].append(step(made[name][-1]))
            if turn:  # the first warms up
                seconds[name].append((time.perf_counter() - begin) / tokens)
    return {"seconds": seconds, "made": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--budgets", default="all,50%,25%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warm", default="0")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        contenders: dict[str, tuple[Step, int]] = {}
        engines: dict[str, chronos.Engine] = {}
        for budget in args.budgets.split(","):
            for prefetch in ("off",) if budget == "all" else ("off", "auto"):
                engine = stack.enter_context(
                    chronos.load(
                        args.packed,
                        backend="torch",
                        device=args.device,
                        budget=budget,
                        warm=args.warm,
                        prefetch=prefetch,
                    )
                )
                assert engine.feed is not None
                if budget == "all" and engine.layout is not None:
                    engine.feed.preload(sorted(engine.layout.records))
                assert engine.tokenizer is not None
                prompt = engine.tokenizer.encode_prompt(PROMPT)
                sequence = OneSequence(engine.session)
                first = sequence.prefill(prompt, GREEDY)
                name = f"{budget}, prefetch {prefetch}"
                engines[name] = engine
                contenders[name] = (lambda t, s=sequence: s.decode(t, GREEDY), first)
        contenders["transformers"] = library(args.model, prompt, None, args.device)
        contenders["transformers eager"] = library(args.model, prompt, "eager", args.device)
        found = measure(contenders, args.turns, args.tokens)
        stats = {name: engine.feed.stats().to_json() for name, engine in engines.items()}
        sources = {name: engine.prefetch_stats() for name, engine in engines.items()}
    base, report = found["seconds"]["transformers"], {}
    for name, seconds in found["seconds"].items():
        speed = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        same = found["made"][name] == found["made"]["transformers"]
        report[name] = {
            "ms_per_token": 1e3 * statistics.median(seconds),
            "speed_to_transformers": speed,
            "same_tokens": same,
        }
        print(f"{name:24} {report[name]['ms_per_token']:8.1f} ms  {speed:5.2f}  {same}")
    print(json.dumps({"contenders": report, "stats": stats, "prefetch": sources}))


if __name__ == "__main__":
    main()
