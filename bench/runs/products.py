"""Tokens of a native model with large float32 products by oneDNN and by `F.linear`, in turns.

Ceiling: the weights a token reads / the memory's rate. What is compared is the library alone: both
widen 16-bit weights, `F.linear` into fresh memory as it was before. x86 CPUs; elsewhere both are
the same.

    python -m bench.runs.products MODEL [--budget resident] [--turns 12] [--tokens 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from chronos.backends.torch import products
from chronos.common.text.sampling import SamplingParams
from chronos.run import engine
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()


def turn(sequence: OneSequence, token: int, tokens: int) -> tuple[float, int]:
    """Seconds a token, the median, and the last token."""
    seconds = []
    for _ in range(tokens):
        begin = time.perf_counter()
        token = sequence.decode(token, GREEDY)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--budget", default="resident")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    libraries = {"onednn": products._has_onednn, "torch": lambda: False}
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    options = {"backend": "torch", "device": "cpu", "own_process": True, "prefetch": "off"}
    with engine.load(args.model, budget=args.budget, **options) as loaded:
        sequence = OneSequence(loaded.session)
        token = sequence.prefill([1, 2, 3], GREEDY)
        for number in range(args.turns + 1):  # the first one warms up
            for name, has in libraries.items():
                products._has_onednn = has
                taken, token = turn(sequence, token, args.tokens)
                if number:
                    seconds[name].append(taken)
    ratio = statistics.median(
        mine / other for mine, other in zip(seconds["onednn"], seconds["torch"], strict=True)
    )
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(
        f"onednn {1e3 * medians['onednn']:.1f} ms a token, F.linear {1e3 * medians['torch']:.1f}, "
        f"time by that of F.linear {ratio:.2f}"
    )
    print(json.dumps({"bench": "products", "budget": args.budget, **seconds}))


if __name__ == "__main__":
    main()
