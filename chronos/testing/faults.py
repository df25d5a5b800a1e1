"""Files that fail on purpose: a `FileIO` for tests of whatever reads or writes.

`FaultyIO` makes the Nth operation fail, reads come short or late, bytes flip, or the process die;
looping N = 1, 2, 3 ... until nothing fails any more visits every operation (the SQLite way).
`JournalIO` remembers what was written and flushed, and says what a power loss would have left.
Not covered: faults of memory maps and of the clock.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from chronos.common.disk.io import FileIO

WRITES = frozenset({"create", "write", "fsync", "replace"})
READS = frozenset({"open", "preadv"})


class FaultyIO(FileIO):
    """A FileIO whose operations named in `ops` are counted, and fail from the `fail_at`th on.

    ops: any of open, create, preadv, write, fsync, replace, unlink. times: how many fail.
    error: the errno they fail with. kill: instead of failing, the process gets SIGKILL.
    max_read, max_write: the most bytes one call moves. interrupt_every, again_every: every so many
    reads raise EINTR or EAGAIN. flip_reads: that many reads get a wrong byte. delay: called before
    each read with its number of bytes, for instance `lambda n: time.sleep(n / 20e6)`.
    """

    def __init__(
        self,
        *,
        fail_at: int = 0,
        ops: Collection[str] = READS | WRITES,
        error: int = errno.EIO,
        times: int = 1 << 62,
        kill: bool = False,
        max_read: int = 0,
        max_write: int = 0,
        interrupt_every: int = 0,
        again_every: int = 0,
        flip_reads: int = 0,
        delay: Callable[[int], None] | None = None,
        free: int | None = None,
    ) -> None:
        self.fail_at, self.ops, self.error, self.times, self.kill = fail_at, ops, error, times, kill
        self.max_read, self.max_write = max_read, max_write
        self.interrupt_every, self.again_every = interrupt_every, again_every
        self.flip_reads, self.delay, self.free = flip_reads, delay, free
        self.count = 0  # operations in `ops` so far
        self.failures = 0
        self.reads = 0
        self.opened: list[str] = []
        self._lock = threading.Lock()

    def _step(self, op: str) -> None:
        if op not in self.ops:
            return
        with self._lock:
            self.count += 1
            failing = self.fail_at and self.fail_at <= self.count < self.fail_at + self.times
            self.failures += bool(failing)
        if failing and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if failing:
            raise OSError(self.error, os.strerror(self.error))

    def open(self, path: str | os.PathLike[str], direct: bool = False) -> int:
        self._step("open")
        self.opened.append(os.fspath(path))
        return super().open(path, direct)

    def create(self, path: str | os.PathLike[str]) -> int:
        self._step("create")
        return super().create(path)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._step("preadv")
        with self._lock:
            self.reads += 1
            reads = self.reads
            flip = self.flip_reads > 0
            self.flip_reads -= flip
        if self.interrupt_every and reads % self.interrupt_every == 0:
            raise InterruptedError
        if self.again_every and reads % self.again_every == 0:
            raise BlockingIOError(errno.EAGAIN, "try again")
        if self.delay:
            self.delay(sum(map(len, buffers)))
        if self.max_read:
            count = super().preadv(fd, [buffers[0][: self.max_read]], offset)
        else:
            count = super().preadv(fd, buffers, offset)
        if flip and count:
            buffers[0][0] ^= 1
        return count

    def write(self, fd: int, data: memoryview) -> int:
        self._step("write")
        return super().write(fd, data[: self.max_write] if self.max_write else data)

    def fsync(self, fd: int) -> None:
        self._step("fsync")
        super().fsync(fd)

    def replace(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        self._step("replace")
        super().replace(source, target)

    def unlink(self, path: str | os.PathLike[str]) -> None:
        self._step("unlink")
        super().unlink(path)

    def free_bytes(self, folder: str | os.PathLike[str]) -> int:
        return super().free_bytes(folder) if self.free is None else self.free


Tree = dict[str, bytes]  # absolute path: content


class JournalIO(FileIO):
    """Does everything for real, and keeps in `states` what a power loss at any moment could leave.

    Two outcomes are kept after each operation that matters: renames that were not flushed are lost,
    and renames went through while the data that was not flushed is lost.
    """

    def __init__(self) -> None:
        self.states: list[Tree] = []
        self._content: dict[int, bytearray] = {}  # inode: what was written
        self._flushed: dict[int, bytes] = {}  # inode: what is on the disk
        self._inode_of: dict[int, int] = {}  # descriptor: inode
        self._names: dict[str, int] = {}  # path: inode, as running processes see it
        self._durable: dict[str, int] = {}  # path: inode, as it is on the disk

    def create(self, path: str | os.PathLike[str]) -> int:
        fd = super().create(path)
        inode = os.fstat(fd).st_ino
        self._content[inode], self._flushed[inode] = bytearray(), b""
        self._inode_of[fd] = self._names[os.path.abspath(path)] = inode
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        count = super().write(fd, data)
        self._content[self._inode_of[fd]] += data[:count]
        return count

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        if fd in self._inode_of:
            inode = self._inode_of[fd]
            self._flushed[inode] = bytes(self._content[inode])
            self._keep()

    def close(self, fd: int) -> None:
        self._inode_of.pop(fd, None)
        super().close(fd)

    def replace(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        super().replace(source, target)
        self._names[os.path.abspath(target)] = self._names.pop(os.path.abspath(source))
        self._keep()

    def unlink(self, path: str | os.PathLike[str]) -> None:
        super().unlink(path)
        self._names.pop(os.path.abspath(path), None)
        self._keep()

    def sync_folder(self, folder: str | os.PathLike[str]) -> None:
        super().sync_folder(folder)
        here = Path(os.path.abspath(folder))
        kept = {path: inode for path, inode in self._durable.items() if Path(path).parent != here}
        now = {path: inode for path, inode in self._names.items() if Path(path).parent == here}
        self._durable = kept | now
        self._keep()

    def _keep(self) -> None:
        for names in (self._durable, self._names):
            self.states.append({path: self._flushed[inode] for path, inode in names.items()})
