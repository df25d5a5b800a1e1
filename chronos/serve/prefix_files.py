"""Kept beginnings of prompts on disk, so that a server that starts anew begins warm.

A file holds what a sequence's caches held where a whole piece of its prompt ended. Its name is a
digest of whose it is (`fingerprint`) and of the ids, so a prompt finds its files without an index.
Those of other models, settings and versions are left alone and told in the log; one that is damaged
is told and removed, and nothing of it reaches a session. What was used least recently goes first.
Not known here: when to read and write.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

import chronos
from chronos.common.disk.atomic import make_folder, sweep_orphans
from chronos.common.disk.header import TensorEntry, read_header
from chronos.common.disk.io import FileIO
from chronos.common.disk.tensors import Named, read_tensors, write_tensors
from chronos.common.errors import ChronosError
from chronos.common.layout.manifest import EXPERTS
from chronos.common.text.sampling import PIECE
from chronos.common.tuning import plain

if TYPE_CHECKING:
    from chronos.run.engine import Engine

_log = logging.getLogger("chronos")
FORMAT = "chronos-prefix-1"
SUFFIX = ".prefix"
_IDS = "ids"
_LIBRARIES = ("torch", "mlx", "transformers", "mlx-lm", "numpy")
Ids = npt.NDArray[np.int64]
Tensor = tuple[TensorEntry, memoryview]


class PrefixFiles:
    """A folder of them, for the model with `owner`."""

    def __init__(self, folder: Path, most_bytes: int, io: FileIO | None = None) -> None:
        """most_bytes: of all files. Raises ResourceError where the folder cannot be had."""
        self._io = io or FileIO()
        if not folder.is_dir():
            make_folder(folder)
            folder.chmod(0o700)  # what people asked is in there
        sweep_orphans(folder)
        self._folder, self._most = folder, most_bytes
        self.owner = ""

    def open(self, owner: str) -> None:
        """Say whose files are looked for from now on, and tell of the others."""
        self.owner = owner
        files = [path for path, _, _ in self._all()]
        foreign = sum(not self._is_own(path) for path in files)
        _log.info("%s keeps %d beginnings of prompts", self._folder, len(files) - foreign)
        if foreign:
            _log.warning(
                "%d files in %s are damaged, or of another model, version or setting: not used",
                foreign,
                self._folder,
            )

    def find(self, ids: Ids, above: int) -> int:
        """Tokens of the longest beginning of a prompt that is there, fewer than it has and more
        than `above`; 0 where there is none."""
        last = (len(ids) - 1) // PIECE * PIECE
        for tokens in range(last, above, -PIECE):
            if self._path(ids[:tokens]).exists():
                return tokens
        return 0

    def read(self, ids: Ids) -> list[Tensor] | None:
        """What `write` was given for these ids, in memory of its own; None, and a line in the log,
        where that is not what the file holds."""
        path = self._path(ids)
        try:
            metadata = read_header(path).metadata
            kept, *tensors = read_tensors(path)
            if (metadata.get("owner"), metadata.get("format")) != (self.owner, FORMAT):
                raise ChronosError("it is another model's")
            if kept[0].name != _IDS or not np.array_equal(np.frombuffer(kept[1], np.int64), ids):
                raise ChronosError("it is of other tokens")
            named = ((entry.name, entry.dtype, entry.shape, data) for entry, data in tensors)
            if metadata.get("digest") != _digest(self.owner, ids, named):
                raise ChronosError("its bytes are not those that were written")
            os.utime(path)  # used last
        except (ChronosError, OSError) as error:
            _log.warning("%s is removed and its prompt is read again: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        return tensors

    def write(self, ids: Ids, tensors: Sequence[Named]) -> None:
        """Keep them, unless they are too large for all of it; a disk that is full is told."""
        path, nbytes = self._path(ids), sum(memoryview(data).nbytes for *_, data in tensors)
        if path.exists() or nbytes + ids.nbytes > self._most:
            return
        metadata = {
            "format": FORMAT,
            "owner": self.owner,
            "digest": _digest(self.owner, ids, tensors),
        }
        named = [(_IDS, "I64", ids.shape, memoryview(ids).cast("B")), *tensors]
        try:
            self._make_room(nbytes)
            write_tensors(path, named, metadata, self._io)
        except (ChronosError, OSError) as error:
            _log.warning("a beginning of a prompt is not kept on disk: %s", error)

    def _make_room(self, nbytes: int) -> None:
        """Give up what was used least recently, of whomever it is."""
        files = sorted(self._all(), key=lambda found: found[2])
        held = sum(size for _, size, _ in files)
        for path, size, _ in files:
            if held + nbytes <= self._most:
                return
            path.unlink(missing_ok=True)
            held -= size

    def _all(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, when it was used) of every file of this kind."""
        found = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            try:
                stat = path.lstat()
            except FileNotFoundError:  # another server's, which made room
                continue
            found.append((path, stat.st_size, stat.st_mtime))
        return found

    def _is_own(self, path: Path) -> bool:
        try:
            metadata = read_header(path).metadata
        except (ChronosError, OSError):
            return False
        return (metadata.get("owner"), metadata.get("format")) == (self.owner, FORMAT)

    def _path(self, ids: Ids) -> Path:
        return self._folder / f"{_digest(self.owner, ids, ())}{SUFFIX}"


def fingerprint(engine: Engine) -> str:
    """Of all that bits of a cache depend on beside the ids: the model's files by size and time, how
    it is computed, with what, and on which CPU."""
    folder = engine.folder
    assert folder is not None  # as of all that `load` opens
    said = {
        "format": FORMAT,
        "chronos": chronos.__version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "backend": [engine.backend, engine.device, engine.threads, plain()],
        "context": engine.context,
        "piece": PIECE,
        "cpu": _cpu(),
        "files": [
            (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
            for path in sorted((*folder.glob("*"), *folder.glob(f"{EXPERTS}/*")))
            if path.is_file() and (stat := path.stat())
        ],
    }
    return xxh3_128(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(owner: str, ids: Ids, tensors: Iterable[Named]) -> str:
    digest = xxh3_128(owner.encode())
    digest.update(np.ascontiguousarray(ids))
    for name, dtype, shape, data in tensors:
        digest.update(f"{name} {dtype} {list(shape)}".encode())
        digest.update(data)
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    """What products on this CPU may use, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
