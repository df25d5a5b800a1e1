"""Each backend's training step against formulas: terms in NumPy, gradients by finite differences.

A gradient is read off the optimizer: after one unclipped update the first moment is (1 - beta1)
times the gradient, whichever backend wrote it.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.training import losses
from chronos.common.training.objectives import (
    Distillation,
    NextToken,
    OddsRatio,
    PolicyGradient,
    Preference,
)
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing import oracle
from chronos.testing.tolerances import assert_close
from chronos.testing.train_tests import TINY, batch, difference, objective, rows, uneven

STAGES = (NextToken, Preference, OddsRatio, PolicyGradient, Distillation)
RECIPE = OptimizerRecipe(clip=1e9, beta1=0.5, seed=3)
ALL = LossWeights(balance=0.3, temporal=0.2, locality=0.1, lookahead=0.5, lookahead_hit=0.2)
TRUNK = LossWeights(balance=0.3, temporal=0.2, locality=0.1, lookahead=0.0, lookahead_hit=0.0)


def with_weights(weights: LossWeights) -> ModelConfig:
    return dataclasses.replace(TINY, loss_weights=weights)


def state_of(step: Any) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(bytes(data), np.float32).reshape(shape).astype(np.float64)
        for name, _, shape, data in step.state()
    }


def terms_by_formula(
    backend_output: Any, config: ModelConfig, batches: list[Batch]
) -> dict[str, float]:
    """Terms of one batch from a forward's outputs, by `common.training.losses`."""
    (data,) = batches
    shape = data.segments_BT.shape
    probs = backend_output.probs_LNE.reshape(-1, *shape, config.num_experts)
    ids = backend_output.ids_LNK.reshape(-1, *shape, config.num_experts_per_tok)
    q = oracle.softmax(np.asarray(backend_output.lookahead_BTJLE, np.float64))
    segments, share = (
        data.segments_BT,
        losses.pick_shares(ids, data.segments_BT, config.num_experts),
    )
    found = {
        "ce": losses.cross_entropy(backend_output.logits_BTV, data.labels_BT),
        "balance": losses.balance(probs, ids, segments),
        "temporal": losses.temporal(probs, segments),
        "locality": losses.locality(probs, ids, segments),
        "lookahead": losses.lookahead(q, probs, segments),
        "lookahead_hit": losses.lookahead_hit(q, ids, segments),
        "router/entropy": losses.router_entropy(probs, segments),
        "router/largest_share": losses.largest_share(share),
        "router/effective_experts": float(losses.effective_experts(share).mean()),
        "router/effective_experts_min": float(losses.effective_experts(share).min()),
    }
    for j in range(config.lookahead_steps + 1):
        found[f"recall_{j}"] = losses.recall(q, ids, segments, j, config.num_experts_per_tok)
    weights = dataclasses.asdict(config.loss_weights)
    found["loss"] = found["ce"] + sum(weight * found[name] for name, weight in weights.items())
    return found


@pytest.mark.parametrize("pads", [0, 5])
def test_terms_are_the_formulas(backend: Any, pads: int) -> None:
    config, data = with_weights(ALL), batch(3, pads=pads)
    model = backend.build(config, seed=7)
    out = backend.forward(model, data.ids_BT, segments_BT=data.segments_BT)
    expected = terms_by_formula(out, config, [data])
    step = backend.train_step(model, RECIPE)
    evaluated = step.evaluate([data], objective(step))
    trained = step.step([data], objective(step), 1e-3, 0)
    assert expected.keys() == evaluated.keys()
    for name, value in expected.items():
        assert_close(evaluated[name], value, "losses", name)
        assert_close(trained[name], value, "losses", name)


def test_fractions_are_those_of_the_whole_update(backend: Any) -> None:
    """Every micro-batch's balance term counts the picks of those after it too."""
    data = [batch(3), batch(4, pads=5)]
    step = backend.train_step(backend.build(TINY, seed=7), RECIPE)
    outs = [backend.forward(step.model, d.ids_BT, segments_BT=d.segments_BT) for d in data]
    joined = np.concatenate([d.segments_BT for d in data])
    probs, ids = (
        np.concatenate(
            [getattr(o, name).reshape(TINY.num_hidden_layers, 2, 16, -1) for o in outs], 1
        )
        for name in ("probs_LNE", "ids_LNK")
    )
    found = step.step(data, objective(step), 1e-3, 0)["balance"]
    assert_close(found, losses.balance(probs, ids, joined), "losses")


def host(array: Any) -> np.ndarray:
    return np.asarray(array.detach() if hasattr(array, "detach") else array)


