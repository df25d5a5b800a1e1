"""The training loop: cadence, logging, checkpoints, resume and interruption. Knows no framework.

A stage gives it a `Task`: a model, batches, an objective; of these it knows the protocols only.
A run folder holds tokenizer.json, metrics.jsonl, checkpoints/step-*.safetensors (weights and
optimizer in one atomic file) and, at the end, model/ (an unpacked model folder) or adapter/ (in
peft's format). One process writes a run folder at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronos import backends
from chronos.backends.protocol import Adapter, Backend, Processes, TrainStep
from chronos.common.data import Batch
from chronos.common.disk.atomic import RunLock, atomic_write, sweep_orphans
from chronos.common.disk.header import read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ChronosError, ConfigError, CorruptFileError, UsageError
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.lora import write_adapter
from chronos.common.training.objectives import Batches, Objective
from chronos.common.training.recipe import (
    CadenceRecipe,
    OptimizerRecipe,
    Recipe,
    S,
    by_section,
    load_recipe,
)
from chronos.common.training.schedule import learning_rate
from chronos.common.tuning import threads_for
from chronos.train import reporting

Event = dict[str, Any]
# What may differ between a run and its continuation: cadence, threads (sums may round otherwise),
# what is computed twice, the number of steps - to go on for longer is a common reason to resume;
# the rate then follows the longer schedule - and how the data is reached: the batches' fingerprint
# knows the data itself.
_FREE = (
    "cadence.", "optimizer.threads:", "optimizer.gradient_checkpointing:", "data.path:",
    "tokenizer.path:", "start:",
)  # fmt: skip


class DivergedError(ChronosError):
    """Too many updates in a row were not finite."""


@dataclass
class Report:
    """What a run came to. `signal` is the signal that stopped it early, or 0; `rank` is not 0 in
    processes that share the first one's updates and write nothing."""

    step: int
    signal: int = 0
    rank: int = 0
    skipped: int = 0
    last: Event = field(default_factory=dict)
    model: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Task:
    """What a stage gives the loop.

    recipe: as the run is known by. valid: batches to evaluate on, none for no evaluation. start: a
    digest of the model it goes on with. period: updates that belong together, so that a run is
    saved, and ends, after all of them alone. logs: files of lines with a `step`, which a run that
    goes on cuts back to where it is. alone: why several processes cannot share its updates, or
    nothing. frozen: bytes of the parts that stay as they are. adapt: gives what is trained beside
    the model in its place, once the batches are there. close: called when the run is over, whatever
    ended it.
    """

    recipe: Recipe[Any]
    model: Any
    tokenizer: Tokenizer
    batches: Batches
    objective: Objective
    valid: Sequence[Batch] = ()
    start: str = ""
    period: int = 1
    logs: tuple[Path, ...] = ()
    alone: str = ""
    frozen: Mapping[str, int] = field(default_factory=dict)
    adapt: Callable[[Batches], Adapter] | None = None
    close: Callable[[], None] = lambda: None


