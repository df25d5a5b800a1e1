"""safetensors files, read strictly and written atomically: the one tensor format of all backends.

Headers go through the strict check of `header`. Data comes by ranged reads at disk speed into
aligned buffers, never through mmap. Values are bytes here: nothing is converted, NaNs pass. The
tensors of a checkpoint lie in one file, in shards that an index names, or where a link points.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.disk import foreign
from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import (
    Located,
    TensorEntry,
    build_header,
    is_plain_name,
    load_json,
    read_header,
    read_small,
    tensor_nbytes,
)
from chronos.common.disk.io import ALIGN, FileIO, StrPath, aligned_buffer, corrupt
from chronos.common.disk.linked import LINK, read_link
from chronos.common.disk.reader import RangedReader, Request
from chronos.common.errors import CorruptFileError

MAX_INDEX = 32 << 20
DTYPE = "chronos.dtype"  # in a packed file's metadata: what its source was computed in
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OF = re.compile(r"(model.*-)(\d+)-of-(\d+)\.safetensors")
_MAX_SHARDS = 10_000
_EXTENT = 16 << 20  # neighbouring tensors are read together up to this size
_AHEAD = 64 << 20  # bytes in flight or read and not yet asked for
# Holds reader threads until it is exhausted or closed; who may stop early uses contextlib.closing.
Stream = Generator[tuple[TensorEntry, memoryview], None, None]
# Bytes, or a function that gives them when their turn comes: they need not all be in memory.
Data = Any
Named = tuple[str, str, tuple[int, ...], Data]


def read_tensors(
    path: StrPath, names: Iterable[str] | None = None, io: FileIO | None = None
) -> Stream:
    """The tensors of a file in file order; those in `names` only, where given and there.

    The views are writable and stay valid for as long as they are kept.
    """
    real = Path(os.path.realpath(path))
    entries = read_header(real, io=io).entries
    if names is not None:
        wanted = set(names)
        entries = {name: entry for name, entry in entries.items() if name in wanted}
    yield from read_located([(real, entry) for entry in entries.values()], io)


def read_checkpoint(
    folder: StrPath, names: Iterable[str] | None = None, io: FileIO | None = None
) -> Stream:
    """The tensors of model.safetensors, or of the shards its index names; as `read_tensors`."""
    located = locate_tensors(folder, io)
    if names is not None:
        located = {name: located[name] for name in dict.fromkeys(names) if name in located}
    yield from read_located(sorted(located.values(), key=lambda at: (at[0], at[1].offset)), io)


def locate_tensors(
    folder: StrPath,
    io: FileIO | None = None,
    *,
    unused: Callable[[Iterable[str]], Collection[str]] | None = None,
) -> dict[str, Located]:
    """Where each tensor of a checkpoint is, files in the order in which Transformers reads them.

    unused: which of the names in the index the caller leaves out: a shard that holds no others may
    be absent. Raises CorruptFileError for a folder without a whole checkpoint, naming what it holds
    instead.
    """
    folder = Path(folder)
    link = folder / LINK
    if link.exists() and not (folder / _SINGLE).exists():
        return read_link(link, io)
    shards = _shards(folder)
    absent = [name for name in shards.files if not (folder / name).exists()]
    _check_absent(folder, shards, absent, unused)
    copies: dict[str, dict[str, Located]] = {}  # by tensor, then by shard
    for file in shards.files:
        if file not in absent:
            real = Path(os.path.realpath(folder / file))
            for name, entry in read_header(real, io=io).entries.items():
                copies.setdefault(name, {})[file] = (real, entry)
    lost = {name for name, file in shards.named.items() if file not in absent} - copies.keys()
    if missing := min(lost, default=None):
        file = shards.named[missing]
        raise corrupt(folder / _INDEX, f"names tensor {missing!r}, which is not in {file}")
    return {name: _chosen(folder, name, found, shards) for name, found in copies.items()}


class _Shards(NamedTuple):
    """files: in the order Transformers reads them. named: the one of each tensor, where an index
    says so. dtype: as the index names it, or ""."""

    files: list[str]
    named: dict[str, str]
    dtype: str = ""


def first_dtype(folder: StrPath) -> str:
    """The dtype Transformers takes where config.json has none: what the index or our own metadata
    says, as "bfloat16"; else that of the first floating tensor of the first file, in order of
    names, as "BF16"; "" where there is none."""
    folder = Path(folder)
    if (folder / LINK).exists() and not (folder / _SINGLE).exists():
        entries = [entry for _, entry in read_link(folder / LINK).values()]
    else:
        shards = _shards(folder)
        there = [name for name in shards.files if (folder / name).exists()]
        header = read_header(folder / (there or shards.files)[0])
        if named := shards.dtype or header.metadata.get(DTYPE, ""):
            return named
        entries = list(header.entries.values())
    entries.sort(key=lambda entry: entry.name)
    return next((e.dtype for e in entries if e.dtype in ("F64", "F32", "F16", "BF16")), "")


def _shards(folder: Path) -> _Shards:
    """Of model.safetensors, of the index, or without one what MLX-LM would find."""
    if (folder / _SINGLE).exists():
        return _Shards([_SINGLE], {})
    if (folder / _INDEX).exists():
        index, dtype = _read_index(folder / _INDEX)
        return _Shards(sorted(set(index.values())), index, dtype)
    files = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not files:
        raise foreign.by_name(folder) or CorruptFileError(
            f"there is no {_SINGLE} and no {_INDEX}",
            str(folder),
            "name the folder of a checkpoint in safetensors, whole",
        )
    wanted = {other for name in files for other in _siblings(name)}
    if lost := sorted(wanted - set(files)):
        raise corrupt(folder / _INDEX, f"is missing, and so is {lost[0]}", "download both")
    return _Shards(files, {})


def _check_absent(
    folder: Path,
    shards: _Shards,
    absent: list[str],
    unused: Callable[[Iterable[str]], Collection[str]] | None,
) -> None:
    """Refuse shards that are not there, unless nothing of them is used."""
    if not absent:
        return
    left_out = unused(shards.named) if unused else ()
    for name, file in shards.named.items():
        if file in absent and name not in left_out:
            raise corrupt(
                folder / _INDEX,
                f"names {file}, which is not there (tensor {name})",
                "copy or download it too",
            )


def _siblings(name: str) -> list[str]:
    """The shards that a shard's own name speaks of."""
    if not (part := _OF.fullmatch(name)):
        return []
    count, width = min(int(part[3]), _MAX_SHARDS), len(part[2])
    return [f"{part[1]}{n:0{width}d}-of-{part[3]}.safetensors" for n in range(1, count + 1)]