@pytest.fixture
def passes(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which passes a step makes: "picks" or "losses", with the picks of the whole update, if it was
    given any, and its own."""
    module = importlib.import_module(f"{backend.__name__}.train")
    count_picks, real, seen = module.count_picks, module.losses, []

    def counted(*arguments: Any) -> Any:
        own = count_picks(*arguments)
        seen.append(("picks", None, host(own)))
        return own

    def noted(*arguments: Any) -> Any:
        found, given = real(*arguments), arguments[-1]
        seen.append(("losses", None if given is None else host(given), host(found.picks_LE)))
        return found

    monkeypatch.setattr(module, "count_picks", counted)
    monkeypatch.setattr(module, "losses", noted)
    return seen


@pytest.mark.parametrize(("parts", "balance"), [(1, 0.3), (3, 0.0), (3, 0.3)])
def test_picks_are_counted_before_where_that_is_needed_only(
    backend: Any, passes: list[Any], parts: int, balance: float
) -> None:
    config = with_weights(dataclasses.replace(TRUNK, balance=balance))
    step = backend.train_step(backend.build(config, seed=7), RECIPE)
    step.step([batch(i) for i in range(parts)], objective(step), 1e-3, 0)
    before = parts if parts > 1 and balance else 0
    assert [kind for kind, *_ in passes] == ["picks"] * before + ["losses"] * parts
    for _, given, own in passes[before:]:
        assert (given is None) == (not before) and own.sum() > 0


def test_both_passes_see_the_same_masks(backend: Any, passes: list[Any]) -> None:
    """Picks depend on dropout and on simulated misses in the layers before."""
    config = dataclasses.replace(with_weights(TRUNK), dropout=0.3, fallback_mask_prob=0.3)
    step = backend.train_step(backend.build(config, seed=7), RECIPE)
    step.step([batch(1), batch(2)], objective(step), 1e-3, 0)
    counted, used = (
        [own for kind, _, own in passes if kind == wanted] for wanted in ("picks", "losses")
    )
    np.testing.assert_array_equal(counted, used)
    np.testing.assert_array_equal(passes[-1][1], used[0] + used[1])


@dataclasses.dataclass(frozen=True)
class Advantage(NextToken):
    """A stage to come: rows weighed by what a batch carries, divided by rows."""

    name: ClassVar[str] = "advantage"
    fields = frozenset({"advantages_B"})

    @property
    def weights(self) -> dict[str, float]:
        return {"gain": 1.0}

    def count(self, batch: Batch) -> dict[str, float]:
        return {"rows": len(batch.ids_BT)}


def test_an_objective_is_one_entry_of_a_backend(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With arrays and a count of its own; its uneven split is its joined batch too."""
    module = importlib.import_module(f"{backend.__name__}.losses")

    def gain(labels: Any, arrays: Any, objective: Any, counts: Any) -> dict[str, Any]:
        (lp_BT,) = labels(module.label_log_probs)
        return {"gain": -(lp_BT.sum(-1) * arrays["advantages_B"]).sum() / counts.own["rows"]}

    monkeypatch.setitem(module.OBJECTIVES, "advantage", gain)
    joined = uneven(4)
    weighed = dataclasses.replace(
        joined, extra={"advantages_B": np.array([1.0, -2.0, 0.5, 3.0], np.float32)}
    )
    found = []
    for data in ([weighed], [rows(weighed, 0, 1), rows(weighed, 1, 4)]):
        step = backend.train_step(backend.build(TINY, seed=7), RECIPE)
        expected = -(
            backend.score(step.model, joined).log_probs_BT.sum(-1) * weighed.extra["advantages_B"]
        ).mean()
        terms = step.step(data, Advantage(), 1e-3, 0)
        assert terms["loss"] == pytest.approx(expected, rel=1e-5)
        found.append({n: g for n, g in state_of(step).items() if n.startswith("exp_avg.")})
    assert difference(*found) < 1e-6


def test_backends_have_the_same_objectives(backend: Any) -> None:
    """One that is missing is found out here, not by who trains with it."""
    module = importlib.import_module(f"{backend.__name__}.losses")
    assert set(module.OBJECTIVES) == {s.name for s in STAGES}


def loss_of(weights: dict[str, np.ndarray], config: ModelConfig, data: Batch) -> float:
    out = oracle.forward(weights, config, data.ids_BT, segments_BT=data.segments_BT)
    mix, p, ids, segments = config.loss_weights, out.probs_LBTE, out.ids_LBTK, data.segments_BT
    q = oracle.softmax(out.lookahead_BTJLE)
    return (
        losses.cross_entropy(out.logits_BTV, data.labels_BT)
        + mix.balance * losses.balance(p, ids, segments)
        + mix.temporal * losses.temporal(p, segments)
        + mix.locality * losses.locality(p, ids, segments)
        + mix.lookahead * losses.lookahead(q, p, segments)
        + mix.lookahead_hit * losses.lookahead_hit(q, ids, segments)
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("part", ["trunk", "lookahead"])
def test_gradients_by_finite_differences(backend: Any, part: str) -> None:
    """Along the gradient of each tensor, plus a random direction, which sees what a gradient lacks.
    The lookahead terms reach the predictor alone, so each part is differentiated under the terms
    that do reach it."""
    config = with_weights(TRUNK if part == "trunk" else ALL)
    data = batch(3, pads=3)
    step = backend.train_step(backend.build(config, seed=7), RECIPE)
    weights = state_of(step)
    del weights["optimizer.step"]
    step.step([data], objective(step), 1e-3, 0)
    gradients = {
        name.removeprefix("exp_avg."): moment / (1 - RECIPE.beta1)
        for name, moment in state_of(step).items()
        if name.startswith("exp_avg.")
    }
    assert gradients.keys() == weights.keys()
    random, size = np.random.default_rng(1), 1e-5
    for name in weights:
        if name.startswith("lookahead.") != (part == "lookahead"):
            continue
        direction = unit(gradients[name]) + unit(random.standard_normal(weights[name].shape))
        ends = [
            loss_of(weights | {name: weights[name] + sign * size * direction}, config, data)
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * size)
        assert_close((gradients[name] * direction).sum(), slope, "finite differences", name)


def test_no_gradient_into_the_trunk_through_lookahead(backend: Any) -> None:
    ahead = dataclasses.replace(TRUNK, balance=0, temporal=0, locality=0, lookahead=1.0)
    found = []
    for weights in (ahead, dataclasses.replace(ahead, lookahead=0.0)):
        step = backend.train_step(backend.build(with_weights(weights), seed=7), RECIPE)
        step.step([batch(3)], objective(step), 1e-3, 0)
        found.append(state_of(step))
    for name in found[0]:
        if name.startswith("exp_avg.") and not name.startswith("exp_avg.lookahead."):
            np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
