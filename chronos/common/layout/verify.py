"""Reading all of a model to see whether it is whole.

`verify` checks headers, geometry, fingerprints, every record's checksum and every value for NaN and
infinity, of a model folder of any kind or a single safetensors or `.ctsr` file. A lone `.ctsr` has
its digests in the manifest and is checked without. Another library's dense part has no shapes to
compare with: those are that library's to check. Not here: looking without reading (`overview`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chronos.common.disk.header import Located, read_header
from chronos.common.disk.io import FileIO, StrPath
from chronos.common.disk.tensors import locate_tensors, read_pieces
from chronos.common.errors import ChronosError, ShapeMismatch
from chronos.common.layout.ctsr import read_records
from chronos.common.layout.finite import check_finite
from chronos.common.layout.folder import Layout, is_packed, open_layout, refuse_unfinished
from chronos.common.layout.guest import find_experts, left_out_of
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.weights import (
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)


@dataclass
class VerifyReport:
    """What was read, and what was found wrong (only where problems are collected)."""

    path: str
    files: int = 0
    tensors: int = 0
    records: int = 0
    encodings: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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

    def problem(self, error: ChronosError) -> None:
        if not self.collect:
            raise error
        self.report.problems.append(str(error))

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
        config = read_config(folder)
        refuse_unfinished(folder, self.io)
        guest = config if isinstance(config, GuestConfig) and not is_packed(folder) else None
        unused = partial(left_out_of, config=guest) if guest else None
        located = locate_tensors(folder, self.io, unused=unused)
        layout = None
        if is_packed(folder):
            layout = open_layout(folder, config=config, io=self.io)
            self.total += layout.total_bytes
            self.report.encodings = sorted(set(layout.encodings.values()))
        if guest:
            find_experts(located, guest)
        elif isinstance(config, ModelConfig):
            located |= self.native(folder, config, located, layout is not None)
        self.total += sum(entry.nbytes for _, entry in located.values())
        self.tensors(located.values())
        if layout is not None:
            self.records(layout)

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

    def records(self, layout: Layout) -> None:
        wanted = [(layout.path(key), record) for key, record in layout.records.items()]
        wanted.sort(key=lambda at: (at[1].file, at[1].offset))
        self.report.files += len(layout.files)
        with closing(read_records(wanted, self.io, self.problem)) as stream:
            for record, data in stream:
                views, where = record.views(data), str(layout.path(record.key))
                for tensor in record.tensors:
                    name = f"{record.label}: {tensor.name}"
                    self.finite(views[tensor.name], tensor.dtype, name, where)
                self.report.records += 1
                self.advance(record.nbytes)


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
        located = _located(path, io)
        verifier.total = sum(entry.nbytes for _, entry in located.values())
        verifier.tensors(located.values())
    verifier.report.seconds = time.perf_counter() - began
    return verifier.report


def _located(path: Path, io: FileIO | None) -> dict[str, Located]:
    real = path.resolve()
    return {name: (real, entry) for name, entry in read_header(real, io=io).entries.items()}
