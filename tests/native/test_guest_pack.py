"""Checkpoints that the libraries themselves write: every record equals the module's own parameters.

Transformers saves most architectures under the names of their hub checkpoints, not of its modules;
MLX-LM saves its modules as they are. Either way the bytes of a record must be those that the
library computes with: one slice of each parameter of its experts module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chronos.common.guest import read_config
from chronos.common.layout import open_layout, pack, read_records
from chronos.common.tensorfile import read_checkpoint

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
NAMED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24, "head_dim": 8,
}  # fmt: skip
MAMBA = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": NAMED | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": NAMED | {"head_dim": 8, "mlp_only_layers": [0]},
    "olmoe": NAMED,
    "deepseek_v2": ROUTED | GROUPED | LATENT | {"q_lora_rank": None},
    "deepseek_v3": ROUTED | GROUPED | LATENT | {"q_lora_rank": 16},
    "gpt_oss": LOCAL | {"head_dim": 8},
    "granitemoe": LOCAL,
    "granitemoeshared": LOCAL | {"shared_intermediate_size": 40},
    "glm4_moe": ROUTED | GROUPED | {"head_dim": 8},
    "phimoe": LOCAL,
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "dots1": ROUTED | GROUPED | {"head_dim": 8, "num_key_value_heads": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, **MAMBA,
    },
    "minimax": LOCAL | {"head_dim": 8},
    "qwen3_next": NAMED | LINEAR,
    "llama4_text": LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "gemma4_text": NAMED | {
        "top_k_experts": 2, "head_dim": 8, "enable_moe_block": True,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def records(folder: Path) -> Iterator[tuple[tuple[int, int], dict[str, bytes]]]:
    layout = open_layout(folder, config=read_config(folder))
    found = read_records([(layout.path(key), record) for key, record in layout.records.items()])
    for record, data in found:
        yield record.key, {name: bytes(view) for name, view in record.views(data).items()}


def layer_number(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


def save(model_type: str, folder: Path, **saving: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **BASE | ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, **saving)
    return model


def experts_of(model: Any) -> dict[int, dict[str, Any]]:
    """The parameters of each layer's experts module, by their names in it."""
    found: dict[int, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path.endswith(".experts"):
            found.setdefault(layer_number(name), {})[leaf] = parameter.detach()
    return found


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_records_are_the_parameters_of_transformers_own_modules(
    model_type: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="tests of Transformers on torch")
    pytest.importorskip("transformers", reason="tests of Transformers on torch")
    shards = {"max_shard_size": "40KB"} if model_type in ("mixtral", "gpt_oss") else {}
    model = save(model_type, tmp_path / "src", **shards)
    pack(tmp_path / "src", tmp_path / "dst")
    expected = experts_of(model)
    assert expected, "the model has no experts module that Chronos knows"
    seen = set()
    for (layer, expert), tensors in records(tmp_path / "dst"):
        assert tensors.keys() == expected[layer].keys()
        for name, data in tensors.items():
            value = expected[layer][name][expert].contiguous()
            assert data == value.view(torch.uint8).numpy().tobytes(), name
        seen.add((layer, expert))
    assert seen == {(layer, expert) for layer in expected for expert in range(4)}
    dense = {entry.name for entry, _ in read_checkpoint(tmp_path / "dst")}
    assert not [name for name in dense if "experts." in name.replace("shared_experts.", "")]
    if shards:
        assert len(list((tmp_path / "src").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "jamba", "gemma4_text"]
)
def test_records_are_the_parameters_of_mlx_lms_own_modules(
    model_type: str, bits: int, tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core", reason="tests of MLX-LM")
    utils = pytest.importorskip("mlx_lm.utils", reason="tests of MLX-LM")
    pytest.importorskip("transformers", reason="tests of MLX-LM")
    from mlx.utils import tree_flatten

    save(model_type, tmp_path / "hub")
    model, config = utils.load_model(tmp_path / "hub")
    if bits:
        model, config = utils.quantize_model(
            model, config, group_size=32, bits=bits, quant_predicate=divides
        )
    utils.save_model(tmp_path / "src", model, donate_model=False)
    utils.save_config(config, config_path=tmp_path / "src/config.json")
    pack(tmp_path / "src", tmp_path / "dst")
    stacks = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if ".switch_mlp." in name or ".switch_glu." in name
    }
    checked = 0
    for (layer, expert), tensors in records(tmp_path / "dst"):
        for name, data in tensors.items():
            (value,) = [
                value
                for full, value in stacks.items()
                if layer_number(full) == layer and full.endswith(f".{name}")
            ]
            assert data == bytes(mx.contiguous(value[expert]).view(mx.uint8)), name
            checked += len(data)
    assert checked == sum(value.nbytes for value in stacks.values())
    if bits:
        assert any(name.endswith(".scales") for name in stacks)


def divides(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
