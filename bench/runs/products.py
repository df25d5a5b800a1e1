"""Float32 rows times weights of 16 bits: our kernels, oneDNN's products and `F.linear`'s.

First by shape, one row and several, by the thread's own clock, from memory that no cache holds.
Ceiling: the weight's bytes / the memory's rate, which several rows share. Then, of a native model
if one is named, its tokens with each of the three, in turns. oneDNN's and `F.linear`'s weights are
widened before, as they are where there are no kernels.

    python -m bench.runs.products [MODEL] [--budget resident] [--turns 12] [--tokens 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from chronos import kernels as native
from chronos.backends.torch import kernels, products
from chronos.common.text.sampling import SamplingParams
from chronos.run import engine
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()


_CYCLED = 192 << 20
LIBRARIES = ("kernels", "onednn", "torch")


@contextmanager
def only(library: str) -> Iterator[None]:
    """Products by one of the three."""
    ours, onednn = kernels.multiplies_wide, products._has_onednn
    if library != "kernels":
        kernels.multiplies_wide = lambda: False
    if library == "torch":
        products._has_onednn = lambda: False
    try:
        yield
    finally:
        kernels.multiplies_wide, products._has_onednn = ours, onednn


def fastest(product: Callable[[Tensor], Any], weights: list[Tensor], calls: int = 60) -> float:
    """Microseconds."""
    taken = []
    for number in range(calls):
        begin = time.thread_time()
        product(weights[number % len(weights)])
        taken.append(time.thread_time() - begin)
    return 1e6 * min(taken)


@torch.inference_mode()
def by_shape(shapes: str) -> list[dict[str, Any]]:
    found = []
    for shape in shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns).bfloat16()
        weights = [weight.clone() for _ in range(_CYCLED // weight.nbytes + 1)]
        each: dict[str, Any] = {"shape": shape}
        for library in LIBRARIES:
            with only(library):
                for count in (1, 2, 4, native.MOST_ROWS) if library == "kernels" else (1,):
                    x = torch.randn(count, columns)
                    us = fastest(lambda weight, x=x: products.linear(x, weight), weights)
                    each[f"{library}_us" if count == 1 else f"{count}_rows_us"] = us
        found.append(each)
        print(
            f"{shape:>10}: kernels {each['kernels_us']:6.0f} us "
            f"({weight.nbytes / each['kernels_us'] / 1e3:.0f} GB/s), "
            f"4 rows {each['4_rows_us']:6.0f} ({4 * each['kernels_us'] / each['4_rows_us']:.1f} "
            f"times the rate), onednn {each['onednn_us']:6.0f}, F.linear {each['torch_us']:6.0f}",
            flush=True,
        )
    return found


def turn(sequence: OneSequence, token: int, tokens: int) -> tuple[float, int]:
    """Seconds a token, the median, and the last token."""
    seconds = []
    for _ in range(tokens):
        begin = time.perf_counter()
        token = sequence.decode(token, GREEDY)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), token


def by_model(args: argparse.Namespace) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    options = {"backend": "torch", "device": "cpu", "own_process": True, "prefetch": "off"}
    with engine.load(args.model, budget=args.budget, **options) as loaded:
        sequence = OneSequence(loaded.session)
        token = sequence.prefill([1, 2, 3], GREEDY)
        for number in range(args.turns + 1):  # the first one warms up
            for name in LIBRARIES:
                with only(name):
                    taken, token = turn(sequence, token, args.tokens)
                if number:
                    seconds[name].append(taken)
    medians = {name: 1e3 * statistics.median(found) for name, found in seconds.items()}
    print("ms a token: " + ", ".join(f"{name} {ms:.1f}" for name, ms in medians.items()))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--budget", default="resident")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--shapes", default="960x1024,1024x480,2880x2880")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"shapes": by_shape(args.shapes)}
    torch.set_num_threads(threads)
    if args.model:
        found |= {"budget": args.budget, **by_model(args)}
    print(json.dumps({"bench": "products"} | found))


if __name__ == "__main__":
    main()
