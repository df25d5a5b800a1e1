"""The config's two spellings, its checks, and the sizes derived from it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from chronos.common.errors import ConfigError
from chronos.common.model.config import LossWeights, ModelConfig

SMALL = ModelConfig(hidden_size=64, num_hidden_layers=3, loss_weights=LossWeights(temporal=0.1))


def changed(**changes) -> dict:
    return SMALL.to_json() | changes


def test_round_trip_through_a_folder(tmp_path) -> None:
    (tmp_path / "config.json").write_text(SMALL.dumps(), "utf-8")
    assert ModelConfig.from_json(tmp_path) == SMALL
    assert ModelConfig.from_json(str(tmp_path / "config.json")) == SMALL
    assert ModelConfig.from_json(SMALL.to_json()) == SMALL


def test_both_spellings_are_written() -> None:
    data = SMALL.to_json()
    assert data["num_experts"] == data["num_local_experts"] == 32
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 1e6
    assert json.loads(SMALL.dumps()) == json.loads(json.dumps(data))


@pytest.mark.parametrize(
    "gone", ["num_experts", "num_local_experts", "rope_theta", "rope_parameters"]
)
def test_either_spelling_is_read(gone: str) -> None:
    data = changed(num_experts=16, num_local_experts=16, rope_theta=5e5)
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    del data[gone]
    config = ModelConfig.from_json(data)
    assert (config.num_experts, config.rope_theta) == (16, 5e5)


def test_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts is 32 in one spelling, 16"):
        ModelConfig.from_json(changed(num_local_experts=16))


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_experts'"):
        ModelConfig.from_json(changed(num_expert=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be 1 to"),
        ({"num_experts": 0, "num_local_experts": 0}, "num_experts must be 1 to"),
        ({"num_experts_per_tok": 33}, "above num_experts"),
        ({"hidden_size": 64.5}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"vocab_size": 10**12}, "vocab_size must be 1 to"),
        ({"rope_dim": 7}, "rope_dim must be even"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"hybrid_pattern": []}, "hybrid_pattern"),
        ({"hybrid_pattern": ["mla", "linear"]}, "hybrid_pattern"),
        ({"fallback_mask_prob": 0.1, "num_shared_experts": 0}, "needs a shared expert"),
        ({"loss_weights": {"balance": -1}}, "at least 0"),
        ({"loss_weights": {"speed": 1}}, "loss_weights takes"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "yarn"}}, "RoPE scaling"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(changed(**change))


HISTORY = {"routing_source": "history"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing_source": "past"}, "routing_source must be one of"),
        ({"routing_source": ["gate", "history"]}, "one for each of the 3 layers"),
        (HISTORY | {"num_resident_experts_per_tok": 0}, "1 <= num_resident_experts_per_tok"),
        (HISTORY | {"num_resident_experts": 1}, "<= num_resident_experts"),
        (HISTORY | {"num_resident_experts_per_tok": 4}, "at least one streamed expert"),
        (HISTORY | {"num_resident_experts": 31}, "2 of 1 are left"),
        (HISTORY | {"norm_topk_prob": False}, "needs norm_topk_prob"),
        ({"history_decay": 1.0}, "history_decay must be"),
        ({"history_decay": []}, "history_decay must be"),
        ({"history_decay": [0.5] * 29}, "at most one a streamed expert"),
        ({"history_norm": "max"}, "history_norm must be one of"),
        ({"streamed_balance": -1.0}, "streamed_balance must be at least 0"),
    ],
    ids=str,
)
def test_routing_that_cannot_be_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(changed(**change))


def test_error_names_the_file(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(num_experts_per_tok=99)), "utf-8")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        ModelConfig.from_json(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_json(tmp_path / "nowhere")


def test_pattern_repeats_over_the_layers() -> None:
    assert [SMALL.attention_kind(layer) for layer in range(3)] == ["mla", "sliding", "mla"]


def test_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.hidden_size = 3  # type: ignore[misc]


def test_derived_sizes() -> None:
    assert SMALL.expert_parameters == 3 * 64 * 512
    assert SMALL.num_routed_experts == 3 * 32
    assert dataclasses.replace(SMALL, dtype="bfloat16").dtype_bytes == 2
