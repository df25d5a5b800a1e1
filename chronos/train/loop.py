"""The training loop: cadence, logging, checkpoints, resume and interruption. Knows no framework.

It is given a backend; NumPy batches go in, plain floats come out. A run folder holds
tokenizer.json, metrics.jsonl, checkpoints/step-*.safetensors (weights and optimizer in one atomic
file) and, at the end, model/ (an unpacked model folder). One process writes a run folder at a time.
Not covered: the alignment stages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronos.backends.protocol import Backend, TrainStep
from chronos.common.data import (
    Batch,
    Document,
    PackedDataset,
    ReadReport,
    encode_documents,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.disk.atomic import RunLock, atomic_write, sweep_orphans
from chronos.common.disk.header import read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ChronosError, ConfigError, CorruptFileError, UsageError
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.recipe import Recipe
from chronos.common.training.schedule import learning_rate

Event = dict[str, Any]
# What may differ between a run and its continuation: cadence, threads (sums may round otherwise)
# and the number of steps - to go on for longer is a common reason to resume; the rate then follows
# the longer schedule.
_FREE = {
    "steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep_checkpoints",
    "threads",
}


class DivergedError(ChronosError):
    """Too many updates in a row were not finite."""


@dataclass
class Report:
    """What a run came to. `signal` is the signal that stopped it early, or 0."""

    step: int
    signal: int = 0
    skipped: int = 0
    last: Event = field(default_factory=dict)
    model: Path | None = None


class Trainer:
    """Pretraining of one model in one run folder."""

    def __init__(
        self,
        backend: Backend,
        recipe: Recipe,
        out: Path,
        train: PackedDataset,
        valid: PackedDataset | None,
        tokenizer: Tokenizer,
        on_event: Callable[[Event], None] = lambda event: None,
        *,
        device: str | None = None,
    ) -> None:
        self.device = device
        self.backend, self.recipe, self.out = backend, recipe, out
        self.train, self.valid, self.tokenizer = train, valid, tokenizer
        self.on_event = on_event
        self._data_digest = ""

    def run(self, *, resume: bool = False, force: bool = False) -> Report:
        """Train to the recipe's last step. Returns early, saved, on SIGINT or SIGTERM.

        Raises UsageError if the folder holds a run and `resume` is false, ConfigError if the
        recipe differs from that run's, DivergedError after `max_skipped` updates in a row that
        were not finite (the last good checkpoint stays).
        """
        with RunLock(self.out), _signals() as stop:
            sweep_orphans(self.out / "checkpoints")
            saved = checkpoints(self.out)
            if saved and not resume:
                raise UsageError(
                    f"the folder holds a run at step {saved[-1][0]}",
                    str(self.out),
                    "continue it with --resume, or name another folder with --out",
                )
            if resume and not saved:
                self.on_event({"message": f"no checkpoint in {self.out}: starting at step 0"})
            self._data_digest = self.train.fingerprint()
            self.tokenizer.save(self.out)
            seed = self.recipe.train.seed
            model = self.backend.build(self.recipe.model, seed=seed, device=self.device)
            step = self.backend.train_step(model, self.recipe.train)
            first = self._resume(step, force) if saved else self._trim_metrics(0)
            report = self._loop(step, first, stop)
            if not report.signal:
                report.model = self.export(model)
        return report

    def export(self, model: Any) -> Path:
        """Write the model folder of the weights as they are."""
        folder = self.out / "model"
        self.backend.save(model, folder)
        self.tokenizer.save(folder)
        return folder

    def _loop(self, step: TrainStep, first: int, stop: list[int]) -> Report:
        r = self.recipe.train
        report, in_a_row, since = Report(first), 0, (time.perf_counter(), first)
        for number in range(first, r.steps):
            rate = learning_rate(
                number,
                peak=r.learning_rate,
                floor=r.min_learning_rate,
                warmup=r.warmup_steps,
                total=r.steps,
            )
            terms = step.step(self._micro_batches(number), rate, number)
            report.step = number + 1
            skipped = int(terms["skipped"])
            report.skipped += skipped
            in_a_row = in_a_row + 1 if skipped else 0
            asked = bool(stop)  # once per step: a signal after this line is the next step's
            last = report.step == r.steps or asked
            if report.step % r.log_every == 0 or skipped or last:
                since = self._log(report, terms, rate, since)
            if in_a_row >= r.max_skipped:
                raise DivergedError(
                    f"{in_a_row} updates in a row were not finite, up to step {report.step}",
                    str(self.out),
                    "lower train.learning_rate and resume: the last good checkpoint is kept",
                )
            if self.valid and not asked and (report.step % r.eval_every == 0 or last):
                self._evaluate(step, report)
            if (report.step % r.save_every == 0 and not skipped) or last:
                self._save(step, report.step)
            if asked:
                report.signal = stop[0]
                break
        return report

    def _micro_batches(self, number: int) -> list[Batch]:
        r = self.recipe.train
        return [
            self.train.batch(number * r.accumulate + i, r.batch_size) for i in range(r.accumulate)
        ]

    def _evaluate(self, step: TrainStep, report: Report) -> None:
        assert self.valid is not None
        r = self.recipe.train
        count = min(r.eval_batches, max(1, len(self.valid) // r.batch_size))
        terms = step.evaluate([self.valid.batch(i, r.batch_size) for i in range(count)])
        self._emit(report, {"step": report.step} | {f"valid_{k}": v for k, v in terms.items()})

    def _log(
        self, report: Report, terms: Event, rate: float, since: tuple[float, int]
    ) -> tuple[float, int]:
        r, now = self.recipe.train, time.perf_counter()
        seconds = (now - since[0]) / max(1, report.step - since[1])
        event = {"step": report.step, "steps": r.steps, "learning_rate": rate} | terms
        event["tokens_per_s"] = r.batch_size * r.seq_len * r.accumulate / seconds
        event["eta_s"] = (r.steps - report.step) * seconds
        event["skipped_total"] = report.skipped
        self._emit(report, event)
        return now, report.step

    def _emit(self, report: Report, event: Event) -> None:
        report.last |= event
        # JSON has no NaN; a skipped update's values are written as null.
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in event.items()
        }
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        self.on_event(event)

    def _save(self, step: TrainStep, number: int) -> None:
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        metadata = {
            "step": str(number),
            "recipe": json.dumps(self.recipe.to_json()),
            "data": self._data_digest,
        }
        write_tensors(folder / f"step-{number:08d}.safetensors", step.state(), metadata)
        for _, old in checkpoints(self.out)[: -self.recipe.train.keep_checkpoints]:
            old.unlink()

    def _resume(self, step: TrainStep, force: bool) -> int:
        """Load the newest checkpoint that reads clean; one that does not is passed over, named."""
        for number, path in reversed(checkpoints(self.out)):
            try:
                metadata = read_header(path).metadata
                recipe = json.loads(metadata.get("recipe", "{}"))
                _same_recipe(recipe, json.loads(json.dumps(self.recipe.to_json())), path, force)
                self._same_data(metadata.get("data", ""), path, force)
                step.load_state(read_tensors(path))
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

    def _trim_metrics(self, number: int) -> int:
        """Drop lines of steps that will be run again, and a torn last line; returns `number`."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return number
        kept = []
        for line in path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= number:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        atomic_write(path, [line.encode() for line in kept])
        return number


