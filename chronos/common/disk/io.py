"""The lowest file layer: the seam faults are injected through, and the errors they become.

Every open, read, write, fsync, rename and unlink of model, trace and checkpoint files goes through
a `FileIO`, so a test can make the Nth one fail. Nothing here maps a file: a file truncated under
mmap kills the process by a signal, a short `preadv` is an error with a name. Reads that fail with
EIO or EAGAIN are tried again, within bounds. Not here: the reader (`reader`), writing (`atomic`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from chronos.common.errors import (
    ChronosError,
    CorruptClusterError,
    CorruptFileError,
    DiskFullError,
    ResourceError,
    StoreError,
)

try:
    import fcntl
    import resource
except ImportError:  # Windows: everything can be imported there, and `FileIO` opens nothing
    POSIX, _F_NOCACHE, _F_FULLFSYNC = False, 0, 0
else:
    POSIX = True
    # macOS: it has no O_DIRECT, and its fsync does not reach the platter.
    _F_NOCACHE = getattr(fcntl, "F_NOCACHE", 0)
    _F_FULLFSYNC = getattr(fcntl, "F_FULLFSYNC", 0)

ALIGN = 4096  # what O_DIRECT needs of offsets, lengths and addresses on every disk we met
RETRY_DELAYS_S = (0.005, 0.02, 0.08)  # a bad block stays bad; a flaky bus or link recovers
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RETRIED = frozenset({errno.EIO, errno.EAGAIN})
_HUGE_PAGE = 2 << 20

_FIXES = {  # of files that cannot be opened
    errno.ENOENT: "restore the file, or make the folder again",
    errno.EACCES: "allow reading it",
    errno.ELOOP: "put the file itself there",
}

StrPath = str | os.PathLike[str]


class FileIO:
    """System calls on regular files, one method each; all raise OSError. Tests subclass it.

    On Windows, which has none of them in this form, opening raises ResourceError.
    """

    def open(self, path: StrPath, direct: bool = False) -> int:
        """Open a regular file for reading; a final symlink or a FIFO is refused, without blocking.

        `direct` bypasses the page cache where the file system can; elsewhere it is ignored.
        """
        _check_system(path)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        o_direct = getattr(os, "O_DIRECT", 0) if direct else 0
        try:
            fd = os.open(path, flags | o_direct)
        except OSError as error:
            if not o_direct or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            fd = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if direct and _F_NOCACHE:
            fcntl.fcntl(fd, _F_NOCACHE, 1)
        return fd

    def create(self, path: StrPath) -> int:
        """Open a new or existing file for writing; a new one gets 0666 & ~umask."""
        _check_system(path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def fsync(self, fd: int) -> None:
        if _F_FULLFSYNC:
            with contextlib.suppress(OSError):  # a file system without it: fsync is all there is
                fcntl.fcntl(fd, _F_FULLFSYNC)
                return
        os.fsync(fd)

    def replace(self, source: StrPath, target: StrPath) -> None:
        os.replace(source, target)

    def unlink(self, path: StrPath) -> None:
        os.unlink(path)

    def close(self, fd: int) -> None:
        os.close(fd)

    def free_bytes(self, folder: StrPath) -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def sync_folder(self, folder: StrPath) -> None:
        """Make renames in `folder` durable; file systems that cannot say so are let through."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)


def _check_system(path: StrPath) -> None:
    if not POSIX:
        raise ResourceError(
            "Chronos reads and writes files by preadv and file locks, which Windows does not have",
            os.fspath(path),
            "run it in WSL 2 or in a Linux container",
        )


class CachedIO(FileIO):
    """Reads through the page cache."""

    def open(self, path: StrPath, direct: bool = False) -> int:
        return super().open(path)


