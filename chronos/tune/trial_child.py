"""A trial's process: `python -m chronos.tune.trial_child`, which trains and measures.

The first line of its input is the job, as JSON. It writes a line for each line of the run's log and
for each rung; after a rung it waits for a line that says whether to go on. Whoever started it is
gone when its input ends: then it ends too, at once, and its run folder has the last checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from chronos import backends
from chronos.backends.protocol import Backend
from chronos.common.disk.atomic import RunLock
from chronos.common.errors import ChronosError, ResourceError
from chronos.common.training.recipe import load_recipe
from chronos.train import STAGES
from chronos.train.loop import Event, Report, Task, start
from chronos.tune.measured import measure
from chronos.tune.settings import TuneSettings

_OUT = sys.stdout
_LEAVING_S = 10.0


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    sys.stdout = sys.stderr  # what others print is no line of ours
    try:
        report = _Trial(job, answers).run()
        _say({"end": "stopped" if report.signal else "done", "step": report.step})
    except ChronosError as error:
        where = {"what": error.what, "where": error.where, "fix": error.fix}
        _say({"end": "error", "kind": type(error).__name__, "exit_code": error.exit_code} | where)
    except MemoryError:
        _say({"end": "error", "kind": "MemoryError", "what": "there was not enough memory"})


def _listen(answers: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        answers.put(line.strip())
    os._exit(1)


def _wait_for(folder: Path) -> None:
    """Until the folder is free: a worker that was killed may have a trial that ends just now."""
    for _ in range(round(_LEAVING_S / 0.1)):
        try:
            with RunLock(folder):
                return
        except ResourceError:
            time.sleep(0.1)


def _say(line: dict[str, Any]) -> None:
    _OUT.write(json.dumps(line) + "\n")
    _OUT.flush()


class _Trial:
    """One run of the training loop, held up at rungs."""

    def __init__(self, job: dict[str, Any], answers: queue.SimpleQueue[str]) -> None:
        self._job, self._answers = job, answers
        self._stage = STAGES[job["stage"]]
        self._settings = TuneSettings(**job["settings"])
        self._rungs = {rung for rung in job["rungs"] if rung > job["judged"]}
        self._loaded: Backend = backends.load(job["backend"])
        self._task: Task | None = None

    def run(self) -> Report:
        folder = Path(self._job["folder"])
        _wait_for(folder)
        return start(
            self._stage.section,
            self._prepare,
            load_recipe(folder / "recipe.toml", self._stage.section),
            folder,
            backend=self._job["backend"],
            device=self._job["device"],
            resume=True,
            on_event=self._on_event,
        )

    def _prepare(self, *args: Any, **options: Any) -> Task:
        self._task = self._stage.prepare(*args, **options)
        return self._task

    def _on_event(self, event: Event) -> None:
        if "step" not in event:
            return
        judged = event["step"] in self._rungs and "valid_ce" in event
        if not judged:
            shown = ("step", "steps", "ce", "valid_ce", "tokens_per_s")
            _say({"progress": {k: event[k] for k in shown if k in event}})
            return
        assert self._task is not None
        found = measure(self._task, self._loaded, self._settings, event["step"], event)
        _say({"rung": vars(found)})
        if self._answers.get() != "go":
            # As Ctrl-C does: the loop ends the next update, saves and leaves.
            signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
