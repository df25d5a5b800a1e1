"""What a token takes of arithmetic, from the geometry alone: trials of a search get equal shares.

Counted are the multiplications of matrices, each with its addition, as two operations: those of
weights with states, of queries with keys, and of attention with values, over the positions that are
seen. Norms, rotations and softmax are left out: below 2 % from a width of 128 on.
"""

from __future__ import annotations

import dataclasses
import math

from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import dense_tensors, lookahead_tensors

TRAINING = 3  # a forward pass, and a backward one of twice its products


def forward(config: ModelConfig, seq_len: int) -> float:
    """Operations of a token's forward pass, a mean over the positions of a row of `seq_len`. The
    embedding counts as the output head, which is the same matrix."""
    weights = sum(math.prod(spec.shape) for spec in dense_tensors(config) if len(spec.shape) == 2)
    experts = config.num_hidden_layers * config.num_experts_per_tok * config.expert_parameters
    if config.lookahead_steps:
        experts += sum(math.prod(s.shape) for s in lookahead_tensors(config) if len(s.shape) == 2)
    return 2.0 * (weights + experts) + _attention(config, seq_len)


def _attention(config: ModelConfig, seq_len: int) -> float:
    total = 0.0
    for layer in range(config.num_hidden_layers):
        latent = config.attention_kind(layer) == "mla"
        widths = 2 * config.head_dim + (config.rope_dim if latent else 0)
        window = seq_len if latent else min(config.sliding_window, seq_len)
        seen = window * (window + 1) / 2 + (seq_len - window) * window
        total += 2.0 * config.num_attention_heads * widths * seen / seq_len
    return total


def solve_width(config: ModelConfig, seq_len: int, operations: float, multiple: int = 8) -> int:
    """The width inside an expert with which a token takes about so many operations, a multiple of
    `multiple`; 0 or less where the rest of the model takes them all."""

    def at(width: int) -> float:
        return forward(dataclasses.replace(config, moe_intermediate_size=width), seq_len)

    each = at(2) - at(1)
    return multiple * round((operations - (at(1) - each)) / each / multiple)
