"""Sharded safetensors as Transformers writes them, one tensor in memory at a time.

Values come from whoever writes a model, or at random where only names, shapes and sizes matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from chronos.backends.torch.checkpoint import to_bytes
from chronos.backends.torch.model import DTYPES
from chronos.common.disk.tensors import write_tensors
from chronos.common.model.weights import SAFETENSORS_DTYPE

# A tensor, or its shape and how to make it when its turn comes.
Shape = tuple[int, ...]
Value = np.ndarray | tuple[Shape, Callable[[], np.ndarray]]


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Value]], dtype: str, shard_bytes: int = 400 << 20
) -> None:
    """Write model-0000i-of-0000n.safetensors and their index; all tensors in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    width = DTYPES[dtype].itemsize
    shards: list[list[tuple[str, Value]]] = [[]]
    filled = total = 0
    for name, value in tensors:
        nbytes = width * int(np.prod(_shape(value)))
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, value))
        filled, total = filled + nbytes, total + nbytes
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys((name for name, _ in shard), file)
        write_tensors(
            folder / file,
            [
                (name, SAFETENSORS_DTYPE[dtype], _shape(value), lambda v=value: _bytes(v, dtype))
                for name, value in shard
            ],
            {"format": "pt"},
        )
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n", "utf-8")


def random_tensors(shapes: Iterable[tuple[str, Shape]]) -> Iterator[tuple[str, Value]]:
    """Ones in the norms, else places in one pool of normals of 0.02 that is gone round."""
    pool = np.random.default_rng(0).normal(0, 0.02, 4 << 20).astype(np.float32)
    for number, (name, shape) in enumerate(shapes):
        start = 4099 * number % len(pool)
        made = partial(np.ones, shape, np.float32)
        if not name.endswith("norm.weight"):
            made = partial(np.resize, pool[start:], shape)
        yield name, (shape, made)


def _shape(value: Value) -> Shape:
    return value[0] if isinstance(value, tuple) else value.shape


def _bytes(value: Value, dtype: str) -> memoryview:
    array = value[1]() if isinstance(value, tuple) else value
    return to_bytes("", torch.from_numpy(array), DTYPES[dtype])[3]
