"""The oracle itself, held to properties that need no second implementation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chronos.common.model.config import ModelConfig
from chronos.testing import oracle

CONFIG = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    max_position_embeddings=64,
    rope_theta=100.0,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    kv_latent_dim=8,
    rope_dim=6,
    sliding_window=4,
    lookahead_hidden_size=8,
)
WEIGHTS = oracle.random_weights(CONFIG)
IDS = np.random.default_rng(1).integers(0, 40, (2, 11))


def run(ids=IDS, weights=WEIGHTS, config=CONFIG, **kwargs) -> oracle.OracleOutput:
    return oracle.forward(weights, config, ids, **kwargs)


def changed(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def only(kind: str, **changes) -> ModelConfig:
    return changed(num_hidden_layers=1, hybrid_pattern=(kind,), **changes)


def test_shapes() -> None:
    out = run()
    assert out.logits_BTV.shape == (2, 11, 40)
    assert out.probs_LBTE.shape == (2, 2, 11, 6)
    assert out.ids_LBTK.shape == out.weights_LBTK.shape == (2, 2, 11, 2)
    assert out.lookahead_BTJLE is not None
    assert out.lookahead_BTJLE.shape == (2, 11, 3, 2, 6)
    np.testing.assert_allclose(out.probs_LBTE.sum(-1), 1)
    np.testing.assert_allclose(out.weights_LBTK.sum(-1), 1)


@pytest.mark.parametrize("place", [0, 5, 10])
def test_the_past_does_not_see_the_future(place: int) -> None:
    other = IDS.copy()
    other[:, place] = (other[:, place] + 1) % 40
    before, after = run().logits_BTV, run(other).logits_BTV
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert abs(before[:, place:] - after[:, place:]).max(-1).min() > 1e-6


def test_rotation_keeps_norms_and_knows_distances_only() -> None:
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 8))
    scores = []
    for shift in (0, 1, 100, 30_000):
        rotated = [oracle.rope(x, np.array(p + shift), 1e4) for x, p in ((q, 7), (k, 3))]
        np.testing.assert_allclose(np.linalg.norm(rotated[0]), np.linalg.norm(q))
        scores.append(rotated[0] @ rotated[1])
    np.testing.assert_allclose(scores, scores[0])
    assert abs(scores[0] - q @ k) > 1e-3


def test_rotation_is_half_split() -> None:
    """Pairs are (i, i + n/2), the first pair turning by one radian a position."""
    turned = oracle.rope(np.array([1.0, 0.0, 0.0, 0.0]), np.array(1), 1e4)
    np.testing.assert_allclose(turned, [np.cos(1), 0, np.sin(1), 0])


def test_a_window_layer_forgets() -> None:
    """One layer with window 4: token t depends on t-3 .. t."""
    config = only("sliding")
    weights = oracle.random_weights(config)
    before = run(weights=weights, config=config).logits_BTV
    other = IDS.copy()
    other[:, 2] = (other[:, 2] + 1) % 40
    change = abs(run(other, weights, config).logits_BTV - before).max((0, 2)) > 1e-9
    assert np.flatnonzero(change).tolist() == [2, 3, 4, 5]


def test_a_latent_layer_does_not_forget() -> None:
    config = only("mla")
    weights = oracle.random_weights(config)
    other = IDS.copy()
    other[:, 2] = (other[:, 2] + 1) % 40
    change = run(other, weights, config).logits_BTV - run(weights=weights, config=config).logits_BTV
    assert np.flatnonzero(abs(change).max((0, 2)) > 1e-9).tolist() == list(range(2, 11))


@pytest.mark.parametrize("kind", ["mla", "sliding"])
def test_order_matters_through_the_rotation_alone(kind: str) -> None:
    """Swapping two early tokens moves the last one's logits; with one key it could not."""
    config = only(kind, sliding_window=64)
    weights = oracle.random_weights(config)
    swapped = IDS[:, [1, 0, *range(2, 11)]]
    a, b = (run(ids, weights, config).logits_BTV[:, -1] for ids in (IDS, swapped))
    assert abs(a - b).max() > 1e-6


def test_packed_documents_are_independent() -> None:
    """Each document of a packed row gives what it gives alone; padding changes nothing."""
    row = IDS[:1]
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]])
    packed = run(row, segments_BT=segments).logits_BTV
    np.testing.assert_allclose(packed[:, :4], run(row[:, :4]).logits_BTV, atol=1e-12)
    np.testing.assert_allclose(packed[:, 4:9], run(row[:, 4:9]).logits_BTV, atol=1e-12)


def test_ties_go_to_the_lower_index() -> None:
    ids, weights = oracle.route(np.array([[[0.2, 0.3, 0.2, 0.3, 0.0]]]), 3, False)
    assert ids.tolist() == [[[1, 3, 0]]]
    assert weights.tolist() == [[[0.3, 0.3, 0.2]]]


def test_all_experts_equal_one_dense_layer() -> None:
    """With the same expert everywhere, routing cannot matter when weights are renormalised."""
    weights = dict(WEIGHTS)
    for layer in range(2):
        for expert in range(6):
            for name in ("gate_up_proj", "down_proj"):
                first = f"model.layers.{layer}.mlp.experts.0.{name}.weight"
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = WEIGHTS[first]
    one, four = (run(weights=weights, config=changed(num_experts_per_tok=k)) for k in (1, 4))
    np.testing.assert_allclose(one.logits_BTV, four.logits_BTV, atol=1e-12)


def test_renormalising_is_a_choice() -> None:
    out = run(config=changed(norm_topk_prob=False))
    chosen = np.take_along_axis(out.probs_LBTE, out.ids_LBTK, -1)
    np.testing.assert_array_equal(out.weights_LBTK, chosen)
    assert abs(out.logits_BTV - run().logits_BTV).max() > 1e-6


def test_missing_experts_become_the_shared_one() -> None:
    available = np.ones((2, 6), bool)
    np.testing.assert_array_equal(run(available_LE=available).logits_BTV, run().logits_BTV)
    weights = dict(WEIGHTS)
    for name in ("gate_up_proj", "down_proj"):
        shared = WEIGHTS[f"model.layers.1.mlp.shared_experts.0.{name}.weight"]
        weights[f"model.layers.1.mlp.experts.3.{name}.weight"] = shared
    available[1, 3] = False
    replaced = run(available_LE=available).logits_BTV
    np.testing.assert_allclose(replaced, run(weights=weights).logits_BTV, atol=1e-12)


def test_committed_routing_follows_the_lookahead() -> None:
    out = run(config=changed(routing_source="lookahead"))
    assert out.lookahead_BTJLE is not None
    forecast = oracle.softmax(out.lookahead_BTJLE[:, :, 0, 1])
    np.testing.assert_array_equal(out.probs_LBTE[1], forecast)


def test_every_weight_has_an_effect() -> None:
    """A tensor the oracle never read would let a backend ignore it too."""
    base = run()
    for name, value in WEIGHTS.items():
        if ".mlp.experts." in name:
            layer, expert = (int(name.split(".")[i]) for i in (2, 5))
            if expert not in base.ids_LBTK[layer]:
                continue
        out = run(weights={**WEIGHTS, name: value * 1.5 + 0.1})
        if name.startswith("lookahead."):
            assert abs(out.lookahead_BTJLE - base.lookahead_BTJLE).max() > 1e-9, name
        else:
            assert abs(out.logits_BTV - base.logits_BTV).max() > 1e-9, name
