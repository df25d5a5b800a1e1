"""Each Mixture-of-Experts architecture of MLX-LM, tiny and random: streamed, is it bit-equal?

The ceiling is bit-equality: one prompt of 48 tokens and two decoded ones, a third of the experts in
memory, against MLX-LM's own resident run of the folder it wrote. Nothing is timed, so caches and
load do not matter. Not covered: checkpoints as the hub has them (tests/native/test_mlx_guests.py
has seven of those), quantised ones, and speed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils as utils
import numpy as np
from mlx.utils import tree_map

import chronos.backends.mlx as backend
from chronos.common.experts.feed import FeedOptions, open_feed
from chronos.common.layout import open_layout, pack
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence

GREEDY = SamplingParams()
IDS = [5, 80, 41, 7, 3, 9] * 8
SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "max_seq_len": 256,
    "intermediate_size": 48,
    "sliding_window": 16,
    "layer_types": ["full_attention"] * 4,
}
# All spellings at once: each architecture takes its own.
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_hidden_dim", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("share_expert_dim", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_interval", "moe_layer_freq"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "decoder_sparse_step"), 1),
    "moe_layer_end_index": 4,
    "moe_layers_enum": "1,2,3",
    "is_moe_layer": [False, True, True, True],
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_expert_bias": True,
    "use_mixed_mlp_moe": True,
}
ATTENTION = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "conv_bias"), False),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("full_attention_interval", "layer_group_size"), 2),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0),
    "linear_conv_kernel_dim": 4,
    "conv_L_cache": 3,
    "group_norm_size": 1,
    "attention_multiplier": 0.25,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "use_qk_norm": True,
    "hybrid_layer_pattern": [0, 1, 0, 1],
    "tie_word_embeddings": False,
}
COMMON = SHAPES | EXPERTS | ATTENTION
SLIDING = ["sliding_attention", "full_attention"] * 2
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1.0}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": YARN | {"mscale_all_dim": 1.0}},
    "deepseek_v32": {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "use_double_wide_mlp": False,
        "layer_types": SLIDING,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"layer_types": SLIDING, "intermediate_size": 24},
    "granitemoehybrid": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    "jamba": MAMBA
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
    | {"expert_layer_period": 2},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "tie_word_embeddings": True},
    "llama4": {
        "text_config": COMMON
        | {
            "model_type": "llama4_text",
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "attn_temperature_tuning": 4,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "no_rope_layers": [1, 1, 1, 0],
            "num_experts_per_tok": 1,
        }
    },
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "ffn_hidden_size": 48,
        "num_layers": 2,
        "num_hidden_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mellum": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "mimo_v2_flash": {
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 16,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
        "n_shared_experts": None,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*EE",
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
    },
    "phixtral": {"num_vocab": 96, "model_dim": 32, "num_heads": 2, "num_layers": 2},
    "qwen3_5_moe": {
        "text_config": COMMON
        | {
            "model_type": "qwen3_5_moe_text",
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        }
    },
}
# Their model files take SwitchGLU from another one.
BESIDES = ("qwen3_5_moe",)


def architectures() -> list[str]:
    """The model files of MLX-LM that build a switch of experts."""
    folder = Path(mlx_lm.__file__).parent / "models"
    found = [p.stem for p in folder.glob("*.py") if p.stem != "switch_layers"]
    texts = {name: (folder / f"{name}.py").read_text() for name in found}
    switches = [n for n, text in texts.items() if "SwitchGLU(" in text or "SwitchMLP(" in text]
    return sorted([*switches, *BESIDES])


def logits(model: Any, feed: Any = None) -> np.ndarray:
    sequence = OneSequence(backend.session(model, feed))
    sequence.prefill(IDS, GREEDY)
    rows = [sequence.logits()]
    for token in (5, 9):
        sequence.decode(token, GREEDY)
        rows.append(sequence.logits())
    return np.stack(rows)


def measure(name: str, folder: Path) -> dict[str, Any]:
    config = COMMON | {"model_type": name} | OWN.get(name, {})
    try:
        kind, arguments = utils._get_classes(config)
        model = kind(arguments.from_dict(config))
        mx.random.seed(0)
        model.update(
            tree_map(
                lambda a: 0.2 * mx.random.normal(a.shape) if a.ndim > 1 else a, model.parameters()
            )
        )
        model(mx.array([IDS]))
    except Exception as error:  # MLX-LM's model does not take this config
        return {"model": name, "state": f"not built: {' '.join(str(error).split())[:80]}"}
    utils.save_model(folder / name, model)
    (folder / name / "config.json").write_text(json.dumps(config))
    pack(folder / name, folder / f"{name}-packed")
    layout = open_layout(folder / f"{name}-packed")
    resident = logits(backend.load(folder / name, resident=True))
    capacity = max(layout.total_bytes // 3, 2 * layout.record_nbytes)
    with open_feed(backend.open_arena, layout, capacity, FeedOptions(top_k=2)) as feed:
        streamed = logits(backend.load(layout.folder, resident=False), feed)
    own = np.array(utils.load_model(folder / name)[0](mx.array([IDS]))[0, -1])
    equal = np.array_equal(streamed, resident) and np.array_equal(own, resident[0])
    worst = float(np.abs(streamed - resident).max())
    return {"model": name, "state": "equal" if equal else f"differs by {worst:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some of them; all by default")
    names = parser.parse_args().names or architectures()
    mx.disable_compile()  # compiling on a CPU starts a C++ compiler for every activation
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            rows.append(measure(name, Path(folder)))
            print(f"{name:20} {rows[-1]['state']}")
    states = {row["model"]: row["state"] for row in rows}
    equal = sum(state == "equal" for state in states.values())
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    summary = {"bench": "mlx_guests", "equal": equal, "of": len(rows), "states": states}
    print(json.dumps(summary | versions | {"device": str(mx.default_device())}))


if __name__ == "__main__":
    main()
