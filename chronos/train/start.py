"""The model a stage goes on with, and what else stages that fine-tune share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chronos.backends.protocol import Backend, Scores
from chronos.common.data import BadRows, Batch, Document, FittedRows, encode_examples
from chronos.common.disk.linked import sample_digest
from chronos.common.disk.tensors import locate_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import read_weights
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.rope import lengthened
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training.lora import LoraRecipe
from chronos.common.training.objectives import Batches, Objective
from chronos.common.training.recipe import Recipe
from chronos.run.models import resolve_model
from chronos.train.adapters import Frozen, loss_weights, open_frozen
from chronos.train.loop import Task

Scored = Callable[[Batch], Scores]  # what a frozen model says of a batch


@dataclass
class Start:
    """A model to be trained, its folder, tokenizer and geometry; `digest` knows its weights.

    weights: of the terms of its routing. frozen: the model as it was opened, where adapters are
    trained beside it.
    """

    folder: Path
    model: Any
    config: ModelConfig | GuestConfig
    tokenizer: Tokenizer
    digest: str
    weights: LossWeights
    frozen: Frozen | None = None

    @property
    def native(self) -> bool:
        return isinstance(self.config, ModelConfig)

    def session(self, backend: Backend) -> Any:
        """Sequences on the model as it is at the time."""
        frozen = self.frozen
        return backend.session(self.model, None) if frozen is None else frozen.session(backend)

    def task(
        self,
        recipe: Recipe[Any],
        backend: Backend,
        batches: Batches,
        objective: Objective,
        valid: Sequence[Batch] = (),
        **options: Any,
    ) -> Task:
        """What the loop is given of it. options: other fields of `Task`."""
        close = options.pop("close", lambda: None)

        def close_all() -> None:
            close()
            if self.frozen is not None:
                self.frozen.close()

        if self.frozen is not None and recipe.lora is not None:
            options["frozen"] = self.frozen.nbytes
            options["adapt"] = partial(
                self.frozen.attach, backend, recipe.lora, recipe.optimizer.seed
            )
        known = (recipe, self.model, self.tokenizer, batches, objective, valid)
        return Task(*known, **(options | {"start": self.digest, "close": close_all}))


def open_start(recipe: Recipe[Any], backend: Backend, device: str | None, *, noise: bool) -> Start:
    """Build the recipe's start model in float32, with the recipe's loss weights.

    noise: whether dropout and masked experts stay as its config has them; policies and references
    of the alignment stages do without. Raises UsageError, ConfigError, CorruptFileError.
    """
    if recipe.lora is not None:
        return _open_frozen(recipe, recipe.lora, backend, device)
    if recipe.budget:
        raise ConfigError(
            "a model that is trained whole has its experts in memory",
            "--budget",
            "train adapters of it: --lora 16",
        )
    folder, config = start_config(recipe)
    changes: dict[str, Any] = {"loss_weights": recipe.model.loss_weights}
    if not noise:
        changes |= {"dropout": 0.0, "fallback_mask_prob": 0.0}
    if recipe.context:
        config = lengthened(config, recipe.context, recipe.trained)
    config = dataclasses.replace(config, **changes)
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    model = build(backend, folder, config, device)
    _anchor(recipe, config, backend, model)
    digest = sample_digest(locate_tensors(folder))
    return Start(folder, model, config, tokenizer, digest, config.loss_weights)


def _open_frozen(
    recipe: Recipe[Any], lora: LoraRecipe, backend: Backend, device: str | None
) -> Start:
    """The recipe's start model as it is run, to train adapters of."""
    folder, config = _found(recipe)
    if recipe.context:
        raise ConfigError(
            "an adapter cannot give a model another context",
            "model.max_position_embeddings",
            "train the model whole, or leave it out",
        )
    if recipe.optimizer.compute_dtype != "float32" and not isinstance(config, ModelConfig):
        raise ConfigError(
            f"a model of another library multiplies in its own dtype, {config.dtype}",
            "optimizer.compute_dtype",
            "leave it out",
        )
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    frozen = open_frozen(folder, config, backend, device, lora, recipe.budget)
    try:
        _anchor(recipe, config, backend, frozen.model)
    except BaseException:
        frozen.close()
        raise
    weights = loss_weights(config, recipe.model.loss_weights)
    return Start(folder, frozen.model, config, tokenizer, frozen.fingerprint, weights, frozen)


def _anchor(
    recipe: Recipe[Any], config: ModelConfig | GuestConfig, backend: Backend, model: Any
) -> None:
    if not recipe.anchor.weight:
        return
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            "the gates of a model of another library show no probabilities to anchor",
            "anchor.weight",
            "use weight = 0, and leave `gate` out of lora.targets",
        )
    if recipe.anchor.form != "gate":
        return
    if "lookahead" in config.routing_sources:
        raise ConfigError(
            "the gates of this model do not choose its experts (lookahead does)",
            "anchor.form",
            'use form = "states", or weight = 0',
        )
    backend.anchor(model)


