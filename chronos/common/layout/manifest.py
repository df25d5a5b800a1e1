"""cluster_manifest.json: which expert lies where, strictly read before any other file is touched.

Names cannot leave their folder, numbers fit their files, records do not overlap, every layer has
all its experts once and an encoding that is known. Version 2, which names no encodings, is read as
what it meant. What the cluster files themselves hold is compared with this by `folder`.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk.header import (
    check_name,
    is_plain_name,
    load_json,
    read_small,
    tensor_nbytes,
)
from chronos.common.disk.io import ALIGN, FileIO
from chronos.common.errors import ConfigError, CorruptClusterError
from chronos.common.layout.codecs import SWIGLU, codec_of, encoding_of
from chronos.common.model.config import load_config
from chronos.common.model.weights import Key

EXPERTS = "experts"
MANIFEST = "cluster_manifest.json"
FORMAT = "chronos-clusters"
VERSION, OLDEST = 3, 2
CTSR_FORMAT, CTSR_VERSION = "ctsr", 1  # of the cluster files
MAX_MANIFEST = 32 << 20
TENSOR_ALIGN = 64  # of a tensor within its record: what vector loads and accelerators like
_MAX_INDEX = 65_535


@dataclass(frozen=True, slots=True)
class RecordTensor:
    """One tensor of an expert; `offset` counts from the start of its record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Record:
    """One expert on disk: `nbytes` (padded to 4096) at `offset` of cluster file `file`; encoding:
    how its tensors are coded, the same in all records of a layer."""

    key: Key
    file: str
    offset: int
    nbytes: int
    digest: bytes
    tensors: tuple[RecordTensor, ...]
    encoding: str = SWIGLU

    def views(self, data: memoryview) -> dict[str, memoryview]:
        """The tensors' bytes by name, given the record's."""
        return {t.name: data[t.offset : t.offset + t.nbytes] for t in self.tensors}

    @property
    def label(self) -> str:
        return f"layer {self.key[0]}, expert {self.key[1]}"


@dataclass(frozen=True)
class Manifest:
    """What cluster_manifest.json says; `files` maps cluster files to their size."""

    fingerprint: str
    order: Mapping[str, Any]
    files: Mapping[str, int]
    records: Mapping[Key, Record]

    @property
    def encodings(self) -> dict[int, str]:
        """How the experts of each layer are coded."""
        return {layer: record.encoding for (layer, _), record in self.records.items()}

    def to_json(self) -> dict[str, Any]:
        by_layer = self.encodings
        most = Counter(by_layer.values()).most_common(1)[0][0] if by_layer else SWIGLU
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "encoding": most,
            "layers": {str(layer): name for layer, name in by_layer.items() if name != most},
            "order": dict(self.order),
            "clusters": [{"file": file, "nbytes": n} for file, n in self.files.items()],
            "records": [_record_json(record) for record in self.records.values()],
        }


_Encoding = Callable[[int, tuple[RecordTensor, ...]], str]  # of a layer's records


def read_manifest(folder: Path, io: FileIO | None = None) -> Manifest:
    """Read and check cluster_manifest.json alone; no cluster file is touched."""
    path = folder / EXPERTS / MANIFEST
    if not os.path.lexists(path):
        raise ConfigError("this is not a packed model", str(folder), "pack it: chronos pack")
    if not stat.S_ISDIR(os.lstat(path.parent).st_mode):
        raise CorruptClusterError("the experts folder is a symbolic link", str(path.parent))
    try:
        return _manifest(load_json(read_small(path, MAX_MANIFEST, io)), folder)
    except (ValueError, RecursionError) as error:
        raise CorruptClusterError(
            f"the cluster manifest is unusable: {error}", str(path)
        ) from error


