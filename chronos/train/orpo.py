"""ORPO (2403.07691): fine-tuning and preference in one loss, without a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from chronos.backends.protocol import Backend
from chronos.common.errors import ConfigError
from chronos.common.training.objectives import OddsRatio
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.train.dpo import ALIGNED
from chronos.train.loop import Event, Task, start
from chronos.train.preference import read_pairs
from chronos.train.start import held_out, open_start


@dataclass(frozen=True)
class OrpoRecipe:
    """The section [orpo]: pairs of an update and the loss."""

    SECTION: ClassVar[str] = "orpo"
    STARTS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = ALIGNED | {
        "optimizer": {"learning_rate": 8e-6, "min_learning_rate": 8e-7, "warmup_steps": 20}
    }
    batch_size: int = 4
    """Pairs of a micro-batch."""
    max_length: int = 1024
    """Tokens of a prompt with its answer, at most."""
    accumulate: int = 1
    """Micro-batches of an update."""
    beta: float = 0.1
    """Weight of the odds ratio."""
    nll: str = "completion"
    """What the cross-entropy is of: `completion`, the chosen answer, or `all`, its prompt too."""

    def __post_init__(self) -> None:
        at_least_one(self.SECTION, self, "batch_size", "max_length", "accumulate")
        if not self.beta > 0:
            raise ConfigError("orpo.beta must be above 0")
        if self.nll not in ("completion", "all"):
            raise ConfigError(f"orpo.nll must be completion or all, not {self.nll!r}")


def prepare(
    recipe: Recipe[OrpoRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Open the start model and read the pairs. Raises DataError, ConfigError, UsageError."""
    stage, found = recipe.stage, open_start(recipe, backend, device, noise=False)
    batches, held = read_pairs(recipe, found, on_event, prompts=stage.nll == "all")
    objective = OddsRatio(found.weights, anchor=recipe.anchor.weight, beta=stage.beta)
    valid = held_out(list(held), recipe) if held else []
    return found.task(recipe, backend, batches, objective, valid)


orpo = partial(start, OrpoRecipe, prepare)
