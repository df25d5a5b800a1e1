"""`.ctsr` cluster files: a safetensors file whose experts are contiguous, aligned records.

The header is padded to a block, so the first record starts on one; filler tensors `pad.N` align
each tensor to 64 bytes and each record to 4096. The writer takes experts one at a time from an
iterator, and their tensors whole or in pieces, so its memory does not grow with the model; it keeps
a finished file it finds. Not here: which experts share a file (`clusters`) and where they come from
(`source`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.disk.header import build_header
from chronos.common.disk.io import ALIGN, FileIO, SmallReader, aligned_buffer, round_up
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.errors import ChronosError, CorruptFileError, ShapeMismatch
from chronos.common.layout.codecs import SWIGLU
from chronos.common.layout.finite import check_below, check_finite
from chronos.common.layout.manifest import (
    CTSR_FORMAT,
    CTSR_VERSION,
    EXPERTS,
    MANIFEST,
    TENSOR_ALIGN,
    Manifest,
    Record,
    RecordTensor,
    manifest_bytes,
    tensor_key,
)
from chronos.common.layout.quantised import index_limits
from chronos.common.model.weights import Key, TensorSpec

_AHEAD = 32 << 20  # bytes of records read before they are asked for
_LARGE = 256 << 20

# Given keys, a generator of each of them with its tensors by name, in the order given. A tensor is
# bytes-like, or an iterator of its bytes in pieces, which are asked for in the record's order.
Source = Callable[[Sequence[Key]], Generator[tuple[Key, Mapping[str, Any]], None, None]]
Progress = Callable[[int], None]  # bytes written so far


@dataclass(frozen=True)
class Written:
    """What `write_experts` did; `reused` counts the files an earlier run had finished."""

    manifest: Manifest
    reused: int


class Template(NamedTuple):
    """Where tensors lie in a record, its padded size, and how they are coded."""

    tensors: tuple[RecordTensor, ...]
    nbytes: int
    encoding: str = SWIGLU


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Template:
    """A record of tensors given by name, safetensors dtype and shape."""
    placed, position = [], 0
    for name, dtype, shape in tensors:
        tensor = RecordTensor(name, dtype, shape, position)
        placed.append(tensor)
        position = round_up(position + tensor.nbytes, TENSOR_ALIGN)
    return Template(tuple(placed), round_up(position, ALIGN))


def record_template(specs: Sequence[TensorSpec], encoding: str = SWIGLU) -> Template:
    """A record of the tensors a config implies."""
    laid = lay_out((spec.name, spec.stored, spec.shape) for spec in specs)
    return laid._replace(encoding=encoding)


def write_experts(
    folder: Path,
    clusters: Sequence[Sequence[Key]],
    specs: Sequence[TensorSpec] | Mapping[int, Template],
    source: Source,
    *,
    fingerprint: str,
    order: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    finite: bool = True,
    seal: Callable[[Mapping[str, int], bytes], None] = lambda headers, manifest: None,
    io: FileIO | None = None,
) -> Written:
    """Write `experts/` of the model folder: one file per cluster, the manifest last.

    specs: the tensors of one expert, all experts alike; or each layer's record. `source` is called
    once per cluster; the memory held is what it holds. With `finite` a NaN or infinity is refused
    by name. seal: called with each file's header size and the manifest's bytes before these are
    published. Raises ShapeMismatch, CorruptFileError, DiskFullError, ResourceError; what was
    complete stays complete, and the same call again continues behind it.
    """
    if not isinstance(specs, Mapping):
        specs = dict.fromkeys(
            {layer for keys in clusters for layer, _ in keys}, record_template(specs)
        )
    home, advance = folder / EXPERTS, progress or (lambda nbytes: None)
    files: dict[str, int] = {}
    headers: dict[str, int] = {}
    records: dict[Key, Record] = {}
    done = reused = 0
    make_folder(home, io)
    for number, keys in enumerate(clusters):
        templates = [specs[layer] for layer, _ in keys]
        cluster = _Cluster(home / f"cluster-{number:05d}.ctsr", keys, templates, fingerprint)
        found = cluster.reuse(io)
        reused += found
        if not found:
            chunks = cluster.chunks(source, finite, advance, done)
            atomic_write(cluster.path, chunks, io, nbytes=cluster.nbytes)
        files[cluster.path.name] = cluster.nbytes
        headers[cluster.path.name] = len(cluster.header)
        records.update({record.key: record for record in cluster.records})
        done += cluster.nbytes
        advance(done)
    manifest = Manifest(fingerprint, dict(order or {}), files, records)
    raw = manifest_bytes(manifest)
    for path in home.glob("cluster-*.ctsr"):  # of an unfinished run with other clusters
        if path.name not in files:
            path.unlink()
    seal(headers, raw)
    atomic_write(home / MANIFEST, [raw], io, nbytes=len(raw))
    return Written(manifest, reused)


class _Cluster:
    """One cluster file in the making: its header is known before its data."""

    def __init__(
        self,
        path: Path,
        keys: Sequence[Key],
        templates: Sequence[Template],
        fingerprint: str,
    ) -> None:
        layers = sorted({layer for layer, _ in keys})
        metadata = {
            "format": CTSR_FORMAT,
            "version": str(CTSR_VERSION),
            "cluster": path.stem.removeprefix("cluster-"),
            "layers": ",".join(map(str, layers)),
            "fingerprint": fingerprint,
            "encoding": ",".join(sorted({template.encoding for template in templates})),
        }
        self.path, self.records = path, list[Record]()
        self.header = build_header(_entries(keys, templates), metadata)
        self.nbytes = len(self.header)
        for key, (tensors, nbytes, encoding) in zip(keys, templates, strict=True):
            place = (path.name, self.nbytes, nbytes)
            self.records.append(Record(key, *place, b"", tensors, encoding))
            self.nbytes += nbytes

    def reuse(self, io: FileIO | None) -> bool:
        """Whether an earlier run finished this very file; its records get their digests if so."""
        try:
            with SmallReader(self.path, io) as file:
                if file.nbytes != self.nbytes or file.read(0, len(self.header)) != self.header:
                    return False
        except CorruptFileError:  # not there, or not a file
            return False
        self.records = [
            replace(record, digest=xxhash.xxh3_128_digest(data))
            for record, data in read_records([(self.path, record) for record in self.records], io)
        ]
        return True

    def chunks(self, source: Source, finite: bool, advance: Progress, base: int) -> Iterator[Any]:
        """The file's bytes; sets each record's digest and calls `advance` behind it."""
        yield self.header
        with closing(source([record.key for record in self.records])) as given:
            for index, record in enumerate(self.records):
                key, data = next(given, (None, {}))
                if key != record.key:
                    raise ValueError(f"the source gave expert {key}, {record.key} was asked for")
                digest = xxhash.xxh3_128()
                for chunk in _record_chunks(record, data, finite):
                    digest.update(chunk)
                    yield chunk
                self.records[index] = replace(record, digest=digest.digest())
                advance(base + record.offset + record.nbytes)


def _entries(
    keys: Sequence[Key], templates: Sequence[Template]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The header's tensors in file order, fillers included."""
    fillers = 0
    for key, (tensors, record_nbytes, _) in zip(keys, templates, strict=True):
        for tensor, gap in _gaps(tensors, record_nbytes):
            yield tensor_key(key, tensor.name), tensor.dtype, tensor.shape
            if gap:
                yield f"pad.{fillers}", "U8", (gap,)
                fillers += 1


