"""Rows times packed matrices by the compiled kernels, beside the library and the memory's rate.

Ceilings: the memory (a copy, bytes read and written), and oneDNN's product of bfloat16 that lies as
it likes best, for twice to four times the bytes. "else" is what happens without a kernel: the
matrix is dequantised by torch, then multiplied; "plain" is dequantising by a kernel, alone.
Each order of summation is measured that the CPU has kernels in, beside the library's product that
adds so: oneDNN's, or with it off ATen's own, as on CPUs for which oneDNN has none (`x @ W` where
columns lie one behind the other). Matrices take turns in 192 MB, so they come from memory. One
thread is timed by its own clock, which a busy neighbour moves little; several by the wall's.

    python -m bench.runs.kernels [--shapes 768x2048,2880x2880] [--threads 1,2] [--calls 60] \
        [--orders pairs,dots,fours]

Prints a table and one JSON line: the fastest of the calls, and whether the bits are the library's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chronos import kernels as native
from chronos.backends.torch import kernels, products
from chronos.backends.torch.quantised import by_torch

_CYCLED = 192 << 20


def empty(name: str, rows: int, columns: int) -> tuple[str, dict[str, Tensor]]:
    """An encoding and tensors of its shapes."""

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    groups = columns // 32
    if name == "mxfp4":
        blocks = of(torch.uint8, rows, groups, 16)
        return name, {"blocks": blocks, "scales": of(torch.uint8, rows, groups)}
    if name == "fp8":
        scale = of(torch.float32, -(-rows // 128), -(-columns // 128))
        weight = of(torch.float8_e4m3fn, rows, columns)
        return "fp8-128x128", {"weight": weight, "weight_scale_inv": scale}
    bits = int(name[-1])
    if name in ("gptq4", "awq4"):
        shape = (columns // 8, rows) if name == "gptq4" else (columns, rows // 8)
        kinds = {
            "qweight": of(torch.int32, *shape),
            "scales": of(torch.float16, groups, rows),
            "qzeros": of(torch.int32, groups, rows // 8),
        }
        index = {"g_idx": of(torch.int32, columns)} if name == "gptq4" else {}
        return f"{name[:-1]}-int4", kinds | index
    words = of(torch.int32, rows, columns * bits // 32)
    scales = of(torch.bfloat16, rows, groups)
    if name.startswith("affine"):
        return f"mlx-{name}", {"weight": words, "scales": scales, "biases": scales}
    shape = torch.tensor([rows, columns])
    kinds = {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}
    return f"compressed-{name}", kinds


def fastest(call: Callable[[int], Any], calls: int, threads: int) -> float:
    """Seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    taken = []
    for number in range(calls):
        begin = clock()
        call(number)
        taken.append(clock() - begin)
    return min(taken)


