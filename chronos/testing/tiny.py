"""Tiny random models that behave like real ones: folders a test can pack, stream and break.

Built with NumPy and the strict tensor writer only, so both backends and tests without a framework
use the same bytes. Weights are random; the tokenizer is trained on a few lines of text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.disk.tensors import write_tensors
from chronos.common.layout import pack
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)
from chronos.common.text.tokenizer import Tokenizer

TEXTS = (
    "def add(left, right):\n    return left + right\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
    "for line in open(path):\n    print(line.strip())\n",
)
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=256,
    rope_theta=10_000.0,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    kv_latent_dim=16,
    rope_dim=8,
    sliding_window=32,
    lookahead_steps=1,
    lookahead_hidden_size=16,
    initializer_range=0.2,
)


def tiny_tokenizer(vocab_size: int = CONFIG.vocab_size) -> Tokenizer:
    """A byte-level tokenizer of at most `vocab_size` ids."""
    return Tokenizer.train(TEXTS, vocab_size)


def tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write an unpacked model folder with a tokenizer; `changes` replace fields of CONFIG."""
    config = dataclasses.replace(CONFIG, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.dumps(), "utf-8")
    random = np.random.default_rng(seed)
    main = dense_tensors(config) + routed_tensors(config)
    write_tensors(folder / "model.safetensors", _arrays(main, config, random), {"format": "pt"})
    if config.lookahead_steps:
        side = _arrays(lookahead_tensors(config), config, random)
        write_tensors(folder / "lookahead.safetensors", side, {"format": "pt"})
    tiny_tokenizer(config.vocab_size).save(folder)
    return folder


def tiny_packed(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a packed model folder with a tokenizer; the unpacked one stays beside it."""
    source = tiny_model(folder.with_name(folder.name + "-unpacked"), seed=seed, **changes)
    pack(source, folder)
    return folder


def _arrays(
    specs: list[TensorSpec], config: ModelConfig, random: np.random.Generator
) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Norms are one, the rest normal with `initializer_range`; the same draws in any dtype."""
    for spec in specs:
        if "norm" in spec.name:
            values = np.ones(spec.shape, np.float32)
        else:
            draws = random.standard_normal(spec.shape, np.float32)
            values = draws * np.float32(config.initializer_range)
        yield spec.name, SAFETENSORS_DTYPE[spec.dtype], spec.shape, _to_bytes(values, spec.dtype)


def _to_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":  # NumPy has none: the upper half of a float32, rounded to nearest even
        bits = values.view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (rounded >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()