def start_config(recipe: Recipe[Any]) -> tuple[Path, ModelConfig]:
    """The folder and geometry of a recipe's start model, before anything is allocated."""
    folder, config = _found(recipe)
    if not isinstance(config, ModelConfig):
        raise UsageError(
            "a model that another library builds cannot be trained whole",
            str(folder),
            "train adapters of it: --lora 16",
        )
    return folder, config


def _found(recipe: Recipe[Any]) -> tuple[Path, ModelConfig | GuestConfig]:
    if not recipe.start:
        raise ConfigError(
            "no model to go on with", "", "name one: --model FOLDER, or path in [model]"
        )
    folder = resolve_model(recipe.start)
    config = read_config(folder)
    if not (folder / "tokenizer.json").exists():
        raise UsageError("the model has no tokenizer.json", str(folder), "put one beside it")
    return folder, config


def build(backend: Backend, folder: Path, config: ModelConfig, device: str | None) -> Any:
    """The weights of a folder in a model of this geometry."""
    return backend.build(config, seed=0, device=device, weights=read_weights(folder, config))


def open_reference(
    folder: str,
    found: Start,
    backend: Backend,
    device: str | None,
    *,
    own: bool,
    temperature: float = 1.0,
) -> Scored:
    """What the model that a policy is held to says of a batch: another folder's, or that which the
    stage began with.

    own: whether it must be another object than the policy, which is about to move; a model with
    adapters is its own reference, without them. Raises UsageError for one of another vocabulary.
    """
    if not folder and found.frozen is not None:
        return partial(found.frozen.score, backend, temperature=temperature)
    if not folder and own:
        assert isinstance(found.config, ModelConfig)
        model = build(backend, found.folder, found.config, device)
        return partial(backend.score, model, temperature=temperature)
    if not folder:
        return partial(backend.score, found.model, temperature=temperature)
    path = resolve_model(folder)
    config = read_config(path)
    if not isinstance(config, ModelConfig):
        raise UsageError("a reference must be a native model", str(path))
    check_vocabulary(found.tokenizer, path, "reference")
    config = dataclasses.replace(config, dropout=0.0, fallback_mask_prob=0.0)
    model = build(backend, path, config, device)
    return partial(backend.score, model, temperature=temperature)


def check_reference(recipe: Recipe[Any], folder: str) -> None:
    """Raises UsageError where a named reference is the model that is trained."""
    if not (folder and recipe.start):
        return
    if resolve_model(folder).resolve() == resolve_model(recipe.start).resolve():
        raise UsageError(
            "the reference is the model that is trained",
            folder,
            "leave `reference` out: the model as it begins is the reference by itself",
        )


def check_vocabulary(tokenizer: Tokenizer, folder: Path, what: str) -> None:
    """Raises UsageError where a second model's ids do not mean what the first one's do."""
    other = Tokenizer.load(folder)
    if other.vocabulary != tokenizer.vocabulary:
        raise UsageError(
            f"the {what} has another vocabulary than the model that is trained",
            str(folder),
            "give one that shares its tokenizer.json",
        )


def fitted(
    documents: Sequence[Document], recipe: Recipe[Any], found: Start, bad: BadRows, *, packed: bool
) -> FittedRows:
    """The documents as rows of the stage's `seq_len`, whole. packed: several to a row, where the
    model keeps them apart."""
    seq_len, tokenizer = recipe.stage.seq_len, found.tokenizer
    return FittedRows(
        encode_examples(tokenizer, documents, seq_len, bad),
        seq_len=seq_len,
        pad_id=tokenizer.pad_id,
        seed=recipe.optimizer.seed,
        packed=packed and found.native,
    )


def check_length(name: str, tokens: int, config: ModelConfig | GuestConfig) -> None:
    """Raises ConfigError where rows are longer than the model's context."""
    if tokens > config.max_position_embeddings:
        raise ConfigError(
            f"{name} = {tokens} tokens do not fit the model's context of"
            f" {config.max_position_embeddings}",
            "",
            f"lower {name}",
        )


def refer(scored: Scored, batch: Batch, anchor: bool) -> dict[str, Any]:
    """What a reference says of a batch, as the arrays that objectives take. anchor: with its
    routers' probabilities."""
    found = scored(batch)
    arrays = {"reference": found.log_probs_BT, "reference_ids": found.ids_BTLK.astype("int32")}
    return arrays | ({"reference_probs": found.probs_BTLE} if anchor else {})


def held_out(batches: Sequence[Batch], recipe: Recipe[Any]) -> list[Batch]:
    """Those an evaluation takes: spread over all of them."""
    count = min(recipe.cadence.eval_batches, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]
