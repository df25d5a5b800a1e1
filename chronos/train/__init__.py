"""Training: `from chronos import train; train.pretrain("recipe.toml", "runs/one")`.

A file a stage, over one loop. The functions are what the command line calls; no framework is
imported before one of them runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from chronos.train.distill import DistillRecipe, distill
from chronos.train.distill import prepare as _distill
from chronos.train.dpo import DpoRecipe, dpo
from chronos.train.dpo import prepare as _dpo
from chronos.train.grpo import GrpoRecipe, grpo
from chronos.train.grpo import prepare as _grpo
from chronos.train.loop import DivergedError, Report, Task
from chronos.train.orpo import OrpoRecipe, orpo
from chronos.train.orpo import prepare as _orpo
from chronos.train.planning import Plan, plan
from chronos.train.pretrain import PretrainRecipe, pretrain
from chronos.train.pretrain import prepare as _pretrain
from chronos.train.sft import SftRecipe, sft
from chronos.train.sft import prepare as _sft


class Stage(NamedTuple):
    """Its section of a recipe, the function that runs it, and what opens it without running."""

    section: type[Any]
    run: Callable[..., Report]
    prepare: Callable[..., Task]


STAGES = {
    "pretrain": Stage(PretrainRecipe, pretrain, _pretrain),
    "sft": Stage(SftRecipe, sft, _sft),
    "dpo": Stage(DpoRecipe, dpo, _dpo),
    "orpo": Stage(OrpoRecipe, orpo, _orpo),
    "grpo": Stage(GrpoRecipe, grpo, _grpo),
    "distill": Stage(DistillRecipe, distill, _distill),
}

__all__ = [
    "STAGES",
    "DivergedError",
    "Plan",
    "Report",
    "Stage",
    "distill",
    "dpo",
    "grpo",
    "orpo",
    "plan",
    "pretrain",
    "sft",
]
