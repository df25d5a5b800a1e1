"""Tiny checkpoints named as other libraries name theirs, to pack and to break without those.

Bytes are random integers, so that no value is NaN and every tensor differs. They are no models that
a library could build; what libraries really write is tested in tests/native.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.disk.header import tensor_nbytes
from chronos.common.disk.tensors import write_tensors

D, F, E, LAYERS = 16, 8, 4, 3  # model and expert width, experts, layers
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # name: dtype and shape
Arrays = dict[str, tuple[str, tuple[int, ...], bytes]]

CONFIG: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": D,
    "max_position_embeddings": 64,
    "num_hidden_layers": LAYERS,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}


def _one_by_one(
    pattern: str, gate: str, up: str, down: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for expert in range(E):
        for name, shape in ((gate, (F, D)), (up, (F, D)), (down, (D, F))):
            if name:
                yield pattern.format(expert, name), shape


def _layer(style: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The routed experts of one layer, below `layers.N.`."""
    if style == "mixtral":
        yield from _one_by_one("block_sparse_moe.experts.{}.{}.weight", "w1", "w3", "w2")
    elif style == "qwen3_moe":
        yield from _one_by_one("mlp.experts.{}.{}.weight", "gate_proj", "up_proj", "down_proj")
    elif style == "jamba":
        names = ("gate_proj", "up_proj", "down_proj")
        yield from _one_by_one("feed_forward.experts.{}.{}.weight", *names)
    elif style == "nemotron_h":
        yield from _one_by_one("mixer.experts.{}.{}.weight", "", "up_proj", "down_proj")
    elif style == "biased":
        yield from _one_by_one("mlp.experts.{}.{}.weight", "gate_proj", "up_proj", "down_proj")
        for expert in range(E):
            for name, width in (("gate_proj", F), ("up_proj", F), ("down_proj", D)):
                yield f"mlp.experts.{expert}.{name}.bias", (width,)
    elif style == "gpt_oss":
        yield "mlp.experts.gate_up_proj", (E, D, 2 * F)
        yield "mlp.experts.gate_up_proj_bias", (E, 2 * F)
        yield "mlp.experts.down_proj", (E, F, D)
        yield "mlp.experts.down_proj_bias", (E, D)
    elif style == "granitemoe":
        yield "block_sparse_moe.input_linear.weight", (E, 2 * F, D)
        yield "block_sparse_moe.output_linear.weight", (E, D, F)
    elif style == "mlx":
        for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
            yield f"mlp.switch_mlp.{name}.weight", (E, *shape)
    else:
        raise ValueError(style)


def _quantised() -> Iterator[tuple[str, tuple[int, ...], str]]:
    for name, (rows, columns) in (
        ("gate_proj", (F, D)),
        ("up_proj", (F, D)),
        ("down_proj", (D, F)),
    ):
        yield f"mlp.switch_mlp.{name}.weight", (E, rows, columns // 8), "U32"
        yield f"mlp.switch_mlp.{name}.scales", (E, rows, 1), "F16"
        yield f"mlp.switch_mlp.{name}.biases", (E, rows, 1), "F16"


STYLES = ("mixtral", "qwen3_moe", "jamba", "nemotron_h", "biased", "gpt_oss", "granitemoe", "mlx")
STYLES += ("mlx-4bit",)


def shapes(style: str, prefix: str = "model.", first: int = 1) -> Shapes:
    """Every tensor of a checkpoint whose layers from `first` on have routed experts."""
    found: Shapes = {f"{prefix}embed_tokens.weight": ("F32", (24, D))}
    for layer in range(LAYERS):
        at = f"{prefix}layers.{layer}."
        found[at + "input_layernorm.weight"] = ("F32", (D,))
        if layer < first:
            found[at + "mlp.gate_proj.weight"] = ("F32", (F, D))
            continue
        found[at + "mlp.gate.weight"] = ("F32", (E, D))
        found[at + "mlp.shared_experts.gate_proj.weight"] = ("F32", (F, D))
        if style == "mlx-4bit":
            found |= {at + name: (dtype, shape) for name, shape, dtype in _quantised()}
        else:
            found |= {at + name: ("F32", shape) for name, shape in _layer(style)}
    return found | {"lm_head.weight": ("F32", (24, D))}


def tiny_guest(
    folder: Path,
    style: str = "qwen3_moe",
    *,
    shards: int = 1,
    change: Callable[[Arrays], object] | None = None,
    config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write a checkpoint of one of STYLES. change: edits the tensors before they are written."""
    random = np.random.default_rng(0)
    arrays: Arrays = {
        name: (dtype, shape, _values(random, dtype, shape))
        for name, (dtype, shape) in shapes(style, **kwargs).items()
    }
    if change:
        change(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"quantization": {"bits": 4}} if style == "mlx-4bit" else {}
    data = {"model_type": style, **CONFIG, **settings, **(config or {})}
    (folder / "config.json").write_text(json.dumps(data))
    write_shards(folder, arrays, shards)
    return folder


def write_shards(folder: Path, arrays: Arrays, shards: int) -> None:
    """One file, or several and their index; neighbours by name go to different shards."""
    items = [(name, *array) for name, array in sorted(arrays.items())]
    if shards == 1:
        write_tensors(folder / "model.safetensors", items, {"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for number, name in enumerate(names):
        write_tensors(folder / name, items[number::shards], {"format": "pt"})
    where = {item[0]: names[i % shards] for i, item in enumerate(items)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _values(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Bytes below 0x40 everywhere: finite in every dtype."""
    return random.integers(0, 0x40, tensor_nbytes(dtype, shape), np.uint8).tobytes()
