"""Model folders in and out of the MLX backend, and nothing else: no policy, no arithmetic.

Reads go through `common.disk.tensors` (strict header check, no mmap; never `mx.load`),
writes through its atomic writer (never `mx.save`). The dense part is widened to float32 on a CPU;
routed experts keep the dtype they are stored in. On disk every expert has tensors of its own; here
they are filled into the stacks that a layer computes with, each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from chronos.backends.mlx.codecs import Raw, codec_of, memory
from chronos.backends.mlx.model import DTYPES, Model
from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import TensorEntry
from chronos.common.disk.io import ALIGN
from chronos.common.disk.tensors import read_checkpoint, read_tensors, write_tensors
from chronos.common.errors import ShapeMismatch
from chronos.common.layout import Layout, packed_experts, read_experts, read_records
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    EXPERT_TENSORS,
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)

_FROM_FILE = {SAFETENSORS_DTYPE[name]: dtype for name, dtype in DTYPES.items()}
Named = tuple[str, str, tuple[int, ...], memoryview]  # name, safetensors dtype, shape, bytes
Place = tuple[mx.array, int | None]  # an array, or an index into a stack: where a tensor lives


def load_model(
    folder: Path,
    device: mx.Device,
    resident: bool,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """Build the model of a folder; with `resident` its routed experts too, packed or not.

    layout: its packed experts, where somebody has opened them. Raises ConfigError,
    CorruptFileError or ShapeMismatch. Without lookahead.safetensors the model's `lookahead` is
    None.
    """
    config = ModelConfig.from_json(folder)
    layout = layout or packed_experts(folder, config, checked=resident)
    encodings = {} if layout is None else layout.encodings
    model = Model(config, resident, encodings)  # its initial values are lazy and never computed
    side = folder / "lookahead.safetensors"
    if not side.exists():
        model.lookahead = None
    stored = DTYPES[config.dtype]
    wide = mx.float32 if device == mx.cpu else stored
    model.update(blank(model.parameters(), lambda path: stored if ".experts." in path else wide))
    places = dict(named(model.parameters()))
    wanted = dense_tensors(config)
    if dense is None:
        dense = read_checkpoint(folder, [s.name for s in wanted])
    _read(dense, wanted, places)
    if side.exists():
        _read(read_tensors(side), lookahead_tensors(config), places)
    if resident:
        coded = [layer for layer, name in encodings.items() if name != SWIGLU]
        plain = [layer for layer in range(config.num_hidden_layers) if layer not in coded]
        specs = routed_tensors(config, plain)
        experts = (
            read_checkpoint(folder, [s.name for s in specs])
            if layout is None
            else read_experts(layout, plain)
        )
        _read(experts, specs, places)
        for layer in coded:
            assert layout is not None
            model.model.layers[layer].mlp.keep(_coded(layout, layer))
    model.eval()
    return model


def _coded(layout: Layout, layer: int) -> Any:
    """A layer's experts as their bytes, and as a stack that their codec sees these."""
    first, count = layout.records[layer, 0], layout.num_experts
    keys = [(layer, expert) for expert in range(count)]
    pages = mx.zeros((count * first.nbytes // ALIGN, ALIGN), mx.uint8)
    mx.eval(pages)
    room = memory(pages)
    wanted = [(layout.path(key), layout.records[key]) for key in keys]
    with closing(read_records(wanted)) as found:
        for record, data in found:
            start = record.key[1] * record.nbytes
            room[start : start + record.nbytes] = data
    raw = Raw(pages, 0, (count, first.nbytes))
    return codec_of(first.encoding).view(raw, first)


def fill(model: Model, weights: Iterable[tuple[TensorEntry, memoryview]]) -> Model:
    """Copy tensors into a model's parameters by name. One that has no LookaheadRouter loses its
    own. Raises ShapeMismatch where others are missing or of another shape."""
    model.update(blank(model.parameters(), lambda path: mx.float32))
    missing = dict(named(model.parameters()))
    for entry, data in weights:
        place = missing.pop(entry.name, None)
        if place is None:
            continue
        shape = tuple(tensor_at(place).shape)
        if entry.dtype not in _FROM_FILE or entry.shape != shape:
            raise ShapeMismatch(
                f"{entry.name} is {entry.dtype} {list(entry.shape)}; "
                f"the config implies {list(shape)}"
            )
        overwrite(place, data, entry.dtype)
    if any(name.startswith("lookahead.") for name in missing):
        model.lookahead = None
    if rest := [name for name in missing if not name.startswith("lookahead.")]:
        raise ShapeMismatch(f"tensor {rest[0]} is missing ({len(rest)} in all)")
    return model


def blank(tree: Any, dtype: Callable[[str], mx.Dtype]) -> Any:
    """Fresh arrays of the shapes of a parameter tree, to be written over."""
    return tree_map_with_path(lambda path, array: mx.zeros(array.shape, dtype(path)), tree)


def named(tree: Any) -> Iterator[tuple[str, Place]]:
    """Every tensor of a parameter tree under its name on disk."""
    for path, array in tree_flatten(tree):
        owner, _, tensor = path.rpartition(".")
        if tensor in EXPERT_TENSORS:
            for index in range(len(array)):
                yield f"{owner}.{index}.{tensor}.weight", (array, index)
        else:
            yield path, (array, None)


def tensor_at(place: Place) -> mx.array:
    array, index = place
    return array if index is None else array[index]


def overwrite(place: Place, data: memoryview, dtype: str) -> None:
    """Put a tensor's bytes into a fresh array; `dtype` is safetensors' name of what they are."""
    array, index = place
    if _FROM_FILE[dtype] != array.dtype:
        shape = tuple(tensor_at(place).shape)
        data = memory(from_bytes(data, dtype, shape).astype(array.dtype))
    start = (index or 0) * len(data)
    memory(array)[start : start + len(data)] = data


def _read(
    found: Iterable[tuple[TensorEntry, memoryview]],
    specs: list[TensorSpec],
    places: dict[str, Place],
) -> None:
    """Write each tensor, checked against its spec, into its place."""
    wanted = {spec.name: spec for spec in specs}
    for entry, data in found:
        spec = wanted.pop(entry.name, None)
        if spec is None:
            continue
        if entry.shape != spec.shape or entry.dtype not in _FROM_FILE:
            raise ShapeMismatch(
                f"{entry.name} is {entry.dtype} {list(entry.shape)}; "
                f"the config implies {SAFETENSORS_DTYPE[spec.dtype]} {list(spec.shape)}"
            )
        overwrite(places[entry.name], data, entry.dtype)
    if wanted:
        raise ShapeMismatch(f"tensor {next(iter(wanted))} is missing ({len(wanted)} in all)")


def from_bytes(data: memoryview, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """An array with a copy of the bytes; `dtype` is safetensors' name."""
    # In its own shape: MLX counts a dimension in 31 bits, which bytes in a row may not fit in.
    rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
    return mx.array(rows).view(_FROM_FILE[dtype]).reshape(shape)


def to_bytes(name: str, tensor: mx.array, dtype: mx.Dtype) -> Named:
    """A tensor as what `write_tensors` takes, narrowed to `dtype`."""
    flat = mx.contiguous(tensor.astype(dtype))
    kind = next(key for key, value in _FROM_FILE.items() if value == dtype)
    return name, kind, tuple(tensor.shape), memory(flat)


def save_model(model: Model, folder: Path) -> None:
    """Write an unpacked model folder: config.json, model.safetensors, lookahead.safetensors."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(named(model.parameters()))
    dtype = DTYPES[config.dtype]
    main = dense_tensors(config) + routed_tensors(config)
    write_tensors(
        folder / "model.safetensors",
        (to_bytes(spec.name, tensor_at(state[spec.name]), dtype) for spec in main),
        {"format": "pt"},
    )
    if model.lookahead is not None:
        side = lookahead_tensors(config)
        write_tensors(
            folder / "lookahead.safetensors",
            (to_bytes(spec.name, tensor_at(state[spec.name]), mx.float32) for spec in side),
            {"format": "pt"},
        )
    atomic_write(folder / "config.json", [config.dumps().encode()])
