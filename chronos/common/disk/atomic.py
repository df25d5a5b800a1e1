"""Writing so that nothing is ever half written: `atomic_write`, its orphans, one writer per folder.

A write goes to a temporary file in the same folder, is flushed to the disk and renamed, and the
folder is flushed too. A writer holds an advisory lock on its temporary file, so a sweep can tell an
orphan from a writer at work, even where process ids are reused (containers). Not covered: locks
across hosts on file systems that keep `flock` local.
"""

from __future__ import annotations

import contextlib
import io as _io
import itertools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from chronos.common.disk.io import FileIO, StrPath, check_free_space, write_error
from chronos.common.errors import ResourceError

with contextlib.suppress(ImportError):  # Windows, where `FileIO` opens nothing that could be locked
    import fcntl

LOCK = "run.lock"  # held while a folder is written
_TEMP_NAME = re.compile(r"\..+\.\d+-\d+\.chronos-tmp")
_counter = itertools.count()

# `Any` where typeshed's Buffer would do: Python 3.11 has no public name for it.
Chunks = Iterable[Any] | Callable[[BinaryIO], object]


class _Sink(_io.RawIOBase):
    """What an `atomic_write` callable writes to: complete writes only, not seekable."""

    def __init__(self, io: FileIO, fd: int) -> None:
        self.io, self.fd, self.count = io, fd, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # no cast of a shape with a 0
        done = 0
        while done < len(view):
            with contextlib.suppress(InterruptedError):
                count = self.io.write(self.fd, view[done:])
                done += count
                self.count += count
        return done


def atomic_write(
    path: StrPath, chunks: Chunks, io: FileIO | None = None, *, nbytes: int = 0
) -> None:
    """Write `path` so that everyone, also after a crash, sees the old file or the whole new one.

    `chunks` is an iterable of bytes-like pieces or a function given a binary file object. `nbytes`,
    where known, is compared with the free space first. Raises ResourceError, or DiskFullError with
    the bytes needed and free; whatever fails, the temporary file goes and the old file stays.
    """
    target, io = Path(path), io or FileIO()
    if nbytes:
        check_free_space(target.parent, nbytes, io)
    temp = target.with_name(f".{target.name}.{os.getpid()}-{next(_counter)}.chronos-tmp")
    fd, written = -1, 0
    try:
        fd = _create_locked(temp, io)
        sink = _Sink(io, fd)
        try:
            _pour(chunks, sink)
        finally:
            written = sink.count
        io.fsync(fd)  # never tried twice: after a failure the kernel may have dropped the pages
        io.replace(temp, target)
        io.sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            io.unlink(temp)
        if isinstance(error, OSError):
            raise write_error(target, error, io, nbytes, written) from error
        raise
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):  # durable since fsync
                io.close(fd)


def _pour(chunks: Chunks, sink: _Sink) -> None:
    if callable(chunks):
        chunks(cast(BinaryIO, sink))
        return
    try:
        for chunk in chunks:
            sink.write(chunk)
    finally:
        if hasattr(chunks, "close"):  # a generator may hold threads and files of its own
            chunks.close()


def _create_locked(path: Path, io: FileIO) -> int:
    """Create `path` and hold its lock; starts again when a sweep took the file in between."""
    while True:
        fd = io.create(path)
        with contextlib.suppress(OSError):  # no locks here: then a sweep cannot lock it either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        io.close(fd)


def make_folder(folder: Path, io: FileIO | None = None) -> None:
    """Create a folder, and durably so where its parent is there. Raises ResourceError."""
    io = io or FileIO()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            io.sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, error, io) from error


def sweep_orphans(folder: StrPath, io: FileIO | None = None) -> list[Path]:
    """Remove temporary files in `folder` whose writers are gone; returns what was removed."""
    io = io or FileIO()
    try:
        names = [name for name in os.listdir(folder) if _TEMP_NAME.fullmatch(name)]
    except FileNotFoundError:
        return []
    return [path for path in map(Path(folder).joinpath, sorted(names)) if _remove_if_idle(path, io)]


def _remove_if_idle(path: Path, io: FileIO) -> bool:
    try:
        fd = io.open(path)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        io.unlink(path)
        return True
    except OSError:
        return False
    finally:
        io.close(fd)


class RunLock:
    """One writer per run folder. The kernel drops the lock with its process, so none goes stale."""

    def __init__(self, folder: StrPath) -> None:
        self.path = Path(folder) / LOCK
        self._fd = -1

    def __enter__(self) -> RunLock:
        while True:
            make_folder(self.path.parent)
            try:
                fd = FileIO().create(self.path)
            except OSError as error:
                raise write_error(self.path, error, FileIO()) from error
            try:
                self._claim(fd)
            except BaseException:
                os.close(fd)
                raise
            if os.fstat(fd).st_nlink:  # else its last owner removed it between open and lock
                self._fd = fd
                return self
            os.close(fd)

    def _claim(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ResourceError(
                f"process {owner} is already writing to this run folder",
                str(self.path.parent),
                "wait for it, or choose another folder",
            ) from None
        except OSError as error:
            raise write_error(self.path, error, FileIO()) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self._fd)
        self._fd = -1
