"""Headers of safetensors files: the strict check that both backends' tensors come through.

It refuses what the format forbids and some of what its other readers let through: duplicate keys,
overlaps, holes, trailing bytes, odd names, unknown fields. Nothing is allocated before the sizes
are known to fit the file. Not here: the tensors' data (`tensors`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.disk import foreign
from chronos.common.disk.io import ALIGN, FileIO, SmallReader, StrPath, corrupt, round_up

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_HEADER = 100_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}
_FOREIGN = "is it a safetensors file?"


class TensorEntry(NamedTuple):
    """Where a tensor lies: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


Located = tuple[Path, TensorEntry]


@dataclass(frozen=True)
class Header:
    """A checked header; `entries` are in file order."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


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
        head = file.read(0, min(file.nbytes, foreign.HEAD))
        if error := foreign.by_content(Path(path), head):
            raise error
        length: int = struct.unpack("<Q", file.read(0, 8))[0]
        if length > max_header:
            what = f"has a header of {length} bytes; at most {max_header} are allowed"
            raise corrupt(path, what, _FOREIGN)
        return parse_header(file.read(8, length), file.nbytes, path)


def parse_header(raw: bytes, file_bytes: int, path: StrPath = "header") -> Header:
    """Check the JSON part of a header against the size of its file. Raises CorruptFileError."""
    if raw[:1] != b"{":
        raise corrupt(path, "has a header that does not start with '{'", _FOREIGN)
    try:
        fields = load_json(raw)
        metadata = fields.pop("__metadata__", None)
        if metadata is None:  # MLX writes null where there is none
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        entries = [_entry(name, value, 8 + len(raw)) for name, value in fields.items()]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        end = _check_cover(entries, 8 + len(raw))
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"has a bad header: {error}") from error
    if end != file_bytes:
        state = "is cut short" if end > file_bytes else "goes on after its last tensor"
        what = f"{state}: {end} bytes wanted, {file_bytes} bytes there"
        raise corrupt(path, what, "copy or download it again")
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


def _check_cover(entries: list[TensorEntry], position: int) -> int:
    """The end of the last tensor, if each begins where the one before it ends."""
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps the tensor" if entry.offset < position else "leaves a hole"
            raise ValueError(f"tensor {entry.name!r} {kind} before it")
        position += entry.nbytes
    return position


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


def read_whole(path: StrPath, limit: int, io: FileIO | None = None) -> bytes:
    """A safetensors file that fits into memory, its header checked: what may go to the library.

    Raises CorruptFileError for a bad header, or above `limit` bytes before reading any.
    """
    raw = read_small(os.path.realpath(path), limit, io)
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > min(MAX_HEADER, len(raw) - 8):
        raise corrupt(path, f"is cut short: {len(raw)} bytes there", _FOREIGN)
    parse_header(raw[8 : 8 + length], len(raw), path)
    return raw


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
