"""An opened packed model: where each expert lies, after every promise of the folder was checked.

`open_layout` looks at the manifest first, then at each cluster file's size and header, and at the
fingerprint that ties dense part, manifest and clusters together. No weight is read and nothing is
allocated for one. Not checked here: the weights' own checksums; the reader does that record by
record, and `verify` for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chronos.common.disk.header import TensorEntry, read_header
from chronos.common.disk.io import FileIO, StrPath, corrupt
from chronos.common.disk.linked import LINK, link_fingerprint
from chronos.common.disk.tensors import read_checkpoint, read_tensors
from chronos.common.errors import (
    BudgetError,
    CorruptClusterError,
    CorruptFileError,
    ShapeMismatch,
    UsageError,
)
from chronos.common.layout.codecs import SWIGLU, codec_of
from chronos.common.layout.ctsr import Template, read_records
from chronos.common.layout.manifest import (
    CTSR_FORMAT,
    CTSR_VERSION,
    EXPERTS,
    MANIFEST,
    Manifest,
    Record,
    read_manifest,
    tensor_key,
)
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig
from chronos.common.model.weights import Key, expert_name

_Spelled = tuple[str, str, tuple[int, ...]]  # a tensor's name, dtype and shape

FINGERPRINT = "chronos_fingerprint"  # the dense file's metadata key


@dataclass(frozen=True)
class Layout:
    """An opened packed model. `missing` is empty unless it was opened with `allow_missing`."""

    folder: Path
    manifest: Manifest
    missing: frozenset[Key] = frozenset()

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def records(self) -> Mapping[Key, Record]:
        return self.manifest.records

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / EXPERTS / file for file in self.manifest.files)

    @cached_property
    def by_file(self) -> Mapping[str, list[Record]]:
        """The records of each cluster file."""
        found: dict[str, list[Record]] = {file: [] for file in self.manifest.files}
        for record in self.records.values():
            found[record.file].append(record)
        return found

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.records}))

    @cached_property
    def num_layers(self) -> int:
        """One more than the last layer with routed experts: layer indices are absolute."""
        return self.moe_layers[-1] + 1

    @cached_property
    def num_experts(self) -> int:
        return 1 + max(expert for _, expert in self.records)

    @cached_property
    def encodings(self) -> dict[int, str]:
        """How the experts of each layer are coded."""
        return self.manifest.encodings

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all routed experts, as stored."""
        return sum(record.nbytes for record in self.records.values())

    @cached_property
    def record_nbytes(self) -> int:
        """The largest record, which is what a slot has to hold."""
        return max(record.nbytes for record in self.records.values())

    def template(self, layer: int) -> Template:
        """The record of an expert of a layer; all of them are alike."""
        record = self.records[layer, 0]
        return Template(record.tensors, record.nbytes, record.encoding)

    def clusters(self) -> list[list[Key]]:
        """The experts of each cluster file, in order of place."""
        found: dict[str, list[Key]] = {path.name: [] for path in self.files}
        for record in sorted(self.records.values(), key=lambda record: record.offset):
            found[record.file].append(record.key)
        return list(found.values())

    def path(self, key: Key) -> Path:
        """The cluster file of an expert."""
        return self.folder / EXPERTS / self.records[key].file


def is_packed(folder: StrPath) -> bool:
    """Whether a folder claims to be a packed model."""
    return os.path.lexists(Path(folder) / EXPERTS / MANIFEST)


def is_unfinished(folder: StrPath, io: FileIO | None = None) -> bool:
    """Whether a folder has parts of a packed model and no manifest, which is written last."""
    folder, dense = Path(folder), Path(folder) / "model.safetensors"
    if is_packed(folder):
        return False
    if (folder / LINK).exists() or (folder / EXPERTS).exists():
        return True
    return dense.exists() and FINGERPRINT in read_header(dense, io=io).metadata


def refuse_unfinished(folder: StrPath, io: FileIO | None = None) -> None:
    """CorruptFileError for what a stopped `pack` left behind."""
    if is_unfinished(folder, io):
        raise CorruptFileError(
            "packing into this folder was not finished",
            str(folder),
            f"chronos pack SRC -o {folder} goes on where it stopped",
        )


