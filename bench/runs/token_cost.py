"""What a token of a small model costs the host: resident, and from a feed at a quarter.

Processor time of the thread that runs the model, in one process, the engines taking turns token by
token, the least of several rounds for each token: waits and busy neighbours are not in it. Floor:
the resident token. What is above it is Python, for leases, announcements and the reads' beginning.

    python -m bench.runs.token_cost [demo] [-n 120] [--rounds 6]

`by_hand` is the same feed when every layer of a token takes its lease the long way.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

PROMPT = "import os\n\n\nclass Reader:\n    def "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("-n", "--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    import chronos
    from chronos.common.text.sampling import SamplingParams

    def opened(budget: str) -> Any:
        return chronos.load(args.model, backend="torch", budget=budget, profile="off", threads=1)

    engines = {name: opened(name) for name in ("resident", "all", "25%")} | {
        "by_hand": opened("25%")
    }
    engines["by_hand"].feed.tier.present = lambda layer, experts: None
    sampling = SamplingParams(temperature=1.0, seed=3)
    times: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        replies = {
            name: engine.generate(PROMPT, sampling, max_tokens=args.tokens)
            for name, engine in engines.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(args.tokens):
            for name in sorted(engines, reverse=bool(number % 2)):
                begin = time.thread_time()
                if next(replies[name], None) is not None:
                    taken[name].append(time.thread_time() - begin)
        for name, each in taken.items():
            times[name].append(each[4:])  # not the prompt, nor what is made once
    ms = {name: 1e3 * float(np.min(each, axis=0).mean()) for name, each in times.items()}
    stats = engines["25%"].feed.stats()
    found = {
        "model": args.model,
        "tokens": len(times["25%"][0]),
        "rounds": args.rounds,
        "ms": ms,
        "share_of_resident_speed": {name: ms["resident"] / each for name, each in ms.items()},
        "reads_per_token": (stats.bytes_read - stats.bytes_loaded)
        / engines["25%"].layout.record_nbytes
        / stats.tokens,
        "unannounced": stats.unannounced,
        "announced_late": stats.announced_late,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
