"""Which optimizer a parameter has."""

from __future__ import annotations

import math

import pytest

from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import dense_tensors, lookahead_tensors, routed_tensors
from chronos.common.training.optimizers import choose, kept_shapes
from chronos.common.training.recipe import OPTIMIZERS, OptimizerRecipe

CONFIG = ModelConfig(num_hidden_layers=2, num_experts=8)
TENSORS = [*dense_tensors(CONFIG), *routed_tensors(CONFIG), *lookahead_tensors(CONFIG)]


def test_muon_has_hidden_matrices_alone() -> None:
    recipe = OptimizerRecipe(name="muon")
    chosen = {t.name: choose(recipe, t.name, len(t.shape)) for t in TENSORS}
    muon = {name for name, choice in chosen.items() if choice.name == "muon"}
    assert "model.layers.0.mlp.experts.3.gate_up_proj.weight" in muon
    assert "model.layers.1.self_attn.o_proj.weight" in muon
    rest = {name.split(".", 3)[-1] if ".layers." in name else name for name in chosen.keys() - muon}
    assert rest == {
        "model.embed_tokens.weight", "model.norm.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight", "self_attn.kv_norm.weight", "self_attn.q_norm.weight",
        "self_attn.k_norm.weight", "mlp.gate.weight", "lookahead.norm.weight",
        "lookahead.in_proj.weight", "lookahead.out_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectors_and_the_embedding_do_not_decay(name: str) -> None:
    recipe = OptimizerRecipe(name=name, weight_decay=0.3)
    for tensor in TENSORS:
        plain = len(tensor.shape) < 2 or "embed" in tensor.name
        assert choose(recipe, tensor.name, len(tensor.shape)).weight_decay == (0 if plain else 0.3)


@pytest.mark.parametrize(("name", "numbers"), [("adamw", 12), ("muon", 6), ("adafactor", 5)])
def test_what_is_kept_of_a_matrix(name: str, numbers: int) -> None:
    assert sum(math.prod(shape) for shape in kept_shapes(name, (2, 3)).values()) == numbers


def test_an_optimizer_that_nobody_has() -> None:
    with pytest.raises(ConfigError, match="adamw, muon, adafactor"):
        OptimizerRecipe(name="sgd")