def _chosen(folder: Path, name: str, found: dict[str, Located], shards: _Shards) -> Located:
    """The copy that the index names. It must be the last one, which Transformers takes."""
    *others, last = found
    named = shards.named.get(name, "")
    if named in others or (others and not shards.named):
        raise corrupt(
            folder / last,
            f"holds tensor {name!r}, and so does {named or others[0]}",
            "remove the copy that is out of date: libraries differ in which one they take",
        )
    return found[last]


def _read_index(path: Path) -> tuple[dict[str, str], str]:
    """The shard of each tensor, and the dtype in the metadata."""
    try:
        real = os.path.realpath(path)  # the Hugging Face cache is made of links
        raw = read_small(real, MAX_INDEX)
        if error := foreign.by_content(path, raw[: foreign.HEAD]):
            raise error
        data = load_json(raw)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"is not a usable index: {error}") from error
    shards, metadata = data.get("weight_map"), data.get("metadata")
    if not isinstance(shards, dict) or not shards:
        raise corrupt(path, "has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not is_plain_name(shard, ".safetensors"):
            raise corrupt(path, f"names {shard!r}, which is not a file of this folder")
    dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
    return shards, str(dtype or "")[:40].removeprefix("torch.")


def next_pieces(stream: Stream, nbytes: int) -> Iterator[memoryview]:
    """The next `nbytes` of what `read_pieces` gives, whole pieces of it."""
    while nbytes > 0:
        data = next(stream)[1]
        nbytes -= data.nbytes
        yield data


def read_pieces(wanted: Iterable[Located], io: FileIO | None = None) -> Stream:
    """Read tensors in the given order, in pieces of at most 16 MiB, with memory for a few of them.

    An entry then has the name, dtype and shape of the tensor, and the place of the piece; a tensor
    without bytes has none. Reads are in order of place within windows of 64 MiB, so that tensors of
    one record that lie apart are still read in large extents.
    """
    windows = list(_windows(_cut(wanted)))
    by_place = [at for window in windows for at in sorted(window, key=_place)]
    with closing(read_located(by_place, io)) as stream:
        arriving = zip(by_place, stream, strict=True)
        for window in windows:
            held: dict[tuple[Path, int], memoryview] = {}
            for at in window:
                while _place(at) not in held:
                    come, (_, data) = next(arriving)
                    held[_place(come)] = data
                yield at[1], held.pop(_place(at))


def _place(at: Located) -> tuple[Path, int]:
    return at[0], at[1].offset


def _cut(wanted: Iterable[Located]) -> Iterator[Located]:
    for path, entry in wanted:
        for done in range(0, entry.nbytes, _EXTENT):
            nbytes = min(_EXTENT, entry.nbytes - done)
            yield path, entry._replace(offset=entry.offset + done, nbytes=nbytes)


def _windows(pieces: Iterable[Located]) -> Iterator[list[Located]]:
    window: list[Located] = []
    nbytes = 0
    for at in pieces:
        if window and nbytes + at[1].nbytes > _AHEAD:
            yield window
            window, nbytes = [], 0
        window.append(at)
        nbytes += at[1].nbytes
    if window:
        yield window


def read_located(wanted: Sequence[Located], io: FileIO | None = None) -> Stream:
    """Read tensors in the given order, some MiB ahead of the consumer, with several threads."""
    waiting = deque(_extents(wanted))
    flying: deque[tuple[Request, list[TensorEntry]]] = deque()
    ahead = 0
    if not waiting:
        return
    with RangedReader(io=io) as reader:
        while waiting or flying:
            while waiting and (not flying or ahead < _AHEAD):
                path, start, nbytes, entries = waiting.popleft()
                buffer = aligned_buffer(nbytes)
                flying.append((reader.submit(path, start, buffer, demand=True), entries))
                ahead += nbytes
            request, entries = flying.popleft()
            request.wait()
            if request.error:
                raise request.error
            ahead -= request.nbytes
            for entry in entries:
                begin = entry.offset - request.offset
                yield entry, request.buffer[begin : begin + entry.nbytes]


def _extents(wanted: Sequence[Located]) -> Iterator[tuple[Path, int, int, list[TensorEntry]]]:
    """Neighbours joined: (file, aligned start, bytes, tensors)."""
    group: list[TensorEntry] = []
    path, start, stop = Path(), 0, 0
    for where, entry in wanted:
        joins = where == path and entry.offset == stop and stop - start + entry.nbytes <= _EXTENT
        if group and not joins:
            yield path, start, stop - start, group
            group = []
        if not group:
            path, start = where, entry.offset // ALIGN * ALIGN
        group.append(entry)
        stop = entry.offset + entry.nbytes
    if group:
        yield path, start, stop - start, group


def write_tensors(
    path: StrPath,
    tensors: Iterable[Named],
    metadata: Mapping[str, str] | None = None,
    io: FileIO | None = None,
) -> None:
    """Write a safetensors file atomically from (name, dtype, shape, data).

    Data is bytes-like, or a function without arguments that returns it when its turn comes. Raises
    ValueError for a bad name, dtype or size, ResourceError or DiskFullError as `atomic_write` does.
    """
    items = list(tensors)
    header = build_header(((name, dtype, shape) for name, dtype, shape, _ in items), metadata or {})
    sizes = [tensor_nbytes(dtype, shape) for _, dtype, shape, _ in items]

    def chunks() -> Iterator[Any]:
        yield header
        for (name, _, _, data), nbytes in zip(items, sizes, strict=True):
            view = memoryview(data() if callable(data) else data)
            if view.nbytes != nbytes:
                raise ValueError(f"tensor {name!r}: {view.nbytes} bytes given, {nbytes} needed")
            yield view

    atomic_write(path, chunks(), io, nbytes=len(header) + sum(sizes))
