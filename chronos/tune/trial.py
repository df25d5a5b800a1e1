"""One trial, as a worker runs it: in a process of its own.

That may fail, run out of memory or be killed without ending the study, and ends with its worker.

Not covered: what is trained (the recipe in the trial's folder) and which trials go on (`worker`).
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chronos.common.errors import ChronosError
from chronos.tune.measured import Measured
from chronos.tune.settings import TuneSettings

CHILD = (sys.executable, "-m", "chronos.tune.trial_child")
_TICK_S = 1.0
_WAIT_S = 60.0  # for a run that was asked to save and leave


class TrialError(ChronosError):
    """A trial that came to no end. `diverged`: by its own doing, so the study learns of it."""

    diverged = False


@dataclass(frozen=True)
class Job:
    """What a trial's process is told. rungs: updates after which it is judged; judged: the last
    one that is behind it, where it goes on."""

    folder: Path
    stage: str
    rungs: tuple[int, ...]
    settings: TuneSettings
    judged: int = 0
    backend: str | None = None
    device: str | None = None

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"folder": str(self.folder), "settings": vars(self.settings)}


class Run(Protocol):
    """How a trial is run. Tests give another one."""

    def __call__(
        self,
        job: Job,
        judge: Callable[[Measured], bool],
        progress: Callable[[dict[str, Any]], None],
        tick: Callable[[], bool],
    ) -> bool:
        """Train to the end. judge: called at each rung; False ends the trial there. progress: lines
        of the log. tick: called every second or so; False asks the trial to save and leave.

        Returns whether it was not asked to leave. Raises TrialError.
        """


def run_apart(
    job: Job,
    judge: Callable[[Measured], bool],
    progress: Callable[[dict[str, Any]], None],
    tick: Callable[[], bool],
) -> bool:
    """The `Run` of a process of its own."""
    process = subprocess.Popen(
        CHILD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is the worker's to hand on
    )
    try:
        return _Watch(process, judge, progress, tick).follow(job)
    finally:
        process.kill()
        process.communicate()


class _Watch:
    """Reads what a trial's process says, and answers."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        judge: Callable[[Measured], bool],
        progress: Callable[[dict[str, Any]], None],
        tick: Callable[[], bool],
    ) -> None:
        self._process, self._judge, self._progress, self._tick = process, judge, progress, tick
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._asked_to_leave = 0
        threading.Thread(target=self._read, daemon=True).start()

    def follow(self, job: Job) -> bool:
        self._answer(json.dumps(job.to_json()))
        while line := self._next():
            said = json.loads(line)
            if "progress" in said:
                self._progress(said["progress"])
            elif "rung" in said:
                self._answer("go" if self._judge(Measured(**said["rung"])) else "stop")
            elif said["end"] == "error":
                raise _error(said, job)
            else:
                return not self._asked_to_leave
        if self._asked_to_leave:  # before it could listen
            return False
        raise self._died(job)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self) -> str:
        while True:
            if not self._tick():
                self._leave()
            try:
                return self._lines.get(timeout=_TICK_S)
            except queue.Empty:
                continue

    def _leave(self) -> None:
        self._asked_to_leave += 1
        if self._asked_to_leave == 1:
            self._process.terminate()
        elif self._asked_to_leave > _WAIT_S / _TICK_S:
            self._process.kill()

    def _answer(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the end of its lines says so

    def _died(self, job: Job) -> TrialError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        out_of_memory = ", as the system does where memory runs out" if code == -9 else ""
        return TrialError(f"the trial's process {how}{out_of_memory}", str(job.folder))


def _error(said: dict[str, Any], job: Job) -> TrialError:
    error = TrialError(said["what"], said.get("where") or str(job.folder), said.get("fix", ""))
    error.diverged = said["kind"] == "DivergedError"
    error.exit_code = int(said.get("exit_code", TrialError.exit_code))
    return error
