"""A study's file: a recipe of a stage, with a section [tune] that says how it is searched.

The recipe is what a trial trains, and the first trial is the recipe itself. A copy with absolute
paths lies in the study's folder, so that trials and `apply` need nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chronos.common.budget import parse_budget, parse_size
from chronos.common.errors import ConfigError, UsageError
from chronos.common.training.flops import TRAINING, forward
from chronos.common.training.recipe import (
    Recipe,
    parse_recipe,
    read_recipe,
    section_of,
    toml_of,
)
from chronos.train import STAGES
from chronos.tune.space import Parameter, space_of

LOSS, READS = "loss", "expert_bytes_per_token"
OBJECTIVES = {"both": (LOSS, READS), "loss": (LOSS,)}
_FREE = ("trials", "repeats", "winners")  # may differ between workers of a study
TUNED = ("pretrain", "sft")  # stages whose held-out cross-entropy says how good the model is


@dataclass(frozen=True)
class TuneSettings:
    """The section [tune]: how many trials, what they are judged by, what they may not do."""

    trials: int = 40
    """Trials of the study, the recipe itself among them."""
    objective: str = "both"
    """`both`: held-out loss and bytes of experts read a token; `loss`: that alone."""
    budget: str = "25%"
    """Memory for routed experts, at which the bytes that are read are counted."""
    structure: bool = False
    """Whether sizes of the model are searched too, the width of an expert solved so that a token
    takes the operations it takes in the recipe."""
    search: list[str] = field(default_factory=list)
    """Parameters to search, or sections of them; empty: all."""
    ranges: dict[str, Any] = field(default_factory=dict)
    """Parameter -> [least, most] or choices, in place of the tuner's own."""
    rungs: int = 3
    """Stages of a trial: after each but the last, only one in `eta` goes on. 1: all run to the
    end."""
    eta: int = 3
    """How many trials stand for one that goes on; each stage trains that many times longer."""
    pruner: str = "halving"
    """Which trials end early: `halving`; of one objective also Optuna's `median`, `hyperband`."""
    repeats: int = 2
    """Runs of the best trials, and of the recipe, with other seeds, once the study is done."""
    winners: int = 3
    """Of the best trials, how many are run again, spread over what they trade."""
    route_tokens: int = 4096
    """Held-out tokens whose routing is recorded to count reads."""
    min_effective: float = 0.4
    """Least share of a layer's experts in effective use, exp(entropy) / experts, of any layer."""
    max_use: float = 0.75
    """Largest share of tokens that may use one and the same expert of a layer."""
    max_parameters: float = 1.5
    """Parameters of the model, at most, as a multiple of the recipe's."""
    max_memory: str = ""
    """Memory an update may take, such as 8GiB; empty: not looked at."""
    seed: int = 0
    """Of the sampler."""

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, dict):
            raise ConfigError("tune.ranges must be a table")
        for name in ("trials", "rungs", "route_tokens", "winners"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tune.{name} must be at least 1")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"tune.objective must be both or loss, not {self.objective!r}")
        if self.pruner not in ("halving", "median", "hyperband"):
            raise ConfigError(
                f"tune.pruner must be halving, median or hyperband, not {self.pruner!r}"
            )
        if self.pruner != "halving" and self.objective == "both":
            raise ConfigError(
                f"tune.pruner {self.pruner} compares one objective",
                "",
                'use pruner = "halving", or objective = "loss"',
            )
        if self.eta < 2 or self.repeats < 0 or self.seed < 0:
            raise ConfigError("tune.eta must be at least 2, repeats and seed at least 0")
        if not (0 < self.min_effective <= 1 and 0 < self.max_use <= 1 and self.max_parameters > 0):
            raise ConfigError(
                "tune.min_effective and max_use must be in (0, 1], max_parameters above 0"
            )
        try:
            parse_budget(self.budget, 1 << 50)
            if self.max_memory:
                parse_size(self.max_memory, "max_memory")
        except UsageError as error:
            raise ConfigError(f"tune: {error.what}", "", error.fix) from None


@dataclass(frozen=True)
class Tuning:
    """What is searched: a recipe, the study's settings, the parameters. text: of the recipe, with
    absolute paths, without [tune]."""

    recipe: Recipe[Any]
    settings: TuneSettings
    space: tuple[Parameter, ...]
    text: str

    @property
    def objectives(self) -> tuple[str, ...]:
        return OBJECTIVES[self.settings.objective]

    @property
    def compute(self) -> float:
        """Operations of a whole trial."""
        return operations(self.recipe)

    @property
    def digest(self) -> str:
        """Of all that trials of one study must have in common."""
        settings = {k: v for k, v in vars(self.settings).items() if k not in _FREE}
        recipe = self.recipe.to_json()
        # Machines that share a study may keep the same data in other places.
        recipe["data"]["path"] = Path(self.recipe.data.path).name
        recipe.get("tokenizer", {}).pop("path", None)
        known = json.dumps([recipe, settings], sort_keys=True, default=str)
        return hashlib.blake2b(known.encode(), digest_size=12).hexdigest()


def rungs_of(steps: int, settings: TuneSettings) -> tuple[int, ...]:
    """Updates after which a trial of so many is judged, the last one included. All are multiples of
    the first, which is how often a trial is evaluated and saved."""
    first = max(1, round(steps / settings.eta ** (settings.rungs - 1)))
    early = (first * settings.eta**number for number in range(settings.rungs - 1))
    return (*(rung for rung in early if rung < steps), steps)


def operations(recipe: Recipe[Any]) -> float:
    """Multiplications and additions of all the updates of a recipe, counted of its geometry."""
    stage = recipe.stage
    tokens = stage.batch_size * stage.seq_len * stage.accumulate * recipe.cadence.steps
    return float(TRAINING * tokens) * forward(recipe.model, stage.seq_len)


def load_tuning(
    path: str | Path,
    *,
    trials: int | None = None,
    budget: str | None = None,
    data: str | None = None,
) -> Tuning:
    """Read and check a study's file. trials, budget, data: in place of the file's.

    Raises ConfigError naming the file and the key, MissingBackendError without the extra [tune].
    """
    from chronos.tune.written import absolute, written

    file, text = read_recipe(path)
    sections = toml_of(text, file)
    own = sections.pop("tune", {})
    try:
        settings = section_of(TuneSettings, {"tune": own}, "tune")
    except ConfigError as error:
        raise ConfigError(error.what, error.where or str(file), error.fix) from None
    flags: dict[str, Any] = {"trials": trials, "budget": budget}
    settings = dataclasses.replace(settings, **{k: v for k, v in flags.items() if v is not None})
    stage = STAGES[stage_of(sections, file)]
    recipe = parse_recipe(sections, stage.section, file)
    if data is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=data))
    if recipe.lora is not None:
        raise ConfigError(
            "the tuner trains models whole, and the recipe has adapters", str(file),
            "leave [lora] out",
        )  # fmt: skip
    if not recipe.data.validation_share:
        raise ConfigError(
            "trials are compared on what is held out, and validation_share holds out nothing",
            str(file),
            "set data.validation_share, for example to 0.05",
        )
    space = space_of(
        recipe,
        structure=settings.structure,
        search=settings.search,
        ranges=dict(_flat(settings.ranges)),
    )
    return Tuning(recipe, settings, space, written(text, absolute(recipe), drop="tune"))


def _flat(table: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, which TOML reads as tables unless they are quoted."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}{key}.")
        else:
            yield name + key, value


def stage_of(sections: dict[str, Any], file: Path) -> str:
    named = [name for name in STAGES if name in sections] or ["pretrain"]
    if named[0] not in TUNED or len(named) > 1:
        raise ConfigError(
            f"the tuner compares held-out cross-entropy, which {' and '.join(named)} has not",
            str(file),
            f"give a recipe of {' or '.join(TUNED)}",
        )
    return named[0]