def open_layout(
    folder: StrPath,
    *,
    fingerprint: str | None = None,
    config: ModelConfig | GuestConfig | None = None,
    allow_missing: bool = False,
    io: FileIO | None = None,
) -> Layout:
    """Open and check a packed model; `folder` is the model folder.

    With `config` the experts' number, names, dtypes and shapes are compared with it, with
    `fingerprint` their model. `allow_missing` lets cluster files be absent and lists their experts.
    Raises CorruptClusterError, ShapeMismatch, ConfigError (not packed), ResourceError.
    """
    layout = described_layout(folder, fingerprint=fingerprint, config=config, io=io)
    missing: set[Key] = set()
    for path in layout.files:
        if allow_missing and not os.path.lexists(path):
            missing.update(record.key for record in layout.by_file[path.name])
        else:
            check_cluster(layout, path, io)
    return Layout(layout.folder, layout.manifest, frozenset(missing))


def described_layout(
    folder: StrPath,
    *,
    fingerprint: str | None = None,
    config: ModelConfig | GuestConfig | None = None,
    io: FileIO | None = None,
) -> Layout:
    """What `open_layout` opens, with no cluster file looked at: those are `check_cluster`'s."""
    folder = Path(folder)
    manifest = read_manifest(folder, io)
    for expected, what in _fingerprints(folder, fingerprint, io):
        if expected != manifest.fingerprint:
            raise CorruptClusterError(
                f"the experts belong to another model than {what}"
                f" (fingerprint {manifest.fingerprint}, not {expected})",
                str(folder / EXPERTS / MANIFEST),
                "pack the model again into a new folder",
            )
    if config is not None:
        check_geometry(manifest, config)
    return Layout(folder, manifest)


def check_cluster(layout: Layout, path: Path, io: FileIO | None = None) -> None:
    """Compare a cluster file's size, metadata and header with the manifest."""
    _check_cluster(path, layout.manifest, layout.by_file[path.name], io)


def packed_experts(
    folder: Path, config: ModelConfig | GuestConfig, *, checked: bool
) -> Layout | None:
    """The packed experts of a folder, None where it is not packed. checked: their files too, as
    `open_layout` does; else the manifest alone, for whoever reads no expert."""
    if not is_packed(folder):
        return None
    return open_layout(folder, config=config) if checked else Layout(folder, read_manifest(folder))


def read_experts(
    layout: Layout, layers: Collection[int] | None = None
) -> Iterator[tuple[TensorEntry, memoryview]]:
    """Every routed expert's tensors under their unpacked names, each record's digest checked.

    layers: of these alone. A view is valid until the next record. Raises CorruptClusterError.
    """
    records = [
        (layout.path(key), record)
        for key, record in layout.records.items()
        if layers is None or key[0] in layers
    ]
    with closing(read_records(records)) as found:
        for record, data in found:
            views = record.views(data)
            for tensor in record.tensors:
                name = expert_name(*record.key, tensor.name)
                entry = TensorEntry(name, tensor.dtype, tensor.shape, 0, tensor.nbytes)
                yield entry, views[tensor.name]


def read_weights(folder: Path, config: ModelConfig) -> Iterator[tuple[TensorEntry, memoryview]]:
    """Every tensor of a native model folder, packed or not, under its unpacked name.

    A view is valid until the next. Raises UsageError for experts that are coded for running only.
    """
    layout = packed_experts(folder, config, checked=True)
    coded = sorted(set(layout.encodings.values()) - {SWIGLU}) if layout else []
    if coded:
        raise UsageError(
            f"experts coded as {coded[0]} are for running only, they cannot be trained",
            str(folder),
            "train the model they were made of, or adapt this one with --lora",
        )
    yield from read_checkpoint(folder)
    if layout is not None:
        yield from read_experts(layout)
    if (folder / "lookahead.safetensors").exists():
        yield from read_tensors(folder / "lookahead.safetensors")


