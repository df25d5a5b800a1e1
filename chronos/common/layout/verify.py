"""Reading all of a model to see whether it is whole.

`verify` checks headers, geometry, fingerprints, digests and every value for NaN and infinity, of a
model folder of any kind or a single file; a file of a packed folder is compared with the digests
beside it. What has no digests, as all of an unpacked folder, is named as not checked. Another
library's dense part has no shapes to compare with: those are that library's to check. Not here:
looking without reading (`overview`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chronos.common.disk import foreign
from chronos.common.disk.atomic import LOCK
from chronos.common.disk.header import Located, read_header
from chronos.common.disk.io import FileIO, StrPath
from chronos.common.disk.linked import LINK
from chronos.common.disk.tensors import locate_tensors, read_pieces
from chronos.common.errors import ChronosError, CorruptClusterError, ResourceError, ShapeMismatch
from chronos.common.layout.ctsr import read_records
from chronos.common.layout.digests import DIGESTS, compare, read_digests
from chronos.common.layout.finite import check_finite
from chronos.common.layout.folder import (
    Layout,
    check_cluster,
    described_layout,
    is_packed,
    refuse_unfinished,
)
from chronos.common.layout.guest import find_experts, left_out_of
from chronos.common.layout.manifest import EXPERTS
from chronos.common.layout.source import open_source
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.weights import (
    Key,
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)


@dataclass
class VerifyReport:
    """What was read, what was found wrong (only where problems are collected: `what`, `where` and
    `fix` of each), and what no digest vouches for."""

    path: str
    files: int = 0
    tensors: int = 0
    records: int = 0
    encodings: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    problems: list[dict[str, str]] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_RESTORE = "restore the file, or pack the model again into a new folder"


class _Verifier:
    def __init__(
        self,
        path: Path,
        collect: bool,
        progress: Callable[[int, int], None] | None,
        io: FileIO | None,
    ) -> None:
        self.report, self.collect, self.io = VerifyReport(str(path)), collect, io
        self.progress, self.total = progress, 0
        self.fix = ""  # of problems that name none

    def problem(self, error: ChronosError) -> None:
        if not self.collect or isinstance(error, ResourceError):  # the machine's, not the file's
            raise error
        found = {"what": error.what, "where": error.where, "fix": error.fix or self.fix}
        if found not in self.report.problems:
            self.report.problems.append(found)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error within is a problem, and the rest of the folder is still read."""
        try:
            yield
        except ChronosError as error:
            self.problem(error)

    def advance(self, nbytes: int) -> None:
        self.report.bytes += nbytes
        if self.progress:
            self.progress(self.report.bytes, self.total)

    def finite(self, data: memoryview, dtype: str, name: str, where: str, skipped: int = 0) -> None:
        try:
            check_finite(data, dtype, name, where, skipped)
        except ChronosError as error:
            self.problem(error)

    def folder(self, folder: Path) -> None:
        refuse_unfinished(folder, self.io)
        if not is_packed(folder):
            self.unpacked(folder, read_config(folder))
            return
        self.fix = _RESTORE
        with self.noting():
            config = read_config(folder)
            with self.noting():
                self.dense(folder, config)
            layout = described_layout(folder, config=config, io=self.io)
            self.report.encodings = sorted(set(layout.encodings.values()))
            self.total += layout.total_bytes
            self.records(layout, layout.files)
        with self.noting():
            self.digests(folder)

    def unpacked(self, folder: Path, config: ModelConfig | GuestConfig) -> None:
        guest = config if isinstance(config, GuestConfig) else None
        unused = partial(left_out_of, config=guest) if guest else None
        located = locate_tensors(folder, self.io, unused=unused)
        if guest:
            find_experts(located, guest)
        elif isinstance(config, ModelConfig):
            located |= self.native(folder, config, located, packed=False)
        with self.noting():
            self.report.records = len(_experts_of(folder, self.io))
        self.total += sum(entry.nbytes for _, entry in located.values())
        self.tensors(located.values())
        self.report.unchecked.append("whether bytes are the ones that were written: only `pack` "
                                     "keeps digests")  # fmt: skip

    def dense(self, folder: Path, config: ModelConfig | GuestConfig) -> None:
        located = locate_tensors(folder, self.io)
        if isinstance(config, ModelConfig):
            located |= self.native(folder, config, located, packed=True)
        self.total += sum(entry.nbytes for _, entry in located.values())
        self.tensors(located.values())

    def digests(self, folder: Path, only: str | None = None) -> None:
        """Compare the folder's files with what was packed, all or one; a file with a problem of its
        own is not told twice."""
        known, unchecked = read_digests(folder, self.io), self.report.unchecked
        if known is None:
            unchecked.append("dense part, side files, manifest and headers: packed before Chronos "
                             "kept their digests; pack again for those")  # fmt: skip
            return
        told = {problem["where"] for problem in self.report.problems}
        for name, digest in known.items():
            path = folder / name
            if str(path) not in told and only in (None, name):
                if only and not self.report.files:  # no weights: read for its digest alone
                    self.report.files = 1
                    self.advance(digest.nbytes)
                with self.noting():
                    compare(path, digest, not name.endswith(".ctsr"), self.io)
        if (folder / LINK).exists() and only is None:
            unchecked.append(f"the dense part, which {LINK} leaves in another folder")
        listed = set(known) | {LOCK, f"{EXPERTS}/{DIGESTS}"}
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        if only is None and (others := sorted(found - listed)):
            unchecked.append("files that packing did not write: " + ", ".join(others))

    def native(
        self, folder: Path, config: ModelConfig, located: dict[str, Located], packed: bool
    ) -> dict[str, Located]:
        """Compare the shapes; the tensors of side files."""
        specs = dense_tensors(config) + ([] if packed else routed_tensors(config))
        self.shapes(specs, located)
        side = folder / "lookahead.safetensors"
        if not side.exists():
            return {}
        extra = _located(side, self.io)
        self.shapes(lookahead_tensors(config), extra)
        return extra

    def shapes(self, specs: Iterable[TensorSpec], located: dict[str, Located]) -> None:
        wanted = {spec.name: (spec.stored, spec.shape) for spec in specs}
        for name in sorted(wanted.keys() ^ located.keys()):
            state = "missing" if name in wanted else "not one the config implies"
            self.problem(ShapeMismatch(f"tensor {name} is {state}", self.report.path))
        for name in wanted.keys() & located.keys():
            path, entry = located[name]
            if (entry.dtype, entry.shape) != wanted[name]:
                dtype, shape = wanted[name]
                what = f"tensor {name} is {entry.dtype} {list(entry.shape)}"
                self.problem(
                    ShapeMismatch(f"{what}, the config implies {dtype} {list(shape)}", str(path))
                )

    def tensors(self, located: Iterable[Located]) -> None:
        wanted = sorted(located, key=lambda at: (at[0], at[1].offset))
        self.report.files += len({path for path, _ in wanted})
        self.report.tensors += len(wanted)
        origin = {entry.name: (path, entry.offset) for path, entry in wanted}
        with closing(read_pieces(wanted, self.io)) as stream:
            for piece, data in stream:
                path, start = origin[piece.name]
                self.finite(data, piece.dtype, piece.name, str(path), piece.offset - start)
                self.advance(piece.nbytes)

    def records(self, layout: Layout, files: Iterable[Path]) -> None:
        """Experts of these cluster files; of one whose header or size is wrong, only that."""
        sound = set()
        for path in files:
            with self.noting():
                check_cluster(layout, path, self.io)
                sound.add(path.name)
        wanted = [(layout.path(r.key), r) for name in sorted(sound) for r in layout.by_file[name]]
        wanted.sort(key=lambda at: (at[1].file, at[1].offset))
        self.report.files += len(sound)
        with closing(read_records(wanted, self.io, self.problem)) as stream:
            for record, data in stream:
                views, where = record.views(data), str(layout.path(record.key))
                for tensor in record.tensors:
                    name = f"{record.label}: {tensor.name}"
                    self.finite(views[tensor.name], tensor.dtype, name, where)
                self.report.records += 1
                self.advance(record.nbytes)

    def file(self, path: Path) -> None:
        """One file: of a packed folder, as that knows it; else its own header and values."""
        inside = path.parent.name == EXPERTS
        folder = path.parent.parent if inside else path.parent
        packed = is_packed(folder)
        self.fix = _RESTORE if packed else ""
        if packed and inside and path.suffix == ".ctsr":
            layout = described_layout(folder, io=self.io)
            if path not in layout.files:
                raise CorruptClusterError("the manifest names no such cluster", str(path))
            self.total += sum(record.nbytes for record in layout.by_file[path.name])
            self.records(layout, [path])
        elif path.suffix in (".safetensors", ".ctsr") or not packed:
            foreign.refuse_other(path)
            located = _located(path, self.io)
            self.total = sum(entry.nbytes for _, entry in located.values())
            self.tensors(located.values())
        if packed:
            self.digests(folder, path.relative_to(folder).as_posix())
        else:
            self.report.unchecked.append("whether these are the bytes that were written: no packed "
                                         "folder is around the file")  # fmt: skip


def verify(
    path: StrPath,
    *,
    collect: bool = False,
    progress: Callable[[int, int], None] | None = None,
    io: FileIO | None = None,
) -> VerifyReport:
    """Read every byte of a model folder or file; the first problem is raised.

    With `collect`, problems of tensors and records are listed in the report instead; a folder whose
    structure cannot be trusted still raises. progress: called with bytes done and in all.
    """
    began, path = time.perf_counter(), Path(path)
    verifier = _Verifier(path, collect, progress, io)
    if path.is_dir():
        verifier.folder(path)
    else:
        verifier.file(path)
    verifier.report.seconds = time.perf_counter() - began
    return verifier.report


def _experts_of(folder: Path, io: FileIO | None) -> list[Key]:
    """Of a folder that is not packed, as packing would find them."""
    return [key for layer in open_source(folder, io or FileIO()).layers for key in layer]


def _located(path: Path, io: FileIO | None) -> dict[str, Located]:
    real = path.resolve()
    return {name: (real, entry) for name, entry in read_header(real, io=io).entries.items()}
