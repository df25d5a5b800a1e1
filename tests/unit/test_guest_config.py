"""Configs of other libraries' models: every spelling of the counts, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chronos.common.disk.tensors import write_tensors
from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import Geometry, GuestConfig, read_config

BASE = {
    "model_type": "olmoe",
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
UNKNOWN = BASE | {"model_type": "of_no_library"}
NATIVE = ModelConfig(hidden_size=64, num_hidden_layers=3)


def renamed(**names: str) -> dict[str, object]:
    """BASE with counts under other spellings."""
    return {names.get(key, key): value for key, value in BASE.items()}


@pytest.mark.parametrize(
    ("model_type", "data", "shared"),
    [
        ("olmoe", BASE, 0),
        ("mixtral", renamed(num_experts="num_local_experts"), 0),
        ("gpt_oss", renamed(num_experts="num_local_experts") | {"experts_per_token": 2}, 0),
        ("deepseek_v3", renamed(num_experts="n_routed_experts") | {"n_shared_experts": 1}, 1),
        (
            "ernie4_5_moe",
            renamed(num_experts="moe_num_experts", num_experts_per_tok="moe_k")
            | {"moe_num_shared_experts": 2},
            2,
        ),
        ("aria_text", renamed(num_experts="moe_num_experts", num_experts_per_tok="moe_topk"), 0),
        ("hunyuan_v1_moe", renamed(num_experts_per_tok="moe_topk") | {"moe_topk": [2, 1]}, 1),
        ("gemma4_text", renamed(num_experts_per_tok="top_k_experts"), 0),
        ("nemotron_h", renamed(num_hidden_layers="_") | {"layers_block_type": ["moe", "m"]}, 0),
        ("kimi_linear", renamed(num_experts_per_tok="num_experts_per_token"), 0),
        ("qwen2_moe", BASE | {"shared_expert_intermediate_size": 16}, 1),
        ("granitemoeshared", BASE | {"shared_intermediate_size": 16}, 1),
        ("granitemoehybrid", BASE | {"shared_intermediate_size": 0}, 0),
        ("llama4_text", renamed(num_experts="num_local_experts"), 1),
        ("deepseek_v2", BASE | {"n_shared_experts": None}, 0),
        (
            "dbrx",
            renamed(num_experts="_", num_experts_per_tok="_")
            | {"ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}},
            0,
        ),
        ("llama4", {"text_config": BASE, "vision_config": {"num_hidden_layers": 9}}, 1),
    ],
)
def test_counts_are_found_under_every_spelling(model_type: str, data: dict, shared: int) -> None:
    config = GuestConfig.from_json(data | {"model_type": model_type})
    assert config == GuestConfig(model_type, 100, 64, 2, 8, 2, shared)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype_in_both_spellings(data: dict, dtype: str) -> None:
    config = GuestConfig.from_json(BASE | data)
    assert (config.dtype, config.dtype_bytes) == (dtype, 4 if dtype == "float32" else 2)


def test_a_file_that_names_no_dtype_has_that_of_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE), "utf-8")
    data = np.zeros(4, np.uint8)
    write_tensors(
        tmp_path / "model.safetensors", [("a.scales", "U8", (4,), data), ("b", "BF16", (2,), data)]
    )
    assert GuestConfig.from_json(tmp_path).dtype == "bfloat16"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, 64),
        ({"rope_parameters": YARN}, 256),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 8}}, 64),  # less than named
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, 64),
        ({"rope_scaling": {"type": "longrope", "factor": 32.0}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, 64),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}}, 64),
        ({"rope_scaling": None}, 64),
    ],
)
def test_the_context_is_what_the_scaling_of_positions_allows(rope: dict, context: int) -> None:
    assert GuestConfig.from_json(BASE | rope).max_position_embeddings == context


def test_the_dtype_of_tensors_is_that_of_the_first_name(tmp_path: Path) -> None:
    """Files begin with the widest tensors, a router's say: that is not what is computed in."""
    (tmp_path / "config.json").write_text(json.dumps(BASE), "utf-8")
    data = np.zeros(8, np.uint8)
    items = [("model.gate", "F32", (2,), data), ("lm_head", "BF16", (4,), data)]
    write_tensors(tmp_path / "model.safetensors", items)
    assert GuestConfig.from_json(tmp_path).dtype == "bfloat16"
    write_tensors(tmp_path / "model.safetensors", [("a", "F64", (1,), data)])
    with pytest.raises(ConfigError, match=r"not 'float64'(.|\n)*add \"dtype\""):
        GuestConfig.from_json(tmp_path)


