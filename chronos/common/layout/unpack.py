"""From a packed folder back to the checkpoint it was packed from: `pack` undone.

Every tensor that was packed has its name, dtype, shape and bytes again, in a shard for the dense
part and one for each layer's experts. Quantised matrices stay as they are, or become plain ones
where a backend gives the arithmetic. What packing left out (heads that no decoder runs) does not
come back. Not here: what the tensors were called (`names`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.disk.atomic import RunLock, atomic_write
from chronos.common.disk.header import Located, TensorEntry, build_header, tensor_nbytes
from chronos.common.disk.io import FileIO, StrPath, check_free_space
from chronos.common.disk.tensors import locate_tensors, next_pieces, read_pieces
from chronos.common.errors import CorruptFileError, UsageError
from chronos.common.layout.codecs import GGUF, dense_encoding, encodings_of
from chronos.common.layout.folder import Layout, is_packed, open_layout
from chronos.common.layout.names import Names, Pattern, read_names
from chronos.common.layout.pack import copy_side_files, side_files
from chronos.common.layout.quantised import VALUES, is_coded, shape_of, split
from chronos.common.layout.verify import verify
from chronos.common.model.config import load_config
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.weights import SAFETENSORS_DTYPE

INDEX = "model.safetensors.index.json"
Coded = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape and bytes by kind
# (encoding, tensors of a matrix, safetensors' dtype, whether columns go first): the plain matrix.
Dequantise = Callable[[str, Coded, str, bool], Any]


@dataclass(frozen=True)
class UnpackReport:
    """What an `unpack` wrote: bytes and tensors of weights, and the files that hold them."""

    bytes: int
    tensors: int
    files: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Matrix(NamedTuple):
    """A quantised matrix to be dequantised: where its tensors lie, by kind."""

    encoding: str
    kinds: dict[str, Located]
    transposed: bool


class _Tensor(NamedTuple):
    """A tensor to write, of parts laid one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: list[Located | _Matrix]


def unpack(
    src: StrPath,
    dst: StrPath,
    *,
    dequantise: Dequantise | None = None,
    progress: Callable[[int, int], None] | None = None,
    io: FileIO | None = None,
) -> UnpackReport:
    """Write the checkpoint that the packed folder `src` was made of into the new folder `dst`.

    All of `src` is compared with its digests first. dequantise: make plain matrices of quantised
    ones, in the dtype of config.json, which then says nothing of a quantisation. progress: called
    with bytes done and in all. Raises UsageError, ConfigError, CorruptFileError, DiskFullError.
    """
    src, dst, io = Path(src), Path(dst), io or FileIO()
    config, names = read_config(src), read_names(src, io)
    _check_folders(src, dst, bool(names))
    layout = open_layout(src, config=config, io=io)
    coded = GGUF in layout.encodings.values()
    if coded and not dequantise:
        raise UsageError(
            "no library reads blocks of GGUF in another file",
            str(src),
            "keep the GGUF file; --dequantize writes the plain checkpoint it stands for",
        )
    plain = _Plain(src, config, coded) if dequantise else None
    shards = [_dense(locate_tensors(src, io), plain)]
    shards += [_experts(layout, layer, names, plain) for layer in layout.moe_layers]
    total = sum(tensor_nbytes(t.dtype, t.shape) for shard in shards for t in shard)
    verify(src, io=io)
    where: dict[str, str] = {}
    done = 0
    with RunLock(dst):
        check_free_space(dst, total, io)
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = build_header(((t.name, t.dtype, t.shape) for t in shard), {"format": "pt"})
            nbytes = len(header) + sum(tensor_nbytes(t.dtype, t.shape) for t in shard)
            atomic_write(dst / file, _chunks(header, shard, dequantise, io), io, nbytes=nbytes)
            where |= {tensor.name: file for tensor in shard}
            done += nbytes
            if progress:
                progress(min(done, total), total)
        copy_side_files(side_files(src), dst, config, io, plain=plain is not None)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(dst / INDEX, index, io)
    return UnpackReport(total, len(where), len(shards))


def _check_folders(src: Path, dst: Path, named: bool) -> None:
    if not is_packed(src):
        raise UsageError("this is no packed model", str(src), "it is as it was published already")
    if not named:
        raise UsageError(
            "the folder does not say what its experts' tensors were called",
            str(src),
            "it was packed by an older Chronos, or its experts were converted: pack the model from"
            " its source again",
        )
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UsageError("the destination is not empty", str(dst), "name a new or an empty folder")


class _Plain:
    """How a model's quantised matrices are to be written plain."""

    def __init__(self, folder: Path, config: Any, coded: bool) -> None:
        """coded: whether experts are quantised whatever config.json says."""
        if not isinstance(config, GuestConfig) or not (coded or config.quantization):
            raise UsageError("the model is not quantised", str(folder), "leave out --dequantize")
        self._raw, self._coding = load_config(folder)[0], config.coding
        self.dtype = SAFETENSORS_DTYPE[config.dtype]

    def of_dense(self, matrix: str) -> str:
        """The encoding of a matrix of the dense part."""
        return dense_encoding(self._raw, matrix, self._coding)


