"""The recipe of a trial, for `chronos train`: the study's own with the values the trial had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk.atomic import atomic_write
from chronos.common.errors import UsageError
from chronos.common.training.recipe import parse_recipe, toml_of
from chronos.train import STAGES
from chronos.tune.report import chosen, seeds
from chronos.tune.settings import stage_of
from chronos.tune.space import value_of
from chronos.tune.study import Study
from chronos.tune.worker import RECIPE
from chronos.tune.written import written


@dataclass(frozen=True)
class Applied:
    """A recipe that was written. changes: key -> (what it was, what it is)."""

    path: Path
    trial: int
    changes: dict[str, tuple[Any, Any]]
    values: dict[str, list[float]]  # by objective, one a seed


def apply(
    folder: str | Path, out: str | Path, *, study: str | None = None, trial: int | None = None
) -> Applied:
    """Write the recipe of a trial, or of the best one, as `chronos tune apply` does.

    study: as `worker.start` takes it. Raises UsageError where there is no such trial, or a file.
    """
    source, target = Path(folder), Path(out)
    opened = Study.of(source, study)
    trials = opened.trials()
    found = chosen(trials, trial)
    if found is None:
        what = "no trial has come to its end" if trial is None else f"trial {trial} has no result"
        raise UsageError(what, str(source), "chronos tune status shows what there is")
    if target.exists():
        raise UsageError("the file is there already", str(target), "name another one")
    text = (source / RECIPE).read_text("utf-8")
    recipe = _recipe(text, source / RECIPE)
    atomic_write(target, [written(text, found.changes).encode()])
    per_seed = seeds(found, trials)
    return Applied(
        target,
        found.number,
        {name: (value_of(recipe, name), value) for name, value in found.changes.items()},
        {name: [v[at] for v in per_seed] for at, name in enumerate(opened.objectives)},
    )


def _recipe(text: str, file: Path) -> Any:
    sections = toml_of(text, file)
    return parse_recipe(sections, STAGES[stage_of(sections, file)].section, file)
