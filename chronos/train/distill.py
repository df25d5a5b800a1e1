"""Distillation: a student is brought near a teacher's predictions (1503.02531), on given rows or on
answers of its own (GKD, 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from chronos import backends
from chronos.backends.protocol import Backend
from chronos.common.data import (
    IGNORE,
    Batch,
    PackedBatches,
    Prompt,
    encode_prompts,
)
from chronos.common.data.packing import order
from chronos.common.errors import ConfigError
from chronos.common.training.objectives import Distillation
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.run.engine import RESIDENT, Engine, load
from chronos.run.models import resolve_model
from chronos.train.data import read_split
from chronos.train.loop import Event, Task, start
from chronos.train.rollouts import Sampler, rows, seed_of
from chronos.train.start import check_length, check_vocabulary, fitted, open_start


@dataclass(frozen=True)
class DistillRecipe:
    """The section [distill]: the teacher, the divergence, and whose answers it is taken on."""

    SECTION: ClassVar[str] = "distill"
    STARTS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "optimizer": {"learning_rate": 1e-4, "min_learning_rate": 1e-5, "warmup_steps": 20}
    }
    teacher: str = ""
    """A model of the same vocabulary: a folder, or `demo`."""
    teacher_budget: str = RESIDENT
    """What the teacher's experts may take of memory, such as `25%`; its folder must be packed."""
    batch_size: int = 4
    """Rows of a micro-batch."""
    seq_len: int = 512
    """Tokens of a row, and of the longest example."""
    accumulate: int = 1
    """Micro-batches of an update."""
    alpha: float = 0.5
    """Weight of the divergence; cross-entropy has the rest."""
    temperature: float = 2.0
    """Of both distributions, and of sampling."""
    divergence: str = "kl"
    """`kl`: T^2 KL(teacher || student). `jsd`: GKD's, of `beta`."""
    beta: float = 0.5
    """Of `jsd`: 0 is KL(teacher || student), 1 is KL(student || teacher)."""
    on_policy: float = 0.0
    """Share of the updates that are on answers the student samples itself."""
    max_tokens: int = 128
    """Tokens of such an answer, at most."""

    def __post_init__(self) -> None:
        at_least_one(self.SECTION, self, "batch_size", "seq_len", "accumulate", "max_tokens")
        if not self.teacher:
            raise ConfigError("distill.teacher names no model")
        if not (0 < self.alpha <= 1 and self.temperature > 0 and 0 <= self.on_policy <= 1):
            raise ConfigError(
                "distill.alpha must be in (0, 1], temperature above 0, on_policy in [0, 1]"
            )
        if self.divergence not in ("kl", "jsd"):
            raise ConfigError(f"distill.divergence must be kl or jsd, not {self.divergence!r}")
        # Divided by its own weight the mixture's divergence becomes a KL; undivided it vanishes.
        if self.beta not in (0, 1) and not 0.01 <= self.beta <= 0.99:
            raise ConfigError("distill.beta must be 0, 1, or in [0.01, 0.99]")


class Taught:
    """Batches with a teacher's logits at their labels."""

    def __init__(
        self,
        recipe: Recipe[DistillRecipe],
        given: PackedBatches,
        teacher: Teacher,
        prompts: Sequence[Prompt],
        sampler: Sampler | None,
        pad_id: int,
    ) -> None:
        self._stage, self._seed = recipe.stage, recipe.optimizer.seed
        self._given, self._teacher, self._pad_id = given, teacher, pad_id
        self._prompts, self._sampler, self._notes = prompts, sampler, dict[str, float]()

    @property
    def fingerprint(self) -> str:
        return self._given.fingerprint

    def notes(self) -> Mapping[str, float]:
        return self._notes

    def at(self, number: int) -> list[Batch]:
        draw = seed_of(self._seed, number, -1) / 2**64
        own = self._sampler is not None and draw < self._stage.on_policy
        self._notes = {"on_policy": float(own)}
        batches = self._sampled(number) if own else self._given.at(number)
        return [batch.with_extra(self._teacher.of(batch)) for batch in batches]

    def _sampled(self, number: int) -> list[Batch]:
        assert self._sampler is not None
        stage, batches = self._stage, []
        count = stage.batch_size * stage.accumulate
        visits = order(self._seed, len(self._prompts), number * count, count)
        ids = [self._prompts[i].ids for i in visits]
        answers = self._sampler(
            ids,
            [seed_of(self._seed, number, i) for i in range(count)],
            max_tokens=stage.max_tokens,
            temperature=stage.temperature,
        )
        self._notes["completions/mean_length"] = float(np.mean([len(a.ids) for a in answers]))
        for at in range(0, count, stage.batch_size):
            part = slice(at, at + stage.batch_size)
            batches.append(rows(ids[part], answers[part], self._pad_id))
        return batches


