"""A GGUF file as something to pack: llama.cpp's tensors with the names of the original checkpoint.

Routed experts stay byte for byte as the file has them, one slice of a stack each. What is not an
expert becomes numbers here, once: quantised matrices in the dtype of config.json (values by the
`gguf` package), rows of queries and keys in the checkpoint's order, MLA's kv_b_proj in one piece.
Everything is compared with config.json before a byte is written. Not here: the header
(`disk.gguf`), the names (`gguf_names`), and how experts are computed (backends).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.gguf import TYPES, GgufHeader, GgufTensor, read_gguf, shards_of
from chronos.common.disk.header import DTYPE_BITS, Located, TensorEntry, tensor_nbytes
from chronos.common.disk.io import FileIO
from chronos.common.disk.linked import sample_digest
from chronos.common.disk.tensors import Stream, next_pieces, read_pieces
from chronos.common.errors import (
    ConfigError,
    CorruptFileError,
    MissingBackendError,
    ShapeMismatch,
)
from chronos.common.layout.affine import bfloat16
from chronos.common.layout.codecs import GGUF
from chronos.common.layout.ctsr import Template, lay_out
from chronos.common.layout.finite import first_nonfinite
from chronos.common.layout.gguf_names import (
    ARCHITECTURES,
    UNUSED,
    Architecture,
    checkpoint_name,
    expert_stack,
    layer_of,
)
from chronos.common.layout.names import Names, Pattern
from chronos.common.layout.quantised import GGUF_BLOCKS
from chronos.common.layout.source import Experts, ModelSource, widened
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.weights import SAFETENSORS_DTYPE, Key

_FLOATS = ("F32", "F16", "BF16")
# Where a block has its scales, and of which dtypes they are.
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), ((0, "F16"),)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), ((0, "F16"), (2, "F16"))),
    "Q2_K": ((80, "F16"), (82, "F16")),
    "Q3_K": ((108, "F16"),),
    "Q6_K": ((208, "F16"),),
    "MXFP4": ((0, "F8_E8M0"),),
}
_BY_NAME = {name: (name, values, size) for name, values, size in TYPES.values()}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Floats = NDArray[np.float32]


class _At(NamedTuple):
    """A tensor of the file, and which file."""

    path: Path
    tensor: GgufTensor

    @property
    def raw(self) -> Located:
        """All of its bytes."""
        tensor = self.tensor
        return self.path, TensorEntry(
            tensor.name, "U8", (tensor.nbytes,), tensor.offset, tensor.nbytes
        )


class _Dense(NamedTuple):
    """A tensor to write: what it is made of, and by what, where that is more than its bytes."""

    entry: TensorEntry
    parts: tuple[_At, ...]
    make: Callable[..., Floats] | None = None


def open_gguf(path: Path, settings: Path, io: FileIO) -> ModelSource:
    """Look at a GGUF file, or the first of its parts, beside the folder that has the original's
    config.json. Raises CorruptFileError, ConfigError, ShapeMismatch, MissingBackendError."""
    config = read_config(settings)
    if not isinstance(config, GuestConfig):
        raise ConfigError(
            "config.json is of one of Chronos' own models, which are not read from GGUF",
            str(settings),
            "pack the folder it was trained into",
        )
    header, tensors = _read(path, io)
    name = str(header.metadata.get("general.architecture"))[:40]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ConfigError(
            f"the file holds a model of llama.cpp's architecture {name!r}, whose tensors are not"
            " known here",
            str(path),
            f"known are {', '.join(ARCHITECTURES)}; pack the original checkpoint instead",
        )
    if config.model_type not in architecture.model_types:
        raise ConfigError(
            f"the file holds a {name} ({' or '.join(architecture.model_types)}), config.json is of"
            f" {config.model_type}",
            str(path),
            "--config must name the folder of the checkpoint that the file was made from",
        )
    left_out = {n for n in tensors if _is_unused(n, config)}
    stacks: dict[int, dict[str, _At]] = {}
    rest: dict[str, _At] = {}
    for tensor, at in tensors.items():
        if tensor in left_out:
            continue
        if found := expert_stack(tensor):
            kind = found.kind if found.kind == "bias" else _kind(at)
            stacks.setdefault(found.layer, {})[f"{found.projection}.{kind}"] = at
        else:
            rest[tensor] = at
    if not stacks:
        raise ShapeMismatch(
            "the file holds no stack of routed experts (blk.N.ffn_gate_exps)",
            str(path),
            "Chronos runs Mixture-of-Experts models; files of before 2024 are not read",
        )
    templates = {layer: _template(layer, stacks[layer], config) for layer in sorted(stacks)}
    dense = _dense(rest, header, name, architecture, config)
    if any(d.make or d.parts[0].tensor.type not in _FLOATS for d in dense):
        _quants()  # told now, and not when half is written
    return ModelSource(
        config,
        [(path, each.entry) for each in dense],
        templates,
        partial(_experts, stacks, templates, io),
        partial(sample_digest, {n: tensors[n].raw for n in tensors.keys() - left_out}, io),
        names=_names(templates, architecture),
        left_out=tuple(sorted(left_out)),
        dense_pieces=partial(_dense_pieces, dense, config.dtype),
    )


def _read(path: Path, io: FileIO) -> tuple[GgufHeader, dict[str, _At]]:
    """The metadata of the first part, the tensors of all."""
    found: dict[str, _At] = {}
    files = shards_of(path)
    first = read_gguf(files[0], io)
    for file in files:
        header = first if file == files[0] else read_gguf(file, io)
        for name, tensor in header.tensors.items():
            if name in found:
                raise CorruptFileError(
                    f"tensor {name} is in {found[name].path.name} too",
                    str(file),
                    "download it again",
                )
            found[name] = _At(file, tensor)
    return first, found


def _is_unused(name: str, config: GuestConfig) -> bool:
    """Whether no decoder runs it: tables of positions, layers that foretell more tokens."""
    layer = layer_of(name)
    return name in UNUSED or (layer is not None and layer >= config.num_hidden_layers)


def _kind(at: _At) -> str:
    """The kind of a stack's matrices in a record. Raises ConfigError for a type that backends do
    not compute with."""
    label = at.tensor.type
    if label in _FLOATS:
        return "weight"
    if label.lower() not in GGUF_BLOCKS:
        known = ", ".join(kind.upper() for kind in GGUF_BLOCKS)
        raise ConfigError(
            f"{at.tensor.name} is {label}, which Chronos does not compute with",
            str(at.path),
            f"experts may be {', '.join(_FLOATS)}, {known}: take such a file of the model, or make"
            " one with llama-quantize",
        )
    return label.lower()


def _template(layer: int, stacks: Mapping[str, _At], config: GuestConfig) -> Template:
    """The record of an expert of a layer; all shapes are compared."""
    order = [f"{p}.{k}" for p in _PROJECTIONS for k in ("weight", *GGUF_BLOCKS, "bias")]
    shapes = {name: stacks[name].tensor.shape for name in order if name in stacks}
    matrices = {n.split(".")[0]: s for n, s in shapes.items() if not n.endswith(".bias")}
    biases = {n.split(".")[0]: s for n, s in shapes.items() if n.endswith(".bias")}
    count = config.num_experts
    up, down = matrices.get("up_proj", ()), matrices.get("down_proj", ())
    whole = matrices.keys() == set(_PROJECTIONS) and len(up) == 3 and up[0] == count
    fits = (
        whole
        and matrices["gate_proj"] == up
        and down == (count, up[2], up[1])
        and all(shape == matrices[name][:2] for name, shape in biases.items())
    )
    if not fits:
        spelled = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
        raise ShapeMismatch(
            f"the experts of layer {layer} do not fit each other and {count} experts: {spelled}",
            str(next(iter(stacks.values())).path),
        )
    laid = lay_out((name, *_stored(stacks[name])) for name in shapes)
    return laid._replace(encoding=GGUF)


def _names(templates: Mapping[int, Template], architecture: Architecture) -> Names:
    """What an expert's tensors are called in a checkpoint, for `unpack --dequantize`; none where
    that has stacks."""
    if architecture.experts is None:
        return {}
    block, projections = architecture.experts
    found: dict[int, dict[str, tuple[Pattern, ...]]] = {}
    for layer, template in templates.items():
        found[layer] = {}
        for tensor in template.tensors:
            projection, kind = tensor.name.split(".")
            start, end = f"model.layers.{layer}.{block}.", f".{projections[projection]}.{kind}"
            found[layer][tensor.name] = ((start, end),)
    return found


def _stored(at: _At) -> tuple[str, tuple[int, ...]]:
    """safetensors' dtype and shape of one expert's part of a stack: blocks are bytes of rows."""
    tensor = at.tensor
    if tensor.type in _FLOATS:
        return tensor.type, tensor.shape[1:]
    rows = tensor.shape[1]
    return "U8", (rows, tensor.nbytes // tensor.shape[0] // rows)


def _experts(
    stacks: Mapping[int, Mapping[str, _At]],
    templates: Mapping[int, Template],
    io: FileIO,
    keys: Sequence[Key],
) -> Experts:
    def located(key: Key, name: str) -> Located:
        path, tensor = stacks[key[0]][name]
        nbytes = tensor.nbytes // tensor.shape[0]
        return path, TensorEntry(name, "U8", (nbytes,), tensor.offset + key[1] * nbytes, nbytes)

    wanted = [(key, t) for key in keys for t in templates[key[0]].tensors]
    with closing(read_pieces((located(k, t.name) for k, t in wanted), io)) as stream:
        for key in keys:
            found = {}
            for tensor in templates[key[0]].tensors:
                data = b"".join(next_pieces(stream, tensor.nbytes))
                at = stacks[key[0]][tensor.name]
                _check_scales(data, at.tensor.type, f"{at.tensor.name}, expert {key[1]}", at.path)
                found[tensor.name] = data
            yield key, found


def _check_scales(data: bytes, label: str, name: str, path: Path) -> None:
    """Raises CorruptFileError for a block whose scale is NaN or infinite."""
    for offset, dtype in _SCALES.get(label, ()):
        blocks = np.frombuffer(data, np.uint8).reshape(-1, GGUF_BLOCKS[label.lower()][1])
        fields = np.ascontiguousarray(blocks[:, offset : offset + DTYPE_BITS[dtype] // 8])
        if (block := first_nonfinite(fields.reshape(-1).data, dtype)) is not None:
            raise CorruptFileError(
                f"{name}: the scale of block {block} is NaN or infinite",
                str(path),
                "download the file again",
            )


def _dense(
    rest: Mapping[str, _At],
    header: GgufHeader,
    name: str,
    architecture: Architecture,
    config: GuestConfig,
) -> list[_Dense]:
    """What is written of the tensors that are no experts. Raises ShapeMismatch."""
    coded = SAFETENSORS_DTYPE[config.dtype]
    found: list[_Dense] = []

    def add(own: str, shape: tuple[int, ...], parts: tuple[_At, ...], make: Any = None) -> None:
        plain = make is None and parts[0].tensor.type in _FLOATS
        dtype = parts[0].tensor.type if plain else coded
        entry = TensorEntry(own, dtype, shape, 0, tensor_nbytes(dtype, shape))
        found.append(_Dense(entry, parts, make))

    for tensor, at in rest.items():
        shape = at.tensor.shape
        if tensor.endswith((".attn_k_b.weight", ".attn_v_b.weight")) and name == "deepseek2":
            if ".attn_v_b." in tensor:
                continue
            second = rest.get(tensor.replace(".attn_k_b.", ".attn_v_b."))
            if second is None:
                raise ShapeMismatch(f"tensor {tensor} has no attn_v_b beside it", str(at.path))
            own = f"model.layers.{layer_of(tensor)}.self_attn.kv_b_proj.weight"
            add(own, _shape_of_kv_b(at, second), (at, second), _kv_b)
            continue
        own_name = checkpoint_name(architecture, tensor)
        if own_name is None:
            raise ShapeMismatch(
                f"tensor {tensor} is not one that a {name} is known to have",
                str(at.path),
                "pack the original checkpoint instead",
            )
        if own_name.endswith("shared_expert_gate.weight"):
            shape = (1, shape[-1])
        elif architecture.permuted and (heads := _heads(own_name, header, name)):
            if shape[0] % (2 * heads):
                raise ShapeMismatch(f"tensor {tensor} has {shape[0]} rows, for {heads} heads")
            add(own_name, shape, (at,), partial(_unpaired, heads=heads))
            continue
        add(own_name, shape, (at,))
    return found


def _heads(name: str, header: GgufHeader, architecture: str) -> int:
    """Heads whose rows lie in pairs; 0 for tensors without a rotation."""
    if ".q_proj." in name:
        return header.number(f"{architecture}.attention.head_count")
    if ".k_proj." in name:
        key = f"{architecture}.attention.head_count_kv"
        return header.number(key if key in header.metadata else key.removesuffix("_kv"))
    return 0


def _unpaired(rows: Floats, heads: int) -> Floats:
    """A matrix or bias whose heads have the halves of a rotation side by side, as the checkpoint
    has them: one half behind the other."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _shape_of_kv_b(k_b: _At, v_b: _At) -> tuple[int, int]:
    """k_b [H, rank, d_k], v_b [H, d_v, rank]."""
    shape, other = k_b.tensor.shape, v_b.tensor.shape
    if len(shape) != 3 or len(other) != 3 or (shape[0], shape[1]) != (other[0], other[2]):
        raise ShapeMismatch(
            f"{k_b.tensor.name} {list(shape)} and attn_v_b {list(other)} do not fit each other",
            str(k_b.path),
        )
    return shape[0] * (shape[2] + other[1]), shape[1]


