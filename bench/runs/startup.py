"""Seconds from the start of a process to its first token, on a model of over 2 GB of experts.

Ceiling: the dense bytes at the disk's rate, and two seconds for Python, the framework's import and
the first pass. Beside it: what the framework's import alone takes, in a process of its own, in the
same minute. The page cache is dropped before each run where that is allowed (root on Linux).

    python -m bench.runs.startup bench/scratch/replay --trace T.npz [--budget 25%] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chronos.common.disk.io import drop_page_cache, measure_read_rate
from chronos.common.layout import open_layout
from chronos.common.traces.trace import RoutingTrace


def first_token_s(args: argparse.Namespace, short: Path) -> float:
    command = [sys.executable, "-m", "bench.lib.streamed", str(args.folder), "--tokens", "1"]
    command += ["--trace", str(short), "--budget", args.budget]
    begin = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["first_token_at"]) - begin


def import_s() -> float:
    begin = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="keep the page cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A few tokens: to load a long trace is no part of a user's start.
        short = Path(folder) / "short.npz"
        RoutingTrace.load(args.trace).part(0, 4).save(short)
        measure(args, short)


def measure(args: argparse.Namespace, short: Path) -> None:
    layout = open_layout(args.folder)
    dense = (args.folder / "model.safetensors").stat().st_size
    rate = measure_read_rate(layout.files[0], 4 << 20)
    first, imports, cold = [], [], False
    for _ in range(args.rounds):
        cold = not args.warm and drop_page_cache()
        first.append(first_token_s(args, short))
        if not args.warm:
            drop_page_cache()
        imports.append(import_s())
    bound = 2.0 + dense / rate
    middle = statistics.median(first)
    print(
        f"first token after {middle:.2f} s ({min(first):.2f} to {max(first):.2f}), "
        f"{'cold' if cold else 'warm'} page cache; bound 2 s + {dense / 1e6:.0f} MB at "
        f"{rate / 1e9:.2f} GB/s = {bound:.2f} s; `import torch` alone "
        f"{statistics.median(imports):.2f} s"
    )
    report = {"bench": "startup", "first_token_s": first, "import_s": imports, "bound_s": bound}
    print(json.dumps(report | {"cold": cold, "dense_bytes": dense, "disk_bytes_per_s": rate}))


if __name__ == "__main__":
    main()
