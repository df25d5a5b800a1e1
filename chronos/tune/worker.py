"""A worker of a study: asks for trials, runs and judges them, and tells what came of them.

Any number of workers share a study, on one machine or several; each has one trial at a time. What
one leaves undone, killed or asked to stop, another takes up from the trial's last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.errors import ConfigError
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.recipe import Recipe
from chronos.train.data import read_split
from chronos.train.loop import signals
from chronos.train.start import start_config
from chronos.tune.events import Log, event_log
from chronos.tune.measured import Measured, before
from chronos.tune.pareto import goes_on
from chronos.tune.report import best, spread
from chronos.tune.settings import Tuning, rungs_of
from chronos.tune.space import Values, changed, changes
from chronos.tune.study import (
    ALIVE_S,
    EARLY,
    FAILED,
    INFEASIBLE,
    INTERRUPTED,
    RUNNING,
    WHOLE,
    Asked,
    Study,
)
from chronos.tune.trial import Job, Run, TrialError, run_apart
from chronos.tune.written import written

RECIPE = "recipe.toml"
_STOP_S = 2.0  # between two looks at whether the study is to stop
_IN_A_ROW = 5  # failures before a worker gives up
Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Done:
    """What a worker came to. signal: the one that ended it, 0 for none; stopped: it was asked to;
    trials: those it told of."""

    signal: int
    stopped: bool
    trials: int


def start(
    tuning: Tuning,
    folder: str | Path,
    *,
    study: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    run: Run = run_apart,
    on_event: Show = lambda event: None,
) -> Done:
    """Work on the study of a folder until it has all its trials, as `chronos tune start` does.

    study: an URL of a database that holds it, in place of the folder's journal. The same call goes
    on with a study that is there, in another process beside the first. Raises ConfigError,
    DataError, UsageError, MissingBackendError, TrialError where the recipe itself cannot be run.
    """
    out = Path(folder)
    make_folder(out)
    tuning = _prepared(tuning, out, on_event)
    opened = Study.open(tuning, out, study)
    log = event_log(out, f"{socket.gethostname()}:{os.getpid()}", on_event)
    with signals() as stop:
        return _Worker(tuning, out, opened, log, (backend, device), run, stop).work()


def stop(study: Study) -> int:
    """Ask a study's workers to save and leave; returns when they have, with how many trials wait to
    go on. Workers that were killed are not waited for."""
    study.ask_to_stop(True)
    while any(trial.state == RUNNING for trial in study.trials()):
        study.recover()
        time.sleep(_STOP_S / 4)
    return study.waiting()


def _prepared(tuning: Tuning, out: Path, on_event: Show) -> Tuning:
    """With the study's tokenizer, which all trials share: trained once; or with the geometry of the
    model that they go on with. The recipe is put into the study's folder."""
    atomic_write(out / RECIPE, [tuning.text.encode()])
    recipe, text = tuning.recipe, tuning.text
    if recipe.stage.STARTS:
        _, config = start_config(recipe)
        model = dataclasses.replace(config, loss_weights=recipe.model.loss_weights)
        recipe = dataclasses.replace(recipe, model=model)
    else:
        path = recipe.tokenizer.path or str(_tokenizer(recipe, out, on_event))
        text = written(text, {"tokenizer.path": path})
        known = dataclasses.replace(recipe.tokenizer, path=path)
        size = Tokenizer.load(path).vocab_size
        model = dataclasses.replace(recipe.model, vocab_size=size)
        recipe = dataclasses.replace(recipe, tokenizer=known, model=model)
    return dataclasses.replace(tuning, recipe=recipe, text=text)


def _tokenizer(recipe: Recipe[Any], out: Path, on_event: Show) -> Path:
    path = (out / "tokenizer").resolve()
    if not (path / "tokenizer.json").exists():
        training, _, _ = read_split(recipe, on_event)
        on_event({"message": f"training a tokenizer of {recipe.tokenizer.vocab_size} tokens"})
        texts = (document.text for document in training)
        Tokenizer.train(texts, recipe.tokenizer.vocab_size).save(path)
    return path


