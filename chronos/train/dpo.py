"""Direct preference optimisation (2305.18290): the chosen answer over the rejected one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from chronos.backends.protocol import Backend
from chronos.common.errors import ConfigError
from chronos.common.training.objectives import Preference
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.train.loop import Event, Task, start
from chronos.train.preference import read_pairs
from chronos.train.start import check_reference, held_out, open_reference, open_start, refer

_KINDS = ("sigmoid", "ipo", "robust", "sigmoid_norm")
ALIGNED: dict[str, dict[str, Any]] = {
    "optimizer": {"learning_rate": 1e-6, "min_learning_rate": 1e-7, "warmup_steps": 20},
    "loss": {"balance": 0.0, "lookahead": 0.0},
    "anchor": {"weight": 0.1},
}


@dataclass(frozen=True)
class DpoRecipe:
    """The section [dpo]: pairs of an update, the loss and its reference."""

    SECTION: ClassVar[str] = "dpo"
    STARTS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = ALIGNED
    batch_size: int = 4
    """Pairs of a micro-batch."""
    max_length: int = 1024
    """Tokens of a prompt with its answer, at most."""
    accumulate: int = 1
    """Micro-batches of an update."""
    loss: str = "sigmoid"
    """`sigmoid`, `ipo`, `robust` or `sigmoid_norm`."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be labelled the wrong way; below 0.5."""
    ld_alpha: float = 1.0
    """Weight of an answer's tokens beyond the other's length; 1: all alike."""
    sft_weight: float = 0.0
    """Of the chosen answers' cross-entropy in the loss."""
    reference: str = ""
    """A folder of another model than the one the stage begins with."""
    precompute_reference: bool = True
    """Score the pairs before the first update and let the reference go; else it stays in memory."""

    def __post_init__(self) -> None:
        at_least_one(self.SECTION, self, "batch_size", "max_length", "accumulate")
        if self.loss not in _KINDS:
            raise ConfigError(f"dpo.loss must be one of {', '.join(_KINDS)}, not {self.loss!r}")
        if not self.beta > 0:
            raise ConfigError("dpo.beta must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError("dpo.label_smoothing must be in [0, 0.5)")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ConfigError(f"dpo.label_smoothing has no effect with loss = {self.loss!r}")
        if not (0 <= self.ld_alpha <= 1 and self.sft_weight >= 0):
            raise ConfigError("dpo.ld_alpha must be in [0, 1], sft_weight at least 0")


def prepare(
    recipe: Recipe[DpoRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Open the start model, read and score the pairs. Raises DataError, ConfigError, UsageError."""
    stage = recipe.stage
    check_reference(recipe, stage.reference)
    found = open_start(recipe, backend, device, noise=False)
    batches, held = read_pairs(recipe, found, on_event)
    # Before the first update the start model is its own reference; a run that goes on builds it
    # anew and scores the same batches, to the same bits.
    live = not stage.precompute_reference
    scored = open_reference(stage.reference, found, backend, device, own=live)
    states = bool(recipe.anchor.weight) and recipe.anchor.form == "states"
    refers = partial(refer, scored, anchor=states)
    if live:
        batches.refer = refers
    else:
        visits = range(recipe.cadence.steps)
        needed = sorted({group for number in visits for group in batches.groups(number)})
        on_event({"message": f"scoring {len(needed)} micro-batches by the reference"})
        batches.extra |= {group: refers(batches.group(group)) for group in needed}
    valid = held_out(list(held), recipe) if held else []
    valid = [batch.with_extra(refers(batch)) for batch in valid]
    objective = Preference(
        found.weights,
        anchor=recipe.anchor.weight,
        kind=stage.loss,
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        ld_alpha=stage.ld_alpha,
        sft=stage.sft_weight,
    )
    return found.task(recipe, backend, batches, objective, valid)


dpo = partial(start, DpoRecipe, prepare)