def _kv_b(k_b: Floats, v_b: Floats) -> Floats:
    """Both halves of each head, one behind the other."""
    both = np.concatenate([k_b.swapaxes(1, 2), v_b], axis=1)
    return both.reshape(-1, both.shape[-1])


def _dense_pieces(dense: Sequence[_Dense], dtype: str, io: FileIO) -> Stream:
    """The tensors to write, in pieces; those that are made of others, whole."""
    with closing(read_pieces((at.raw for each in dense for at in each.parts), io)) as stream:
        for entry, parts, make in dense:
            done = 0
            for data in _made(stream, parts, make, dtype):
                yield entry._replace(offset=done, nbytes=data.nbytes), data
                done += data.nbytes


def _made(
    stream: Stream, parts: tuple[_At, ...], make: Callable[..., Floats] | None, dtype: str
) -> Iterator[memoryview]:
    tensor = parts[0].tensor
    if make is not None:
        whole = []
        for _, part in parts:
            raw = b"".join(next_pieces(stream, part.nbytes))
            whole.append(_floats(np.frombuffer(raw, np.uint8), part.type).reshape(part.shape))
        yield _narrowed(make(*whole), dtype)
    elif tensor.type in _FLOATS:
        yield from next_pieces(stream, tensor.nbytes)
    else:
        rest, (_, _, size) = b"", _BY_NAME[tensor.type]
        for piece in next_pieces(stream, tensor.nbytes):
            raw = rest + bytes(piece)
            usable = len(raw) // size * size
            rest = raw[usable:]
            yield _narrowed(_floats(np.frombuffer(raw[:usable], np.uint8), tensor.type), dtype)


def _floats(raw: NDArray[np.uint8], label: str) -> Floats:
    """The values of blocks in a row."""
    if label in _FLOATS:
        return widened(raw.data, label, (raw.nbytes * 8 // DTYPE_BITS[label],))
    quants = _quants()
    blocks = raw.reshape(-1, _BY_NAME[label][2])
    values: Floats = quants.dequantize(blocks, quants.GGMLQuantizationType[label])
    return values.reshape(-1)


def _narrowed(values: Floats, dtype: str) -> memoryview:
    made: NDArray[Any] = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        made = bfloat16(made)
    elif dtype == "float16":
        made = made.astype(np.float16)
    return made.reshape(-1).data.cast("B")


def _quants() -> Any:
    try:
        import gguf.quants
    except ImportError as error:
        raise MissingBackendError(
            f"reading quantised matrices of GGUF needs the package gguf ({error})",
            "",
            "pip install 'chronos-moe[gguf]'",
        ) from error
    return gguf.quants
