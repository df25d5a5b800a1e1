"""`experts/digests.json`: digests of what a packed folder holds beside its experts' records.

Made when packing, before the manifest is published: of the dense part, side files, the manifest,
and the header of each cluster file, whose records have their digests in the manifest. A dense part
that is linked is another folder's and has none. Not here: reading all of it to compare (`verify`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import load_json, read_small
from chronos.common.disk.io import FileIO, SmallReader
from chronos.common.errors import CorruptFileError
from chronos.common.layout.manifest import EXPERTS, MANIFEST

DIGESTS = "digests.json"
_FORMAT, _VERSION, _MAX_BYTES, _PIECE = "chronos-digests", 1, 32 << 20, 1 << 20
_FIX = "restore it, or pack the model again into a new folder"


@dataclass(frozen=True)
class Digest:
    """xxh3_128 of the first `nbytes` bytes of a file; of all of it, but for cluster files."""

    nbytes: int
    xxh3_128: str


def digest_of(path: Path, io: FileIO | None = None, nbytes: int | None = None) -> Digest:
    """Of a file, or of its first bytes. Raises CorruptFileError where it cannot be read."""
    found = xxhash.xxh3_128()
    with SmallReader(path, io) as file:
        size = file.nbytes if nbytes is None else nbytes
        for offset in range(0, size, _PIECE):
            found.update(file.read(offset, min(_PIECE, size - offset)))
    return Digest(size, found.hexdigest())


def seal(
    folder: Path, names: Iterable[str], headers: Mapping[str, int], manifest: bytes, io: FileIO
) -> None:
    """Write the digests of a folder whose manifest is about to be published.

    names: files of the folder. headers: cluster files, with the bytes before their first record.
    """
    found = {name: digest_of(folder / name, io) for name in names}
    for name, nbytes in headers.items():
        found[f"{EXPERTS}/{name}"] = digest_of(folder / EXPERTS / name, io, nbytes)
    whole = xxhash.xxh3_128(manifest).hexdigest()
    found[f"{EXPERTS}/{MANIFEST}"] = Digest(len(manifest), whole)
    _write(folder, found, io)


def renew(folder: Path, names: Iterable[str], io: FileIO | None = None) -> None:
    """Take files as they are now, or are gone, where the folder keeps digests at all."""
    known = read_digests(folder, io)
    if known is None:
        return
    for name in names:
        known.pop(name, None)
        if (folder / name).exists():
            known[name] = digest_of(folder / name, io)
    _write(folder, known, io or FileIO())


def read_digests(folder: Path, io: FileIO | None = None) -> dict[str, Digest] | None:
    """By path within the folder; None where packing kept none. Raises CorruptFileError."""
    path = folder / EXPERTS / DIGESTS
    if not path.exists():
        return None
    raw = read_small(path, _MAX_BYTES, io)
    try:
        data = load_json(raw)
        if data.get("format") == _FORMAT and data.get("version", 0) > _VERSION:
            raise ValueError("they are of a newer Chronos; upgrade Chronos")
        found = {name: Digest(**value) for name, value in data["files"].items()}
        if raw != _written(found):
            raise ValueError("they are not what was written")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"the digests of the folder are damaged: {error}", str(path), _FIX
        ) from error
    return found


def compare(path: Path, digest: Digest, whole: bool, io: FileIO | None = None) -> None:
    """Raises CorruptFileError where a file is not what was packed. whole: all of it counts."""
    found = digest_of(path, io, None if whole else digest.nbytes)
    if found != digest:
        part = "" if whole else "the header of "
        raise CorruptFileError(f"{part}{path.name} is not what was packed", str(path), _FIX)


def _write(folder: Path, digests: Mapping[str, Digest], io: FileIO) -> None:
    raw = _written(digests)
    atomic_write(folder / EXPERTS / DIGESTS, [raw], io, nbytes=len(raw))


def _written(digests: Mapping[str, Digest]) -> bytes:
    """The file's bytes: any other ones are damage. Its own digest guards what it says."""
    files = {name: vars(digest) for name, digest in sorted(digests.items())}
    own = xxhash.xxh3_128(json.dumps(files).encode()).hexdigest()
    data = {"format": _FORMAT, "version": _VERSION, "files": files, "xxh3_128": own}
    return json.dumps(data, indent=1).encode()
