"""Jobs: commands of Chronos that run beside the UI, each in a run folder, known by its log.

`start` gives a folder's lock to a `keeper`, which runs the command and writes RUN/job.jsonl. All
else is read from there and from whether the lock is held, so whoever looks, this process or one
that is started later, finds the same jobs. Knows no page and no framework.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.disk.atomic import make_folder
from chronos.common.disk.io import FileIO, write_error
from chronos.common.errors import ResourceError, UsageError
from chronos.ui.keeper import LOG
from chronos.ui.root import Root
from chronos.ui.rows import Row, Rows

with contextlib.suppress(ImportError):  # Windows, where jobs are refused
    import fcntl

LOCK = "job.lock"
_BEGIN_S = 20.0  # for a keeper to write its first line
_ENDING_S = 2.0  # for one to go that has written its last, and for who looks at the lock
_STATES = {0: "done", -signal.SIGINT: "stopped", -signal.SIGTERM: "stopped"}


@dataclass(frozen=True)
class Job:
    """What the log says of the newest job in a run folder. state: running, stopping, done, stopped
    (by a signal), failed, or lost (its processes are gone and it never wrote its end)."""

    name: str
    folder: Path
    kind: str
    args: tuple[str, ...]
    began: float
    state: str
    code: int | None
    rows: tuple[Row, ...]
    group: int

    @property
    def alive(self) -> bool:
        return self.state in ("running", "stopping")

    def lines(self, last: int = 200) -> list[str]:
        """What it printed last, progress and data alike, in the order it came."""
        return [row["text"] for row in self.rows if row["event"] in ("out", "err")][-last:]

    def result(self) -> Any:
        """The last JSON object that it printed as data, or None."""
        for row in reversed(self.rows):
            if row["event"] == "out" and row["text"].startswith("{"):
                with contextlib.suppress(ValueError):
                    return json.loads(row["text"])
        return None


class Jobs:
    """The jobs below a root. Safe to use from several threads."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._logs: dict[Path, Rows] = {}
        self._keepers: list[
            subprocess.Popen[bytes]
        ] = []  # to be waited for, lest they stay zombies
        self._mutex = threading.Lock()

    def start(self, name: str, kind: str, args: Sequence[str]) -> Job:
        """Run `chronos ARGS` in the run folder `name`, with the root as its working directory.
        Returns once its log says that it began. Raises ResourceError where a job runs there."""
        folder = self.root.run(name)
        make_folder(folder)
        with contextlib.suppress(UsageError):
            if self.job(name).alive:
                raise _busy(folder)
        lock = _claim(folder)
        try:
            command = [sys.executable, "-m", "chronos.ui.keeper", str(lock), str(folder), kind]
            before = _size(folder / LOG)
            keeper = subprocess.Popen(
                [*command, "--", *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,
                cwd=self.root.folder,
            )
        finally:
            os.close(lock)
        with self._mutex:
            self._keepers = [each for each in self._keepers if each.poll() is None] + [keeper]
        end = time.monotonic() + _BEGIN_S
        while _size(folder / LOG) <= before:
            if keeper.poll() is not None or time.monotonic() > end:
                raise ResourceError("the job did not begin", str(folder))
            time.sleep(0.01)
        return self.job(name)

    def stop(self, name: str) -> None:
        """Ask a job to end: by SIGINT, at which commands save what they have; asked again, by
        SIGTERM. One that has ended is left alone."""
        job = self.job(name)
        if not job.alive:
            return
        number = signal.SIGTERM if job.state == "stopping" else signal.SIGINT
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(job.group, number)

    def job(self, name: str) -> Job:
        """Raises UsageError where no job ever ran under that name."""
        folder = self.root.run(name)
        # Before the log: a job that ends in between has then written its end.
        held = _held(folder)
        with self._mutex:
            rows = self._logs.setdefault(folder, Rows(folder / LOG)).read()
        starts = [at for at, row in enumerate(rows) if row.get("event") == "start"]
        if not starts:
            raise UsageError("no job ran here", name)
        return _job(name, folder, rows[starts[-1] :], held)

    def jobs(self) -> list[Job]:
        """All of them, the newest first."""
        found = []
        for log in self.root.runs.glob(f"*/{LOG}"):
            with contextlib.suppress(UsageError):
                found.append(self.job(log.parent.name))
        return sorted(found, key=lambda job: -job.began)

    def of(self, *kinds: str) -> list[Job]:
        return [job for job in self.jobs() if job.kind in kinds]

    def free_name(self, stem: str) -> str:
        """A name under which nothing ran yet: stem, stem-2, stem-3 ..."""
        number, name = 1, stem
        while self.root.run(name).exists():
            number += 1
            name = f"{stem}-{number}"
        return name


def _job(name: str, folder: Path, rows: list[Row], held: bool) -> Job:
    first, ends = rows[0], [row for row in rows if row.get("event") == "end"]
    code = int(ends[-1]["code"]) if ends else None
    stops = any(row.get("event") == "stop" for row in rows)
    if code is None:
        state = ("stopping" if stops else "running") if held else "lost"
    elif code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        state = "stopped"
    else:
        state = _STATES.get(code, "failed")
    return Job(
        name,
        folder,
        str(first["kind"]),
        tuple(first["args"]),
        float(first["time"]),
        state,
        code,
        tuple(rows),
        int(first["group"]),
    )


def _claim(folder: Path) -> int:
    """The run folder's lock as a file descriptor. Raises ResourceError."""
    path, end = folder / LOCK, time.monotonic() + _ENDING_S
    try:
        fd = FileIO().create(path)
    except OSError as error:
        raise write_error(path, error, FileIO()) from error
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(fd)
                raise _busy(folder) from None
            time.sleep(0.01)


def _busy(folder: Path) -> ResourceError:
    fix = "stop it, or choose another name"
    return ResourceError("a job is running in this folder", str(folder), fix)


def _held(folder: Path) -> bool:
    """Whether some process holds the lock of a run folder."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
