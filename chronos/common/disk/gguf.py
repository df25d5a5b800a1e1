"""Headers of GGUF files, llama.cpp's format, read strictly.

Facts: docs/gguf.md of ggml-org/ggml; versions 2 and 3, little-endian. Every count and length is
compared with what is left of the file before anything is allocated for it; tensors must lie inside,
aligned, each by itself. Long arrays (vocabularies) are skipped, not kept. Not here: what tensors
mean (`layout.gguf`), and their values.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.disk.header import check_name
from chronos.common.disk.io import FileIO, SmallReader, StrPath, corrupt, round_up
from chronos.common.errors import CorruptFileError

# By ggml's number of a type: name, values in a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
SUFFIX = ".gguf"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_HEADER = 512 << 20
_MAX_TEXT = 1 << 20  # bytes of a string that is kept: a chat template is the longest
_KEPT = 4_096  # elements of an array that are kept
_PIECE = 1 << 20
_SPLIT = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")


class GgufTensor(NamedTuple):
    """A tensor: shape with the longest stride first, `offset` from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Checked; metadata without arrays of strings and long ones, tensors in file order."""

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    def number(self, key: str) -> int:
        """A count of the metadata. Raises CorruptFileError where it is none."""
        value = self.metadata.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CorruptFileError(f"the metadata have no usable {key} ({str(value)[:40]})")
        return value


def read_gguf(path: StrPath, io: FileIO | None = None) -> GgufHeader:
    """The header of one file. Raises CorruptFileError naming the file."""
    with SmallReader(os.path.realpath(path), io) as file:
        try:
            return _parse(_Cursor(file))
        except (ValueError, UnicodeDecodeError) as error:
            raise corrupt(path, f"has a bad header: {error}", "download it again") from error


def shards_of(path: Path) -> list[Path]:
    """All files of a model, of which `path` is one. Raises CorruptFileError where some are
    missing."""
    found = _SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    count = int(found[3])
    files = [path.with_name(f"{found[1]}{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    lost = [file.name for file in files if not file.exists()]
    if lost or not files:
        raise CorruptFileError(
            f"{len(lost)} of {count} parts are missing: {', '.join(lost[:3])}",
            str(path),
            "put all parts into one folder",
        )
    return files


class _Cursor:
    """Reads forward, some KiB at a time; lengths are compared with the file first."""

    def __init__(self, file: SmallReader) -> None:
        self._file, self.at = file, 0
        self._buffer, self._start = b"", 0

    @property
    def left(self) -> int:
        return min(self._file.nbytes, _MAX_HEADER) - self.at

    def take(self, nbytes: int) -> bytes:
        self._check(nbytes)
        begin = self.at - self._start
        if begin + nbytes > len(self._buffer):
            self._start, begin = self.at, 0
            self._buffer = self._file.read(self.at, min(max(nbytes, _PIECE), self.left))
        self.at += nbytes
        return self._buffer[begin : begin + nbytes]

    def skip(self, nbytes: int) -> None:
        self._check(nbytes)
        self.at += nbytes
        if not self._start <= self.at <= self._start + len(self._buffer):
            self._buffer, self._start = b"", self.at

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, least: int, what: str) -> int:
        """A number of things of at least so many bytes each."""
        count: int = self.number("Q")
        if count * least > self.left:
            raise ValueError(f"{count} {what} do not fit into the rest of the file")
        return count

    def text(self) -> str:
        length = self.count(1, "bytes of a string")
        if length > _MAX_TEXT:
            raise ValueError(f"a string has {length} bytes")
        return self.take(length).decode("utf-8")

    def _check(self, nbytes: int) -> None:
        if nbytes > self.left:
            raise ValueError(f"it ends at byte {self._file.nbytes}, {self.at + nbytes} are needed")


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not read here (2 and 3 are)")
    tensors = cursor.count(8 + 4 + 8 + 4 + 8, "tensors")
    header = GgufHeader()
    for _ in range(cursor.count(8 + 4 + 1, "keys")):
        key = cursor.text()
        if key in header.metadata:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        header.metadata[key] = _value(cursor, cursor.number("I"))
    described = [_described(cursor) for _ in range(tensors)]
    align = header.metadata.get("general.alignment", 32)
    if type(align) is not int or not 8 <= align <= 1 << 20 or align & (align - 1):
        raise ValueError(f"general.alignment is {align}")
    start = round_up(cursor.at, align)
    end = start
    for tensor in sorted(described, key=lambda t: (t.offset, t.nbytes)):
        check_name(tensor.name)
        placed = tensor._replace(offset=start + tensor.offset)
        if tensor.name in header.tensors:
            raise ValueError(f"the tensor {tensor.name!r} is there twice")
        if tensor.offset % align:
            raise ValueError(f"tensor {tensor.name!r} is not aligned to {align} bytes")
        if placed.offset < end:
            raise ValueError(f"tensor {tensor.name!r} overlaps the tensor before it")
        end = placed.offset + placed.nbytes
        header.tensors[tensor.name] = placed
    if end > cursor._file.nbytes:
        raise ValueError(f"it is cut short: {end} bytes wanted, {cursor._file.nbytes} there")
    return header


def _value(cursor: _Cursor, kind: int) -> Any:
    """A value of the metadata; None for an array that is not kept."""
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"a value has the type {kind}")
    element = cursor.number("I")
    if element == _STRING:
        for _ in range(cursor.count(8, "strings")):
            cursor.skip(cursor.count(1, "bytes of a string"))
        return None
    if element not in _SCALARS:
        raise ValueError(f"an array has elements of the type {element}")
    size = struct.calcsize(_SCALARS[element])
    count = cursor.count(size, "numbers")
    if count > _KEPT:
        cursor.skip(count * size)
        return None
    return [cursor.number(_SCALARS[element]) for _ in range(count)]


def _described(cursor: _Cursor) -> GgufTensor:
    """offset: from the start of the data."""
    name, dims = cursor.text(), cursor.number("I")
    if not 1 <= dims <= 4:
        raise ValueError(f"tensor {name[:80]!r} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]  # the shortest stride is first
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        raise ValueError(f"tensor {name[:80]!r} has the type {kind}, which is not known here")
    label, block, size = TYPES[kind]
    if any(not 0 < n < 1 << 40 for n in shape) or shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} is {label} {list(shape)}")
    nbytes = math.prod(shape) // block * size
    if nbytes > 1 << 60 or offset > 1 << 60:
        raise ValueError(f"tensor {name[:80]!r} has {nbytes} bytes at {offset}")
    return GgufTensor(name, label, shape, offset, nbytes)
