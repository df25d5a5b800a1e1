"""Each backend's training step against formulas: terms in NumPy, gradients by finite differences.

A gradient is read off the optimizer: after one unclipped update the first moment is (1 - beta1)
times the gradient, whichever backend wrote it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.training import losses
from chronos.common.training.recipe import TrainRecipe
from chronos.testing import oracle
from chronos.testing.tolerances import assert_close
from chronos.testing.train_tests import TINY, batch

RECIPE = TrainRecipe(batch_size=2, seq_len=16, clip=1e9, beta1=0.5, seed=3)
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
    """Terms of one batch from a forward's outputs, by `common.losses`."""
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
        "entropy": losses.router_entropy(probs, segments),
        "largest_share": losses.largest_share(share),
        "effective_experts": float(losses.effective_experts(share).mean()),
        "effective_experts_min": float(losses.effective_experts(share).min()),
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
    evaluated = step.evaluate([data])
    trained = step.step([data], 1e-3, 0)
    assert expected.keys() == evaluated.keys()
    for name, value in expected.items():
        assert_close(evaluated[name], value, "losses", name)
        assert_close(trained[name], value, "losses", name)


def test_fractions_are_those_of_the_global_batch(backend: Any) -> None:
    """The second micro-batch's balance term counts the picks of the first as well."""
    data = [batch(3), batch(4)]
    step = backend.train_step(backend.build(TINY, seed=7), RECIPE)
    outs = [backend.forward(step.model, d.ids_BT, segments_BT=d.segments_BT) for d in data]
    E, shape = TINY.num_experts, data[0].segments_BT.shape
    picks = [np.stack([np.bincount(i.reshape(-1), minlength=E) for i in o.ids_LNK]) for o in outs]
    so_far = [picks[0], picks[0] + picks[1]]
    terms = [
        E
        * ((p / p.sum(-1, keepdims=True)) * o.probs_LNE.reshape(-1, shape[0] * shape[1], E).mean(1))
        for p, o in zip(so_far, outs, strict=True)
    ]
    assert_close(step.step(data, 1e-3, 0)["balance"], np.mean([t.sum() for t in terms]), "losses")


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
    step.step([data], 1e-3, 0)
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
        step.step([batch(3)], 1e-3, 0)
        found.append(state_of(step))
    for name in found[0]:
        if name.startswith("exp_avg.") and not name.startswith("exp_avg.lookahead."):
            np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
