"""Training: `from chronos import train; train.pretrain("recipe.toml", "runs/one")`.

A file a stage, over one loop. The functions are what the command line calls; no framework is
imported before one of them runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chronos.train.distill import DistillRecipe, distill
from chronos.train.dpo import DpoRecipe, dpo
from chronos.train.grpo import GrpoRecipe, grpo
from chronos.train.loop import DivergedError, Report
from chronos.train.orpo import OrpoRecipe, orpo
from chronos.train.pretrain import PretrainRecipe, pretrain
from chronos.train.sft import SftRecipe, sft

# Each stage's section of a recipe, and the function that runs it.
STAGES: dict[str, tuple[type[Any], Callable[..., Report]]] = {
    "pretrain": (PretrainRecipe, pretrain),
    "sft": (SftRecipe, sft),
    "dpo": (DpoRecipe, dpo),
    "orpo": (OrpoRecipe, orpo),
    "grpo": (GrpoRecipe, grpo),
    "distill": (DistillRecipe, distill),
}

__all__ = [
    "STAGES",
    "DivergedError",
    "Report",
    "distill",
    "dpo",
    "grpo",
    "orpo",
    "pretrain",
    "sft",
]
