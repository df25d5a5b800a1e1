"""The tensors a config implies: names are a format, so they are pinned here."""

from __future__ import annotations

import dataclasses
import math

import pytest

from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    count_parameters,
    dense_tensors,
    expert_name,
    expert_tensors,
    lookahead_tensors,
    routed_tensors,
)

CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=100,
    num_experts=5,
    num_experts_per_tok=2,
    num_shared_experts=2,
    moe_intermediate_size=24,
    kv_latent_dim=16,
    rope_dim=6,
    lookahead_steps=2,
    lookahead_hidden_size=12,
    dtype="bfloat16",
)


def shapes(specs) -> dict[str, tuple[int, ...]]:
    found = {spec.name: spec.shape for spec in specs}
    assert len(found) == len(specs), "a name appears twice"
    return found


def test_latent_attention() -> None:
    found = shapes(dense_tensors(CONFIG))
    prefix = "model.layers.2.self_attn."
    assert {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)} == {
        "q_proj.weight": (4 * (8 + 6), 32),
        "kv_down_proj.weight": (16, 32),
        "kv_norm.weight": (16,),
        "k_rope_proj.weight": (6, 32),
        "k_up_proj.weight": (4 * 8, 16),
        "v_up_proj.weight": (4 * 8, 16),
        "o_proj.weight": (32, 4 * 8),
    }


def test_window_attention() -> None:
    found = shapes(dense_tensors(CONFIG))
    prefix = "model.layers.1.self_attn."
    assert {n.removeprefix(prefix): s for n, s in found.items() if n.startswith(prefix)} == {
        "q_proj.weight": (32, 32),
        "k_proj.weight": (16, 32),
        "v_proj.weight": (16, 32),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
        "o_proj.weight": (32, 32),
    }


def test_the_rest_of_the_dense_part() -> None:
    found = shapes(dense_tensors(CONFIG))
    assert found["model.embed_tokens.weight"] == (100, 32)
    assert found["model.norm.weight"] == (32,)
    assert found["model.layers.0.mlp.gate.weight"] == (5, 32)
    assert found["model.layers.0.mlp.shared_experts.1.gate_up_proj.weight"] == (48, 32)
    assert not any("lm_head" in name or ".experts." in name for name in found)


def test_experts_in_record_order() -> None:
    assert [(s.name, s.shape) for s in expert_tensors(CONFIG)] == [
        ("gate_up_proj", (48, 32)),
        ("down_proj", (32, 24)),
    ]
    found = shapes(routed_tensors(CONFIG))
    assert len(found) == 3 * 5 * 2
    assert found["model.layers.2.mlp.experts.4.down_proj.weight"] == (32, 24)
    assert expert_name(2, 4, "down_proj") in found


def test_lookahead_router_is_float32() -> None:
    specs = lookahead_tensors(CONFIG)
    assert shapes(specs) == {
        "lookahead.norm.weight": (32,),
        "lookahead.in_proj.weight": (12, 32),
        "lookahead.out_proj.weight": (3 * 3 * 5, 12),
    }
    assert {spec.dtype for spec in specs} == {"float32"}


def test_sizes() -> None:
    assert {spec.dtype for spec in dense_tensors(CONFIG)} == {"bfloat16"}
    experts = routed_tensors(CONFIG)
    parameters = CONFIG.num_routed_experts * CONFIG.expert_parameters
    assert sum(s.nbytes for s in experts) == 2 * parameters
    every = dense_tensors(CONFIG) + experts
    assert count_parameters(CONFIG) == sum(math.prod(s.shape) for s in every)


@pytest.mark.parametrize("shared", [0, 1])
def test_shared_experts_are_counted(shared: int) -> None:
    config = dataclasses.replace(CONFIG, num_shared_experts=shared)
    fewer = (2 - shared) * 3 * CONFIG.expert_parameters
    assert count_parameters(config) == count_parameters(CONFIG) - fewer
