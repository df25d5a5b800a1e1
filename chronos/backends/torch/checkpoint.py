"""Model folders in and out of the torch backend, and nothing else: no policy, no arithmetic.

Reads go through `common.disk.tensors` (strict header check, no mmap, no pickle). A CPU
computes in float32, as 16-bit matrix products are slow there: small tensors are widened here, large
matrices and experts keep the dtype they are stored in and are widened where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronos.backends.torch.codecs import codec_of
from chronos.backends.torch.model import DTYPES, Model
from chronos.backends.torch.quantised import dequantised
from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import TensorEntry
from chronos.common.disk.tensors import read_checkpoint, read_tensors, write_tensors
from chronos.common.errors import ShapeMismatch
from chronos.common.layout import Layout, packed_experts, read_experts, read_records
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import (
    LARGE,
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)

_FROM_FILE = {SAFETENSORS_DTYPE[name]: dtype for name, dtype in DTYPES.items()}
# What a guest's dense part may hold besides (tables of ids, masks, buffers), by torch's names.
_OTHERS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_EVERY = _FROM_FILE | {k: getattr(torch, v) for k, v in _OTHERS.items() if hasattr(torch, v)}
_ABSORBED = ("k_up_proj.weight", "v_up_proj.weight")  # used in products other than `linear`
Named = tuple[str, str, tuple[int, ...], memoryview]  # name, safetensors dtype, shape, bytes


def load_model(
    folder: Path,
    device: torch.device,
    resident: bool,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
    *,
    as_stored: bool = True,
) -> Model:
    """Build the model of a folder; with `resident` its routed experts too, packed or not.

    layout: its packed experts, where somebody has opened them. as_stored: on a CPU, leave large
    matrices of the dense part in their dtype; else all is widened. Raises ConfigError,
    CorruptFileError or ShapeMismatch. Without lookahead.safetensors the model's `lookahead` is
    None.
    """
    config = ModelConfig.from_json(folder)
    layout = layout or packed_experts(folder, config, checked=resident)
    encodings = {} if layout is None else layout.encodings
    with torch.device("meta"):
        model = Model(config, resident, encodings)
    on_cpu = device.type == "cpu"
    wide = torch.float32 if on_cpu else DTYPES[config.dtype]
    tensors: dict[str, Tensor] = {}
    wanted = dense_tensors(config)
    if dense is None:
        dense = read_checkpoint(folder, [s.name for s in wanted])
    tensors |= _read(dense, wanted, device, wide, keep_large=on_cpu and as_stored)
    side = folder / "lookahead.safetensors"
    if side.exists():
        tensors |= _read(read_tensors(side), lookahead_tensors(config), device, wide)
    else:
        model.lookahead = None
    if resident:
        coded = [layer for layer, name in encodings.items() if name != SWIGLU]
        plain = [layer for layer in range(config.num_hidden_layers) if layer not in coded]
        specs = routed_tensors(config, plain)
        experts = (
            read_checkpoint(folder, [s.name for s in specs])
            if layout is None
            else read_experts(layout, plain)
        )
        tensors |= _read(experts, specs, device, None)
        for layer in coded:
            assert layout is not None
            model.model.layers[layer].mlp.keep(_coded(layout, layer, device))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _coded(layout: Layout, layer: int, device: torch.device) -> list[Any]:
    """A layer's experts as their bytes, and as their codec sees these."""
    codec, table = codec_of(layout.encodings[layer]), []
    keys = [(layer, expert) for expert in range(layout.num_experts)]
    wanted = [(layout.path(key), layout.records[key]) for key in keys]
    with closing(read_records(wanted)) as found:
        for record, data in found:
            raw = torch.frombuffer(data, dtype=torch.uint8).to(device, copy=True)
            table.append(codec.view(raw, record))
    return table


