"""What a study searches: parameters of a recipe, their ranges, and what one choice of them changes.

`SPACE` is the whole of it, as values. A parameter stands for a key of the recipe and is in a study
only where it can move an objective: a weight that nothing uses would look important by chance.
What follows from others is computed, never sampled: the width of an expert is solved so that a
token takes the operations it takes in the user's own recipe, and the updates are what is left of
the rounding, so every trial has the same compute. Knows no sampler and trains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chronos.common.errors import ConfigError
from chronos.common.training import flops
from chronos.common.training.recipe import Recipe

Values = dict[str, Any]  # key of a recipe, "section.key" -> value
WIDTH, STEPS = "model.moe_intermediate_size", "cadence.steps"
PEAK, FLOOR = "optimizer.learning_rate", "optimizer.min_learning_rate"
_SOURCE, _AHEAD = "model.routing_source", "model.lookahead_steps"
_HISTORY, _FORECASTS = (_SOURCE, "history".__eq__), (_AHEAD, bool)
_ON = ".on"  # a switch beside a weight that may be 0, whose range is logarithmic


class Suggests(Protocol):
    """What a sampler offers: `optuna.Trial` does."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Parameter:
    """One key of a recipe. within: its bounds, or its choices where `choice`; a function where they
    follow from the recipe.

    log: sampled by its logarithm. zero: it may be off, too. when: another key, and for which values
    of that this one has a use. used: whether a recipe's trials can differ by it at all.
    """

    name: str
    within: Any
    log: bool = False
    zero: bool = False
    choice: bool = False
    when: tuple[str, Callable[[Any], bool]] | None = None
    used: Callable[[Recipe[Any]], bool] = lambda recipe: True

    def around(self, value: Any) -> Parameter:
        """With a range that has room for a value: the user's own recipe is a trial too."""
        if self.choice:
            choices = self.within if value in self.within else (*self.within, value)
            return dataclasses.replace(self, within=choices)
        if self.zero and value == 0:
            return self
        low, high = self.within
        return dataclasses.replace(self, within=(min(low, value), max(high, value)))

    def suggest(self, trial: Suggests) -> Any:
        if self.choice:
            return trial.suggest_categorical(self.name, list(self.within))
        if self.zero and not trial.suggest_categorical(self.name + _ON, [False, True]):
            return 0.0
        low, high = self.within
        if isinstance(low, int) and isinstance(high, int):
            return trial.suggest_int(self.name, low, high)
        return trial.suggest_float(self.name, low, high, log=self.log)

    def asked(self, value: Any) -> Values:
        """What a sampler would have had to say for this value."""
        if not self.zero:
            return {self.name: value}
        return {self.name + _ON: True, self.name: value} if value else {self.name + _ON: False}


def _from_nothing(recipe: Recipe[Any]) -> bool:
    """Whether the geometry is the recipe's to choose, not that of a model it goes on with."""
    return not recipe.stage.STARTS


def _one_routing(recipe: Recipe[Any]) -> bool:
    """Whether all layers are routed alike, and not by the LookaheadRouter, whose terms would lose
    their use with another source."""
    source = recipe.model.routing_source
    return _from_nothing(recipe) and isinstance(source, str) and source != "lookahead"


def _sources(recipe: Recipe[Any]) -> tuple[str, ...]:
    two_tiers = recipe.model.num_experts_per_tok > 1
    return ("gate", "informed", "history") if two_tiers else ("gate", "informed")


def _two_tiers(recipe: Recipe[Any]) -> bool:
    return _one_routing(recipe) and "history" in _sources(recipe)


def _one_decay(recipe: Recipe[Any]) -> bool:
    return _two_tiers(recipe) and isinstance(recipe.model.history_decay, float)


