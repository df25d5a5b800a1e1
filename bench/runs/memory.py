"""Peak memory of a whole streamed process under a memory cap, page cache included.

The promise: dense weights + expert budget + 600 MB. The cap is set to exactly that, so a process
that needs more is killed. Linux as root. Make the model first, for example with
`chronos bench replay T.npz --work bench/scratch/replay`.

    python -m bench.runs.memory bench/scratch/replay --trace T.npz [--budget 25%] [--tokens 96]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.lib import capped
from chronos.common.budget import parse_budget
from chronos.common.layout import open_layout

_HEADROOM = 600_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    total = open_layout(args.folder).total_bytes
    budget = parse_budget(args.budget, total)
    dense = (args.folder / "model.safetensors").stat().st_size
    cap = dense + budget + _HEADROOM
    command = ["-m", "bench.lib.streamed", str(args.folder), "--trace", str(args.trace)]
    command += ["--budget", args.budget, "--tokens", str(args.tokens)]
    report = capped.run_python(command, cap)
    print(
        f"experts {total / 1e6:.0f} MB, budget {budget / 1e6:.0f} MB, dense {dense / 1e6:.0f} MB: "
        f"cap {cap / 1e6:.0f} MB, peak {report['peak_bytes'] / 1e6:.0f} MB, exit {report['rc']}"
    )
    last = json.loads(report.pop("last_line") or "{}")
    sizes = {"expert_bytes": total, "budget_bytes": budget, "dense_bytes": dense}
    print(json.dumps({"bench": "memory", **sizes, **report, **last}))


if __name__ == "__main__":
    main()
