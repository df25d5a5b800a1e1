"""From a model folder, packed or not, to a packed one: dense part, cluster files, manifest last.

Bytes are moved, converted only where an encoding is asked for, and searched for NaN on their way.
Memory is bounded by some pieces of 16 MiB. A run killed at any point leaves either no manifest or a
whole model, and the same command again continues behind the last finished cluster file. The source
is only read. Not here: what a source is and how it is checked (`source`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk import foreign
from chronos.common.disk.atomic import LOCK, RunLock, atomic_write, sweep_orphans
from chronos.common.disk.gguf import SUFFIX
from chronos.common.disk.header import build_header
from chronos.common.disk.io import ALIGN, FileIO, SmallReader, StrPath, check_free_space
from chronos.common.disk.linked import LINK, write_link
from chronos.common.disk.tensors import DTYPE, read_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout.ctsr import write_experts
from chronos.common.layout.digests import renew, seal
from chronos.common.layout.finite import check_finite
from chronos.common.layout.folder import (
    FINGERPRINT,
    Layout,
    is_packed,
    is_unfinished,
    open_layout,
)
from chronos.common.layout.gguf import open_gguf
from chronos.common.layout.manifest import EXPERTS, read_manifest
from chronos.common.layout.names import NAMES, write_names
from chronos.common.layout.source import ModelSource, encoded, open_source, pick
from chronos.common.model.config import ModelConfig, load_config
from chronos.common.model.guest import GuestConfig
from chronos.common.model.weights import Key, lookahead_tensors

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "lookahead.safetensors",
    "forecast.safetensors", "config.json",
)  # fmt: skip
DENSE = "model.safetensors"
_COPY = 1 << 20


@dataclass(frozen=True)
class PackReport:
    """What a `pack` did: bytes of weights in the packed folder, seconds, experts, cluster files.

    left_out: names of tensors that no decoder runs (multi-token-prediction layers).
    """

    bytes: int
    seconds: float
    records: int
    clusters: int
    reused_clusters: int
    fingerprint: str
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pack(
    src: StrPath,
    dst: StrPath,
    *,
    config: StrPath | None = None,
    order: str | Sequence[Sequence[Key]] = "layer",
    how: Mapping[str, Any] | None = None,
    encoding: str | None = None,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
    io: FileIO | None = None,
) -> PackReport:
    """Write the packed form of the model in `src` into `dst`.

    src: a model folder, or a GGUF file; `config` is then the folder of the original checkpoint, for
    its config.json and tokenizer. order: "layer" (one cluster file per layer), or the clusters as
    lists of (layer, expert) that hold every expert once; `how` is kept in the manifest as the
    reason. encoding: convert the experts (`source.own_encoding`); else their bytes stay as they
    are. link: leave the dense part where it is, which needs `src` for as long as `dst` is used.
    progress: called with bytes done and in all. Raises ConfigError, ShapeMismatch, CorruptFileError
    (a NaN, by tensor), DiskFullError before anything is written where it can, UsageError.
    """
    began, src, dst, io = time.perf_counter(), Path(src), Path(dst), io or FileIO()
    model = opened(src, config, io)
    if config is not None:
        if link:
            raise UsageError("a GGUF file is converted: nothing of it can stay in place", "--link")
        src = Path(config)
    _check_side_files(src, io)
    if encoding is not None and set(model.encodings.values()) != {encoding}:
        model = encoded(model, encoding)
    _check_destination(src, dst, model, io)
    clusters = _clusters(order, model)
    how = dict(how or {"method": order if isinstance(order, str) else "clusters"})
    dense = 0 if link else model.dense_nbytes
    total = dense + model.expert_nbytes

    def advance(nbytes: int) -> None:
        if progress:
            progress(min(total, nbytes), total)

    with _locked(dst):
        sweep_orphans(dst)
        sweep_orphans(dst / EXPERTS)
        if is_packed(dst):
            layout = _same_model(dst, model, clusters)
            _complete(src, dst, model, link, config is not None, advance, io)
            return _already_packed(layout, model, began)
        _refuse_foreign(src, dst, io)
        check_free_space(dst, total + _overhead(src, clusters) - _existing_nbytes(dst), io)
        _place_dense(dst, model, link, advance, io)
        copy_side_files(side_files(src), dst, model.config, io, plain=config is not None)
        if model.names:
            write_names(dst, model.names, io)
        written = write_experts(
            dst,
            clusters,
            model.templates,
            model.experts,
            fingerprint=model.fingerprint,
            order=how,
            progress=lambda nbytes: advance(dense + nbytes),
            seal=lambda headers, manifest: seal(dst, _packed_files(dst), headers, manifest, io),
            io=io,
        )
    return PackReport(
        bytes=dense + sum(written.manifest.files.values()),
        seconds=time.perf_counter() - began,
        records=len(written.manifest.records),
        clusters=len(clusters),
        reused_clusters=written.reused,
        fingerprint=model.fingerprint,
        left_out=model.left_out,
    )


def opened(src: Path, config: StrPath | None, io: FileIO) -> ModelSource:
    """What `pack` would write. Raises what `pack` does; UsageError where `config` is missing, or
    names what the folder has itself."""
    if src.suffix == SUFFIX:
        if config is None:
            raise UsageError(
                f"{src.name} is in GGUF, which has no config.json",
                str(src),
                "name the folder of the original checkpoint (config.json, tokenizer): --config DIR",
            )
        return open_gguf(src, Path(config), io)
    if config is not None:
        raise UsageError("only a GGUF file needs another folder's config.json", "--config")
    return open_source(src, io)


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """The folder as this process' own; one that it made is gone again where nothing was written."""
    made = not dst.exists()
    try:
        with RunLock(dst):
            yield
    except BaseException:
        if made:
            with suppress(OSError):
                dst.rmdir()
        raise


