"""Each backend against the golden run: a tiny model's weights, its gradients, ten updates of it.

`python -m tests.golden.test_golden` writes golden.safetensors anew with the torch backend. Do that
only after a change that is meant to change numbers, and say so in the commit: whatever else
changes them is a bug in a backend, or in both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry, read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.model.weights import dense_tensors, lookahead_tensors, routed_tensors
from chronos.common.training import losses
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing import oracle
from chronos.testing.tolerances import assert_close

PATH = Path(__file__).with_name("golden.safetensors")
STEPS, RATE = 10, 3e-3
CONFIG = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=61,
    rope_theta=10_000.0,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    kv_latent_dim=8,
    rope_dim=4,
    sliding_window=5,
    lookahead_steps=2,
    lookahead_hidden_size=8,
    loss_weights=LossWeights(0.02, 0.01, 0.01, 0.5, 0.1),
    initializer_range=0.2,
)
RECIPE = OptimizerRecipe(weight_decay=0.1, clip=1.0)
OBJECTIVE = NextToken(CONFIG.loss_weights)
UNCLIPPED = dataclasses.replace(RECIPE, clip=1e9)
Arrays = dict[str, np.ndarray]


def batch(number: int) -> Batch:
    """Two documents a row, the second row ending in padding; every number follows from a rule."""
    at = np.arange(24).reshape(2, 12)
    ids = ((7 * at * at + 3 * at + 11 * number) % CONFIG.vocab_size).astype(np.int32)
    segments = np.repeat([[0] * 7 + [1] * 5], 2, axis=0).astype(np.int32)
    segments[1, 9:] = -1
    labels = np.where(segments >= 0, np.roll(ids, -1, axis=1), -100)
    labels[:, [6, 11]] = labels[1, 8] = -100
    return Batch(ids, labels.astype(np.int32), segments)


def arrays(state: Iterable[Any]) -> Arrays:
    """A step's state by name."""
    return {name: np.frombuffer(bytes(d), np.float32).reshape(s) for name, _, s, d in state}


def gradients(step: Any) -> Arrays:
    """Of the first batch. The first moment after one unclipped update is (1 - beta1) times it."""
    step.step([batch(0)], OBJECTIVE, RATE, 0)
    return {
        name.removeprefix("exp_avg."): value / np.float32(1 - RECIPE.beta1)
        for name, value in arrays(step.state()).items()
        if name.startswith("exp_avg.")
    }


def ten_updates(step: Any) -> tuple[list[dict[str, float]], Arrays]:
    """The terms of each update, and the state in the end."""
    return [step.step([batch(n)], OBJECTIVE, RATE, n) for n in range(STEPS)], arrays(step.state())


def write() -> None:
    from chronos.backends import torch

    def fresh(recipe: OptimizerRecipe) -> Any:
        return torch.train_step(torch.build(CONFIG, seed=1), recipe)

    groups = {"start": arrays(fresh(RECIPE).state()), "gradients": gradients(fresh(UNCLIPPED))}
    terms, groups["end"] = ten_updates(fresh(RECIPE))
    tensors = [
        (f"{group}/{name}", "F32", value.shape, np.ascontiguousarray(value))
        for group, found in groups.items()
        for name, value in found.items()
        if not name.startswith(("exp_avg", "optimizer."))
    ]
    write_tensors(PATH, tensors, {"terms": json.dumps(terms)})


@pytest.fixture(scope="module")
def groups() -> dict[str, Arrays]:
    """start, gradients, end: arrays by name."""
    found: dict[str, Arrays] = {"start": {}, "gradients": {}, "end": {}}
    for entry, data in read_tensors(PATH):
        group, _, name = entry.name.partition("/")
        found[group][name] = np.frombuffer(data, np.float32).reshape(entry.shape)
    return found


@pytest.fixture(scope="module")
def terms() -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(read_header(PATH).metadata["terms"])
    return found


def start(backend: Any, groups: dict[str, Arrays], recipe: OptimizerRecipe = RECIPE) -> Any:
    """A step that begins where the golden run began."""
    step = backend.train_step(backend.build(CONFIG, seed=0), recipe)
    step.load_state(
        (TensorEntry(name, "F32", value.shape, 0, value.nbytes), memoryview(bytearray(value)))
        for name, value in groups["start"].items()
    )
    return step


def test_gradients(backend: Any, groups: dict[str, Arrays]) -> None:
    found = gradients(start(backend, groups, UNCLIPPED))
    assert found.keys() == groups["gradients"].keys()
    for name, expected in groups["gradients"].items():
        assert_close(found[name], expected, "gradients", name)


def test_ten_updates(
    backend: Any, groups: dict[str, Arrays], terms: list[dict[str, float]]
) -> None:
    found, end = ten_updates(start(backend, groups))
    for number, expected in enumerate(terms):
        assert found[number].keys() == expected.keys()
        for name in ("loss", "ce", "balance", "temporal", "locality", "lookahead", "grad_norm"):
            label = f"{name} of update {number}"
            assert_close(found[number][name], expected[name], "loss curve", label)
    for name, value in groups["end"].items():
        assert_close(end[name], value, "weights after ten updates", name)


def test_the_first_loss_is_the_oracle_s(
    groups: dict[str, Arrays], terms: list[dict[str, float]]
) -> None:
    """The file itself, without a backend."""
    data = batch(0)
    out = oracle.forward(groups["start"], CONFIG, data.ids_BT, segments_BT=data.segments_BT)
    expected = losses.cross_entropy(out.logits_BTV, data.labels_BT)
    assert_close(terms[0]["ce"], expected, "losses")
    assert terms[-1]["loss"] < terms[0]["loss"]


@pytest.mark.parametrize("group", ["start", "gradients", "end"])
def test_every_parameter_is_in_the_file(groups: dict[str, Arrays], group: str) -> None:
    specs = dense_tensors(CONFIG) + routed_tensors(CONFIG) + lookahead_tensors(CONFIG)
    assert {n: v.shape for n, v in groups[group].items()} == {s.name: s.shape for s in specs}


if __name__ == "__main__":
    write()