def _read(
    found: Iterable[tuple[TensorEntry, memoryview]],
    specs: list[TensorSpec],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    keep_large: bool = False,
) -> dict[str, Tensor]:
    """Tensors by name, each checked against its spec, moved to the device and widened, but for
    large ones if so asked."""
    wanted = {spec.name: spec for spec in specs}
    tensors = {}
    for entry, data in found:
        spec = wanted.pop(entry.name, None)
        if spec is None:
            continue
        if entry.shape != spec.shape or entry.dtype not in _FROM_FILE:
            raise ShapeMismatch(
                f"{entry.name} is {entry.dtype} {list(entry.shape)}; "
                f"the config implies {SAFETENSORS_DTYPE[spec.dtype]} {list(spec.shape)}"
            )
        tensor = from_bytes(data, entry.dtype, entry.shape)
        large = tensor.dim() > 1 and tensor.numel() >= LARGE
        kept = keep_large and large and not entry.name.endswith(_ABSORBED)
        tensors[entry.name] = tensor.to(device, None if kept else dtype, copy=True)
    if wanted:
        raise ShapeMismatch(f"tensor {next(iter(wanted))} is missing ({len(wanted)} in all)")
    return tensors


@torch.no_grad()
def fill(model: Model, weights: Iterable[tuple[TensorEntry, memoryview]]) -> Model:
    """Copy tensors into a model's parameters by name. One that has no LookaheadRouter loses its
    own. Raises ShapeMismatch where others are missing or of another shape."""
    missing = dict(model.named_parameters())
    for entry, data in weights:
        parameter = missing.pop(entry.name, None)
        if parameter is None:
            continue
        if entry.dtype not in _FROM_FILE or entry.shape != tuple(parameter.shape):
            raise ShapeMismatch(
                f"{entry.name} is {entry.dtype} {list(entry.shape)}; "
                f"the config implies {list(parameter.shape)}"
            )
        parameter.copy_(from_bytes(data, entry.dtype, entry.shape))
    if any(name.startswith("lookahead.") for name in missing):
        model.lookahead = None
    if rest := [name for name in missing if not name.startswith("lookahead.")]:
        raise ShapeMismatch(f"tensor {rest[0]} is missing ({len(rest)} in all)")
    return model


def from_bytes(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that shares the buffer's memory; `dtype` is safetensors' name. Raises ShapeMismatch
    for one that this PyTorch does not have."""
    if dtype not in _EVERY:
        raise ShapeMismatch(f"a tensor is {dtype}, which PyTorch {torch.__version__} does not have")
    if not data:  # torch wants a buffer of some bytes
        return torch.empty(shape, dtype=_EVERY[dtype])
    return torch.frombuffer(data, dtype=_EVERY[dtype]).view(shape)


def dequantised_bytes(
    encoding: str,
    kinds: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    dtype: str,
    transposed: bool,
) -> memoryview:
    """The bytes of a quantised matrix made plain, rows or with `transposed` columns first; kinds:
    dtype, shape and bytes of its tensors. dtype: safetensors' name."""
    tensors = {
        kind: from_bytes(memoryview(bytearray(data)), stored, shape)
        for kind, (stored, shape, data) in kinds.items()
    }
    matrix_NK = dequantised(encoding, tensors, _FROM_FILE[dtype])
    plain = matrix_NK.t().contiguous() if transposed else matrix_NK
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())


def to_bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> Named:
    """A tensor as what `write_tensors` takes, narrowed to `dtype`."""
    flat = tensor.detach().to("cpu", dtype).contiguous()
    kind = next(key for key, value in _FROM_FILE.items() if value == dtype)
    view = memoryview(flat.reshape(-1).view(torch.uint8).numpy())
    return name, kind, tuple(flat.shape), view


def save_model(model: Model, folder: Path) -> None:
    """Write an unpacked model folder: config.json, model.safetensors, lookahead.safetensors."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.named_parameters())
    dtype = DTYPES[config.dtype]
    main = dense_tensors(config) + routed_tensors(config)
    write_tensors(
        folder / "model.safetensors",
        (to_bytes(spec.name, state[spec.name], dtype) for spec in main),
        {"format": "pt"},
    )
    if model.lookahead is not None:
        side = lookahead_tensors(config)
        write_tensors(
            folder / "lookahead.safetensors",
            (to_bytes(spec.name, state[spec.name], torch.float32) for spec in side),
            {"format": "pt"},
        )
    atomic_write(folder / "config.json", [config.dumps().encode()])
