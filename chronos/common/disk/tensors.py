"""safetensors files, read strictly and written atomically: the one tensor format of all backends.

Headers go through the strict check of `header`. Data comes by ranged reads at disk speed into
aligned buffers, never through mmap. Values are bytes here: nothing is converted, NaNs pass. The
tensors of a checkpoint lie in one file, in shards that an index names, or where a link points.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

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


def locate_tensors(folder: StrPath, io: FileIO | None = None) -> dict[str, Located]:
    """Where each tensor of a checkpoint is. Raises CorruptFileError for a folder without one."""
    single = Path(folder) / "model.safetensors"
    index, link = Path(folder) / "model.safetensors.index.json", Path(folder) / LINK
    if link.exists() and not single.exists():
        return read_link(link, io)
    if single.exists() or not index.exists():
        _refuse_pickles(single)
        real = Path(os.path.realpath(single))
        return {name: (real, entry) for name, entry in read_header(real, io=io).entries.items()}
    shards = _read_index(index)
    located: dict[str, Located] = {}
    for shard in sorted(set(shards.values())):
        real = Path(os.path.realpath(Path(folder) / shard))
        if not real.exists():
            raise corrupt(index, f"names {shard}, which is not there", "copy or download it too")
        for name, entry in read_header(real, io=io).entries.items():
            if shards.get(name) != shard:
                raise corrupt(index, f"does not say that {shard} holds tensor {name!r}")
            located[name] = (real, entry)
    if missing := min(shards.keys() - located.keys(), default=None):
        raise corrupt(index, f"names tensor {missing!r}, which is not in {shards[missing]}")
    return located


def _refuse_pickles(single: Path) -> None:
    """Name what is there in the place of safetensors: a pickle runs code when it is read."""
    if single.exists():
        return
    for path in sorted(single.parent.glob("*")):
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise CorruptFileError(
                f"the weights are pickled ({path.name}), which Chronos does not read",
                str(single.parent),
                "load the model with Transformers and save_pretrained it: that writes safetensors",
            )


def _read_index(path: Path) -> dict[str, str]:
    try:
        real = os.path.realpath(path)  # the Hugging Face cache is made of links
        shards = load_json(read_small(real, MAX_INDEX)).get("weight_map")
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"is not a usable index: {error}") from error
    if not isinstance(shards, dict) or not shards:
        raise corrupt(path, "has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not is_plain_name(shard, ".safetensors"):
            raise corrupt(path, f"names {shard!r}, which is not a file of this folder")
    return shards


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
