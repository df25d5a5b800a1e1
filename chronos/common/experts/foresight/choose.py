"""Which policy ranks a feed's experts: the one asked for by name, or what the model folder offers.

Every slot of a feed has the size of the largest record, so a policy ranks experts, not bytes. Not
covered: how a forecaster comes into a folder (`chronos fit`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.experts.foresight.forecast import Forecaster, ForecastModel, find_forecast
from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import DecayedUse, Predictor, TokenTable
from chronos.common.experts.residency import LRU, Policy
from chronos.common.layout import Layout

# Those that nothing trains, made for (layers that have experts, experts of a layer).
UNTRAINED: dict[str, Callable[[int, int], Predictor]] = {
    kind.name: kind for kind in (TokenTable, DecayedUse)
}


def predictors() -> list[str]:
    """The names that `--predictor` takes."""
    return ["auto", "forecast", *UNTRAINED, "lru"]


def check_predictor(name: str | Path) -> None:
    """Raises UsageError for what names no predictor."""
    if str(name) not in predictors() and Path(name).suffix != ".safetensors":
        raise UsageError(
            f"predictor cannot be {str(name)!r}",
            "--predictor",
            f"use {', '.join(predictors())}, or the path of a forecaster (.safetensors)",
        )


def choose_policy(name: str | Path, layout: Layout, top_k: int) -> Policy:
    """A policy for a feed over `layout`. name: one of `predictors`, or the path of a side file.

    auto: the folder's forecaster, if it has one of this model, while that pays; else what each
    token needed before. That ranks as lfu does and reads ahead better (docs/prediction.md).
    Raises UsageError, ShapeMismatch (a forecaster of another model) or CorruptFileError.
    """
    check_predictor(name)
    if name == "lru":
        return LRU(layout.num_layers, layout.num_experts)
    if (untrained := UNTRAINED.get(str(name))) is not None:
        return _untrained(layout, untrained)
    path = find_forecast(layout.folder) if name in ("auto", "forecast") else Path(name)
    if path is None and name == "auto":
        return _untrained(layout)
    if path is None:
        raise UsageError(
            "the model has no forecaster",
            str(layout.folder),
            f"chronos fit {layout.folder} --data PATH makes one",
        )
    try:
        forecaster = _forecaster(path, layout, top_k)
    except ShapeMismatch:
        if name == "auto":
            return _untrained(layout)
        raise
    return (SwitchablePolicy if name == "auto" else PredictorPolicy)(forecaster, layout.moe_layers)


def _untrained(
    layout: Layout, kind: Callable[[int, int], Predictor] = TokenTable
) -> PredictorPolicy:
    predictor = kind(len(layout.moe_layers), layout.num_experts)
    return PredictorPolicy(predictor, layout.moe_layers)


def _forecaster(path: Path, layout: Layout, top_k: int) -> Forecaster:
    model = ForecastModel.load(path)
    rows = len(layout.moe_layers)
    model.check_fits(rows, layout.num_experts, top_k, layout.fingerprint, str(path))
    return model.predictor()
