"""One streamed run of replayed routing in a process of its own; what
`bench.runs.memory` and `bench.runs.startup` start. Prints one JSON line.

    python -m bench.lib.streamed FOLDER --trace T.npz --budget 25% --tokens 48
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from chronos.common.text.sampling import SamplingParams
from chronos.common.traces.trace import RoutingTrace
from chronos.measure.recorded import RecordedRouting
from chronos.run import engine
from chronos.run.sequence import OneSequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    trace = RoutingTrace.load(args.trace)
    greedy = SamplingParams()
    with engine.load(args.folder, budget=args.budget, own_process=True) as loaded:
        sequence = OneSequence(loaded.session, route_override=RecordedRouting(trace))
        token = sequence.prefill([0], greedy)
        first = time.time()
        for _ in range(args.tokens - 1):
            token = sequence.decode(token, greedy)
        stats = loaded.feed.stats().to_json() if loaded.feed else {}
    print(json.dumps({"first_token_at": first, **stats}))


if __name__ == "__main__":
    main()
