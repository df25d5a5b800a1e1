"""Tiny guests for the MLX backend, made by the libraries that write them, and runs of them.

Half of the folders are written by Transformers, half by MLX-LM, two of these quantised. Weights are
random float32 and wide enough that a wrong expert, matrix or rotation shows. Needs both libraries.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils as utils
import numpy as np
import torch
from mlx.utils import tree_map_with_path
from transformers import AutoConfig, AutoModelForCausalLM

import chronos.backends.mlx as backend
from chronos.common.experts.feed import Feed
from chronos.common.layout import Layout
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence
from chronos.testing.store_rig import feed_over

GREEDY = SamplingParams()
PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 96, 40)]  # 80 pairs: MLX-LM sorts
DECODED = [5, 80, 41]
BUDGETS = (1.0, 0.5, 0.2)

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
}
# Written by Transformers: experts one by one under two spellings, or stacked, or transposed.
HUB: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen3_moe": EIGHT | {"head_dim": 16},
    "qwen2_moe": EIGHT | {"shared_expert_intermediate_size": 40},
    "granitemoe": LOCAL,
    "gpt_oss": LOCAL
    | {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "deepseek_v3": ROUTED
    | {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 2,
    },
    # Its `sanitize` shifts the norms, but only among experts under the names it knows.
    "qwen3_next": EIGHT
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
ROPE = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5}
# Written by MLX-LM.
SAVED: dict[str, dict[str, Any]] = {
    "olmoe": COMMON | ROPE | LOCAL | EIGHT,
    "phimoe": COMMON | ROPE | LOCAL | {"rope_scaling": None},
    "nemotron_h": COMMON
    | {
        "hybrid_override_pattern": "M*EE",
        "num_hidden_layers": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "attention_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
    },
}
WIDE = (
    COMMON
    | ROPE
    | EIGHT
    | {"norm_topk_prob": True, "hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
)
QUANTISED = {
    "qwen3_moe-4bit": WIDE
    | {"intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe-8bit": WIDE | {"intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


def packed(folder: Path) -> Path:
    return folder.with_name(folder.name + "-packed")


def save(name: str, folder: Path, **changes: Any) -> None:
    """Write the unpacked folder of a model; changes: of its config."""
    (save_by_transformers if name in HUB else save_by_mlx_lm)(name, folder, **changes)


def save_by_transformers(name: str, folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | HUB[name] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)


def save_by_mlx_lm(name: str, folder: Path, **changes: Any) -> None:
    model_type, _, bits = name.partition("-")
    config = {"model_type": model_type} | (SAVED | QUANTISED)[name] | changes
    kind, arguments = utils._get_classes(config)
    model = kind(arguments.from_dict(config))
    mx.random.seed(0)
    model.update(tree_map_with_path(spread, model.parameters()))
    if bits:
        model, config = utils.quantize_model(
            model, config, 32, int(bits[0]), quant_predicate=mixed_bits if bits == "4bit" else None
        )
    utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))


def spread(path: str, array: Any) -> Any:
    return 0.2 * mx.random.normal(array.shape) if array.ndim > 1 else array


def mixed_bits(path: str, module: Any) -> bool | dict[str, Any]:
    """The first layer's experts at 8 bits: the records of the layers differ."""
    return {"group_size": 32, "bits": 8} if "layers.0.mlp.switch_mlp" in path else True


def open_feed(layout: Layout, share: float, **options: Any) -> Feed:
    capacity = max(int(layout.total_bytes * share), 2 * layout.record_nbytes)
    return feed_over(backend, layout, capacity, top_k=2, **options)


def run(model: Any, feed: Feed | None = None, ahead: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind the prompt and each decoded token, and the routing of all tokens, TLK."""
    runner = OneSequence(backend.session(model, feed), record=True)
    runner.prefill(PROMPT, GREEDY)
    logits = [runner.logits()]
    for number, token in enumerate(DECODED):
        if ahead and feed is not None:
            layers = feed.layout.moe_layers
            feed.preload([(layer, (number + i) % 8) for layer in layers for i in range(4)])
        runner.decode(token, GREEDY)
        logits.append(runner.logits())
    return np.stack(logits), np.concatenate([ids for ids, _ in runner.routing()])


def needs(ids_TLK: np.ndarray) -> int:
    """Experts a store is asked for: a layer's once for the prompt, then for each token."""
    prompt_LTK = ids_TLK[: len(PROMPT)].swapaxes(0, 1)
    return sum(len(np.unique(layer)) for layer in prompt_LTK) + ids_TLK[len(PROMPT) :].size


def changed(folder: Path, target: Path, **keys: Any) -> Path:
    """A copy of a folder with other keys in its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps(config))
    return target


def values(array: Any) -> np.ndarray:
    return np.array(array.astype(mx.float32))