CLASSES = """
class TinyTextConfig(PreTrainedConfig):
    model_type = "tiny_moe_text"
    attribute_map = {"num_experts": "num_local_experts"}
    vocab_size: int = 77
    max_position_embeddings: int | None = 123
    num_local_experts: int = 6
    rope_parameters: dict | None = None

class TinyConfig(PreTrainedConfig):
    model_type = "tiny_moe"
    vocab_size: int = 10 * 10

class OldConfig(PreTrainedConfig):
    model_type = "tiny_old"

    def __init__(self, vocab_size=55, top_k=3, **kwargs):
        pass
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the installed Transformers."""
    for name in ("tiny_moe", "tiny_old"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "configuration_x.py").write_text(CLASSES)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)


@pytest.mark.usefixtures("library")
def test_what_a_file_leaves_out_is_the_default_of_its_class() -> None:
    text = {k: v for k, v in BASE.items() if k not in ("vocab_size", "model_type", "num_experts")}
    del text["max_position_embeddings"]
    config = GuestConfig.from_json({"model_type": "tiny_moe", "text_config": text})
    assert (config.vocab_size, config.max_position_embeddings, config.num_experts) == (77, 123, 6)
    old = BASE | {"model_type": "tiny_old", "num_experts_per_tok": None, "vocab_size": None}
    config = GuestConfig.from_json(old)
    assert (config.vocab_size, config.num_experts_per_tok) == (55, 3)
    with pytest.raises(ConfigError, match="no vocab_size"):  # not written as a plain value
        GuestConfig.from_json(BASE | {"model_type": "tiny_moe", "vocab_size": None})
    with pytest.raises(ConfigError, match="no vocab_size"):
        GuestConfig.from_json(BASE | {"model_type": "../tiny_moe", "vocab_size": None})


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, ""),
        ({"quantization": {"bits": 4, "group_size": 64}}, "mlx"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "mlx"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
    ],
)
def test_quantization_is_kept_by_name(data: dict, name: str) -> None:
    assert GuestConfig.from_json(BASE | data).quantization == name


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (BASE | {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        (UNKNOWN | {"num_experts": None}, "no routed experts"),
        (BASE | {"num_experts": 0}, "num_experts must be 1"),
        (BASE | {"num_experts": 10**9}, "num_experts must be 1"),
        (BASE | {"num_experts_per_tok": 9}, "above num_experts"),
        (BASE | {"num_experts_per_tok": True}, "num_experts_per_tok must be"),
        (BASE | {"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        (BASE | {"vocab_size": "many"}, "vocab_size must be"),
        (UNKNOWN | {"vocab_size": None}, 'no vocab_size(.|\n)*add "vocab_size"'),
        (BASE | {"model_type": None}, "no model_type"),
        (BASE | {"text_config": [1]}, "text_config is not an object"),
        (BASE | {"quantization_config": "fp8"}, "quantization_config is not an object"),
        (BASE | {"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_refusals_name_the_key(data: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        GuestConfig.from_json(data)


def test_a_folder_is_ours_or_a_guest_by_its_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(NATIVE.dumps(), "utf-8")
    native: Geometry = read_config(tmp_path)
    assert native == NATIVE
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"dtype": "float16"}), "utf-8")
    guest: Geometry = read_config(tmp_path)
    assert guest == GuestConfig("olmoe", 100, 64, 2, 8, 2, 0, "float16")


def test_both_kinds_of_folder_are_refused_for_code_of_their_own(tmp_path: Path) -> None:
    for data in (NATIVE.to_json(), BASE):
        (tmp_path / "config.json").write_text(json.dumps({**data, "auto_map": {}}), "utf-8")
        with pytest.raises(ConfigError, match="auto_map"):
            read_config(tmp_path)