def prepare(
    recipe: Recipe, out: Path, on_event: Callable[[Event], None] = lambda event: None
) -> tuple[Recipe, Tokenizer, PackedDataset, PackedDataset | None]:
    """Read the recipe's data, load or train its tokenizer, and pack both splits.

    The tokenizer of a run that has a checkpoint is used again. The recipe comes back with the
    model's vocabulary size set to the tokenizer's. Raises DataError, ConfigError.
    """
    report = ReadReport()
    if recipe.data.path == "stdlib":
        documents = stdlib_documents(report)
    else:
        documents = list(read_documents(recipe.data.path, recipe.data.skip_bad, report))
    on_event({"message": str(report)})
    training, validation = split_documents(documents, recipe.data.validation_share)
    known = recipe.tokenizer.path
    if not known and checkpoints(out) and (out / "tokenizer.json").exists():
        known = str(out)  # without a checkpoint it is left over from a recipe that may have changed
    if known:
        tokenizer = Tokenizer.load(known)
    else:
        on_event({"message": f"training a tokenizer of {recipe.tokenizer.vocab_size} tokens"})
        tokenizer = Tokenizer.train((d.text for d in training), recipe.tokenizer.vocab_size)
    model = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    recipe = dataclasses.replace(recipe, model=model)
    train = _pack(tokenizer, training, recipe)
    valid = _pack(tokenizer, validation, recipe) if validation else None
    on_event(
        {"message": f"{train.tokens} tokens to train on, {valid.tokens if valid else 0} held out"}
    )
    return recipe, tokenizer, train, valid


def _pack(tokenizer: Tokenizer, documents: list[Document], recipe: Recipe) -> PackedDataset:
    encoded = encode_documents(tokenizer, documents)
    return pack_documents(
        encoded.ids,
        seq_len=recipe.train.seq_len,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        seed=recipe.train.seed,
        trained=encoded.trained,
    )


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a run folder, oldest first."""
    found = []
    for path in (out / "checkpoints").glob("step-*.safetensors"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal():
            found.append((int(digits), path))
    return sorted(found)


def _same_recipe(old: Any, new: Any, path: Path, force: bool) -> None:
    changes = [c for c in _differences(old, new, "") if c.split(":")[0].split(".")[-1] not in _FREE]
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
def _signals() -> Iterator[list[int]]:
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
