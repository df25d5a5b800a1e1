"""Losses of the MLX backend against those of mlx-lm-lora: values and every parameter's gradient.

Its functions score the same native model, in float32. Where the two differ is said by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch, Example, join
from chronos.common.training.objectives import OddsRatio, PolicyGradient, Preference
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing.train_tests import TINY
from chronos.train.rollouts import Answer, rows

NEEDS = ("mlx", "mlx_lm", "mlx_lm_lora")
BETA1 = 0.5
PROMPTS, ANSWERS = (3, 6, 2), ((4, 7), (5, 1), (3, 3))  # lengths; of answers chosen and rejected


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Compiling on a CPU starts a C++ compiler for every function."""
    mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
    mx.disable_compile()
    yield
    mx.enable_compile()


def ids(rng: np.random.Generator, count: int) -> list[int]:
    return [int(token) for token in rng.integers(6, TINY.vocab_size, count)]


def pairs(count: int) -> list[list[tuple[list[int], list[int]]]]:
    """(prompt, answer) of the chosen and of the rejected rows."""
    rng = np.random.default_rng(0)
    prompts = [ids(rng, n) for n in PROMPTS[:count]]
    return [
        [(p, ids(rng, lengths[side])) for p, lengths in zip(prompts, ANSWERS, strict=False)]
        for side in (0, 1)
    ]


def theirs_of(side: list[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    """Ids and mask [P, T], padded on the right."""
    import mlx.core as mx

    width = max(len(p) + len(a) for p, a in side)
    whole = [p + a + [0] * (width - len(p) - len(a)) for p, a in side]
    mask = [[0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in side]
    return mx.array(whole), mx.array(mask).astype(mx.float32)


def ours_of(sides: list[list[tuple[list[int], list[int]]]]) -> Batch:
    examples = [
        [Example(np.array(p + a, np.int32), np.arange(len(p + a)) >= len(p))]
        for pair in zip(*sides, strict=True)
        for p, a in pair
    ]
    return join(examples, 0, answers=True)


def policy(seed: int = 7) -> Any:
    from chronos.backends import mlx as backend

    return backend.build(TINY, seed=seed)


def logits_of(model: Any) -> Callable[..., Any]:
    return lambda x, cache=None: model(x).logits


def check(batch: Batch, objective: Any, loss: Callable[[Any], Any], *, slope: bool = True) -> Any:
    """The same loss and, with `slope`, the same gradient; returns what ours logs."""
    import mlx.nn as nn

    from chronos.backends import mlx as backend
    from chronos.backends.mlx.checkpoint import named, tensor_at

    model = policy()
    model.train()
    value, tree = nn.value_and_grad(model, lambda: loss(logits_of(model)))()
    expected = {name: np.array(tensor_at(place)) for name, place in named(tree)}
    step = backend.train_step(policy(), OptimizerRecipe(clip=1e9, beta1=BETA1))
    terms = step.step([batch], objective, 0.0, 0)
    assert terms["loss"] == pytest.approx(float(value), rel=1e-5, abs=1e-5)
    found = {
        name.removeprefix("exp_avg."): np.frombuffer(bytes(data), np.float32).reshape(shape)
        for name, _, shape, data in step.state()
        if name.startswith("exp_avg.")
    }
    assert expected.keys() == found.keys()
    assert max(np.abs(gradient).max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items() if slope else ():
        close = {"atol": 1e-5, "rtol": 1e-5, "err_msg": name}
        np.testing.assert_allclose(found[name] / (1 - BETA1), gradient, **close)
    return terms


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo(kind: str) -> None:
    from mlx_lm_lora.trainer.dpo_trainer import compute_score, dpo_loss, get_token_scores

    from chronos.backends import mlx as backend

    sides, reference = pairs(3), policy(8)
    given = [theirs_of(side) for side in sides]
    logged: dict[str, Any] = {}

    def loss(model: Any) -> Any:
        scores = [
            compute_score(get_token_scores(m, *side), side[1], kind)
            for m in (model, logits_of(reference))
            for side in given
        ]
        masks = [mask for _, mask in given]
        found, _, _, metrics = dpo_loss(*scores, *masks, beta=0.3, delta=0.0, loss_type=kind)
        logged.update(metrics)
        return found

    batch = ours_of(sides)
    batch = batch.with_extra({"reference": backend.score(reference, batch).log_probs_BT})
    terms = check(batch, Preference(kind=kind, beta=0.3), loss)
    if kind == "sigmoid":  # their accuracy is that of the means of the batch
        assert terms["rewards/margins"] == pytest.approx(float(logged["margins"]), abs=1e-5)


def test_orpo() -> None:
    """Of one pair: their cross-entropy of several is a mean of rows, not of tokens."""
    import mlx.core as mx
    from mlx_lm_lora.trainer.orpo_trainer import get_logps, orpo_loss

    sides = pairs(1)
    (chosen, chosen_mask), (rejected, rejected_mask) = map(theirs_of, sides)

    def loss(model: Any) -> Any:
        good, bad = get_logps(model, chosen, chosen_mask), get_logps(model, rejected, rejected_mask)
        found, *_ = orpo_loss(*good, *bad, chosen_mask, rejected_mask, mx.ones(1), beta=0.3)
        return found

    check(ours_of(sides), OddsRatio(beta=0.3), loss)


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo(kind: str, level: str, beta: float) -> None:
    """On policy. Their divergence has the forward KL's gradient; its value is ours."""
    import mlx.core as mx
    from mlx_lm_lora.trainer.grpo_trainer import grpo_loss

    from chronos.backends import mlx as backend

    o = PolicyGradient(kind=kind, level=level, beta=beta, max_tokens=9)
    reference, (side, _) = policy(8), pairs(3)
    advantages = np.array([0.7, -1.1, 0.4], np.float32)

    def loss(model: Any) -> Any:
        found, *_ = grpo_loss(
            model, logits_of(reference), [[p for p, _ in side]],
            completions=[mx.array(a) for _, a in side], batch_indices=[0, 1, 2],
            advantages=mx.array(advantages), beta=beta, epsilon=0.2, max_tokens=9,
            importance_sampling_level=level, grpo_loss_type=kind,
        )  # fmt: skip
        return found

    batch = rows([p for p, _ in side], [Answer(a, "", False) for _, a in side], 0)
    known = backend.score(reference, batch).log_probs_BT
    batch = batch.with_extra({"advantages": advantages, "reference": known})
    check(batch, o, loss, slope=not beta)