def tensor_key(key: Key, name: str) -> str:
    """The name of an expert's tensor inside a cluster file."""
    return f"L{key[0]}.E{key[1]}.{name}"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as written: one record a line. Raises ConfigError where none could read it."""
    data = manifest.to_json()
    records = ",\n".join(
        json.dumps(record, separators=(",", ":")) for record in data.pop("records")
    )
    raw = (json.dumps(data)[:-1] + ', "records": [\n' + records + "\n]}\n").encode()
    if len(raw) > MAX_MANIFEST:
        raise ConfigError(f"the manifest would have {len(raw)} bytes, more than {MAX_MANIFEST}")
    return raw


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "layer": record.key[0],
        "expert": record.key[1],
        "file": record.file,
        "offset": record.offset,
        "nbytes": record.nbytes,
        "xxh3_128": record.digest.hex(),
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset}
            for t in record.tensors
        ],
    }


def _manifest(data: dict[str, Any], folder: Path) -> Manifest:
    """Check every field; ValueError says what is wrong."""
    if data.get("format") != FORMAT:
        raise ValueError(f"its format is {data.get('format')!r}, not {FORMAT!r}")
    version = _natural(data.get("version"), "version")
    if version > VERSION:
        raise ValueError(
            f"it was made by a newer Chronos (version {version} of the format); upgrade Chronos"
        )
    if version < OLDEST:
        raise ValueError(f"version {version} of the format is no longer read; pack the model again")
    named = {"encoding": str, "layers": dict} if version > 2 else {}
    _fields(
        data,
        "the manifest",
        format=str,
        version=int,
        fingerprint=str,
        order=dict,
        clusters=list,
        records=list,
        **named,
    )
    files: dict[str, int] = {}
    for cluster in data["clusters"]:
        _fields(cluster, "a cluster", file=str, nbytes=int)
        if not is_plain_name(cluster["file"], ".ctsr"):
            raise ValueError(f"{cluster['file']!r} is not a cluster file of this folder")
        files[cluster["file"]] = _natural(cluster["nbytes"], "nbytes")
    if len({file.casefold() for file in files}) != len(data["clusters"]):
        raise ValueError("two clusters share a file, or differ in upper and lower case only")
    records: dict[Key, Record] = {}
    known: dict[str, tuple[RecordTensor, ...]] = {}  # most records are alike: check each kind once
    encoding = _encodings(data) if named else _implied_encodings(folder)
    for item in data["records"]:
        record = _record(item, files, known, encoding)
        if record.key in records:
            raise ValueError(f"{record.label} is there twice")
        records[record.key] = record
    _check_complete(records)
    _check_overlap(records.values())
    if odd := set(data.get("layers", ())) - {str(layer) for layer, _ in records}:
        raise ValueError(f"layers names {min(odd)!r:.60}, which has no records")
    return Manifest(data["fingerprint"], data["order"], files, records)


def _encodings(data: dict[str, Any]) -> _Encoding:
    """As the manifest names them. Raises ConfigError for one that is not known."""
    for name in {data["encoding"]: None, **dict.fromkeys(data["layers"].values())}:
        if not isinstance(name, str):
            raise ValueError(f"the encoding of a layer is {name!r:.60}")
        codec_of(name)
    return lambda layer, tensors: data["layers"].get(str(layer), data["encoding"])


def _implied_encodings(folder: Path) -> _Encoding:
    """Of version 2: what a layer's tensors and the model's config.json imply."""
    config = load_config(folder)[0] if (folder / "config.json").exists() else {}
    found: dict[int, str] = {}

    def encoding(layer: int, tensors: tuple[RecordTensor, ...]) -> str:
        if layer not in found:
            found[layer] = encoding_of(config, layer, tensors)
        return found[layer]

    return encoding


def _fields(value: Any, what: str, **types: type) -> None:
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"{what} must have {', '.join(types)}, and only those")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{name} of {what} is {value[name]!r:.60}")


def _natural(value: Any, what: str, limit: int = 1 << 62) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{what} is {value!r:.60}, not a number from 0 to {limit}")
    return value


def _record(
    item: Any,
    files: Mapping[str, int],
    known: dict[str, tuple[RecordTensor, ...]],
    encoding: _Encoding,
) -> Record:
    _fields(
        item, "a record",
        layer=int, expert=int, file=str, offset=int, nbytes=int, xxh3_128=str, tensors=list,
    )  # fmt: skip
    layer = _natural(item["layer"], "layer", _MAX_INDEX)
    expert = _natural(item["expert"], "expert", _MAX_INDEX)
    offset, nbytes = _natural(item["offset"], "offset"), _natural(item["nbytes"], "nbytes")
    what = f"the record of layer {layer}, expert {expert},"
    if item["file"] not in files:
        raise ValueError(f"{what} is in {item['file']!r}, which is not a cluster")
    if offset % ALIGN or nbytes % ALIGN or not nbytes:
        raise ValueError(f"{what} is not made of whole blocks of {ALIGN} bytes")
    if offset + nbytes > files[item["file"]]:
        raise ValueError(f"{what} ends after its file")
    try:
        digest = bytes.fromhex(item["xxh3_128"])
    except ValueError:
        digest = b""
    if len(digest) != 16:
        raise ValueError(f"{what} has no xxh3_128 of 32 hexadecimal digits")
    spelled = repr(item["tensors"])
    if spelled not in known:
        known[spelled] = _tensors(item["tensors"])
    tensors = known[spelled]
    if tensors[-1].offset + tensors[-1].nbytes > nbytes:
        raise ValueError(f"{what} is too short for its tensors")
    key, name = (layer, expert), encoding(layer, tensors)
    return Record(key, item["file"], offset, nbytes, digest, tensors, name)


def _tensors(items: list[Any]) -> tuple[RecordTensor, ...]:
    tensors: list[RecordTensor] = []
    position = 0
    for item in items:
        _fields(item, "a tensor", name=str, dtype=str, shape=list, offset=int)
        check_name(item["name"])
        shape = tuple(_natural(size, "a size") for size in item["shape"])
        offset = _natural(item["offset"], "offset")
        if offset < position or offset % TENSOR_ALIGN:
            raise ValueError(f"tensor {item['name']!r} overlaps another or is not aligned")
        position = offset + tensor_nbytes(item["dtype"], shape)
        tensors.append(RecordTensor(item["name"], item["dtype"], shape, offset))
    if not tensors or len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("a record has no tensors, or two of one name")
    return tuple(tensors)


def _check_complete(records: Mapping[Key, Record]) -> None:
    """Every layer that has routed experts has all of them."""
    if not records:
        raise ValueError("there are no records")
    layers = {layer for layer, _ in records}
    experts = 1 + max(expert for _, expert in records)
    if len(records) != len(layers) * experts:
        lost = next((i, e) for i in sorted(layers) for e in range(experts) if (i, e) not in records)
        raise ValueError(f"layer {lost[0]}, expert {lost[1]} is in no cluster")


def _check_overlap(records: Iterable[Record]) -> None:
    ends: dict[str, int] = {}
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < ends.get(record.file, 0):
            raise ValueError(f"{record.label} overlaps another record in {record.file}")
        ends[record.file] = record.offset + record.nbytes
