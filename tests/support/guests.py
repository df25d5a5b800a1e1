"""Other libraries' models, tiny: a Mixtral folder, and geometries of many architectures.

No library is imported here. `tiny_guest` writes its folder with NumPy; of an architecture's
geometry (what its config class takes, by model_type) a test builds the model and saves it. Each has
layers with and without experts where it can, and 4 experts of which a token takes 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.disk.tensors import write_tensors
from chronos.common.layout import pack
from chronos.testing.tiny import tiny_tokenizer

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
    "flex_olmo": NAMED,
    "deepseek_v2": ROUTED | GROUPED | LATENT | {"q_lora_rank": None},
    "deepseek_v3": ROUTED | GROUPED | LATENT | {"q_lora_rank": 16},
    # torch's sigmoid takes another exponential for what is left of rows cut in 32 (AVX-512): one
    # row and many rows of 48 differ in the last bit.
    "gpt_oss": LOCAL | {"head_dim": 8, "intermediate_size": 64},
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
    "qwen3_next": NAMED | LINEAR | {"full_attention_interval": 2},
    "llama4_text": LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "gemma4_text": NAMED | {
        "top_k_experts": 2, "head_dim": 8, "enable_moe_block": True,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip

# More ids than the tokenizer has tokens, as in many a checkpoint.
_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "dtype": "float32",
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "sliding_window": None, "attention_dropout": 0.0,
}  # fmt: skip


def tiny_guest(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a packed Mixtral with a tokenizer; the unpacked one stays beside it.

    changes: of config.json. No shape may change.
    """
    source = folder.with_name(folder.name + "-unpacked")
    tiny_tokenizer().save(source)
    (source / "config.json").write_text(json.dumps(_MIXTRAL | changes), "utf-8")
    random = np.random.default_rng(seed)
    tensors = [
        (name, "F32", shape, _values(shape, random).astype(np.float32))
        for name, shape in _shapes(_MIXTRAL)
    ]
    write_tensors(source / "model.safetensors", tensors, {"format": "pt"})
    pack(source, folder)
    return folder


def _values(shape: tuple[int, ...], random: np.random.Generator) -> Any:
    return random.normal(0.0, 0.3, shape) if len(shape) > 1 else np.ones(shape)


def _shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Mixtral's hub checkpoints have them."""
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"]}
    heads["v"] = heads["k"]
    yield from (("model.embed_tokens.weight", (V, D)), ("lm_head.weight", (V, D)))
    yield "model.norm.weight", (D,)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield from ((f"{at}{n}_layernorm.weight", (D,)) for n in ("input", "post_attention"))
        for name, count in heads.items():
            yield f"{at}self_attn.{name}_proj.weight", (count * c["head_dim"], D)
        yield f"{at}self_attn.o_proj.weight", (D, heads["q"] * c["head_dim"])
        yield f"{at}block_sparse_moe.gate.weight", (c["num_local_experts"], D)
        for expert in range(c["num_local_experts"]):
            one = f"{at}block_sparse_moe.experts.{expert}."
            yield from ((f"{one}w1.weight", (F, D)), (f"{one}w3.weight", (F, D)))
            yield f"{one}w2.weight", (D, F)
