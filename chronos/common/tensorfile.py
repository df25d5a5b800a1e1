"""safetensors files, read strictly and written atomically: the one tensor format of all backends.

The header check refuses what the format forbids and some of what its other readers let through:
duplicate keys, overlaps, holes, trailing bytes, odd names, unknown fields. Nothing is allocated
before the sizes are known to fit the file. Data comes by ranged reads at disk speed into aligned
buffers, never through mmap. Values are bytes here: nothing is converted, NaNs pass.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.errors import CorruptFileError
from chronos.common.fileio import (
    ALIGN,
    FileIO,
    SmallReader,
    StrPath,
    aligned_buffer,
    corrupt,
    round_up,
)
from chronos.common.files import RangedReader, Request, atomic_write

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_HEADER = 100_000_000
MAX_INDEX = 32 << 20
_EXTENT = 16 << 20  # neighbouring tensors are read together up to this size
_AHEAD = 64 << 20  # bytes in flight or read and not yet asked for
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorEntry(NamedTuple):
    """Where a tensor lies: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header; `entries` are in file order."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


Located = tuple[Path, TensorEntry]
# Holds reader threads until it is exhausted or closed; who may stop early uses contextlib.closing.
Stream = Generator[tuple[TensorEntry, memoryview], None, None]
# Bytes, or a function that gives them when their turn comes: they need not all be in memory.
Data = Any
Named = tuple[str, str, tuple[int, ...], Data]


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises ValueError for an unknown dtype or a size that is not whole."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if (
            size >= 1 << 62 or bits >= 1 << 63
        ):  # before a later 0 hides it: other readers multiply in 64 bits
            raise ValueError(f"shape {list(shape)} is too large")
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8


def read_header(
    path: StrPath, *, max_header: int = MAX_HEADER, follow: bool = True, io: FileIO | None = None
) -> Header:
    """Read and check the header of a safetensors file.

    Without `follow` a symbolic link is refused. Raises CorruptFileError (CorruptClusterError for a
    .ctsr file) naming the file, and the bytes wanted and there.
    """
    with SmallReader(os.path.realpath(path) if follow else path, io) as file:
        length: int = struct.unpack("<Q", file.read(0, 8))[0]
        if length > max_header:
            raise corrupt(path, f"has a header of {length} bytes; at most {max_header} are allowed")
        return parse_header(file.read(8, length), file.nbytes, path)


def parse_header(raw: bytes, file_bytes: int, path: StrPath = "header") -> Header:
    """Check the JSON part of a header against the size of its file. Raises CorruptFileError."""
    if raw[:1] != b"{":
        raise corrupt(path, "has a header that does not start with '{'")
    try:
        fields = load_json(raw)
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        entries = [_entry(name, value, 8 + len(raw)) for name, value in fields.items()]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        _check_cover(entries, 8 + len(raw), file_bytes)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"has a bad header: {error}") from error
    return Header({entry.name: entry for entry in entries}, metadata, 8 + len(raw), file_bytes)