def check_geometry(manifest: Manifest, config: ModelConfig | GuestConfig) -> None:
    """Compare the records with a config. Raises ShapeMismatch naming the expert.

    Where the config implies the tensors of a layer's encoding, with those; else those of one layer
    are compared with each other.
    """
    layers = set(range(config.num_hidden_layers))
    if not isinstance(config, ModelConfig):
        layers &= {layer for layer, _ in manifest.records}
    implied = {
        encoding: [(s.name, s.stored, s.shape) for s in codec_of(encoding).tensors(config)]
        for encoding in set(manifest.encodings.values())
    }
    wanted = {(layer, expert) for layer in layers for expert in range(config.num_experts)}
    if odd := sorted(wanted ^ manifest.records.keys()):
        layer, expert = odd[0]
        state = "missing" if odd[0] in wanted else "not in the config"
        raise ShapeMismatch(f"expert {expert} of layer {layer} is {state} ({len(odd)} in all)")
    for (layer, _), record in manifest.records.items():
        wanted_here = implied[record.encoding]
        expected = wanted_here or _spelled(manifest.records[layer, 0])
        if (found := _spelled(record)) != expected:
            source = "the config implies" if wanted_here else "others of the layer have"
            raise ShapeMismatch(
                f"{record.label}: {_spell(found)} found, {source} {_spell(expected)}", record.file
            )


def _spelled(record: Record) -> list[_Spelled]:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in record.tensors]


def _spell(tensors: Iterable[_Spelled]) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, dtype, shape in tensors)


def _fingerprints(
    folder: Path, fingerprint: str | None, io: FileIO | None
) -> Iterable[tuple[str, str]]:
    if fingerprint is not None:
        yield fingerprint, "the one asked for"
    dense = folder / "model.safetensors"
    if dense.exists():
        yield read_header(dense, io=io).metadata.get(FINGERPRINT, "none"), "model.safetensors"
    elif (link := folder / LINK).exists():
        yield link_fingerprint(link, io), LINK


def _check_cluster(
    path: Path, manifest: Manifest, records: list[Record], io: FileIO | None
) -> None:
    """Compare a cluster file's size, metadata and header with the manifest."""
    header = read_header(path, follow=False, io=io)
    if header.file_bytes != manifest.files[path.name]:
        raise CorruptClusterError(
            f"{path.name} has {header.file_bytes} bytes, {manifest.files[path.name]} wanted",
            str(path),
        )
    _check_version(path, header.metadata)
    if header.metadata.get("fingerprint") != manifest.fingerprint:
        raise CorruptClusterError(
            f"{path.name} belongs to another model"
            f" (fingerprint {header.metadata.get('fingerprint')}, not {manifest.fingerprint})",
            str(path),
            "pack the model again into a new folder",
        )
    wanted = {
        tensor_key(record.key, tensor.name): (tensor, record.offset + tensor.offset)
        for record in records
        for tensor in record.tensors
    }
    found = {name for name in header.entries if not name.startswith("pad.")}
    if odd := min(found ^ wanted.keys(), default=None):
        raise CorruptClusterError(f"{path.name} and the manifest disagree about {odd}", str(path))
    for name, (tensor, offset) in wanted.items():
        entry = header.entries[name]
        if (entry.dtype, entry.shape, entry.offset) != (tensor.dtype, tensor.shape, offset):
            raise CorruptClusterError(
                f"{path.name} and the manifest disagree about {name}", str(path)
            )


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get("version", "")
    if metadata.get("format") != CTSR_FORMAT or not version.isdecimal():
        raise corrupt(path, "is a safetensors file, but not a cluster of experts")
    if int(version) > CTSR_VERSION:
        raise corrupt(path, f"was made by version {version} of its format; upgrade Chronos")


def minimum_bytes(layout: Layout, top_k: int = 1) -> int:
    """The least a feed can run on: room for the experts one token needs in one layer."""
    return min(top_k, max(1, len(layout.records))) * layout.record_nbytes


def slots_within(
    layout: Layout,
    capacity_bytes: int,
    top_k: int = 1,
    what: str = "an expert budget",
    why: str = "one token needs",
) -> int:
    """Whole slots in a budget, at most one per record. Raises BudgetError naming the minimum, what
    is too small, and why `top_k` experts are the least."""
    least = minimum_bytes(layout, top_k)
    if capacity_bytes < least:
        raise BudgetError(
            f"{what} of {capacity_bytes} bytes is too small:"
            f" {why} {top_k} experts of {layout.record_nbytes} bytes at once",
            str(layout.folder),
            f"give at least {least} bytes ({100 * least / max(1, layout.total_bytes):.1f} %)",
        )
    return min(capacity_bytes // max(1, layout.record_nbytes), len(layout.records))