class Teacher:
    """A model that says what it would have predicted, with its experts in memory or on disk."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._backend = engine, backends.load(engine.backend)

    def of(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """`teacher`: its logits at the labels, float32 [N, V], each document by itself, so they are
        the same bits whatever share of its experts is in memory."""
        found = []
        for ids_T, labels_T, segments_T in zip(
            batch.ids_BT, batch.labels_BT, batch.segments_BT, strict=True
        ):
            for number in range(int(segments_T.max()) + 1):
                here = segments_T == number
                at = np.flatnonzero(labels_T[here] != IGNORE)
                if len(at):
                    found.append(self._logits(ids_T[here])[at])
        return {"teacher": np.concatenate(found)}

    def _logits(self, ids_T: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        model, feed, ids_1T = self._engine.session.model, self._engine.feed, ids_T[None]
        if feed is None:
            return np.asarray(self._backend.forward(model, ids_1T.astype(np.int64)).logits_BTV[0])
        with feed.step() as step:
            out = self._backend.forward(model, ids_1T.astype(np.int64), source=step)
        return np.asarray(out.logits_BTV[0])

    def close(self) -> None:
        self._engine.close()


def prepare(
    recipe: Recipe[DistillRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Open the student and the teacher, read and pack the rows. Raises DataError, ConfigError,
    UsageError, BudgetError."""
    stage = recipe.stage
    folder = resolve_model(stage.teacher)
    found = open_start(recipe, backend, device, noise=True)
    check_vocabulary(found.tokenizer, folder, "teacher")
    check_length("distill.seq_len", stage.seq_len, found.config)
    training, validation, bad = read_split(recipe, on_event)

    given = fitted(training, recipe, found, bad, packed=True)
    held = fitted(validation, recipe, found, bad, packed=True) if validation else None
    prompts, sampler = list[Prompt](), None
    if stage.on_policy:
        room = stage.seq_len - stage.max_tokens
        prompts = encode_prompts(found.tokenizer, training, room, bad)
        sampler = Sampler(backend, found, stage.batch_size)
    teacher = Teacher(
        load(folder, backend=backend.name, device=device, budget=stage.teacher_budget)
    )
    batches = Taught(
        recipe,
        PackedBatches(given, stage.batch_size, stage.accumulate),
        teacher,
        prompts,
        sampler,
        found.tokenizer.pad_id,
    )
    valid = []
    if held:
        plain = held.first(stage.batch_size, recipe.cadence.eval_batches)
        valid = [batch.with_extra(teacher.of(batch)) for batch in plain]
    objective = Distillation(
        found.weights,
        anchor=recipe.anchor.weight,
        alpha=stage.alpha,
        temperature=stage.temperature,
        jsd=stage.beta if stage.divergence == "jsd" else None,
    )
    return found.task(
        recipe,
        backend,
        batches,
        objective,
        valid,
        alone="the student's answers are sampled in one process" if stage.on_policy else "",
        close=teacher.close,
    )


distill = partial(start, DistillRecipe, prepare)
