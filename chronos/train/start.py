"""The model a stage goes on with, and what else stages that fine-tune share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.backends.protocol import Backend
from chronos.common.data import Batch
from chronos.common.disk.linked import sample_digest
from chronos.common.disk.tensors import locate_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import read_weights
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import read_config
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.recipe import Recipe
from chronos.run.models import resolve_model


@dataclass
class Start:
    """A model to be trained, its folder, tokenizer and geometry; `digest` knows its weights."""

    folder: Path
    model: Any
    config: ModelConfig
    tokenizer: Tokenizer
    digest: str


def open_start(recipe: Recipe[Any], backend: Backend, device: str | None, *, noise: bool) -> Start:
    """Build the recipe's start model in float32, with the recipe's loss weights.

    noise: whether dropout and masked experts stay as its config has them; policies and references
    of the alignment stages do without. Raises UsageError, ConfigError, CorruptFileError.
    """
    folder, config = start_config(recipe)
    changes: dict[str, Any] = {"loss_weights": recipe.model.loss_weights}
    if not noise:
        changes |= {"dropout": 0.0, "fallback_mask_prob": 0.0}
    config = dataclasses.replace(config, **changes)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    model = build(backend, folder, config, device)
    if recipe.anchor.weight and recipe.anchor.form == "gate":
        if config.routing_source != "gate":
            raise ConfigError(
                f"the gates of this model do not choose its experts ({config.routing_source} does)",
                "anchor.form",
                'use form = "states", or weight = 0',
            )
        backend.anchor(model)
    digest = sample_digest(locate_tensors(folder))
    return Start(folder, model, config, tokenizer, digest)


def start_config(recipe: Recipe[Any]) -> tuple[Path, ModelConfig]:
    """The folder and geometry of a recipe's start model, before anything is allocated."""
    if not recipe.start:
        raise ConfigError(
            "no model to go on with", "", "name one: --model FOLDER, or path in [model]"
        )
    folder = resolve_model(recipe.start)
    config = read_config(folder)
    if not isinstance(config, ModelConfig):
        raise UsageError(
            "a model that another library builds cannot be trained whole",
            str(folder),
            "train a native model",
        )
    if not (folder / "tokenizer.json").exists():
        raise UsageError("the model has no tokenizer.json", str(folder), "put one beside it")
    return folder, config


def build(backend: Backend, folder: Path, config: ModelConfig, device: str | None) -> Any:
    """The weights of a folder in a model of this geometry."""
    return backend.build(config, seed=0, device=device, weights=read_weights(folder, config))


def open_reference(
    folder: str, found: Start, backend: Backend, device: str | None, *, own: bool
) -> Any:
    """The model that a policy is held to: another folder's, or what the stage began with.

    own: whether it must be another object than the policy, which is about to move. Raises
    UsageError for one of another vocabulary.
    """
    if not folder:
        return build(backend, found.folder, found.config, device) if own else found.model
    path = resolve_model(folder)
    config = read_config(path)
    if not isinstance(config, ModelConfig):
        raise UsageError("a reference must be a native model", str(path))
    check_vocabulary(found.tokenizer, path, "reference")
    config = dataclasses.replace(config, dropout=0.0, fallback_mask_prob=0.0)
    return build(backend, path, config, device)


def check_vocabulary(tokenizer: Tokenizer, folder: Path, what: str) -> None:
    """Raises UsageError where a second model's ids do not mean what the first one's do."""
    other = Tokenizer.load(folder)
    if other.vocabulary != tokenizer.vocabulary:
        raise UsageError(
            f"the {what} has another vocabulary than the model that is trained",
            str(folder),
            "give one that shares its tokenizer.json",
        )


def check_length(name: str, tokens: int, config: ModelConfig) -> None:
    """Raises ConfigError where rows are longer than the model's context."""
    if tokens > config.max_position_embeddings:
        raise ConfigError(
            f"{name} = {tokens} tokens do not fit the model's context of"
            f" {config.max_position_embeddings}",
            "",
            f"lower {name}",
        )


def refer(scored: Callable[[Batch], Any], batch: Batch, anchor: bool) -> dict[str, Any]:
    """What a reference says of a batch, as the arrays that objectives take. anchor: with its
    routers' probabilities."""
    found = scored(batch)
    arrays = {"reference": found.log_probs_BT, "reference_ids": found.ids_BTLK.astype("int32")}
    return arrays | ({"reference_probs": found.probs_BTLE} if anchor else {})


def held_out(batches: Sequence[Batch], recipe: Recipe[Any]) -> list[Batch]:
    """Those an evaluation takes: spread over all of them."""
    count = min(recipe.cadence.eval_batches, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]