def memory_rate(threads: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(_CYCLED // 8, dtype=torch.int64)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda _: target.copy_(source), 5, threads)


def of_library(order: str, x: Tensor, weight: Tensor) -> Tensor:
    """The product that adds in that order; weight [N, K], or [K, N] for "fours"."""
    torch.backends.mkldnn.enabled = order == "pairs"
    y = x @ weight if order == "fours" else F.linear(x, weight)
    torch.backends.mkldnn.enabled = True
    return y


def measure(
    name: str, order: str, rows: int, columns: int, threads: int, calls: int
) -> dict[str, Any]:
    if name == "bf16":
        encoding, kinds = name, {"weight": torch.randn(rows, columns).bfloat16()}
        weight = kinds["weight"]
    else:
        encoding, like = empty(name, rows, columns)
        drawn = kernels.random_like({f"m.{kind}": tensor for kind, tensor in like.items()})
        kinds = {kind.removeprefix("m."): tensor for kind, tensor in drawn.items()}
        weight = by_torch(encoding, kinds, torch.bfloat16)
    nbytes = sum(tensor.nbytes for tensor in kinds.values())
    held = [
        {k: tensor.clone() for k, tensor in kinds.items()} for _ in range(_CYCLED // nbytes + 1)
    ]
    number = native.ORDERS.index(order)
    described = [kernels.describe(encoding, each) for each in held]
    matrices = kernels.in_order(number, [each for each in described if each is not None])
    assert len(matrices) == len(held)
    x = torch.randn(native.MOST_ROWS, columns).bfloat16()
    y = torch.empty(native.MOST_ROWS, rows, dtype=torch.bfloat16)

    def multiply(number: int, count: int) -> None:
        matrix = matrices[number % len(matrices)]
        native.multiply([(matrix, x.data_ptr(), y.data_ptr())], count, threads, held)

    def ours(tried: int, row: Tensor) -> Tensor:
        return kernels.multiply(row, kernels.in_order(tried, matrices[:1]), held)

    lying = weight.t().contiguous() if order == "fours" else weight
    same = kernels.same_order(weight, lambda row: of_library(order, row, lying), ours) == number
    kernels.in_order(number, matrices)
    seconds = {n: fastest(lambda i, n=n: multiply(i, n), calls, threads) for n in (1, 2, 4, 8)}
    plain_s = 0.0
    if name != "bf16":
        plain_s = fastest(lambda i: kernels.dequantised(encoding, held[i % len(held)]), 5, threads)
    del held[1:], described[1:]
    plain = [lying.clone() for _ in range(_CYCLED // lying.nbytes + 1)]
    linear = fastest(lambda i: of_library(order, x[:1], plain[i % len(plain)]), calls, threads)
    best = 0.0
    if order == "pairs":
        packed = [products.packed(each) for each in plain]
        best = fastest(
            lambda i: products.onednn_linear(x[:1], packed[i % len(packed)]), calls, threads
        )
    torch_s = 0.0
    if name != "bf16":
        torch_s = fastest(lambda _: by_torch(encoding, kinds, torch.bfloat16), 3, threads)
    return {
        "format": name, "order": order, "rows": rows, "columns": columns, "threads": threads,
        "same_bits": same,
        "us": 1e6 * seconds[1], "gweights_per_s": rows * columns / seconds[1] / 1e9,
        "gbytes_per_s": nbytes / seconds[1] / 1e9,
        "rate_of_rows": {n: n * seconds[1] / s for n, s in seconds.items()},
        "linear_us": 1e6 * linear, "packed_us": 1e6 * best, "else_us": 1e6 * (torch_s + linear),
        "plain_us": 1e6 * plain_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="768x2048,2880x2880")
    parser.add_argument("--formats", default="bf16,mxfp4,fp8,int4,int8,affine4,affine8,gptq4,awq4")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--calls", type=int, default=60)
    orders = [native.ORDERS[number] for number in native.orders()]
    parser.add_argument("--orders", default=",".join(orders))
    args = parser.parse_args()
    found, rates = [], {}
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        rates[threads] = memory_rate(threads) / 1e9
        print(f"{threads} threads; a copy moves {rates[threads]:.1f} GB/s")
        print(
            "format   order      shape   bits     us  Gw/s  GB/s 4 rows  | linear"
            "  packed    else  plain"
        )
        for shape in args.shapes.split(","):
            rows, columns = map(int, shape.split("x"))
            kinds = itertools.product(args.formats.split(","), args.orders.split(","))
            for name, order in kinds:
                with torch.inference_mode():
                    each = measure(name, order, rows, columns, threads, args.calls)
                found.append(each)
                print(
                    f"{name:8} {order:5} {shape:>10} {'same' if each['same_bits'] else 'other':>6} "
                    f"{each['us']:6.0f} {each['gweights_per_s']:5.1f} {each['gbytes_per_s']:5.1f} "
                    f"{each['rate_of_rows'][4]:6.2f}  | {each['linear_us']:6.0f} "
                    f"{each['packed_us']:7.0f} {each['else_us']:7.0f} {each['plain_us']:6.0f}",
                    flush=True,
                )
    print(json.dumps({"bench": "kernels", "copy_gbytes_per_s": rates, "rows": found}))


if __name__ == "__main__":
    main()
