"""What the tuner adds to a trial, beside the same recipe run by hand.

A trial is the same updates by the same loop, in a process that reads the same data; measured is
what comes on top, each part by itself, since two whole runs differ by more than that from minute to
minute:

- a rung: held-out routing is recorded and reads are counted. In turns with updates, so that a busy
  minute slows both; `rung_updates` is a rung in updates;
- the study: asking, the trial's recipe, its rungs, telling, in the journal and the log, by the real
  worker over trials that train nothing;
- the start of a trial's process beside that of `chronos train`;
- evaluations that the recipe would not have made by itself (a study evaluates at its rungs).

Ceiling: 0 %. `overhead` is the sum beside a trial of the recipe's own steps;
`updates_for_2_percent` is how long a trial must be for the sum to stay below 2 % of it. All takes
two minutes.

    python -m bench.runs.tune [--recipe demo] [--rounds 6]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chronos import backends
from chronos.common.training.recipe import read_recipe
from chronos.run.models import DEMO, resolve_model
from chronos.train import STAGES
from chronos.tune import worker
from chronos.tune.measured import Measured, measure
from chronos.tune.settings import TuneSettings, load_tuning, rungs_of
from chronos.tune.trial import Job
from chronos.tune.written import written

TRIALS = 40  # of the study whose bookkeeping is timed; one is slower the more there were
LOADS = "from chronos import backends; backends.load(None)"
BY_HAND = f"import chronos.cli.main, chronos.cli.train, chronos.train; {LOADS}"
IN_STUDY = f"import chronos.tune.trial_child; {LOADS}"


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def start_s(rounds: int) -> tuple[float, float]:
    """Seconds that the processes of a run by hand and of a trial take to begin."""
    found: dict[str, list[float]] = {BY_HAND: [], IN_STUDY: []}
    for _ in range(rounds):
        for code, seconds in found.items():
            command = [sys.executable, "-c", code]
            seconds.append(timed(lambda: subprocess.run(command, check=True)))  # noqa: B023
    return statistics.median(found[BY_HAND]), statistics.median(found[IN_STUDY])


def study_s(recipe: Path, folder: Path) -> float:
    """Seconds a trial that the worker and the study take."""
    tuning = load_tuning(recipe, trials=TRIALS)

    def run(job: Job, judge: Any, progress: Any, tick: Any) -> bool:
        for step in job.rungs:  # the better the later, so that all run to their ends
            progress({"step": step, "steps": job.rungs[-1]})
            better = int(job.folder.name)
            if not judge(Measured(step, 3 - 0.01 * better, 1e6 - better, 0.9, 0.2)):
                return True
        return True

    return timed(lambda: worker.start(tuning, folder, run=run)) / TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    by_hand_s, in_study_s = start_s(3)
    say(f"a process begins in {in_study_s:.2f} s, by hand in {by_hand_s:.2f} s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own: dict[str, Any] = {"tune.repeats": 0, "tokenizer.path": str(resolve_model(DEMO))}
        recipe = folder / "study.toml"
        recipe.write_text(written(read_recipe(args.recipe)[1], own), "utf-8")
        each_s = study_s(recipe, folder / "run")
        say(f"the study takes {each_s:.3f} s a trial")
        tuning, loaded = load_tuning(recipe), backends.load(None)
        cadence, stage = tuning.recipe.cadence, STAGES[tuning.recipe.stage.SECTION]
        task = stage.prepare(
            tuning.recipe, loaded, folder, device=None,
            on_event=lambda event: say(str(event.get("message", ""))),
        )  # fmt: skip
        step = loaded.train_step(task.model, tuning.recipe.optimizer)
        terms = step.evaluate(task.valid[:1], task.objective)
        valid = {f"valid_{key}": value for key, value in terms.items()}
        updates, rungs = list[float](), list[float]()
        for number in range(args.rounds + 1):
            batches = task.batches.at(number)
            rate = tuning.recipe.optimizer.learning_rate
            updates.append(timed(lambda: step.step(batches, task.objective, rate, number)))  # noqa: B023
            rungs.append(
                timed(lambda: measure(task, loaded, TuneSettings(), number, valid))  # noqa: B023
            )
            say(f"an update {updates[-1]:.2f} s, a rung {rungs[-1]:.2f} s")
        held = rungs_of(cadence.steps, tuning.settings)
        more = max(0, -(-cadence.steps // held[0]) - -(-cadence.steps // cadence.eval_every))
        evaluation = timed(lambda: step.evaluate(task.valid, task.objective)) if more else 0.0
    update, rung = statistics.median(updates[1:]), statistics.median(rungs[1:])
    fixed = each_s + max(0.0, in_study_s - by_hand_s)
    added = fixed + len(held) * rung + more * evaluation
    found = {
        "update_s": update,
        "rung_s": rung,
        "rung_updates": rung / update,
        "rungs": held,
        "study_s": each_s,
        "start_s": {"by_hand": by_hand_s, "in_study": in_study_s},
        "more_evaluations": more,
        "evaluation_s": evaluation,
        "added_s": added,
        "trial_s": cadence.steps * update,
        "overhead": added / (cadence.steps * update),
        "updates_for_2_percent": round((fixed + len(held) * rung) / 0.02 / update),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