def start(
    stage: type[S],
    prepare: Callable[..., Task],
    recipe: Recipe[S] | str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    backend: str | None = None,
    device: str | None = None,
    resume: bool = False,
    force: bool = False,
    report_to: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Run a stage in the run folder `out`, as `chronos train STAGE` does.

    recipe: one that was loaded, the path of its TOML file, or the name of one that ships. model:
    what to go on with, instead of the recipe's. resume: go on from the newest checkpoint; force:
    although recipe or data have changed. report_to: `tensorboard`, `trackio` or `wandb`, which get
    the log's numbers too. on_event gets messages and terms as they come. Raises ConfigError,
    DataError, UsageError if the folder holds a run, MissingBackendError, DivergedError.
    """
    if report_to is not None:
        reporting.check(report_to)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, stage)
    if model is not None:
        recipe = dataclasses.replace(recipe, start=str(model))
    loaded, folder = backends.load(backend), Path(out)
    loaded.check_recipe(recipe.optimizer)
    if loaded.processes().rank:
        on_event = _silent
    return run(
        lambda: prepare(recipe, loaded, folder, device=device, on_event=on_event),
        loaded,
        folder,
        resume=resume,
        force=force,
        report_to=report_to,
        on_event=on_event,
    )


def _silent(event: Event) -> None:
    """What processes beside the first one say."""


def run(
    prepare: Callable[[], Task],
    backend: Backend,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report_to: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Train to the recipe's last step. Returns early, saved, on SIGINT or SIGTERM.

    prepare: gives the task, once the folder is this process' own. force: resume although recipe or
    data have changed. Raises UsageError if the folder holds a run and `resume` is false,
    ConfigError if the recipe differs from that run's, DivergedError after `max_skipped` updates in
    a row that were not finite (the last good checkpoint stays).
    """
    processes = backend.processes()
    with nullcontext() if processes.rank else RunLock(out):
        if not processes.rank:
            sweep_orphans(out / "checkpoints")
        saved = checkpoints(out)
        if saved and not resume:
            raise UsageError(
                f"the folder holds a run at step {saved[-1][0]}",
                str(out),
                "continue it with --resume, or name another folder with --out",
            )
        if resume and not saved:
            on_event({"message": f"no checkpoint in {out}: starting at step 0"})
        task = prepare()
        try:
            if task.alone and processes.count > 1:
                raise UsageError(task.alone, "", "start one process")
            with signals() as stop:
                begun = _Run(backend, processes, task, out, on_event)
                return begun.start(stop, resume=bool(saved), force=force, report_to=report_to)
        finally:
            task.close()


def set_threads(backend: Backend, recipe: Recipe[Any], on_event: Callable[[Event], None]) -> None:
    """Let products take as many threads as the recipe says, where it does."""
    threads = threads_for(recipe.optimizer.threads or None)
    if threads is not None and backend.set_threads(threads) is None:
        text = f"threads = {threads} has no effect: {backend.name} takes its own number"
        on_event({"warning": text})


class _Run:
    """One task in one run folder."""

    def __init__(
        self,
        backend: Backend,
        processes: Processes,
        task: Task,
        out: Path,
        on_event: Callable[[Event], None],
    ) -> None:
        self.backend, self.task, self.out, self.on_event = backend, task, out, on_event
        self.processes, self.writes = processes, processes.rank == 0
        self.cadence: CadenceRecipe = task.recipe.cadence
        self._data_digest = task.batches.fingerprint
        self._adapter: Adapter | None = None
        self._since, self._tokens = (0.0, 0), 0  # of the last line of the log, and what came since
        self._seen = 0  # tokens of the run's batches, padding left out; those used again once
        self._reporter: reporting.Reporter | None = None

    def start(self, stop: list[int], *, resume: bool, force: bool, report_to: str | None) -> Report:
        """stop: filled with a signal that asks for the end."""
        task = self.task
        set_threads(self.backend, task.recipe, self.on_event)
        if self.writes:
            task.tokenizer.save(self.out)
        self._adapter = None if task.adapt is None else task.adapt(task.batches)
        adapters = [] if self._adapter is None else [self._adapter]
        step = self.backend.train_step(task.model, task.recipe.optimizer, *adapters)
        first = self._resume(step, force) if resume else self._trim_metrics(0)
        if report_to is not None and self.writes:
            known = task.recipe.to_json()
            self._reporter = reporting.open_reporter(report_to, self.out, known, first)
        try:
            report = self._loop(step, first, stop)
        finally:
            if self._reporter is not None:
                self._reporter.close()
        if report.signal or not self.writes:
            return report
        if self._adapter is None:
            report.model = self._export()
        else:
            report.adapter = self._export_adapter(self._adapter)
        return report

    def _export_adapter(self, adapter: Adapter) -> Path:
        """Write the adapter as it is, in peft's format."""
        folder, recipe = self.out / "adapter", self.task.recipe
        assert recipe.lora is not None
        write_adapter(
            folder,
            recipe.lora,
            adapter.tensors(),
            base=recipe.start,
            fingerprint=self.task.start,
        )
        self.task.tokenizer.save(folder)
        return folder

    def _export(self) -> Path:
        """Write the model folder of the weights as they are."""
        folder = self.out / "model"
        self.backend.save(self.task.model, folder)
        self.task.tokenizer.save(folder)
        return folder

    def _loop(self, step: TrainStep, first: int, stop: list[int]) -> Report:
        cadence, optimizer, task = self.cadence, self.task.recipe.optimizer, self.task
        report, in_a_row, due = Report(first, rank=self.processes.rank), 0, False
        self._since, self._tokens = (time.perf_counter(), first), 0
        for number in range(first, cadence.steps):
            rate = learning_rate(
                number,
                peak=optimizer.learning_rate,
                floor=optimizer.min_learning_rate,
                warmup=optimizer.warmup_steps,
                total=cadence.steps,
            )
            batches = self._batches(step, number, first)
            self._tokens += sum(batch.ids_BT.size for batch in batches)
            if number % task.period == 0:
                self._seen += sum(int((batch.segments_BT >= 0).sum()) for batch in batches)
            terms = step.step(batches, task.objective, rate, number) | dict(task.batches.notes())
            report.step = number + 1
            skipped = int(terms["skipped"])
            report.skipped += skipped
            in_a_row = in_a_row + 1 if skipped else 0
            whole = report.step % task.period == 0
            # Once per step: a signal after this line is the next step's.
            asked = self.processes.any(bool(stop)) and whole
            last = report.step == cadence.steps or asked
            if report.step % cadence.log_every == 0 or skipped or last or number == 0:
                self._log(report, terms, rate)
            if in_a_row >= cadence.max_skipped:
                raise DivergedError(
                    f"{in_a_row} updates in a row were not finite, up to step {report.step}",
                    str(self.out),
                    "lower optimizer.learning_rate and resume: the last good checkpoint is kept",
                )
            if task.valid and not asked and (report.step % cadence.eval_every == 0 or last):
                self._evaluate(step, report)
            due = (due or report.step % cadence.save_every == 0) and not skipped
            if (due and whole) or last:
                self._save(step, report.step)
                due = False
            if asked:
                report.signal = stop[0] if stop else signal.SIGTERM  # another process was asked
                break
        return report

    def _batches(self, step: TrainStep, number: int, first: int) -> list[Batch]:
        """An update's batches. What goes wrong in making them costs no update that is done."""
        try:
            return self.task.batches.at(number)
        except ChronosError:
            if number > first and number % self.task.period == 0:
                self._save(step, number)
            raise

    def _evaluate(self, step: TrainStep, report: Report) -> None:
        terms = step.evaluate(self.task.valid, self.task.objective)
        self._emit(report, {"step": report.step} | {f"valid_{k}": v for k, v in terms.items()})

    def _log(self, report: Report, terms: Event, rate: float) -> None:
        now, steps = time.perf_counter(), self.cadence.steps
        seconds = now - self._since[0]
        event = {"step": report.step, "steps": steps, "learning_rate": rate} | terms
        event["num_tokens"] = self._seen
        event["tokens_per_s"] = self._tokens / seconds
        done = max(1, report.step - self._since[1])
        event["eta_s"] = (steps - report.step) * seconds / done
        event["skipped_total"] = report.skipped
        self._emit(report, event)
        self._since, self._tokens = (now, report.step), 0

    def _emit(self, report: Report, event: Event) -> None:
        report.last |= event
        if not self.writes:
            return
        # JSON has no NaN; a skipped update's values are written as null.
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in event.items()
        }
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self._reporter is not None:
            self._reporter.log(finite)
        self.on_event(event)

    def _save(self, step: TrainStep, number: int) -> None:
        if not self.writes:
            return
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        metadata = {
            "step": str(number),
            "recipe": json.dumps(self.task.recipe.to_json()),
            "data": self._data_digest,
            "start": self.task.start,
            "num_tokens": str(self._seen),
        }
        write_tensors(folder / f"step-{number:08d}.safetensors", step.state(), metadata)
        for _, old in checkpoints(self.out)[: -self.cadence.keep_checkpoints]:
            old.unlink()

    def _resume(self, step: TrainStep, force: bool) -> int:
        """Load the newest checkpoint that reads clean; one that does not is passed over, named."""
        for number, path in reversed(checkpoints(self.out)):
            try:
                metadata = read_header(path).metadata
                recipe = json.loads(metadata.get("recipe", "{}"))
                _same_recipe(recipe, self.task.recipe, path, force)
                self._same_data(metadata.get("data", ""), path, force)
                self._same_start(metadata.get("start", ""), path, force)
                step.load_state(read_tensors(path))
                self._seen = int(metadata.get("num_tokens", 0))
            except CorruptFileError as error:
                self.on_event({"warning": f"{path.name} is passed over: {error.what}"})
                continue
            return self._trim_metrics(number)
        raise CorruptFileError("no checkpoint of this run can be read", str(self.out))

    def _same_data(self, digest: str, path: Path, force: bool) -> None:
        if digest and digest != self._data_digest and not force:
            raise ConfigError(
                "the training data is not the run's: its text, order or tokenizer has changed",
                str(path),
                "restore the data, name another --out, or pass --force",
            )

    def _same_start(self, digest: str, path: Path, force: bool) -> None:
        if digest != self.task.start and not force:
            raise ConfigError(
                "the model to go on with is not the run's: its weights are others",
                str(path),
                "name the model the run began with, another --out, or pass --force",
            )

    def _trim_metrics(self, number: int) -> int:
        """Drop lines of steps that will be run again, and a torn last line; returns `number`."""
        if not self.writes:
            return number
        _trim(self.out / "metrics.jsonl", number)
        for path in self.task.logs:  # a step there is the number of updates before it
            _trim(path, number - 1)
        return number


def _trim(path: Path, last: int) -> None:
    """Keep the lines of a log up to step `last`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    atomic_write(path, [line.encode() for line in kept])


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a run folder, oldest first."""
    found = []
    for path in (out / "checkpoints").glob("step-*.safetensors"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal():
            found.append((int(digits), path))
    return sorted(found)


def _same_recipe(old: dict[str, Any], recipe: Recipe[Any], path: Path, force: bool) -> None:
    old, new = by_section(old, type(recipe.stage)), json.loads(json.dumps(recipe.to_json()))
    # A run of before a key was there had its default.
    old["optimizer"] = dataclasses.asdict(OptimizerRecipe()) | old.get("optimizer", {})
    changes = [c for c in _differences(old, new, "") if not c.startswith(_FREE)]
    if changes and not force:
        raise ConfigError(
            "the recipe differs from the run's: " + "; ".join(changes),
            str(path),
            "restore the recipe, name another --out, or pass --force",
        )


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name}: {old!r} -> {new!r}"


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; a second one ends the process at once."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield seen
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