def _gaps(
    tensors: tuple[RecordTensor, ...], record_nbytes: int
) -> Iterator[tuple[RecordTensor, int]]:
    """Each tensor with the filler bytes behind it."""
    ends = [tensor.offset for tensor in tensors[1:]] + [record_nbytes]
    for tensor, end in zip(tensors, ends, strict=True):
        yield tensor, end - tensor.offset - tensor.nbytes


def _record_chunks(record: Record, data: Mapping[str, Any], finite: bool) -> Iterator[Any]:
    limits = index_limits(record.tensors)
    for tensor, gap in _gaps(record.tensors, record.nbytes):
        given, nbytes = data[tensor.name], 0
        for piece in given if isinstance(given, Iterator) else [given]:
            view = memoryview(piece)
            if finite:
                name = f"{record.label}: {tensor.name}"
                check_finite(view, tensor.dtype, name, skipped=nbytes)
                if limit := limits.get(tensor.name):
                    check_below(view, limit, name)
            nbytes += view.nbytes
            yield view
        if nbytes != tensor.nbytes:
            raise ShapeMismatch(
                f"{record.label}: {tensor.name} has {nbytes} bytes, {tensor.nbytes} wanted"
            )
        yield bytes(gap)


def _room(record_nbytes: int) -> int:
    """How many records may be on their way: of the largest, hundreds of MB, one at a time."""
    return max(1 if record_nbytes > _LARGE else 2, _AHEAD // record_nbytes)


def read_records(
    records: Iterable[tuple[Path, Record]],
    io: FileIO | None = None,
    on_error: Callable[[ChronosError], None] | None = None,
) -> Generator[tuple[Record, memoryview], None, None]:
    """Read records in the order given, some ahead, each checked against its digest if it has one.

    A view is valid until the next one is asked for. The first error is raised, or all are given to
    `on_error` and their records left out.
    """
    waiting = deque(records)
    flying: deque[tuple[Request, Record]] = deque()
    spare: list[memoryview] = []
    with RangedReader(io=io) as reader:
        while waiting or flying:
            while waiting and len(flying) < _room(waiting[0][1].nbytes):
                path, record = waiting.popleft()
                buffer = spare.pop() if spare else aligned_buffer(0)
                if len(buffer) != record.nbytes:
                    buffer = aligned_buffer(record.nbytes)
                digest, label = record.digest or None, record.label
                request = reader.submit(
                    path, record.offset, buffer, demand=True, digest=digest, label=label
                )
                flying.append((request, record))
            request, record = flying.popleft()
            request.wait()
            if request.error is None:
                yield record, request.buffer
            elif on_error is None:
                raise request.error
            else:
                on_error(request.error)
            spare.append(request.buffer)
