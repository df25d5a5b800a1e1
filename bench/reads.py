"""The ranged reader against plain direct reads of the same sizes from the same file.

Ceiling: `measure_read_rate`, a bare loop of preadv with O_DIRECT in as many threads. Ours adds the
queue, chunks, the checksum of every record and its wake-ups. Interleaved, compared pair by pair.

    python -m bench.reads FILE_OF_A_GIGABYTE [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import xxhash

from chronos.common.fileio import ALIGN, aligned_buffer, measure_read_rate
from chronos.common.files import RangedReader, Request

SIZES = (48 << 10, 256 << 10, 1 << 20, 3 << 20)
_TOTAL = 192 << 20


def ours(path: Path, size: int, threads: int, seed: int) -> float:
    """Bytes per second of scattered reads with as many requests under way as a store has."""
    places = list(range(0, path.stat().st_size - size, -(-size // ALIGN) * ALIGN))
    random.Random(seed).shuffle(places)
    places = places[: max(1, min(_TOTAL // size, 2000))]
    buffers = [aligned_buffer(size) for _ in range(16)]
    with RangedReader(threads=threads) as reader:
        pending: list[tuple[Request, int]] = []
        begin = time.perf_counter()
        for number, place in enumerate(places):
            if len(pending) == len(buffers):
                pending.pop(0)[0].wait()
            request = reader.submit(path, place, buffers[number % len(buffers)], demand=True)
            pending.append((request, number))
        for request, _ in pending:
            request.wait()
        return len(places) * size / (time.perf_counter() - begin)


def checksum_rate(size: int) -> float:
    data = bytes(size)
    begin = time.perf_counter()
    for _ in range(20):
        xxhash.xxh3_128_digest(data)
    return 20 * size / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        pairs = []
        for number in range(args.rounds):
            limit = min(_TOTAL, 2000 * size)
            plain = measure_read_rate(args.file, size, args.threads, max_bytes=limit)
            pairs.append((ours(args.file, size, args.threads, number), plain))
        share = statistics.median(a / b for a, b in pairs)
        rows.append(
            {
                "bytes": size,
                "ours_bytes_per_s": statistics.median(a for a, _ in pairs),
                "plain_bytes_per_s": statistics.median(b for _, b in pairs),
                "share_median": share,
                "share_range": [min(a / b for a, b in pairs), max(a / b for a, b in pairs)],
            }
        )
        print(
            f"{size >> 10:5d} KiB: ours {rows[-1]['ours_bytes_per_s'] / 1e9:.2f} GB/s, plain "
            f"{rows[-1]['plain_bytes_per_s'] / 1e9:.2f}, share {share:.2f}"
        )
    print(f"checksum of a 3 MiB record: {checksum_rate(3 << 20) / 1e9:.1f} GB/s on one core")
    print(json.dumps({"bench": "reads", "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