def _by_matrix(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The name of each kind of each matrix."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        matrix, kind = split(name)
        found.setdefault(matrix, {})[kind] = name
    return found


def _dense(located: Mapping[str, Located], plain: _Plain | None) -> list[_Tensor]:
    tensors = []
    for matrix, kinds in _by_matrix(located).items():
        if plain is not None and is_coded(kinds):
            parts = {kind: located[name] for kind, name in kinds.items() if kind != "bias"}
            coded = _Matrix(plain.of_dense(matrix), parts, False)
            tensors.append(_Tensor(f"{matrix}.weight", plain.dtype, _size(coded), [coded]))
            kinds = {kind: name for kind, name in kinds.items() if kind == "bias"}
        for name in kinds.values():
            entry = located[name][1]
            tensors.append(_Tensor(name, entry.dtype, entry.shape, [located[name]]))
    return tensors


def _experts(layout: Layout, layer: int, names: Names, plain: _Plain | None) -> list[_Tensor]:
    """The tensors of a layer's experts. Those of one expert follow each other: its record is read
    once."""
    record, count = layout.records[layer, 0], layout.num_experts
    found = {tensor.name: tensor for tensor in record.tensors}
    patterns = names.get(layer, {})
    if patterns.keys() != found.keys():
        raise CorruptFileError(
            f"names.json has not the tensors of layer {layer}",
            str(layout.folder),
            "pack the model again into a new folder",
        )
    matrices = _by_matrix(found)
    encodings = encodings_of(record.encoding, matrices)

    def at(expert: int, name: str, part: int, parts: int) -> Located:
        tensor, place = found[name], layout.records[layer, expert]
        nbytes = tensor.nbytes // parts
        shape = (tensor.shape[0] // parts, *tensor.shape[1:])
        offset = place.offset + tensor.offset + part * nbytes
        return layout.path((layer, expert)), TensorEntry(name, tensor.dtype, shape, offset, nbytes)

    def matrix_of(expert: int, matrix: str) -> _Matrix:
        kinds = {k: at(expert, n, 0, 1) for k, n in matrices[matrix].items() if k != "bias"}
        return _Matrix(encodings[matrix], kinds, "blocks" in kinds)

    made: list[tuple[Pattern, Callable[[int], Located | _Matrix]]] = []
    for matrix, kinds in matrices.items():
        coded = plain is not None and is_coded(kinds)
        for kind, name in kinds.items():
            if not coded or kind == "bias":
                parts = len(patterns[name])
                for part, pattern in enumerate(patterns[name]):
                    made.append((pattern, partial(at, name=name, part=part, parts=parts)))
            elif kind in VALUES:
                (pattern,) = patterns[name]
                renamed = (*pattern[:-1], _as_plain(pattern[-1], kind))
                made.append((renamed, partial(matrix_of, matrix=matrix)))
    tensors = []
    for expert in range(count):
        for pattern, part_of in made:
            if len(pattern) == 2:
                tensors.append(_whole(str(expert).join(pattern), [part_of(expert)], plain))
    for pattern, part_of in made:
        if len(pattern) == 1:
            stack = _whole(pattern[0], [part_of(expert) for expert in range(count)], plain)
            tensors.append(stack._replace(shape=(count, *stack.shape)))
    return tensors


def _whole(name: str, parts: list[Located | _Matrix], plain: _Plain | None) -> _Tensor:
    """A tensor of these parts, with the dtype and shape of one of them."""
    if isinstance(first := parts[0], _Matrix):
        assert plain is not None
        return _Tensor(name, plain.dtype, _size(first), parts)
    return _Tensor(name, first[1].dtype, first[1].shape, parts)


def _as_plain(name: str, kind: str) -> str:
    """What a matrix is called where it is not quantised."""
    if kind == "blocks":
        return name.removesuffix("_blocks")
    return f"{name.removesuffix(kind)}weight"


def _size(matrix: _Matrix) -> tuple[int, int]:
    kinds = {kind: (entry.dtype, entry.shape) for kind, (_, entry) in matrix.kinds.items()}
    rows, columns = shape_of(matrix.encoding, kinds, "a matrix")
    return (columns, rows) if matrix.transposed else (rows, columns)


def _chunks(
    header: bytes, shard: list[_Tensor], dequantise: Dequantise | None, io: FileIO
) -> Iterator[Any]:
    """The bytes of a file. What lies in it follows the order of reading."""
    yield header
    wanted = [
        at
        for tensor in shard
        for part in tensor.parts
        for at in (part.kinds.values() if isinstance(part, _Matrix) else [part])
    ]
    with closing(read_pieces(wanted, io)) as stream:
        for tensor in shard:
            for part in tensor.parts:
                if not isinstance(part, _Matrix):
                    yield from next_pieces(stream, part[1].nbytes)
                    continue
                assert dequantise is not None
                kinds = {
                    kind: (entry.dtype, entry.shape, b"".join(next_pieces(stream, entry.nbytes)))
                    for kind, (_, entry) in part.kinds.items()
                }
                yield dequantise(part.encoding, kinds, tensor.dtype, part.transposed)


def _write_json(path: Path, data: Any, io: FileIO) -> None:
    raw = json.dumps(data, indent=2).encode()
    atomic_write(path, [raw], io, nbytes=len(raw))
