"""Supervised fine-tuning: a model goes on with chats and completions, on the answers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from chronos.backends.protocol import Backend
from chronos.common.data import PackedBatches
from chronos.common.errors import ConfigError
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.train.data import read_split
from chronos.train.loop import Event, Task, start
from chronos.train.start import check_length, fitted, open_start


@dataclass(frozen=True)
class SftRecipe:
    """The section [sft]: rows of an update, and how examples share them."""

    SECTION: ClassVar[str] = "sft"
    STARTS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        "optimizer": {"learning_rate": 2e-5, "min_learning_rate": 2e-6, "warmup_steps": 20}
    }
    batch_size: int = 8
    """Rows of a micro-batch."""
    seq_len: int = 1024
    """Tokens of a row, and of the longest example."""
    accumulate: int = 1
    """Micro-batches of an update."""
    packing: bool = True
    """Whether a row takes several examples, by best fit; none is cut, none sees another."""
    loss: str = "nll"
    """`nll`, cross-entropy, or `dft`: each token weighs its own probability."""

    def __post_init__(self) -> None:
        at_least_one(self.SECTION, self, "batch_size", "seq_len", "accumulate")
        if self.loss not in ("nll", "dft"):
            raise ConfigError(f"sft.loss must be nll or dft, not {self.loss!r}")


def prepare(
    recipe: Recipe[SftRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Open the start model, read and pack the rows. Raises DataError, ConfigError, UsageError."""
    stage, found = recipe.stage, open_start(recipe, backend, device, noise=True)
    check_length("sft.seq_len", stage.seq_len, found.config)
    training, validation, bad = read_split(recipe, on_event)

    rows = fitted(training, recipe, found, bad, packed=stage.packing)
    on_event({"message": f"{rows.tokens} tokens in {len(rows)} rows, {rows.fill:.0%} full"})
    valid = []
    if validation:
        held = fitted(validation, recipe, found, bad, packed=stage.packing)
        valid = held.first(stage.batch_size, recipe.cadence.eval_batches)
    return found.task(
        recipe,
        backend,
        PackedBatches(rows, stage.batch_size, stage.accumulate),
        NextToken(
            found.weights,
            anchor=recipe.anchor.weight,
            dft=stage.loss == "dft",
            details=True,
        ),
        valid,
    )


sft = partial(start, SftRecipe, prepare)
