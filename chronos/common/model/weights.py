"""Names, shapes and dtypes of every tensor a config implies: one checkpoint format for backends.

Three groups: the dense part (`model.safetensors`), the routed experts (beside the dense part in
an unpacked folder, under `experts/` in a packed one) and the LookaheadRouter
(`lookahead.safetensors`). The embedding is tied to the output head and stored once.

Shape legend: D hidden, V vocabulary, F expert hidden, E experts, H heads, G key-value heads,
d head_dim, r rope_dim, z latent, K lookahead steps, L layers, U lookahead hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from chronos.common.disk.header import tensor_nbytes
from chronos.common.model.config import ModelConfig

# safetensors' own dtype names.
Key = tuple[int, int]  # an expert: (absolute layer index, expert index)
SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
EXPERT_TENSORS = ("gate_up_proj", "down_proj")
# Numbers in a dense matrix from which on a CPU leaves it as stored and widens it at each use, which
# for smaller ones takes longer than reading them wide.
LARGE = 1 << 19


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name on disk, shape and dtype: `float32`, `bfloat16`, `float16`, or safetensors'
    name of one that only a codec computes with ("I8")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def stored(self) -> str:
        """safetensors' name of the dtype."""
        return SAFETENSORS_DTYPE.get(self.dtype, self.dtype)

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.stored, self.shape)


def expert_tensors(config: ModelConfig) -> list[TensorSpec]:
    """One expert's tensors in record order: gate_up_proj [2F, D], gate rows first; down_proj."""
    D, F = config.hidden_size, config.moe_intermediate_size
    return [
        TensorSpec("gate_up_proj", (2 * F, D), config.dtype),
        TensorSpec("down_proj", (D, F), config.dtype),
    ]


def expert_name(layer: int, expert: int, tensor: str) -> str:
    """The name of a routed expert's tensor in an unpacked folder."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{tensor}.weight"


def dense_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Everything that is not a routed expert and not a predictor, in order of use."""
    D = config.hidden_size
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (config.vocab_size, D))
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes.append((prefix + "input_layernorm.weight", (D,)))
        shapes += [(prefix + "self_attn." + n, s) for n, s in _attention(config, layer)]
        shapes.append((prefix + "post_attention_layernorm.weight", (D,)))
        shapes.append((prefix + "mlp.gate.weight", (config.num_experts, D)))
        if rows := previous_gate_rows(config, layer):
            shapes.append((prefix + "mlp.previous_gate.weight", (rows, D)))
        for shared in range(config.num_shared_experts):
            shapes += [
                (f"{prefix}mlp.shared_experts.{shared}.{spec.name}.weight", spec.shape)
                for spec in expert_tensors(config)
            ]
    shapes.append(("model.norm.weight", (D,)))
    return [TensorSpec(name, shape, config.dtype) for name, shape in shapes]


def previous_gate_rows(config: ModelConfig, layer: int) -> int:
    """Experts whose choice the token before has a gate for: 0 for none."""
    rows = {"informed": config.num_experts, "history": config.num_resident_experts}
    return rows.get(config.routing_of(layer), 0)


def _attention(config: ModelConfig, layer: int) -> list[tuple[str, tuple[int, ...]]]:
    D, H, d = config.hidden_size, config.num_attention_heads, config.head_dim
    if config.attention_kind(layer) == "mla":
        z, r = config.kv_latent_dim, config.rope_dim
        return [
            ("q_proj.weight", (H * (d + r), D)),  # per head: d without position, then r rotated
            ("kv_down_proj.weight", (z, D)),
            ("kv_norm.weight", (z,)),
            ("k_rope_proj.weight", (r, D)),
            ("k_up_proj.weight", (H * d, z)),
            ("v_up_proj.weight", (H * d, z)),
            ("o_proj.weight", (D, H * d)),
        ]
    G = config.num_key_value_heads
    return [
        ("q_proj.weight", (H * d, D)),
        ("k_proj.weight", (G * d, D)),
        ("v_proj.weight", (G * d, D)),
        ("q_norm.weight", (d,)),
        ("k_norm.weight", (d,)),
        ("o_proj.weight", (D, H * d)),
    ]


def lookahead_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The LookaheadRouter: norm, SiLU MLP, a distribution per (step 0..K, layer); in float32."""
    D, U = config.hidden_size, config.lookahead_hidden_size
    out = (config.lookahead_steps + 1) * config.num_hidden_layers * config.num_experts
    return [
        TensorSpec("lookahead.norm.weight", (D,), "float32"),
        TensorSpec("lookahead.in_proj.weight", (U, D), "float32"),
        TensorSpec("lookahead.out_proj.weight", (out, U), "float32"),
    ]


def routed_tensors(config: ModelConfig, layers: Iterable[int] | None = None) -> list[TensorSpec]:
    """All routed experts (of some layers) under their unpacked names, by layer, then expert."""
    return [
        TensorSpec(expert_name(layer, expert, spec.name), spec.shape, spec.dtype)
        for layer in (range(config.num_hidden_layers) if layers is None else layers)
        for expert in range(config.num_experts)
        for spec in expert_tensors(config)
    ]


def count_parameters(config: ModelConfig) -> int:
    """All parameters of the main model, the LookaheadRouter excluded."""
    specs = dense_tensors(config) + routed_tensors(config)
    return sum(math.prod(spec.shape) for spec in specs)
