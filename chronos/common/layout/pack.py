"""From a model folder, packed or not, to a packed one: dense part, cluster files, manifest last.

Bytes are moved, never converted; every tensor is compared with the config and searched for NaN on
its way. Memory is bounded by a few records. A run killed at any point leaves either no manifest or
a whole model, and the same command again continues behind the last finished cluster file. The
source is only read. Not covered: checkpoints of other model types.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from chronos.common.config import ModelConfig
from chronos.common.errors import ConfigError, ShapeMismatch, UsageError
from chronos.common.fileio import FileIO, SmallReader, StrPath, check_free_space
from chronos.common.files import RunLock, atomic_write, sweep_orphans
from chronos.common.layout.ctsr import Source, read_records, record_template, write_experts
from chronos.common.layout.finite import check_finite
from chronos.common.layout.folder import FINGERPRINT, is_packed, open_layout
from chronos.common.layout.manifest import EXPERTS, Key
from chronos.common.tensorfile import (
    Located,
    locate_tensors,
    read_located,
    read_tensors,
    write_tensors,
)
from chronos.common.weights import (
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    expert_name,
    expert_tensors,
    lookahead_tensors,
    routed_tensors,
)

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "lookahead.safetensors", "intent.safetensors", "LICENSE", "config.json",
)  # fmt: skip
_SAMPLE = 4096  # bytes at either end of a tensor that go into the fingerprint
_COPY = 1 << 20

Experts = Generator[tuple[Key, Mapping[str, Any]], None, None]


@dataclass(frozen=True)
class PackReport:
    """What a `pack` did: bytes of weights in the packed folder, seconds, experts, cluster files."""

    bytes: int
    seconds: float
    records: int
    clusters: int
    reused_clusters: int
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Model:
    """A source: where the dense tensors are, how to get experts, and which model it is."""

    config: ModelConfig
    dense: list[Located]
    experts: Source
    fingerprint: str

    @property
    def dense_nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.dense)


def pack(
    src: StrPath,
    dst: StrPath,
    *,
    order: str | Sequence[Sequence[Key]] = "layer",
    how: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    io: FileIO | None = None,
) -> PackReport:
    """Write the packed form of the model in `src` into `dst`.

    order: "layer" (one cluster file per layer), or the clusters as lists of (layer, expert) that
    hold every expert once; `how` is kept in the manifest as the reason. progress: called with bytes
    done and in all. Raises ConfigError, ShapeMismatch, CorruptFileError (a NaN, by tensor),
    DiskFullError before anything is written where it can, UsageError.
    """
    began, src, dst, io = time.perf_counter(), Path(src), Path(dst), io or FileIO()
    model = _open_source(src, io)
    clusters = _clusters(order, model.config)
    how = dict(how or {"method": order if isinstance(order, str) else "clusters"})
    if dst.exists() and src.resolve() == dst.resolve():
        raise UsageError("source and destination are the same folder", str(dst))
    specs = expert_tensors(model.config)
    total = model.dense_nbytes + record_template(specs)[1] * model.config.num_routed_experts

    def advance(nbytes: int) -> None:
        if progress:
            progress(min(total, model.dense_nbytes + nbytes), total)

    with RunLock(dst):
        sweep_orphans(dst)
        sweep_orphans(dst / EXPERTS)
        if is_packed(dst):
            return _already_packed(dst, model, clusters, began)
        check_free_space(dst, total + _overhead(src, model.config) - _existing_nbytes(dst), io)
        _write_dense(dst, model, io)
        _copy_side_files(src, dst, model.config, io)
        written = write_experts(
            dst,
            clusters,
            specs,
            model.experts,
            fingerprint=model.fingerprint,
            order=how,
            progress=advance,
            io=io,
        )
    return PackReport(
        bytes=model.dense_nbytes + sum(written.manifest.files.values()),
        seconds=time.perf_counter() - began,
        records=len(written.manifest.records),
        clusters=len(clusters),
        reused_clusters=written.reused,
        fingerprint=model.fingerprint,
    )


def _open_source(src: Path, io: FileIO) -> _Model:
    config = ModelConfig.from_json(src)
    located = locate_tensors(src, io)
    dense = _pick(dense_tensors(config), located, src)
    if is_packed(src):
        layout = open_layout(src, config=config, io=io)

        def packed_experts(keys: Sequence[Key]) -> Experts:
            wanted = [(layout.path(key), layout.records[key]) for key in keys]
            with closing(read_records(wanted, io)) as stream:
                for record, data in stream:
                    yield record.key, record.views(data)

        experts: Source = packed_experts
        fingerprint = layout.fingerprint
    else:
        _pick(routed_tensors(config), located, src)
        experts = _unpacked_experts(config, located, io)
        fingerprint = _fingerprint(located, io)
    known = {spec.name for spec in dense_tensors(config)}
    known |= {spec.name for spec in routed_tensors(config)}
    if odd := min(located.keys() - known, default=None):
        raise ShapeMismatch(f"tensor {odd} is not one the config implies", str(src))
    return _Model(config, dense, experts, fingerprint)


def _pick(specs: Iterable[TensorSpec], located: Mapping[str, Located], src: Path) -> list[Located]:
    """The tensors of `specs`, each compared with the file. Raises ShapeMismatch by name."""
    picked = []
    for spec in specs:
        at = located.get(spec.name)
        if at is None:
            raise ShapeMismatch(f"tensor {spec.name} is missing", str(src))
        if (at[1].dtype, at[1].shape) != (SAFETENSORS_DTYPE[spec.dtype], spec.shape):
            raise ShapeMismatch(
                f"tensor {spec.name} is {at[1].dtype} {list(at[1].shape)}, the config implies"
                f" {SAFETENSORS_DTYPE[spec.dtype]} {list(spec.shape)}",
                str(at[0]),
            )
        picked.append(at)
    return picked


def _unpacked_experts(config: ModelConfig, located: Mapping[str, Located], io: FileIO) -> Source:
    names = [spec.name for spec in expert_tensors(config)]

    def experts(keys: Sequence[Key]) -> Experts:
        wanted = [located[expert_name(*key, name)] for key in keys for name in names]
        with closing(read_located(wanted, io)) as stream:
            for key in keys:
                yield key, {name: next(stream)[1] for name in names}

    return experts


def _fingerprint(located: Mapping[str, Located], io: FileIO) -> str:
    """xxh3_128 over each tensor's name, dtype, shape and both ends, in order of names.

    The ends, not all bytes: any training step moves nearly every weight, and reading it all would
    double the time to pack.
    """
    digest = xxhash.xxh3_128()
    with ExitStack() as stack:
        paths = {path for path, _ in located.values()}
        files = {path: stack.enter_context(SmallReader(path, io)) for path in paths}
        for name in sorted(located):
            path, entry = located[name]
            size = min(_SAMPLE, entry.nbytes)
            digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            digest.update(files[path].read(entry.offset, size))
            digest.update(files[path].read(entry.offset + entry.nbytes - size, size))
    return digest.hexdigest()


def _clusters(order: str | Sequence[Sequence[Key]], config: ModelConfig) -> list[list[Key]]:
    layers = [
        [(layer, expert) for expert in range(config.num_experts)]
        for layer in range(config.num_hidden_layers)
    ]
    if isinstance(order, str):
        if order != "layer":
            raise UsageError(f"unknown order {order!r}", "", "use 'layer' or a list of clusters")
        return layers
    clusters = [list(cluster) for cluster in order if cluster]
    given = sorted(key for cluster in clusters for key in cluster)
    if given != [key for layer in layers for key in layer]:
        raise UsageError("the clusters do not hold every expert of the model exactly once")
    if len(clusters) > 99_999:
        raise ConfigError(f"{len(clusters)} clusters are too many")
    return clusters


def _already_packed(
    dst: Path, model: _Model, clusters: list[list[Key]], began: float
) -> PackReport:
    """The report for a finished folder of the same model and clusters; anything else is refused."""
    layout = open_layout(dst, config=model.config)
    found: dict[str, list[Key]] = {path.name: [] for path in layout.files}
    for record in sorted(layout.records.values(), key=lambda record: record.offset):
        found[record.file].append(record.key)
    if layout.fingerprint != model.fingerprint or list(found.values()) != clusters:
        raise UsageError(
            "the destination already holds another packed model",
            str(dst),
            "remove it or choose another folder: cluster files are never changed in place",
        )
    return PackReport(
        bytes=model.dense_nbytes + sum(layout.manifest.files.values()),
        seconds=time.perf_counter() - began,
        records=len(layout.records),
        clusters=len(clusters),
        reused_clusters=len(clusters),
        fingerprint=layout.fingerprint,
    )


def _overhead(src: Path, config: ModelConfig) -> int:
    """Bytes of side files, and about those of headers and manifest."""
    side = sum((src / name).stat().st_size for name in SIDE_FILES if (src / name).exists())
    return side + 512 * config.num_routed_experts


def _existing_nbytes(dst: Path) -> int:
    return sum(path.stat().st_size for path in (dst / EXPERTS).glob("cluster-*.ctsr"))


def _write_dense(dst: Path, model: _Model, io: FileIO) -> None:
    metadata = {"format": "pt", FINGERPRINT: model.fingerprint}
    with closing(read_located(model.dense, io)) as stream:

        def next_finite() -> memoryview:
            entry, data = next(stream)
            check_finite(data, entry.dtype, entry.name)
            return data

        tensors = [(e.name, e.dtype, e.shape, next_finite) for _, e in model.dense]
        write_tensors(dst / "model.safetensors", tensors, metadata, io)


def _copy_side_files(src: Path, dst: Path, config: ModelConfig, io: FileIO) -> None:
    for name in SIDE_FILES:
        source = src / name
        if not source.exists():
            continue
        if source.suffix == ".safetensors":
            found = {}
            with closing(read_tensors(source, io=io)) as stream:
                for entry, data in stream:
                    check_finite(data, entry.dtype, entry.name, str(source))
                    found[entry.name] = (source, entry)
            if name == "lookahead.safetensors":
                _pick(lookahead_tensors(config), found, src)
        with SmallReader(os.path.realpath(source), io) as file:
            chunks = (
                file.read(offset, min(_COPY, file.nbytes - offset))
                for offset in range(0, file.nbytes, _COPY)
            )
            atomic_write(dst / name, chunks, io, nbytes=file.nbytes)
