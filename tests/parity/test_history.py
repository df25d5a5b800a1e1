"""Routing by the past: the same choice however a text is cut, known a token before it is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing.model_tests import CONFIG, close, tokens
from chronos.testing.tolerances import assert_close
from chronos.testing.train_tests import TINY, batch, objective

HISTORY = dataclasses.replace(
    CONFIG,
    routing_source="history",
    num_experts_per_tok=3,
    num_resident_experts=2,
    num_resident_experts_per_tok=1,
)
NEAR, FIRST = 1, 2  # of the chosen ones the resident; the first streamed expert
CONFIGS = {
    "history": HISTORY,
    "two decays": dataclasses.replace(HISTORY, history_decay=(0.5, 0.95)),
    "unit norm": dataclasses.replace(HISTORY, history_decay=(0.5, 0.9), history_norm="unit"),
    "each layer its own": dataclasses.replace(
        HISTORY, routing_source=("gate", "history", "informed", "history")
    ),
}
CHUNKS = [[1] * 60, [6, 1, 7, 8, 38], [59, 1], [1, 59]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_chunking_gives_the_same_choice(backend: Any, name: str, chunks: list[int]) -> None:
    model, ids = backend.build(CONFIGS[name], seed=3), tokens(60)
    whole = backend.forward(model, ids)
    cache, parts, start = model.new_cache(), [], 0
    for count in chunks:
        parts.append(backend.forward(model, ids[:, start : start + count], cache=cache))
        start += count
    np.testing.assert_array_equal(np.concatenate([p.ids_LNK for p in parts], 1), whole.ids_LNK)
    close(np.concatenate([p.logits_BTV for p in parts], 1), whole.logits_BTV)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_said_to_come_comes(backend: Any, name: str) -> None:
    """After a piece, after each token, and of a copy of the cache that goes another way."""
    config, ids = CONFIGS[name], tokens(40)
    model = backend.build(config, seed=3)
    cache, follow = model.new_cache(), layers_that_follow(config)
    backend.forward(model, ids[:, :11], cache=cache)
    for t in range(11, 40):
        said = {layer: ids_BK.tolist()[0] for layer, ids_BK in model.upcoming(cache).items()}
        assert sorted(said) == follow
        fork = cache.copied()
        for each, token in ((cache, ids[:, t : t + 1]), (fork, (ids[:, t : t + 1] + 1) % 61)):
            found = backend.forward(model, token.astype(np.int32), cache=each).ids_LNK
            for layer in follow:
                np.testing.assert_array_equal(found[layer, 0, NEAR:], said[layer])


@pytest.mark.parametrize("place", [0, 1, 7, 22])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_moves_no_streamed_choice_up_to_itself(backend: Any, name: str, place: int) -> None:
    """In any layer. A document's first token is the exception: it chooses for itself."""
    config = CONFIGS[name]
    model, ids = backend.build(config, seed=3), tokens(24)
    changed, moved = ids.copy(), False
    changed[0, place] = (changed[0, place] + 1) % config.vocab_size
    before, after = (backend.forward(model, each).ids_LNK for each in (ids, changed))
    for layer in layers_that_follow(config):
        last = place + 1 if place else 0
        np.testing.assert_array_equal(after[layer, :last, NEAR:], before[layer, :last, NEAR:])
        moved |= bool((after[layer, last:, NEAR:] != before[layer, last:, NEAR:]).any())
    assert moved  # later ones it does


def layers_that_follow(config: ModelConfig) -> list[int]:
    return [layer for layer, name in enumerate(config.routing_sources) if name == "history"]


