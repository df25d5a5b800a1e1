"""What llama.cpp calls the tensors of Mixture-of-Experts models: one table, for both directions.

By GGUF's `general.architecture`: the Transformers types it stands for, and each tensor's name in
their checkpoints. Facts are from llama.cpp's converters and gguf's `tensor_mapping.py`, with which
`tests/unit/test_gguf.py` compares them. What is more than a name: rows of queries and keys that lie
in pairs for llama.cpp's rotation (`permuted`), gpt-oss' gate and up, which are taken apart, MLA's
kv_b_proj, taken apart with its first half transposed, and a shared expert's gate, which is a row.

Routed experts are stacks `blk.N.ffn_{gate,up,down}_exps` there, whatever a checkpoint calls them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
_NORM_BEHIND = {"post_attention_norm": "post_attention_layernorm"}


_ONE_BY_ONE = ("mlp.experts", {p: p for p in ("gate_proj", "up_proj", "down_proj")})
_BY_NUMBER = (
    "block_sparse_moe.experts", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """model_types: Transformers' names of it. names: of the tensors of a layer, without ".weight"
    and ".bias", or whole where a checkpoint's name has no such end. permuted: whether rows of
    queries and keys lie in pairs. experts: what a checkpoint calls a layer's experts and each of
    their projections, where it has them one by one."""

    model_types: tuple[str, ...]
    names: Mapping[str, str]
    permuted: bool = False
    experts: tuple[str, Mapping[str, str]] | None = _ONE_BY_ONE


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        ("mixtral",),
        _COMMON | {"ffn_gate_inp": "block_sparse_moe.gate"},
        permuted=True,
        experts=_BY_NUMBER,
    ),
    "qwen2moe": Architecture(
        ("qwen2_moe",),
        _COMMON
        | {
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        },
    ),
    "qwen3moe": Architecture(("qwen3_moe",), _COMMON),
    "olmoe": Architecture(("olmoe",), _COMMON),
    "phimoe": Architecture(
        ("phimoe",), _COMMON | {"ffn_gate_inp": "block_sparse_moe.gate"}, experts=_BY_NUMBER
    ),
    "deepseek2": Architecture(("deepseek_v2", "deepseek_v3"), _COMMON | _SHARED | _LATENT),
    "gpt-oss": Architecture(
        ("gpt_oss",),
        _COMMON
        | _NORM_BEHIND
        | {"ffn_gate_inp": "mlp.router", "attn_sinks.weight": "self_attn.sinks"},
        experts=None,
    ),
    "granitemoe": Architecture(
        ("granitemoe",),
        _COMMON | {"ffn_gate_inp": "block_sparse_moe.router.layer"},
        permuted=True,
        experts=None,
    ),
    "glm4moe": Architecture(("glm4_moe",), _COMMON | _SHARED | _NORM_BEHIND),
    "dots1": Architecture(("dots1",), _COMMON | _SHARED),
}
_TENSOR = re.compile(r"(?:blk\.(\d{1,5})\.)?(\w+)(\.weight|\.bias)?")
_EXPERT = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|down)_exps\.(weight|bias)")
# Of positions, which config.json describes.
UNUSED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


class ExpertStack(NamedTuple):
    """A tensor of all routed experts of a layer."""

    layer: int
    projection: str  # gate_proj, up_proj or down_proj
    kind: str  # weight or bias


def expert_stack(name: str) -> ExpertStack | None:
    """What a tensor of that name is of the routed experts; None for the rest of a model."""
    found = _EXPERT.fullmatch(name)
    return ExpertStack(int(found[1]), f"{found[2]}_proj", found[3]) if found else None


def layer_of(name: str) -> int | None:
    """The layer a tensor of that name is in; None where it is in none."""
    found = re.match(r"blk\.(\d{1,5})\.", name)
    return int(found[1]) if found else None


def checkpoint_name(architecture: Architecture, name: str) -> str | None:
    """What a tensor of the dense part is called in a checkpoint; None where that is not known."""
    found = _TENSOR.fullmatch(name)
    if not found:
        return None
    layer, stem, end = found[1], found[2], found[3] or ""
    if layer is None:
        return f"{_MODEL[stem]}{end}" if stem in _MODEL else None
    names = architecture.names
    own = names.get(f"{stem}{end}") or (f"{names[stem]}{end}" if stem in names else None)
    return None if own is None else f"model.layers.{int(layer)}.{own}"


def gguf_name(architecture: Architecture, name: str) -> str | None:
    """The reverse: llama.cpp's name of a checkpoint's tensor; None where that is not known."""
    inside = re.fullmatch(r"model\.layers\.(\d{1,5})\.(.+)", name)
    names = architecture.names if inside else _MODEL
    rest = inside[2] if inside else name
    stem, dot, end = rest.rpartition(".")
    ways = {own: known for known, own in names.items()}
    known = ways.get(rest) or (f"{ways[stem]}.{end}" if dot and stem in ways else None)
    return known if known is None or not inside else f"blk.{int(inside[1])}.{known}"
