"""Pretraining on text, packed into rows: a model from scratch, or one that goes on.

Chats and completions are text too. A model that goes on may get a longer context.

The first stage, and the pattern of a stage: a section of the recipe, `prepare`, which gives the
loop a model, its batches and an objective, and a function that runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from chronos.backends.protocol import Backend
from chronos.common.data import (
    Document,
    PackedBatches,
    PackedDataset,
    encode_documents,
    pack_documents,
)
from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.train.data import read_split
from chronos.train.loop import Event, Report, Task, checkpoints, start
from chronos.train.start import open_start


@dataclass(frozen=True)
class PretrainRecipe:
    """The section [pretrain]: rows of an update, and what the lookahead's gradient reaches."""

    SECTION: ClassVar[str] = "pretrain"
    STARTS: ClassVar[bool] = False
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {}
    batch_size: int = 8
    """Rows of a micro-batch."""
    seq_len: int = 256
    """Tokens of a row."""
    accumulate: int = 1
    """Micro-batches of an update."""
    lookahead_into_trunk: bool = False
    """Whether the LookaheadRouter's gradient reaches the layer below it."""

    def __post_init__(self) -> None:
        at_least_one(self.SECTION, self, "batch_size", "seq_len", "accumulate")


def pretrain(
    recipe: Recipe[PretrainRecipe] | str | Path,
    out: str | Path,
    *,
    backend: str | None = None,
    device: str | None = None,
    resume: bool = False,
    force: bool = False,
    report_to: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Train a model from scratch in the run folder `out`, as `chronos train pretrain` does.

    recipe: one that was loaded, the path of its TOML file, or "demo" for the shipped one. resume:
    go on from the newest checkpoint; force: although recipe or data have changed. report_to:
    `tensorboard`, `trackio` or `wandb`. on_event gets messages and terms as they come. Raises
    ConfigError, DataError, UsageError if the folder holds a run, MissingBackendError,
    DivergedError.
    """
    return start(
        PretrainRecipe,
        prepare,
        recipe,
        out,
        backend=backend,
        device=device,
        resume=resume,
        force=force,
        report_to=report_to,
        on_event=on_event,
    )


def prepare(
    recipe: Recipe[PretrainRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Read the recipe's data, load or train its tokenizer, pack both splits, build the model, or
    open that which goes on.

    The tokenizer of a run that has a checkpoint is used again. The model's vocabulary size is set
    to the tokenizer's. Raises DataError, ConfigError.
    """
    if recipe.start:
        return _go_on(recipe, backend, device, on_event)
    _check_rows(recipe.stage, recipe.model)
    training, validation, _ = read_split(recipe, on_event)
    tokenizer = _tokenizer(recipe, out, training, on_event)
    config = dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab_size)
    model = backend.build(config, seed=recipe.optimizer.seed, device=device)
    recipe = dataclasses.replace(recipe, model=config)
    return _task(recipe, model, tokenizer, training, validation, on_event)


def _go_on(
    recipe: Recipe[PretrainRecipe],
    backend: Backend,
    device: str | None,
    on_event: Callable[[Event], None],
) -> Task:
    """With another model and its tokenizer."""
    found = open_start(recipe, backend, device, noise=True)
    assert isinstance(found.config, ModelConfig)
    _check_rows(recipe.stage, found.config)
    training, validation, _ = read_split(recipe, on_event)
    recipe = dataclasses.replace(recipe, model=found.config)
    task = _task(recipe, found.model, found.tokenizer, training, validation, on_event)
    return dataclasses.replace(task, start=found.digest)


def _task(
    recipe: Recipe[PretrainRecipe],
    model: Any,
    tokenizer: Tokenizer,
    training: list[Document],
    validation: list[Document],
    on_event: Callable[[Event], None],
) -> Task:
    rows = _pack(tokenizer, training, recipe)
    held_out = _pack(tokenizer, validation, recipe) if validation else None
    tokens = held_out.tokens if held_out else 0
    on_event({"message": f"{rows.tokens} tokens to train on, {tokens} held out"})
    stage = recipe.stage
    batches = PackedBatches(rows, stage.batch_size, stage.accumulate)
    most = recipe.cadence.eval_batches
    valid = held_out.first(stage.batch_size, most) if held_out else []
    return Task(
        recipe,
        model,
        tokenizer,
        batches,
        NextToken(recipe.model.loss_weights, lookahead_into_trunk=stage.lookahead_into_trunk),
        valid,
    )


def _check_rows(stage: PretrainRecipe, config: ModelConfig) -> None:
    rows, context = stage.seq_len, config.max_position_embeddings
    if rows > context:
        raise ConfigError(
            f"rows of pretrain.seq_len {rows} tokens do not fit the model's context of {context}",
            "",
            "lower seq_len, or raise model.max_position_embeddings",
        )


def _tokenizer(
    recipe: Recipe[PretrainRecipe],
    out: Path,
    documents: list[Document],
    on_event: Callable[[Event], None],
) -> Tokenizer:
    known = recipe.tokenizer.path
    if not known and checkpoints(out) and (out / "tokenizer.json").exists():
        known = str(out)  # without a checkpoint it is left over from a recipe that may have changed
    if known:
        return Tokenizer.load(known)
    size = recipe.tokenizer.vocab_size
    on_event({"message": f"training a tokenizer of {size} tokens"})
    return Tokenizer.train((d.text for d in documents), size)


def _pack(
    tokenizer: Tokenizer, documents: list[Document], recipe: Recipe[PretrainRecipe]
) -> PackedDataset:
    encoded = encode_documents(tokenizer, documents)
    return pack_documents(
        encoded.ids,
        seq_len=recipe.stage.seq_len,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        seed=recipe.optimizer.seed,
        trained=encoded.trained,
    )