def reorder(
    folder: StrPath,
    order: Sequence[Sequence[Key]],
    how: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Write a packed folder anew with its experts in another order, and take its place.

    Nothing else may use the folder meanwhile: a reader of the old order would be stopped by a
    checksum. Needs room for both; interrupted, it leaves the old folder, or between two renames
    both beside its place.
    """
    old = Path(folder).resolve()
    new, aside = (old.with_name(f".{old.name}.chronos-{state}") for state in ("new", "old"))
    for path in (new, aside):
        shutil.rmtree(path, ignore_errors=True)
    linked = (old / LINK).exists()
    report = pack(old, new, order=order, how=how, link=linked, progress=progress)
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside)
    return report


def _clusters(order: str | Sequence[Sequence[Key]], model: ModelSource) -> list[list[Key]]:
    layers = model.layers
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


def check_destination(src: StrPath, dst: StrPath) -> None:
    """Raises UsageError where `pack` would refuse to write; asked before long work."""
    src, dst, io = Path(src), Path(dst), FileIO()
    _check_destination(src, dst, open_source(src, io), io)
    if dst.exists() and not is_packed(dst):
        with RunLock(dst):
            sweep_orphans(dst)
            _refuse_foreign(src, dst, io)


def _check_destination(src: Path, dst: Path, model: ModelSource, io: FileIO) -> None:
    if not dst.exists():
        return
    if src.resolve() == dst.resolve():
        raise UsageError("source and destination are the same folder", str(dst))
    if not dst.is_dir():
        raise UsageError("the destination is a file", str(dst), "name a new or an empty folder")
    if is_packed(dst) and read_manifest(dst, io).fingerprint != model.fingerprint:
        raise _another(dst)


def _same_model(dst: Path, model: ModelSource, clusters: list[list[Key]]) -> Layout:
    """The layout of a finished folder of the same model and clusters; others are refused."""
    layout = open_layout(dst, config=model.config)
    if layout.encodings != model.encodings or layout.clusters() != clusters:
        raise _another(dst)
    return layout


def _another(dst: Path) -> UsageError:
    return UsageError(
        "the destination already holds another packed model",
        str(dst),
        "remove it or choose another folder: cluster files are never changed in place",
    )


def _complete(
    src: Path,
    dst: Path,
    model: ModelSource,
    link: bool,
    plain: bool,
    advance: Callable[[int], None],
    io: FileIO,
) -> None:
    """Put back what a finished folder has lost. Its own copy of the dense part is never removed:
    other folders may be linked to it, the source too."""
    lost = [path for path in side_files(src) if not (dst / path.name).exists()]
    copy_side_files(lost, dst, model.config, io, plain=plain)
    put_back = [path.name for path in lost]
    if not (dst / DENSE).exists():
        check_free_space(dst, 0 if link else model.dense_nbytes, io)
        _place_dense(dst, model, link, advance, io)
        put_back += [DENSE, LINK]
    if model.names and not (dst / EXPERTS / NAMES).exists():
        write_names(dst, model.names, io)
        put_back.append(f"{EXPERTS}/{NAMES}")
    if put_back:
        renew(dst, put_back, io)


def _already_packed(layout: Layout, model: ModelSource, began: float) -> PackReport:
    dense = model.dense_nbytes if (layout.folder / DENSE).exists() else 0
    return PackReport(
        bytes=dense + sum(layout.manifest.files.values()),
        seconds=time.perf_counter() - began,
        records=len(layout.records),
        clusters=len(layout.files),
        reused_clusters=len(layout.files),
        fingerprint=layout.fingerprint,
        left_out=model.left_out,
    )


def _packed_files(dst: Path) -> list[str]:
    """Names of what packing wrote beside the experts."""
    written = (DENSE, LINK, f"{EXPERTS}/{NAMES}", *(path.name for path in side_files(dst)))
    return [name for name in written if (dst / name).exists()]


def _overhead(src: Path, clusters: list[list[Key]]) -> int:
    """Bytes of side files, and about those of headers and manifest."""
    side = sum(path.stat().st_size for path in side_files(src))
    return side + 1024 * sum(map(len, clusters)) + ALIGN * len(clusters)


def _existing_nbytes(dst: Path) -> int:
    written = [*(dst / EXPERTS).glob("cluster-*.ctsr"), *dst.glob(DENSE)]
    return sum(path.stat().st_size for path in written)


def _refuse_foreign(src: Path, dst: Path, io: FileIO) -> None:
    """Go on in an empty folder or where an unfinished run left off, never over other files.

    Raises UsageError: the dense part is written first, so a folder without ours is not ours.
    """
    if is_unfinished(dst, io):
        return
    written = ["config.json", *(path.name for path in side_files(src))]
    there = [dst / name for name in written if (dst / name).exists()]
    if there or any(dst.glob("*.safetensors*")):
        model = (dst / "config.json").exists() or not there
        raise UsageError(
            "the destination holds a model that was not packed by Chronos"
            if model
            else f"the destination holds a {there[0].name} that was not written by Chronos",
            str(dst),
            "choose an empty or a new folder: its files would be overwritten",
        )
    # Hidden ones may be there: a repository made to hold the model, what file managers leave.
    others = sorted(
        path.name for path in dst.iterdir() if path.name != LOCK and not path.name.startswith(".")
    )
    if others:
        shown = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise UsageError(
            f"the destination holds other files: {shown}",
            str(dst),
            "choose an empty or a new folder",
        )


def _place_dense(
    dst: Path, model: ModelSource, link: bool, advance: Callable[[int], None], io: FileIO
) -> None:
    """Copied or linked, and not both."""
    if link:
        write_link(dst, model.dense, model.fingerprint, io)
        (dst / DENSE).unlink(missing_ok=True)  # of an unfinished run that copied it
    else:
        _write_dense(dst, model, advance, io)
        (dst / LINK).unlink(missing_ok=True)


def _write_dense(dst: Path, model: ModelSource, advance: Callable[[int], None], io: FileIO) -> None:
    metadata = {"format": "pt", FINGERPRINT: model.fingerprint}
    if isinstance(model.config, GuestConfig):  # in a file of other tensors others come first
        metadata[DTYPE] = model.config.dtype
    header = build_header(((e.name, e.dtype, e.shape) for _, e in model.dense), metadata)
    if _holds(dst / DENSE, header, len(header) + model.dense_nbytes, io):
        return

    def chunks() -> Iterator[Any]:
        yield header
        done, starts = 0, {entry.name: entry.offset for _, entry in model.dense}
        with closing(model.read_dense(io)) as stream:
            for piece, data in stream:
                skipped = piece.offset - starts[piece.name]
                check_finite(data, piece.dtype, piece.name, skipped=skipped)
                yield data
                done += data.nbytes
                advance(done)

    atomic_write(dst / DENSE, chunks(), io, nbytes=len(header) + model.dense_nbytes)


def _holds(path: Path, header: bytes, nbytes: int, io: FileIO) -> bool:
    """Whether an earlier run finished this very file: it has the same tensors and fingerprint."""
    if not path.exists():
        return False
    with SmallReader(path, io) as file:
        return file.nbytes == nbytes and file.read(0, len(header)) == header


def side_files(src: Path) -> list[Path]:
    """What comes along beside the weights: config, tokenizer, licenses."""
    licenses = sorted(path.name for path in src.glob("LICENSE*") if path.is_file())
    return [src / name for name in (*licenses, *SIDE_FILES) if (src / name).exists()]


def _check_side_files(src: Path, io: FileIO) -> None:
    """Refuse pointers and pages in their place, which tokenizers of a clone without git-lfs are."""
    for path in side_files(src):
        with SmallReader(os.path.realpath(path), io) as file:
            head = file.read(0, min(file.nbytes, foreign.HEAD))
        if error := foreign.by_content(path, head):
            raise error


def copy_side_files(
    files: Iterable[Path],
    dst: Path,
    config: ModelConfig | GuestConfig,
    io: FileIO,
    *,
    plain: bool = False,
) -> None:
    """Copy them, the tensors of those that have some checked. plain: config.json says nothing of a
    quantisation then."""
    for source in files:
        if source.suffix == ".safetensors":
            found = {}
            with closing(read_tensors(source, io=io)) as stream:
                for entry, data in stream:
                    check_finite(data, entry.dtype, entry.name, str(source))
                    found[entry.name] = (source, entry)
            if source.name == "lookahead.safetensors" and isinstance(config, ModelConfig):
                pick(lookahead_tensors(config), found, source.parent)
        if plain and source.name == "config.json":
            raw = json.dumps(_without_quantisation(load_config(source)[0]), indent=2).encode()
            atomic_write(dst / source.name, [raw], io, nbytes=len(raw))
            continue
        with SmallReader(os.path.realpath(source), io) as file:
            chunks = (
                file.read(offset, min(_COPY, file.nbytes - offset))
                for offset in range(0, file.nbytes, _COPY)
            )
            atomic_write(dst / source.name, chunks, io, nbytes=file.nbytes)


def _without_quantisation(config: Any) -> Any:
    """The same config.json of a model that is not quantised."""
    if not isinstance(config, dict):
        return config
    gone = ("quantization_config", "quantization")
    return {key: _without_quantisation(value) for key, value in config.items() if key not in gone}
