"""What the tuner adds to a trial: its time in a study beside the same recipe run by hand.

Ceiling: 0 %, where a trial takes what `chronos train pretrain` takes of the same recipe. What is
added is asking for the trial, holding it up at its rungs, recording held-out routing and counting
reads there, and telling. Both are processes of their own and import the framework; they run in
turns, medians count, and nothing is read from a cold disk.

    python -m bench.runs.tune [--recipe demo] [--steps 300] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chronos.common.training.recipe import read_recipe
from chronos.tune.written import written


def chronos(*args: str | Path) -> float:
    """Seconds of a command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "chronos", *map(str, args), "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def trial_s(run: Path) -> tuple[float, float]:
    """Seconds of the first trial, and from its end to the begin of the next one."""
    lines = (run / "events.jsonl").read_text("utf-8").splitlines()
    told = [e for e in map(json.loads, lines) if e["event"] == "trial"]
    first, end, second = (e["time"] for e in told[:3])
    return end - first, second - end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    by_hand: list[float] = []
    in_study: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: dict[str, Any] = {"cadence.steps": args.steps, "tune.trials": 2}
        # The second trial is there to see what comes between two: it may end at once.
        settings |= {"tune.repeats": 0, "tune.rungs": 3}
        recipe = folder / "study.toml"
        recipe.write_text(written(read_recipe(args.recipe)[1], settings), "utf-8")
        for number in range(args.rounds):
            run = folder / f"run{number}"
            chronos("tune", "start", "-c", recipe, "-o", run)
            trial, between = trial_s(run)
            in_study.append(trial + between)
            own = run / "trials" / "0000" / "recipe.toml"
            by_hand.append(chronos("train", "pretrain", "-c", own, "-o", folder / "hand"))
            shutil.rmtree(folder / "hand")
            print(f"trial {in_study[-1]:.1f} s, by hand {by_hand[-1]:.1f} s", file=sys.stderr)
    hand, study = statistics.median(by_hand), statistics.median(in_study)
    found = {"steps": args.steps, "by_hand_s": by_hand, "in_study_s": in_study}
    print(json.dumps(found | {"overhead": study / hand - 1}))


if __name__ == "__main__":
    main()