def _resident(recipe: Recipe[Any]) -> tuple[int, int]:
    return 1, max(1, recipe.model.num_experts // 4)


def _resident_picks(recipe: Recipe[Any]) -> tuple[int, int]:
    return 1, recipe.model.num_experts_per_tok - 1


def _trains_forecasts(recipe: Recipe[Any]) -> bool:
    """Whether what the LookaheadRouter learns reaches an objective: else it learns by itself."""
    into_trunk = getattr(recipe.stage, "lookahead_into_trunk", False)
    return _from_nothing(recipe) and (into_trunk or "lookahead" in recipe.model.routing_sources)


SPACE = (
    Parameter(PEAK, (2e-4, 1e-2), log=True),
    Parameter("loss.balance", (1e-3, 0.1), log=True),
    Parameter("loss.temporal", (1e-3, 1.0), log=True, zero=True),
    Parameter("loss.locality", (1e-3, 0.3), log=True, zero=True),
    Parameter(_AHEAD, (0, 1, 2, 3, 4), choice=True, used=_trains_forecasts),
    Parameter("loss.lookahead", (0.01, 2.0), log=True, when=_FORECASTS, used=_trains_forecasts),
    Parameter(_SOURCE, _sources, choice=True, used=_one_routing),
    Parameter("model.history_decay", (0.6, 0.98), when=_HISTORY, used=_one_decay),
    Parameter("model.num_resident_experts", _resident, when=_HISTORY, used=_two_tiers),
    Parameter("model.num_resident_experts_per_tok", _resident_picks, when=_HISTORY,
              used=_two_tiers),
    Parameter("model.streamed_balance", (1.0, 10.0), log=True, when=_HISTORY, used=_two_tiers),
)  # fmt: skip
# With `structure`: factors on the recipe's own sizes, but for counts that are small.
_FACTORS = {"model.hidden_size": (32, (0.5, 0.75, 1.0, 1.25, 1.5)),
            "model.num_experts": (4, (0.5, 1.0, 2.0)),
            "model.kv_latent_dim": (8, (0.5, 1.0, 2.0))}  # fmt: skip
_SHARED = Parameter("model.num_shared_experts", (0, 1, 2), choice=True, used=_from_nothing)


def space_of(
    recipe: Recipe[Any],
    *,
    structure: bool = False,
    search: Sequence[str] = (),
    ranges: Mapping[str, Any] | None = None,
) -> tuple[Parameter, ...]:
    """The parameters of a study of this recipe, each with room for the recipe's own value.

    structure: sizes too. search: names, or sections, to search alone. ranges: name -> bounds or
    choices in place of those above. Raises ConfigError for names that are not searched.
    """
    declared = [*SPACE, *(_sizes(recipe) if structure else ())]
    ranges = dict(ranges or {})
    names = [parameter.name for parameter in declared]
    wanted = [n for n in names if not search or n in search or n.partition(".")[0] in search]
    sections = {name.partition(".")[0] for name in names}
    if unknown := [n for n in [*search, *ranges] if n not in names and n not in sections]:
        raise ConfigError(
            f"the tuner does not search {unknown[0]!r}", "tune", f"it knows {', '.join(names)}"
        )
    found = []
    for parameter in declared:
        if parameter.name in wanted and parameter.used(recipe):
            if callable(parameter.within):
                parameter = dataclasses.replace(parameter, within=parameter.within(recipe))
            parameter = _narrowed(parameter, ranges.get(parameter.name))
            if _applies(parameter, recipe, {}):
                parameter = parameter.around(value_of(recipe, parameter.name))
            found.append(parameter)
    if not found:
        raise ConfigError("nothing is left to search", "tune.search", "name more parameters")
    return tuple(found)


def _sizes(recipe: Recipe[Any]) -> list[Parameter]:
    if not _from_nothing(recipe):
        raise ConfigError(
            f"{recipe.stage.SECTION} goes on with a model, whose sizes are given",
            "tune.structure",
            "leave structure out",
        )
    sizes = []
    for name, (step, factors) in _FACTORS.items():
        own = value_of(recipe, name)
        rounded = {max(step, round(own * f / step) * step) for f in factors if f != 1}
        sizes.append(Parameter(name, tuple(sorted({own, *rounded})), choice=True))
    return [*sizes, _SHARED]


def _narrowed(parameter: Parameter, within: Any) -> Parameter:
    if within is None:
        return parameter
    numbers = isinstance(within, list) and all(type(v) in (int, float) for v in within)
    if parameter.choice and isinstance(within, list) and within:
        return dataclasses.replace(parameter, within=tuple(within))
    if not parameter.choice and numbers and len(within) == 2 and within[0] < within[1]:
        whole = all(isinstance(bound, int) for bound in parameter.within)
        if (parameter.log and within[0] <= 0) or (whole and any(type(v) is float for v in within)):
            numbers = False
        if numbers:
            kind = int if whole else float
            return dataclasses.replace(parameter, within=tuple(map(kind, within)))
    what = "a list of choices" if parameter.choice else "[least, most]"
    raise ConfigError(f"the range of {parameter.name} cannot be {within!r}", "tune.ranges",
                      f"give {what}")  # fmt: skip


def value_of(recipe: Recipe[Any], name: str) -> Any:
    """What a recipe says under "section.key"."""
    return getattr(_section(recipe, name.partition(".")[0]), name.partition(".")[2])


def _section(recipe: Recipe[Any], name: str) -> Any:
    if name == recipe.stage.SECTION:
        return recipe.stage
    return recipe.model.loss_weights if name == "loss" else getattr(recipe, name)


def own_values(recipe: Recipe[Any], space: Sequence[Parameter]) -> Values:
    """What a sampler would have had to say to get the recipe itself."""
    said: Values = {}
    for parameter in space:
        if _applies(parameter, recipe, {}):
            said |= parameter.asked(value_of(recipe, parameter.name))
    return said


def suggest(trial: Suggests, recipe: Recipe[Any], space: Sequence[Parameter]) -> Values:
    """One choice of all parameters that have a use beside the others."""
    values: Values = {}
    for parameter in space:
        if _applies(parameter, recipe, values):
            values[parameter.name] = parameter.suggest(trial)
    return values


def _applies(parameter: Parameter, recipe: Recipe[Any], values: Values) -> bool:
    if parameter.when is None:
        return True
    name, useful = parameter.when
    return useful(values[name] if name in values else value_of(recipe, name))


def changes(recipe: Recipe[Any], values: Mapping[str, Any]) -> Values:
    """Keys of the recipe that differ under these values, with those that follow from them.

    Raises ConfigError for a geometry that cannot be: nothing has been allocated then.
    """
    wanted = {name: value for name, value in values.items() if value != value_of(recipe, name)}
    if PEAK in wanted:  # the schedule keeps its shape
        wanted[FLOOR] = wanted[PEAK] * (
            recipe.optimizer.min_learning_rate / recipe.optimizer.learning_rate
        )
    if any(name.startswith("model.") for name in wanted):
        wanted |= _same_compute(recipe, wanted)
    return wanted


def _same_compute(recipe: Recipe[Any], wanted: Values) -> Values:
    rows = recipe.stage.seq_len
    own = flops.forward(recipe.model, rows)
    config = changed(recipe, wanted).model
    width = flops.solve_width(config, rows, own)
    if width < 8:
        raise ConfigError("no width of an expert leaves a token the operations it may take")
    config = dataclasses.replace(config, moe_intermediate_size=width)
    steps = max(1, round(recipe.cadence.steps * own / flops.forward(config, rows)))
    found = {WIDTH: width, STEPS: steps}
    return {name: value for name, value in found.items() if value != value_of(recipe, name)}


def changed(recipe: Recipe[Any], wanted: Mapping[str, Any]) -> Recipe[Any]:
    """The recipe with other values of keys. Raises ConfigError."""
    sections: dict[str, Values] = {}
    for name, value in wanted.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    model = sections.pop("model", {})
    if weights := sections.pop("loss", {}):
        model["loss_weights"] = dataclasses.replace(recipe.model.loss_weights, **weights)
    whole: Values = {"model": dataclasses.replace(recipe.model, **model)} if model else {}
    for section, fields in sections.items():
        name = "stage" if section == recipe.stage.SECTION else section
        whole[name] = dataclasses.replace(_section(recipe, section), **fields)
    return dataclasses.replace(recipe, **whole)
