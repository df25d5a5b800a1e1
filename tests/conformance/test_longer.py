"""A context that grows by YaRN: a tiny model reads beyond what it was trained on, and goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from chronos.common.data import Batch
from chronos.common.disk.header import TensorEntry
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.model.rope import lengthened
from chronos.common.training.objectives import NextToken
from chronos.common.training.recipe import OptimizerRecipe

TRAINED, LONG = 64, 256
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=32,
    max_position_embeddings=TRAINED,
    rope_theta=10_000.0,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=32,
    kv_latent_dim=16,
    rope_dim=16,
    sliding_window=4,
    hybrid_pattern=("mla",),
    lookahead_steps=0,
    lookahead_hidden_size=1,
    loss_weights=LossWeights(balance=0.01, lookahead=0.0),
)
_PERIOD, _UPDATES = 6, 300


def rows(seed: int, count: int, tokens: int) -> Batch:
    """Six random ids again and again: who looks six tokens back knows what comes."""
    words = np.random.default_rng(seed).integers(0, 16, (count, _PERIOD)).astype(np.int32)
    ids = np.tile(words, tokens // _PERIOD + 2)[:, : tokens + 1]
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.zeros((count, tokens), np.int32))


def beyond(backend: Any, model: Any) -> float:
    """Nats a token behind the first TRAINED ones."""
    return float(-backend.score(model, rows(10**6, 8, LONG)).log_probs_BT[:, TRAINED:].mean())


def within(backend: Any, model: Any) -> float:
    """Nats a token where training was, once a period is known."""
    return float(-backend.score(model, rows(10**6, 8, TRAINED)).log_probs_BT[:, 16:].mean())


@pytest.fixture(scope="module")
def trained() -> list[tuple[TensorEntry, bytearray]]:
    """The weights of a model that has learned rows of TRAINED tokens, by either backend."""
    backend: Any = pytest.importorskip("chronos.backends.torch")
    step = backend.train_step(backend.build(CONFIG, seed=1), OptimizerRecipe(weight_decay=0.0))
    for number in range(_UPDATES):
        rate = 6e-3 * min(1, (number + 1) / 20) * (1 - 0.9 * number / _UPDATES)
        step.step([rows(number, 4, TRAINED)], NextToken(CONFIG.loss_weights), rate, number)
    return [
        (TensorEntry(name, dtype, shape, 0, len(data)), bytearray(data))
        for name, dtype, shape, data in backend.tensors(step.model)
    ]


def test_a_model_reads_beyond_what_it_was_trained_on(
    backend: Any, trained: list[tuple[TensorEntry, bytearray]]
) -> None:
    def of(config: ModelConfig) -> Any:
        weights = [(entry, memoryview(bytearray(data))) for entry, data in trained]
        return backend.build(config, seed=0, weights=weights)

    known = within(backend, of(CONFIG))
    plain = beyond(backend, of(dataclasses.replace(CONFIG, max_position_embeddings=LONG)))
    longer = lengthened(CONFIG, LONG)
    scaled = beyond(backend, of(longer))
    assert known < 0.5  # it has learned its rows
    assert plain > known + 1.0  # the control: positions that training never had
    assert scaled < known + 0.2
    assert within(backend, of(longer)) < known + 0.2
