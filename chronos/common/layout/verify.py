"""Reading all of a model to see whether it is whole, and looking at one without reading it.

`verify` checks headers, geometry, fingerprints, every record's checksum and every value for NaN and
infinity. `inspect` reads headers only. Both take a model folder, packed or not, or a single
safetensors or `.ctsr` file. A lone `.ctsr` has its digests in the manifest and is checked without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chronos.common.config import ModelConfig
from chronos.common.errors import ChronosError, ShapeMismatch, UsageError
from chronos.common.fileio import FileIO, StrPath
from chronos.common.layout.ctsr import read_records
from chronos.common.layout.finite import check_finite
from chronos.common.layout.folder import Layout, is_packed, open_layout
from chronos.common.tensorfile import Located, locate_tensors, read_header, read_located
from chronos.common.weights import (
    SAFETENSORS_DTYPE,
    TensorSpec,
    dense_tensors,
    lookahead_tensors,
    routed_tensors,
)

_SHARES = (0.125, 0.25, 0.5)


@dataclass
class VerifyReport:
    """What was read, and what was found wrong (only where problems are collected)."""

    path: str
    files: int = 0
    tensors: int = 0
    records: int = 0
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

    def finite(self, data: memoryview, dtype: str, name: str, where: str) -> None:
        try:
            check_finite(data, dtype, name, where)
        except ChronosError as error:
            self.problem(error)

    def folder(self, folder: Path) -> None:
        config = ModelConfig.from_json(folder)
        located = locate_tensors(folder, self.io)
        specs = dense_tensors(config)
        layout = None
        if is_packed(folder):
            layout = open_layout(folder, config=config, io=self.io)
            self.total += layout.total_bytes
        else:
            specs += routed_tensors(config)
        self.shapes(specs, located)
        side = folder / "lookahead.safetensors"
        if side.exists():
            extra = _located(side, self.io)
            self.shapes(lookahead_tensors(config), extra)
            located = {**located, **extra}
        self.total += sum(entry.nbytes for _, entry in located.values())
        self.tensors(located.values())
        if layout is not None:
            self.records(layout)

    def shapes(self, specs: Iterable[TensorSpec], located: dict[str, Located]) -> None:
        wanted = {spec.name: (SAFETENSORS_DTYPE[spec.dtype], spec.shape) for spec in specs}
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
        with closing(read_located(wanted, self.io)) as stream:
            for (path, _), (entry, data) in zip(wanted, stream, strict=True):
                self.finite(data, entry.dtype, entry.name, str(path))
                self.report.tensors += 1
                self.advance(entry.nbytes)

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


def inspect(path: StrPath) -> dict[str, Any]:
    """What a model folder or file holds, from its headers alone; sizes in bytes."""
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    if not path.exists():
        raise UsageError("there is no such file or folder", str(path))
    header = read_header(path)
    tensors = [e for name, e in header.entries.items() if not name.startswith("pad.")]
    return {
        "kind": "cluster" if path.suffix == ".ctsr" else "tensors",
        "bytes": header.file_bytes,
        "tensors": len(tensors),
        "dtypes": sorted({entry.dtype for entry in tensors}),
        **{f"metadata.{key}": value for key, value in header.metadata.items()},
    }


def _inspect_folder(folder: Path) -> dict[str, Any]:
    config = ModelConfig.from_json(folder)
    located = locate_tensors(folder)
    experts = {spec.name for spec in routed_tensors(config)} & located.keys()
    dense = sum(entry.nbytes for name, (_, entry) in located.items() if name not in experts)
    data: dict[str, Any] = {
        "kind": "packed" if is_packed(folder) else "unpacked",
        "layers": config.num_hidden_layers,
        "experts_per_layer": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "shared_experts": config.num_shared_experts,
        "hidden_size": config.hidden_size,
        "expert_hidden_size": config.moe_intermediate_size,
        "dtype": config.dtype,
        "dense_bytes": dense,
    }
    if data["kind"] == "unpacked":
        return data | {"expert_bytes_total": sum(located[name][1].nbytes for name in experts)}
    layout = open_layout(folder, config=config)
    data |= {
        "expert_bytes_total": layout.total_bytes,
        "expert_bytes": layout.record_nbytes,
        "clusters": len(layout.files),
        "order": layout.manifest.order.get("method", "unknown"),
        "fingerprint": layout.fingerprint,
    }
    for share in _SHARES:
        slots = int(share * layout.total_bytes) // layout.record_nbytes
        data[f"budget {share:.1%}"] = (
            f"{slots} experts in {slots * layout.record_nbytes} bytes,"
            f" {slots / len(layout.moe_layers):.1f} a layer"
        )
    return data