def test_both_backends_choose_alike(both: tuple[Any, Any], tmp_path: Path) -> None:
    """Over 10,000 tokens; where two means are nearer than float32 sums agree, either may win."""
    torch, mlx = both
    torch.save(torch.build(HISTORY, seed=4), tmp_path / "model")
    ids = tokens(250, seed=9, batch=40)
    first, second = (
        backend.forward(backend.load(tmp_path / "model", device="cpu", resident=True), ids)
        for backend in both
    )
    assert first.ids_LNK.shape[1] == 10_000
    apart = (np.sort(first.ids_LNK, -1) != np.sort(second.ids_LNK, -1)).any(-1)
    assert apart.mean() <= 1e-4
    assert len(np.unique(first.ids_LNK)) == HISTORY.num_experts


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_balance_is_that_of_each_tier(backend: Any, factor: float) -> None:
    """Each as if it were a layer of its own, by its share of the picks."""
    weights = LossWeights(balance=0.3, temporal=0, locality=0, lookahead=0, lookahead_hit=0)
    config = dataclasses.replace(
        HISTORY, num_hidden_layers=2, streamed_balance=factor, loss_weights=weights
    )
    model, data = backend.build(config, seed=7), batch(3, pads=5)
    out = backend.forward(model, data.ids_BT, segments_BT=data.segments_BT)
    real_N = data.segments_BT.reshape(-1) >= 0
    expected, share = 0.0, NEAR / config.num_experts_per_tok
    tiers = (
        (slice(0, FIRST), slice(0, NEAR), share),
        (slice(FIRST, None), slice(NEAR, None), None),
    )
    for layer in range(2):
        for experts, picked, own in tiers:
            probs_TE = out.probs_LNE[layer, real_N, experts].astype(np.float64)
            p_E = (probs_TE / probs_TE.sum(-1, keepdims=True)).mean(0)
            ids = out.ids_LNK[layer, real_N, picked].ravel() - (experts.start or 0)
            f_E = np.bincount(ids, minlength=len(p_E)) / len(ids)
            weight = own if own is not None else (1 - share) * factor
            expected += weight * len(p_E) * (f_E * p_E).sum()
    step = backend.train_step(model, OptimizerRecipe(seed=3))
    found = step.step([data], objective(step), 1e-3, 0)
    assert_close(found["balance"], expected, "losses")
    assert_close(found["loss"], found["ce"] + 0.3 * expected, "losses")


def test_continuing_is_the_same_run(backend: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, **{f: getattr(HISTORY, f) for f in SHAPE}, dropout=0.1, fallback_mask_prob=0.1
    )
    straight = start(backend, config)
    for number in range(4):
        if number == 2:
            state = [(*entry[:3], bytes(entry[3])) for entry in straight.state()]
            write_tensors(tmp_path / "state.safetensors", state)
        straight.step([batch(number)], objective(straight), 1e-2, number)
    resumed = start(backend, config)
    resumed.load_state(read_tensors(tmp_path / "state.safetensors"))
    for number in (2, 3):
        resumed.step([batch(number)], objective(resumed), 1e-2, number)
    wanted = {name: bytes(data) for name, _, _, data in straight.state()}
    assert {name: bytes(data) for name, _, _, data in resumed.state()} == wanted
    assert any("previous_gate" in name for name in wanted)


SHAPE = (
    "routing_source", "num_experts_per_tok", "num_resident_experts", "num_resident_experts_per_tok",
)  # fmt: skip


def start(backend: Any, config: ModelConfig) -> Any:
    return backend.train_step(backend.build(config, seed=7), OptimizerRecipe(seed=5))


def test_the_past_of_the_streamed_gate_is_trained(backend: Any) -> None:
    """Of two tokens and one layer, only the second has a label: the weights of its streamed experts
    are the first one's scores, so a gradient of their rows in the gate comes from there."""
    config = dataclasses.replace(
        TINY,
        **{f: getattr(HISTORY, f) for f in SHAPE},
        num_hidden_layers=1,
        hybrid_pattern=("mla",),
        loss_weights=LossWeights(balance=0, temporal=0, locality=0, lookahead=0, lookahead_hit=0),
    )
    step, data = start(backend, config), batch(0)
    data.labels_BT[:] = -100
    data.segments_BT[:] = -1
    data.segments_BT[0, :2], data.labels_BT[0, 1] = 0, 5
    step.step([data], objective(step), 1e-2, 0)
    [gradient_ED] = [
        np.frombuffer(bytes(values), np.float32).reshape(shape)
        for name, _, shape, values in step.state()
        if name == "exp_avg.model.layers.0.mlp.gate.weight"
    ]
    assert np.abs(gradient_ED[FIRST:]).max() > 1e-6
