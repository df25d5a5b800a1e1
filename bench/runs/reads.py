"""The ranged reader against plain direct reads of the same sizes from the same file.

Ceiling: a bare loop of preadv with O_DIRECT in as many threads, over the same places in the same
order. Ours adds the queue, pieces and wake-ups. It takes requests as a store hands them over, those
of a layer together (--together 1: one by one, as no store does). Sequential places are those of a
layer packed side by side, scattered ones those of decoding. Interleaved, compared pair by pair.
Linux.

    python -m bench.runs.reads FILE_OF_A_GIGABYTE [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path

import xxhash

from chronos.common.disk.io import ALIGN, touched_buffers
from chronos.common.disk.reader import RangedReader, Request

SIZES = (48 << 10, 256 << 10, 1 << 20, 3 << 20)
_TOTAL, _AHEAD = 192 << 20, 16


def places(path: Path, size: int, order: str, seed: int) -> list[int]:
    found = list(range(0, path.stat().st_size - size, -(-size // ALIGN) * ALIGN))
    count = max(1, min(_TOTAL // size, 2000))
    if order == "scattered":
        random.Random(seed).shuffle(found)
        return found[:count]
    first = random.Random(seed).randrange(max(1, len(found) - count))
    return found[first : first + count]


def plain(path: Path, size: int, at: list[int], threads: int) -> float:
    """Bytes per second of bare reads."""
    fd, todo = os.open(path, os.O_RDONLY | os.O_DIRECT), iter(at)
    lock = threading.Lock()

    def work(buffer: memoryview) -> None:
        while True:
            with lock:
                place = next(todo, None)
            if place is None:
                return
            os.preadv(fd, [buffer], place)

    buffers = touched_buffers(threads, size)
    workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - begin
    os.close(fd)
    return len(at) * size / taken


def ours(path: Path, size: int, at: list[int], threads: int, together: int) -> tuple[float, float]:
    """Bytes per second, with as many requests under way as a store has, and CPU us a request."""
    buffers = touched_buffers(_AHEAD, size)
    with RangedReader(threads=threads) as reader:
        pending: list[Request] = []
        begin, busy = time.perf_counter(), time.process_time()
        for first in range(0, len(at), together):
            while len(pending) + together > _AHEAD:
                pending.pop(0).wait()
            requests = [
                Request(str(path), place, buffers[number % _AHEAD], demand=True)
                for number, place in enumerate(at[first : first + together], first)
            ]
            reader.submit_many(requests)
            pending += requests
        for request in pending:
            request.wait()
        rate = len(at) * size / (time.perf_counter() - begin)
        return rate, (time.process_time() - busy) / len(at) * 1e6


def checksum_rate(size: int) -> float:
    data = bytes(size)
    begin = time.perf_counter()
    for _ in range(20):
        xxhash.xxh3_128_digest(data)
    return 20 * size / (time.perf_counter() - begin)


def measure(args: argparse.Namespace, order: str, size: int) -> dict[str, object]:
    pairs, busy = [], []
    for number in range(args.rounds):
        at = places(args.file, size, order, number)
        bare = plain(args.file, size, at, args.threads)
        rate, cpu = ours(args.file, size, at, args.threads, args.together)
        pairs.append((rate, bare))
        busy.append(cpu)
    shares = [mine / bare for mine, bare in pairs]
    mine, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{order:>10} {size >> 10:5d} KiB: ours {mine / 1e9:.2f} GB/s, plain {bare / 1e9:.2f}, "
        f"share {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}), "
        f"CPU {statistics.median(busy):.0f} us a request"
    )
    rates = {"ours_bytes_per_s": mine, "plain_bytes_per_s": bare, "cpu_us": busy}
    return {"order": order, "bytes": size, **rates, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--together", type=int, default=4, choices=range(1, _AHEAD + 1))
    args = parser.parse_args()
    rows = [measure(args, order, size) for order in ("sequential", "scattered") for size in SIZES]
    print(f"checksum of a 3 MiB record: {checksum_rate(3 << 20) / 1e9:.1f} GB/s on one core")
    how = {"threads": args.threads, "together": args.together}
    print(json.dumps({"bench": "reads", **how, "rows": rows}))


if __name__ == "__main__":
    main()
