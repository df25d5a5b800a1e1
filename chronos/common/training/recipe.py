"""Training recipes: a TOML file checked into frozen dataclasses before anything is allocated.

Sections [model] (ModelConfig fields), [data], [tokenizer], [train], [loss]; unknown names are
refused with the nearest valid one. Units: tokens, steps, seconds.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chronos.common.errors import ConfigError
from chronos.common.model.config import LossWeights, ModelConfig

_T = TypeVar("_T")
_ACCEPTED = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


@dataclass(frozen=True)
class DataRecipe:
    """What to train on: a path, or "stdlib" for the Python standard library's own sources."""

    path: str = "stdlib"
    validation_share: float = 0.02
    skip_bad: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ConfigError("data.validation_share must be in [0, 1)")
        if self.skip_bad < 0:
            raise ConfigError("data.skip_bad must be at least 0")


@dataclass(frozen=True)
class TokenizerRecipe:
    """A tokenizer trained on the data, unless `path` names a folder that has one."""

    vocab_size: int = 2048
    path: str = ""


@dataclass(frozen=True)
class TrainRecipe:
    """The loop: AdamW with warm-up and cosine decay, clipping, cadence of evaluation and saving."""

    steps: int = 1000
    batch_size: int = 8
    seq_len: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 16
    save_every: int = 200
    keep_checkpoints: int = 2
    max_skipped: int = 10
    lookahead_into_trunk: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "log_every", "eval_every",
                     "eval_batches", "save_every", "keep_checkpoints", "max_skipped"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1")
        for name in ("warmup_steps", "weight_decay", "seed", "threads"):
            if not getattr(self, name) >= 0:  # NaN is not
                raise ConfigError(f"train.{name} must be at least 0")
        if self.seed >= 1 << 40:  # times a million and a step, it stays within 64 bits
            raise ConfigError("train.seed must be below 2**40")
        if not 0 < self.min_learning_rate <= self.learning_rate:
            raise ConfigError("train.min_learning_rate must be above 0 and at most learning_rate")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.clip > 0):
            raise ConfigError("train.beta1 and beta2 must be in [0, 1), clip above 0")


@dataclass(frozen=True)
class Recipe:
    """A whole training run. The model's vocabulary size is the tokenizer's."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @property
    def loss(self) -> LossWeights:
        return self.model.loss_weights

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the weights a run ends with; compared on resume."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming the file and the key."""
    try:
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such recipe", str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe cannot be read: {error}", str(path)) from None
    try:
        return _recipe(data)
    except ConfigError as error:
        raise ConfigError(error.what, error.where or str(path), error.fix) from None


def _recipe(data: dict[str, Any]) -> Recipe:
    _known(data, {"model", "data", "tokenizer", "train", "loss"}, "section")
    tokenizer = _section(TokenizerRecipe, data.get("tokenizer", {}), "tokenizer")
    model = dict(data.get("model", {}))
    if isinstance(model.get("hybrid_pattern"), list):
        model["hybrid_pattern"] = tuple(model["hybrid_pattern"])
    model.setdefault("vocab_size", tokenizer.vocab_size)
    model["loss_weights"] = _section(LossWeights, data.get("loss", {}), "loss")
    return Recipe(
        model=_section(ModelConfig, model, "model"),
        data=_section(DataRecipe, data.get("data", {}), "data"),
        tokenizer=tokenizer,
        train=_section(TrainRecipe, data.get("train", {}), "train"),
    )


def _section(kind: type[_T], values: dict[str, Any], name: str) -> _T:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ConfigError(f"[{name}] must be a table")
    _known(values, set(fields), f"key in [{name}]")
    for key, value in values.items():
        wanted = str(fields[key].type)
        if wanted in _ACCEPTED and type(value) not in _ACCEPTED[wanted]:
            raise ConfigError(f"{name}.{key} must be of type {wanted}, not {value!r}")
    return kind(**values)


def _known(values: dict[str, Any], names: set[str], what: str) -> None:
    for key in values.keys() - names:
        near = difflib.get_close_matches(key, names, n=1)
        raise ConfigError(
            f"unknown {what}: {key!r}", "", f"did you mean {near[0]!r}?" if near else ""
        )
