"""Rows of pairs for DPO and ORPO, and what a reference says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chronos.common.data import PairBatches, encode_pairs
from chronos.common.training.recipe import Recipe
from chronos.train.data import read_split
from chronos.train.loop import Event
from chronos.train.start import Start, check_length


def read_pairs(
    recipe: Recipe[Any],
    found: Start,
    on_event: Callable[[Event], None],
    *,
    prompts: bool = False,
) -> tuple[PairBatches, PairBatches | None]:
    """(training, validation) as the stage's section wants them. prompts: train them too."""
    stage = recipe.stage
    check_length(f"{stage.SECTION}.max_length", stage.max_length, found.config)
    training, validation, bad = read_split(recipe, on_event)

    def pairs(documents: Any, accumulate: int) -> PairBatches:
        return PairBatches(
            encode_pairs(found.tokenizer, documents, stage.max_length, bad),
            batch_size=stage.batch_size,
            accumulate=accumulate,
            pad_id=found.tokenizer.pad_id,
            seed=recipe.optimizer.seed,
            prompts=prompts,
        )

    batches = pairs(training, stage.accumulate)
    on_event({"message": f"{len(training)} pairs in {len(batches)} micro-batches"})
    return batches, pairs(validation, 1) if validation else None
