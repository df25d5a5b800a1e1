"""Memory of an update: exact for weights, and what autograd keeps, counted, for activations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.model.config import ModelConfig
from chronos.common.training import memory
from chronos.common.training.objectives import NextToken, count
from chronos.common.training.recipe import OPTIMIZERS, OptimizerRecipe

GEOMETRY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 500, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48, "kv_latent_dim": 24, "rope_dim": 8, "sliding_window": 64,
    "lookahead_hidden_size": 32, "max_position_embeddings": 256, "num_shared_experts": 2,
}  # fmt: skip
CONFIG = ModelConfig(**GEOMETRY, hybrid_pattern=("mla",))
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 64)).astype(np.int32)


def kept_by_autograd(config: ModelConfig, ids: np.ndarray, again: bool = False) -> int:
    """Bytes of the tensors that torch keeps for a backward pass, weights left out."""
    torch = pytest.importorskip("torch")
    from chronos.backends import torch as backend
    from chronos.backends.torch.losses import losses

    model = backend.build(config, seed=1, device="cpu").train()
    model.gradient_checkpointing = again
    data = Batch(ids, np.roll(ids, -1, 1), np.zeros_like(ids))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x: else its place is taken again
        return x

    goal = NextToken(config.loss_weights)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses(model, data, goal, count([data], goal, config.lookahead_steps), None)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("pattern", [("mla",), ("sliding",), ("mla", "sliding")])
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 32, "moe_intermediate_size": 128}])
def test_activations_are_what_autograd_keeps(
    pattern: tuple[str, ...], changes: dict[str, int]
) -> None:
    config = ModelConfig(**(GEOMETRY | changes), hybrid_pattern=pattern)
    softmax = memory.logits(config, IDS.size) / 2  # the logits themselves are gone by then
    found = kept_by_autograd(config, IDS) - softmax
    assert memory.activations(config, *IDS.shape) == pytest.approx(found, rel=0.03)


def test_a_layer_that_is_computed_again_leaves_its_input() -> None:
    """What is left of all layers, and one whole: as many activations as a model of one has more."""
    one, two = (dataclasses.replace(CONFIG, num_hidden_layers=n) for n in (1, 2))
    layer = memory.activations(two, *IDS.shape) - memory.activations(one, *IDS.shape)
    found = kept_by_autograd(CONFIG, IDS, again=True) - memory.logits(CONFIG, IDS.size) / 2 + layer
    planned = memory.activations(CONFIG, *IDS.shape, again=True)
    assert planned == pytest.approx(found, rel=0.05)
    assert planned < 0.6 * memory.activations(CONFIG, *IDS.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_what_is_kept_are_exact(backend: Any, name: str) -> None:
    recipe = OptimizerRecipe(name=name)
    step = backend.train_step(backend.build(CONFIG, seed=1), recipe)
    data = Batch(*(np.ones((1, 4), np.int32) * x for x in (1, 1, 0)))
    step.step([data], NextToken(), 1e-3, 0)
    size = sum(4 * int(np.prod(shape)) for n, _, shape, _ in step.state() if n != "optimizer.step")
    found = memory.weights(CONFIG, recipe)
    assert found["parameters"] + found["optimizer"] == size
    assert found["gradients"] == found["parameters"]


def test_logits_are_those_of_one_tile() -> None:
    row = 4 * CONFIG.vocab_size
    assert memory.logits(CONFIG, 10) == 2 * 10 * row
    assert memory.TILE_BYTES < memory.logits(CONFIG, 10**9) <= 2 * memory.TILE_BYTES
