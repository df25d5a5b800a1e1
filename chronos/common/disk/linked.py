"""`dense.json`: a packed folder's dense part left where it is, in the shards it was packed from.

The file names each shard by path, size and time of change, and the shard of each tensor. A shard
that has moved or changed is an error that says so; one that was only touched is told by samples of
its tensors. Not here: copying the dense part, as packing does unless it is asked to link.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash

from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import Located, load_json, read_header, read_small
from chronos.common.disk.io import FileIO, SmallReader, corrupt
from chronos.common.errors import CorruptFileError

LINK = "dense.json"
_FORMAT, _VERSION = "chronos-dense-link", 1
_MAX_BYTES = 32 << 20
_SAMPLE = 4096  # bytes at either end of a tensor


def sample_digest(located: Mapping[str, Located], io: FileIO | None = None) -> str:
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


def write_link(folder: Path, dense: list[Located], fingerprint: str, io: FileIO) -> None:
    """Write `dense.json`; fingerprint: the packed model's."""
    paths = sorted({path for path, _ in dense})
    stats = [os.stat(path) for path in paths]
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": fingerprint,
        "samples": sample_digest({entry.name: (path, entry) for path, entry in dense}, io),
        "shards": [
            {"file": str(path), "nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            for path, stat in zip(paths, stats, strict=True)
        ],
        "tensors": {entry.name: paths.index(path) for path, entry in dense},
    }
    atomic_write(folder / LINK, [json.dumps(data).encode()], io)


def link_fingerprint(path: Path, io: FileIO | None = None) -> str:
    """The fingerprint of the model that `dense.json` belongs to."""
    return str(_load(path, io)["fingerprint"])


def read_link(path: Path, io: FileIO | None = None) -> dict[str, Located]:
    """Where each tensor lies. Raises CorruptFileError naming a shard that moved or changed."""
    data = _load(path, io)
    touched, entries = False, []
    for shard in data["shards"]:
        real = Path(shard["file"])
        touched |= _is_touched(real, shard, path)
        entries.append({name: (real, at) for name, at in read_header(real, io=io).entries.items()})
    located: dict[str, Located] = {}
    for name, number in data["tensors"].items():
        if name not in entries[number]:
            raise _changed(Path(data["shards"][number]["file"]), path)
        located[name] = entries[number][name]
    if touched and sample_digest(located, io) != data["samples"]:
        raise _changed(Path(data["shards"][0]["file"]).parent, path)
    return located


def _is_touched(real: Path, shard: Mapping[str, Any], link: Path) -> bool:
    """Whether a shard's time of change differs; raises where it is gone or of another size."""
    try:
        stat = os.stat(real)
    except OSError as error:
        raise CorruptFileError(
            f"the dense part of this model is linked to {real}: {error.strerror}",
            str(link),
            "put the original checkpoint back, or pack it again without --link",
        ) from None
    if stat.st_size != shard["nbytes"]:
        raise _changed(real, link)
    return bool(stat.st_mtime_ns != shard["mtime_ns"])


def _changed(real: Path, link: Path) -> CorruptFileError:
    return CorruptFileError(
        f"the dense part of this model is linked to {real}, which has changed since",
        str(link),
        "put the original checkpoint back, or pack the new one into a new folder",
    )


def _load(path: Path, io: FileIO | None) -> dict[str, Any]:
    try:
        data = load_json(read_small(path, _MAX_BYTES, io))
        _check(data)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"is not a usable link: {error}") from error
    return data


def _check(data: Mapping[str, Any]) -> None:
    """ValueError says what is wrong."""
    if data.get("format") != _FORMAT or type(data.get("version")) is not int:
        raise ValueError(f"its format is {data.get('format')!r}, not {_FORMAT!r}")
    if data["version"] > _VERSION:
        raise ValueError(f"it was made by version {data['version']}; upgrade Chronos")
    shards, tensors = data.get("shards"), data.get("tensors")
    if not isinstance(shards, list) or not isinstance(tensors, dict):
        raise ValueError("shards or tensors are missing")
    for shard in shards:
        if not isinstance(shard, dict) or shard.keys() != {"file", "nbytes", "mtime_ns"}:
            raise ValueError("a shard must have file, nbytes and mtime_ns, and only those")
        file = shard["file"]
        if not isinstance(file, str) or not os.path.isabs(file) or "\0" in file:
            raise ValueError(f"a shard cannot be {file!r:.60}")
        if type(shard["nbytes"]) is not int or type(shard["mtime_ns"]) is not int:
            raise ValueError("nbytes and mtime_ns are whole numbers")
    if not all(type(n) is int and 0 <= n < len(shards) for n in tensors.values()):
        raise ValueError("a tensor is in no shard")
    if not all(isinstance(data.get(key), str) for key in ("fingerprint", "samples")):
        raise ValueError("fingerprint or samples are missing")
