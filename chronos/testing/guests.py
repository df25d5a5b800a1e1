"""Geometries of other libraries' models, tiny: what their config classes take, by model_type.

No library is imported here; a test builds the model, with random weights, and saves it. Each has
layers with and without experts where its architecture can, and 4 experts of which a token takes 2.
"""

from __future__ import annotations

from typing import Any

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
    "qwen3_next": NAMED | LINEAR | {"full_attention_interval": 2},
    "llama4_text": LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "gemma4_text": NAMED | {
        "top_k_experts": 2, "head_dim": 8, "enable_moe_block": True,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    },
}  # fmt: skip
