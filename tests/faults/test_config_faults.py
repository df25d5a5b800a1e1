"""X3: whatever a config.json holds, it is a config within bounds or a ConfigError."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import count_parameters

VALID = ModelConfig().to_json()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "mla", "xx"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)
# Values that sit on, or just past, some bound.
EDGES = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 2**15, 2**31, 2**32, 2**63, 10**9, 10**30, 0.5, -0.0, math.inf, math.nan]
)


def check(data: dict) -> None:
    try:
        config = ModelConfig.from_json(data)
    except ConfigError as error:
        assert str(error)
        return
    assert config.num_experts_per_tok <= config.num_experts
    assert config.rope_dim % 2 == config.head_dim % 2 == 0
    assert all(config.attention_kind(i) in ("mla", "sliding") for i in range(3))
    assert ModelConfig.from_json(config.to_json()) == config
    # Arithmetic alone: nothing is allocated to find out that a model is too large.
    assert config.num_routed_experts * config.expert_parameters <= 1 << 43


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(VALID)), JSON | EDGES, max_size=4))
def test_changed_fields(changes: dict) -> None:
    check(VALID | changes)


@settings(max_examples=100, deadline=None)
@given(data=st.dictionaries(st.sampled_from([*sorted(VALID), "auto_map", "y"]), JSON | EDGES))
def test_arbitrary_objects(data: dict) -> None:
    check(data | {"model_type": "chronos"})


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_arbitrary_bytes(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("c") / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(path)


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 100_000, "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "null", "[]", '"x"', ""],
    ids=["nested", "lists", "digits", "null", "array", "string", "empty"],
)
def test_hostile_text(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(tmp_path)


def test_huge_file_is_refused_unread(tmp_path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take a terabyte of memory
    with pytest.raises(ConfigError, match="larger than"):
        ModelConfig.from_json(tmp_path)


def test_code_from_the_checkpoint_is_refused(tmp_path) -> None:
    data = VALID | {"auto_map": {"AutoConfig": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()")
    with pytest.raises(ConfigError, match="auto_map"):
        ModelConfig.from_json(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "evil.py"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 2**63},
        {"num_experts": 0, "num_local_experts": 0},
        {"num_experts_per_tok": 64},
        # Each within its own bound, together some 10^18 parameters.
        {"num_hidden_layers": 512, "num_experts": 65_535, "num_local_experts": 65_535,
         "hidden_size": 65_536, "moe_intermediate_size": 1 << 20},
    ],
    ids=range(6),
)  # fmt: skip
def test_sizes_beyond_reason(changes: dict) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_json(VALID | changes)


def test_the_largest_published_geometry_is_accepted() -> None:
    config = ModelConfig(
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        head_dim=128,
        vocab_size=163_840,
        num_experts=384,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        kv_latent_dim=512,
        rope_dim=64,
    )
    assert 0.9e12 < count_parameters(config) < 1.2e12