class _Worker:
    """One process' share of a study."""

    def __init__(
        self,
        tuning: Tuning,
        out: Path,
        study: Study,
        log: Log,
        place: tuple[str | None, str | None],
        run: Run,
        stop: list[int],
    ) -> None:
        """place: backend and device. stop: filled with a signal that asks for the end."""
        self._tuning, self._out, self._study, self._log = tuning, out, study, log
        self._place, self._run, self._stop = place, run, stop
        self._looked, self._asked = 0.0, False

    def work(self) -> Done:
        study, settings = self._study, self._tuning.settings
        study.ask_to_stop(False)
        self._log(
            "start", objectives=list(study.objectives), trials=settings.trials,
            operations=self._tuning.compute, budget=settings.budget,
            parameters=[parameter.name for parameter in self._tuning.space],
        )  # fmt: skip
        told = failures = 0
        while not self._leaving(now=True):
            for number in study.recover():
                self._log("trial", trial=number, state=INTERRUPTED, why="its worker was killed")
            if not study.waiting() and study.count() >= settings.trials and not self._repeats():
                break
            asked = study.ask(self._tuning)
            if self._surplus(asked):
                asked.surplus()
                continue
            state = self._trial(asked)
            told += state != INTERRUPTED
            failures = failures + 1 if state == FAILED else 0
            if failures >= _IN_A_ROW:
                raise TrialError(
                    f"{failures} trials in a row failed", str(self._out), "see its events.jsonl"
                )
        signal_seen = self._stop[0] if self._stop else 0
        self._log("end", trials=told, stopped=self._asked, signal=signal_seen)
        return Done(signal_seen, self._asked, told)

    def _leaving(self, *, now: bool = False) -> bool:
        """Whether to stop: looked up in the study now and then."""
        if now or time.monotonic() - self._looked > _STOP_S:
            self._looked, self._asked = time.monotonic(), self._study.stopping
        return bool(self._stop) or self._asked

    def _surplus(self, asked: Asked) -> bool:
        """Whether other workers asked for enough trials at the same moment."""
        if asked.origin != asked.number:
            return False
        earlier = [
            trial for trial in self._study.trials()
            if trial.number < asked.number and trial.state != INTERRUPTED
        ]  # fmt: skip
        if asked.repeat is not None:
            return any((t.repeat, t.seed) == (asked.repeat, asked.seed) for t in earlier)
        if asked.own and any(trial.own for trial in earlier):
            return True
        return sum(trial.repeat is None for trial in earlier) >= self._tuning.settings.trials

    def _repeats(self) -> bool:
        """Queue the best trials again with other seeds, once. Returns whether there are some."""
        settings, trials = self._tuning.settings, self._study.trials()
        if settings.repeats == 0 or any(trial.repeat is not None for trial in trials):
            return False
        if any(trial.state == RUNNING for trial in trials):
            return False  # whoever ends last queues them
        winners = spread(best(trials), settings.winners)
        own = [t for t in trials if t.own and t.state == WHOLE and t not in winners]
        for trial in [*winners, *own]:  # the recipe too: what it is compared with varies as well
            for number in range(settings.repeats):
                seed = self._tuning.recipe.optimizer.seed + 1 + number
                self._study.repeat(trial.number, trial.params, seed)
        return bool(winners)

    def _trial(self, asked: Asked) -> str:
        """Run a trial. Returns the state it is told with."""
        begun = time.monotonic()
        self._log("trial", trial=asked.number, state=RUNNING, params=asked.values,
                  origin=asked.origin, repeat=asked.repeat, seed=asked.seed)  # fmt: skip
        state, why, constraints = self._outcome(asked)
        found = asked.rungs[-1]["values"] if asked.rungs else []
        self._log(
            "trial", trial=asked.number, state=state, why=why, constraints=constraints,
            values=dict(zip(self._study.objectives, found, strict=False)),
            measured=asked.measured, seconds=time.monotonic() - begun,
        )  # fmt: skip
        return state

    def _outcome(self, asked: Asked) -> tuple[str, str, dict[str, float]]:
        """(state, why, constraints), told to the study."""
        folder = self._out / f"trials/{asked.origin:04d}"
        lacking = {"compute": 1.0}
        try:
            wanted = changes(self._tuning.recipe, asked.values)
            recipe = changed(self._tuning.recipe, wanted)
            asked.keep_changes(wanted)
        except ConfigError as error:
            lacking["geometry"] = 1.0
            asked.early(lacking, error.what)
            return INFEASIBLE, error.what, lacking
        known = before(recipe, self._tuning.recipe, self._tuning.settings)
        if too_much := [name for name, value in known.items() if value > 0]:
            asked.early(known | lacking, f"{too_much[0]}: more than the study allows")
            return INFEASIBLE, f"{too_much[0]}: more than the study allows", known | lacking
        steps = recipe.cadence.steps
        rungs = rungs_of(steps, self._tuning.settings)
        self._write(folder, wanted, rungs, asked)
        watch = _Judge(self, asked, rungs, known)
        job = Job(
            folder, recipe.stage.SECTION, rungs, self._tuning.settings,
            asked.rungs[-1]["step"] if asked.rungs else 0, *self._place,
        )  # fmt: skip
        try:
            whole = self._run(job, watch.judge, watch.progress, watch.tick)
        except TrialError as error:
            if asked.own and not error.diverged:
                asked.interrupted()  # to be tried again when what is wrong has been mended
                raise
            if error.diverged:
                constraints = known | lacking | {"diverged": 1.0}
                asked.early(constraints, error.what)
                self._tidy(folder)
                return INFEASIBLE, error.what, constraints
            asked.failed(error.what)
            return FAILED, error.what, {}
        if not whole:
            asked.interrupted()
            return INTERRUPTED, "asked to stop", {}
        self._tidy(folder)
        constraints = known | watch.constraints
        if watch.ended:
            constraints["compute"] = 1 - asked.rungs[-1]["step"] / steps
            asked.early(constraints, watch.ended)
            violated = any(v > 0 for k, v in constraints.items() if k != "compute")
            return INFEASIBLE if violated else EARLY, watch.ended, constraints
        values = asked.rungs[-1]["values"]
        asked.whole(values, constraints)
        return INFEASIBLE if any(v > 0 for v in constraints.values()) else WHOLE, "", constraints

    def _write(self, folder: Path, wanted: Values, rungs: tuple[int, ...], asked: Asked) -> None:
        """The trial's own recipe, which `chronos train` runs by hand too."""
        make_folder(folder)
        own = {
            "cadence.steps": rungs[-1],
            "cadence.eval_every": rungs[0],
            "cadence.save_every": rungs[0],
            "cadence.keep_checkpoints": 1,
        }
        if asked.seed is not None:
            own["optimizer.seed"] = asked.seed
        text = written(self._tuning.text, wanted | own)
        atomic_write(folder / RECIPE, [text.encode()])

    def _tidy(self, folder: Path) -> None:
        """What a trial that is over leaves: its log, and its model if it came to the end."""
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