def load_json(raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys or NaN. Raises ValueError or RecursionError."""
    value = json.loads(
        raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer
    )
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return result


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int:
    if digits == "-0" or len(digits) > 20:  # beyond 64 bits; also keeps int() linear
        raise ValueError(f"the number {digits[:24]} is out of range")
    return int(digits)


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    check_name(name)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets, and only those")
    dtype, shape, span = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise ValueError(f"tensor {name!r} has a malformed dtype, shape or data_offsets")
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from None
    if span[1] - span[0] != nbytes:
        raise ValueError(f"tensor {name!r} needs {nbytes} bytes, its offsets span {span}")
    return TensorEntry(name, dtype, tuple(shape), data_start + span[0], nbytes)


def check_name(name: str) -> None:
    """Refuse names that could do harm as a path or on a terminal. Raises ValueError."""
    if not name or not name.isprintable() or "\\" in name or name.startswith("/"):
        raise ValueError(f"the tensor name {name!r} is not allowed")
    if ".." in name.split("/"):
        raise ValueError(f"the tensor name {name!r} is not allowed")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(entries: list[TensorEntry], position: int, file_bytes: int) -> None:
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps the tensor" if entry.offset < position else "leaves a hole"
            raise ValueError(f"tensor {entry.name!r} {kind} before it")
        position += entry.nbytes
    if position != file_bytes:
        raise ValueError(f"{position} bytes wanted, {file_bytes} bytes there")


def read_tensors(
    path: StrPath, names: Iterable[str] | None = None, io: FileIO | None = None
) -> Stream:
    """The tensors of a file in file order; those in `names` only, where given and there.

    The views are writable and stay valid for as long as they are kept.
    """
    real = Path(os.path.realpath(path))
    entries = read_header(real, io=io).entries
    if names is not None:
        wanted = set(names)
        entries = {name: entry for name, entry in entries.items() if name in wanted}
    yield from read_located([(real, entry) for entry in entries.values()], io)


def read_checkpoint(
    folder: StrPath, names: Iterable[str] | None = None, io: FileIO | None = None
) -> Stream:
    """The tensors of model.safetensors, or of the shards its index names; as `read_tensors`."""
    located = locate_tensors(folder, io)
    if names is not None:
        located = {name: located[name] for name in dict.fromkeys(names) if name in located}
    yield from read_located(sorted(located.values(), key=lambda at: (at[0], at[1].offset)), io)


def locate_tensors(folder: StrPath, io: FileIO | None = None) -> dict[str, Located]:
    """Where each tensor of a checkpoint is. Raises CorruptFileError for a folder without one."""
    single = Path(folder) / "model.safetensors"
    index = Path(folder) / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        _refuse_pickles(single)
        real = Path(os.path.realpath(single))
        return {name: (real, entry) for name, entry in read_header(real, io=io).entries.items()}
    shards = _read_index(index)
    located: dict[str, Located] = {}
    for shard in sorted(set(shards.values())):
        real = Path(os.path.realpath(Path(folder) / shard))
        for name, entry in read_header(real, io=io).entries.items():
            if shards.get(name) != shard:
                raise corrupt(index, f"does not say that {shard} holds tensor {name!r}")
            located[name] = (real, entry)
    if missing := min(shards.keys() - located.keys(), default=None):
        raise corrupt(index, f"names tensor {missing!r}, which is not in {shards[missing]}")
    return located


def _refuse_pickles(single: Path) -> None:
    """Name what is there in the place of safetensors: a pickle runs code when it is read."""
    if single.exists():
        return
    for path in sorted(single.parent.glob("*")):
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise CorruptFileError(
                f"the weights are pickled ({path.name}), which Chronos does not read",
                str(single.parent),
                "load the model with Transformers and save_pretrained it: that writes safetensors",
            )


def _read_index(path: Path) -> dict[str, str]:
    try:
        real = os.path.realpath(path)  # the Hugging Face cache is made of links
        shards = load_json(read_small(real, MAX_INDEX)).get("weight_map")
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"is not a usable index: {error}") from error
    if not isinstance(shards, dict) or not shards:
        raise corrupt(path, "has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not is_plain_name(shard, ".safetensors"):
            raise corrupt(path, f"names {shard!r}, which is not a file of this folder")
    return shards


def is_plain_name(name: str, suffix: str) -> bool:
    """Whether `name` is a visible file of the folder it is used in, whatever the platform."""
    plain = name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')
    return plain and name.endswith(suffix) and len(name.encode()) <= 255


def read_small(path: StrPath, limit: int, io: FileIO | None = None) -> bytes:
    """A whole small regular file; CorruptFileError above `limit` bytes, before reading any."""
    with SmallReader(path, io) as file:
        if file.nbytes > limit:
            raise corrupt(path, f"has {file.nbytes} bytes; at most {limit} are allowed")
        return file.read(0, file.nbytes)


def read_pieces(wanted: Iterable[Located], io: FileIO | None = None) -> Stream:
    """Read tensors in the given order, in pieces of at most 16 MiB, with memory for a few of them.

    An entry then has the name, dtype and shape of the tensor, and the place of the piece; a tensor
    without bytes has none. Reads are in order of place within windows of 64 MiB, so that tensors of
    one record that lie apart are still read in large extents.
    """
    windows = list(_windows(_cut(wanted)))
    by_place = [at for window in windows for at in sorted(window, key=_place)]
    with closing(read_located(by_place, io)) as stream:
        arriving = zip(by_place, stream, strict=True)
        for window in windows:
            held: dict[tuple[Path, int], memoryview] = {}
            for at in window:
                while _place(at) not in held:
                    come, (_, data) = next(arriving)
                    held[_place(come)] = data
                yield at[1], held.pop(_place(at))


def _place(at: Located) -> tuple[Path, int]:
    return at[0], at[1].offset


def _cut(wanted: Iterable[Located]) -> Iterator[Located]:
    for path, entry in wanted:
        for done in range(0, entry.nbytes, _EXTENT):
            nbytes = min(_EXTENT, entry.nbytes - done)
            yield path, entry._replace(offset=entry.offset + done, nbytes=nbytes)


def _windows(pieces: Iterable[Located]) -> Iterator[list[Located]]:
    window: list[Located] = []
    nbytes = 0
    for at in pieces:
        if window and nbytes + at[1].nbytes > _AHEAD:
            yield window
            window, nbytes = [], 0
        window.append(at)
        nbytes += at[1].nbytes
    if window:
        yield window


def read_located(wanted: Sequence[Located], io: FileIO | None = None) -> Stream:
    """Read tensors in the given order, some MiB ahead of the consumer, with several threads."""
    waiting = deque(_extents(wanted))
    flying: deque[tuple[Request, list[TensorEntry]]] = deque()
    ahead = 0
    if not waiting:
        return
    with RangedReader(io=io) as reader:
        while waiting or flying:
            while waiting and (not flying or ahead < _AHEAD):
                path, start, nbytes, entries = waiting.popleft()
                buffer = aligned_buffer(nbytes)
                flying.append((reader.submit(path, start, buffer, demand=True), entries))
                ahead += nbytes
            request, entries = flying.popleft()
            request.wait()
            if request.error:
                raise request.error
            ahead -= request.nbytes
            for entry in entries:
                begin = entry.offset - request.offset
                yield entry, request.buffer[begin : begin + entry.nbytes]


def _extents(wanted: Sequence[Located]) -> Iterator[tuple[Path, int, int, list[TensorEntry]]]:
    """Neighbours joined: (file, aligned start, bytes, tensors)."""
    group: list[TensorEntry] = []
    path, start, stop = Path(), 0, 0
    for where, entry in wanted:
        joins = where == path and entry.offset == stop and stop - start + entry.nbytes <= _EXTENT
        if group and not joins:
            yield path, start, stop - start, group
            group = []
        if not group:
            path, start = where, entry.offset // ALIGN * ALIGN
        group.append(entry)
        stop = entry.offset + entry.nbytes
    if group:
        yield path, start, stop - start, group


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Length and JSON, padded with spaces so that the data starts at a multiple of ALIGN."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        check_name(name)
        if name in fields:
            raise ValueError(f"the tensor name {name!r} is there twice")
        end = position + tensor_nbytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(fields, separators=(",", ":")).encode()
    length = round_up(8 + len(raw), ALIGN) - 8
    return struct.pack("<Q", length) + raw.ljust(length)


def write_tensors(
    path: StrPath,
    tensors: Iterable[Named],
    metadata: Mapping[str, str] | None = None,
    io: FileIO | None = None,
) -> None:
    """Write a safetensors file atomically from (name, dtype, shape, data).

    Data is bytes-like, or a function without arguments that returns it when its turn comes. Raises
    ValueError for a bad name, dtype or size, ResourceError or DiskFullError as `atomic_write` does.
    """
    items = list(tensors)
    header = build_header(((name, dtype, shape) for name, dtype, shape, _ in items), metadata or {})
    sizes = [tensor_nbytes(dtype, shape) for _, dtype, shape, _ in items]

    def chunks() -> Iterator[Any]:
        yield header
        for (name, _, _, data), nbytes in zip(items, sizes, strict=True):
            view = memoryview(data() if callable(data) else data)
            if view.nbytes != nbytes:
                raise ValueError(f"tensor {name!r}: {view.nbytes} bytes given, {nbytes} needed")
            yield view

    atomic_write(path, chunks(), io, nbytes=len(header) + sum(sizes))