class PacedIO(FileIO):
    """Reads as from a disk of `bytes_per_s` that serves one request after the other.

    The bytes are really read, meanwhile; the caller sleeps for what is left of its turn. For a
    slower disk than the one at hand: a cgroup's limit counts over a tenth of a second, within which
    a token's reads all run at full speed.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free_at = bytes_per_s, 0.0
        self._lock = threading.Lock()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nbytes = sum(map(len, buffers))
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            end = self._free_at = begin + nbytes / self._rate
        count = super().preadv(fd, buffers, offset)
        time.sleep(max(0.0, end - time.monotonic()))
        return count


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def aligned_buffer(nbytes: int) -> memoryview:
    """A writable, page-aligned, zeroed buffer; its memory goes when the last view of it goes."""
    rounded = max(ALIGN, round_up(nbytes, ALIGN))
    try:
        memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(f"cannot reserve {nbytes} bytes of memory: {error.strerror}") from error
    if rounded >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:nbytes]


def touched_buffers(count: int, nbytes: int) -> list[memoryview]:
    """Page-aligned buffers in one piece of memory whose pages, huge ones where there are any, exist
    already, as those of an arena's slots do: into fresh memory in small pages the same virtual disk
    gave 1.2 GB/s in place of 3.4."""
    stride = round_up(nbytes, ALIGN)
    memory = aligned_buffer(round_up(count * stride, _HUGE_PAGE))
    memory[::ALIGN] = bytes(len(memory[::ALIGN]))
    return [memory[start : start + nbytes] for start in range(0, count * stride, stride)]


def address(buffer: memoryview) -> int:
    """Where a writable buffer lies in memory; 0 for an empty one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