class _Judge:
    """What becomes of a trial while it runs."""

    def __init__(
        self, worker: _Worker, asked: Asked, rungs: tuple[int, ...], known: Mapping[str, float]
    ) -> None:
        self._worker, self._asked, self._rungs, self._known = worker, asked, rungs, known
        self._told = time.monotonic()
        self.constraints: dict[str, float] = {}
        self.ended = ""  # why it ended at a rung
        if asked.measured:
            self._constrain(asked.measured)

    def _constrain(self, measured: Mapping[str, float]) -> dict[str, float]:
        found = Measured(**measured)  # type: ignore[arg-type]
        self.constraints = found.constraints(self._worker._tuning.settings)
        return self.constraints

    def judge(self, found: Measured) -> bool:
        worker, asked = self._worker, self._asked
        objectives = worker._study.objectives
        values = [getattr(found, name) for name in objectives]
        violated = [name for name, value in self._constrain(vars(found)).items() if value > 0]
        asked.judged(found.step, values, vars(found), not violated)
        last = found.step == self._rungs[-1]
        number = len(asked.rungs) - 1
        # The recipe itself and repeats are there to be compared with: they run to the end.
        always = last or asked.own or asked.repeat is not None
        on = always or (not violated and self._among_the_best(number, values, found.step))
        if not on:
            self.ended = (
                f"{violated[0]} at rung {number}" if violated else f"behind at rung {number}"
            )
        worker._log(
            "rung", trial=asked.number, rung=number, step=found.step, steps=self._rungs[-1],
            values=dict(zip(objectives, values, strict=True)), measured=vars(found),
            constraints=self.constraints, goes_on=None if last else on,
        )  # fmt: skip
        return on

    def _among_the_best(self, number: int, values: list[float], step: int) -> bool:
        worker = self._worker
        settings = worker._tuning.settings
        if settings.pruner != "halving":
            return not self._asked.prune(step, values[0])
        others = [
            trial.rungs[number].values
            for trial in worker._study.trials()
            if trial.number != self._asked.number
            and trial.state != INTERRUPTED
            and trial.repeat is None
            and len(trial.rungs) > number
            and trial.rungs[number].feasible
        ]
        return goes_on(values, others, settings.eta)

    def progress(self, line: dict[str, Any]) -> None:
        self._worker._log("progress", trial=self._asked.number, **line)

    def tick(self) -> bool:
        if time.monotonic() - self._told > ALIVE_S:
            self._told = time.monotonic()
            self._asked.alive()
        return not self._worker._leaving()
