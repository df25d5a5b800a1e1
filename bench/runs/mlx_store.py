"""Where experts live in MLX memory: three ways to replace one, with what each copies and allocates.

  arena    one array; its exported buffer is what the reader fills; stacks over it are views
  donated  a stack of slots updated in place: `stack[slot] = new`, which MLX does without a copy of
           the stack only while nothing else refers to it
  groups   one array per expert and projection; the evicted one is dropped

The read itself is the same for all and left out: bytes come from a host buffer, as after a read.
Ceiling: copying a record once (measured here, warm); the arena needs no copy after the read, so it
is shown with the one that stands for the read. Allocation is from MLX's own counters.

    python -m bench.runs.mlx_store [--slots 16] [--record-kib 576] [--loads 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

Load = Callable[[int, np.ndarray], None]


def arena(slots: int, rows: int, columns: int) -> tuple[Load, Callable[[], mx.array]]:
    whole = mx.zeros((slots, rows, columns))
    mx.eval(whole)
    room = np.frombuffer(memoryview(whole).cast("B"), np.float32).reshape(whole.shape)

    def load(slot: int, data: np.ndarray) -> None:
        room[slot] = data  # stands for preadv into the slot: not counted as a copy

    return load, lambda: whole


def donated(slots: int, rows: int, columns: int) -> tuple[Load, Callable[[], mx.array]]:
    stack = [mx.zeros((slots, rows, columns))]
    mx.eval(stack)

    def load(slot: int, data: np.ndarray) -> None:
        stack[0][slot] = mx.array(data)
        mx.eval(stack)

    return load, lambda: stack[0]


def groups(slots: int, rows: int, columns: int) -> tuple[Load, Callable[[], mx.array]]:
    experts = [mx.zeros((rows, columns)) for _ in range(slots)]
    mx.eval(experts)

    def load(slot: int, data: np.ndarray) -> None:
        experts[slot] = mx.array(data)
        mx.eval(experts[slot])

    return load, lambda: mx.stack(experts)


WAYS = {"arena": (arena, 0), "donated": (donated, 2), "groups": (groups, 1)}


def measure(way: str, slots: int, rows: int, columns: int, loads: int) -> dict[str, Any]:
    make, copies = WAYS[way]
    mx.clear_cache()
    before = mx.get_active_memory()
    load, stack = make(slots, rows, columns)
    held = mx.get_active_memory() - before
    mx.reset_peak_memory()
    rng = np.random.default_rng(0)
    records = rng.standard_normal((4, rows, columns)).astype(np.float32)
    seconds = []
    for i in range(loads):
        begin = time.perf_counter()
        load(i % slots, records[i % 4])
        seconds.append(time.perf_counter() - begin)
    peak = max(mx.get_peak_memory() - before, held)  # the peak is only noted when memory is taken
    after, cached = mx.get_active_memory() - before, mx.get_cache_memory()
    last = np.array(stack()[(loads - 1) % slots])
    assert np.array_equal(last, records[(loads - 1) % 4]), "the slot does not hold what was loaded"
    return {
        "way": way,
        "copies_after_the_read": copies,
        "us_per_load": round(statistics.median(seconds) * 1e6, 1),
        "held_bytes": held,
        "held_bytes_after": after,
        "peak_over_held_bytes": peak - held,
        "cached_bytes": cached,
    }


def broken_donation(slots: int, rows: int, columns: int) -> dict[str, Any]:
    """What `donated` costs when work not yet evaluated still refers to the stack."""
    load, stack = donated(slots, rows, columns)
    pending = stack().sum()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    begin = time.perf_counter()
    load(0, np.zeros((rows, columns), np.float32))
    seconds, peak = time.perf_counter() - begin, mx.get_peak_memory() - before
    mx.eval(pending)
    return {"us": round(seconds * 1e6, 1), "peak_over_held_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--record-kib", type=int, default=576)
    parser.add_argument("--loads", type=int, default=200)
    args = parser.parse_args()
    columns = 256
    rows = args.record_kib * 1024 // 4 // columns
    once = np.zeros((2, rows, columns), np.float32)
    copies = []
    for _ in range(50):
        begin = time.perf_counter()
        once[0] = once[1]
        copies.append(time.perf_counter() - begin)
    ceiling = statistics.median(copies) * 1e6
    nbytes = rows * columns * 4
    print(f"a record is {nbytes} bytes; copying it once takes {ceiling:.0f} us (the ceiling)")
    rows_of = [measure(way, args.slots, rows, columns, args.loads) for way in WAYS]
    for row in rows_of:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    broken = broken_donation(args.slots, rows, columns)
    print(f"donated, with work pending on the stack: {broken}")
    result = {"record_bytes": nbytes, "slots": args.slots, "copy_once_us": round(ceiling, 1)}
    result |= {"ways": rows_of, "broken_donation": broken, "mlx": mx.__version__}
    print(json.dumps({"bench": "mlx_store", "device": str(mx.default_device())} | result))


if __name__ == "__main__":
    main()