def read_some(io: FileIO, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """One `preadv` that gets through interrupts, and through EIO and EAGAIN within bounds."""
    delays = iter(RETRY_DELAYS_S)
    while True:
        try:
            return io.preadv(fd, buffers, offset)
        except InterruptedError:
            continue
        except OSError as error:
            delay = next(delays, None) if error.errno in _RETRIED else None
            if delay is None:
                raise
        time.sleep(delay)


def read_exact(io: FileIO, fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; fewer bytes than asked only where the file ends."""
    done = 0
    while done < len(buffer):
        count = read_some(io, fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


class SmallReader:
    """A regular file open for a few reads of exact length, with typed errors; a context manager."""

    def __init__(self, path: StrPath, io: FileIO | None = None) -> None:
        self.path, self.io = path, io or FileIO()
        try:
            self.fd = self.io.open(path)
        except OSError as error:
            raise read_error(path, error) from error
        self.nbytes = self.io.size(self.fd)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes; what the file cannot hold is refused before it is allocated."""
        have = max(0, self.nbytes - offset)
        if nbytes <= have:
            buffer = bytearray(nbytes)
            try:
                have = read_exact(self.io, self.fd, memoryview(buffer), offset)
            except OSError as error:
                raise read_error(self.path, error) from error
            if have == nbytes:
                return bytes(buffer)
        raise short_read(self.path, offset, nbytes, have)

    def __enter__(self) -> SmallReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.io.close(self.fd)


def read_error(path: StrPath, error: OSError) -> ChronosError:
    """The typed error for a file that could not be opened or read."""
    where, reason = os.fspath(path), error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ResourceError(
            f"too many open files (this process may open {limit})", where, "raise `ulimit -n`"
        )
    if error.errno in (errno.ELOOP, errno.EMLINK):
        reason = "it is a symbolic link"
    known = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)
    if error.errno in (*known, errno.EINVAL):
        return corrupt(where, f"cannot be opened: {reason}", _FIXES.get(error.errno, ""))
    return StoreError(f"reading {Path(where).name} failed: {reason}", where)


def corrupt(path: StrPath, what: str, fix: str = "") -> CorruptFileError:
    """An error naming a damaged file, of the kind its suffix calls for."""
    kind = CorruptClusterError if os.fspath(path).endswith(".ctsr") else CorruptFileError
    return kind(f"{Path(path).name} {what}", os.fspath(path), fix)


def short_read(path: StrPath, offset: int, wanted: int, have: int) -> CorruptFileError:
    """The error for a file that ends inside an extent it should hold."""
    return corrupt(
        path, f"ends too early: {wanted} bytes wanted at offset {offset}, {have} bytes there"
    )


def write_error(
    path: Path, error: OSError, io: FileIO, needed: int = 0, written: int = 0
) -> ResourceError:
    """The typed error for a write, fsync or rename that failed."""
    reason = error.strerror or str(error)
    if error.errno not in FULL_DISK:
        return ResourceError(f"cannot write {path.name}: {reason}", str(path))
    try:
        free = f"{io.free_bytes(path.parent)} bytes free"
    except OSError:
        free = "free space unknown"
    size = f"{needed} bytes needed" if needed else f"more than {written} bytes needed"
    return DiskFullError(
        f"cannot write {path.name}: {reason}: {size}, {free}",
        str(path),
        "free some space or choose another folder; what was there before is unchanged",
    )


def check_free_space(folder: Path, nbytes: int, io: FileIO) -> None:
    """Refuse early, with both numbers, what would not fit into `folder`. Raises DiskFullError."""
    try:
        free = io.free_bytes(folder)
    except OSError:  # refused: then the write itself will tell
        return
    if nbytes > free:
        raise DiskFullError(
            f"not enough disk space: {nbytes} bytes needed, {free} bytes free",
            str(folder),
            "free some space or choose another folder",
        )


@dataclass(slots=True, eq=False)
class OpenFile:
    fd: int
    users: int = 0


class OpenFiles:
    """At most `limit` descriptors, the least recently used closed first; any thread may ask."""

    def __init__(self, io: FileIO, limit: int) -> None:
        self._io, self._limit = io, limit
        self._handles: OrderedDict[tuple[str, bool], OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, path: str, direct: bool) -> OpenFile:
        key = (path, direct)
        with self._lock:
            handle = self._handles.get(key)
            if handle is None:
                handle = self._handles[key] = self._open(path, direct)
            else:
                self._handles.move_to_end(key)
            handle.users += 1
            return handle

    def release(self, handle: OpenFile) -> None:
        with self._lock:
            handle.users -= 1

    def close(self) -> None:
        with self._lock:
            self._close_idle(0)

    def _open(self, path: str, direct: bool) -> OpenFile:
        self._close_idle(self._limit - 1)
        try:
            return OpenFile(self._io.open(path, direct))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._close_idle(0):
                raise
        return OpenFile(self._io.open(path, direct))

    def _close_idle(self, keep: int) -> bool:
        """Close idle files, oldest first, until `keep` are open; true if any was closed."""
        idle = [key for key, handle in self._handles.items() if not handle.users]
        excess = idle[: max(0, len(self._handles) - keep)]
        for key in excess:
            self._io.close(self._handles.pop(key).fd)
        return bool(excess)


def drop_page_cache() -> bool:
    """Forget what the system keeps of files, flushed first; False where that is not allowed: it
    needs Linux and root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def drop_file_pages(folder: StrPath) -> bool:
    """Forget what the system keeps of a folder's files, those left out that are mapped; False where
    it cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in Path(folder).rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return True


def measure_read_rate(
    path: StrPath,
    block_bytes: int = 1 << 20,
    threads: int = 4,
    *,
    max_bytes: int = 512 << 20,
    io: FileIO | None = None,
) -> float:
    """Bytes per second of plain direct reads of `block_bytes` at scattered places.

    Cold where the file system has direct reads; elsewhere the page cache may answer. At most
    `max_bytes` are read. Raises the typed errors of `read_error`.
    """
    io = io or FileIO()
    try:
        fd = io.open(path, direct=True)
    except OSError as error:
        raise read_error(path, error) from error
    try:
        size = io.size(fd)
        block = max(ALIGN, min(block_bytes, size) // ALIGN * ALIGN)
        offsets = list(range(0, size - block + 1, block)) or [0]
        random.Random(0).shuffle(offsets)
        offsets = offsets[: max(1, max_bytes // block)]
        threads = min(threads, len(offsets))
        buffers = touched_buffers(threads, block)

        def read_share(number: int) -> int:
            return sum(
                read_some(io, fd, [buffers[number]], offset) for offset in offsets[number::threads]
            )

        with ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            total = sum(pool.map(read_share, range(threads)))
            return total / (time.perf_counter() - began)
    except OSError as error:
        raise read_error(path, error) from error
    finally:
        io.close(fd)
