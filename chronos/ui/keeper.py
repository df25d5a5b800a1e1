"""The process that keeps one job: `python -m chronos.ui.keeper FD RUN KIND -- ARGUMENTS`.

It runs `chronos ARGUMENTS`, writes each line that this prints to RUN/job.jsonl, and how it ended.
The file is the truth about the job:

    {"event": "start", "time": ..., "kind": ..., "args": [...], "group": ...}
    {"event": "out" | "err", "time": ..., "text": ...}
    {"event": "stop", "time": ..., "signal": "SIGINT"}
    {"event": "end", "time": ..., "code": 0}

FD is the run folder's lock, which keeper and command both hold: while either lives, no other job
begins there. Both are one process group, as a command and its shell's pipe are, so a signal to the
group reaches the command whether or not the keeper is alive; the keeper only notes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LOG = "job.jsonl"
_MOST_LINE = 1 << 22  # characters kept of one printed line


class Log:
    """Appends events; from any thread, each line in one write."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        row = {"event": event, "time": time.time(), **fields}
        os.write(self._fd, json.dumps(row).encode() + b"\n")


def keep(lock: int, folder: Path, kind: str, args: Sequence[str]) -> int:
    """Run the command to its end; its exit code, negative for a signal that ended it."""
    log = Log(folder)
    log.write("start", kind=kind, args=list(args), group=os.getpgrp())
    # A handler, not SIG_IGN: what is ignored stays ignored in the command.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: log.write("stop", signal=signal.Signals(n).name))
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "chronos", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(lock,),
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        log.write("end", code=4, text=str(error))
        return 4
    assert child.stdout is not None and child.stderr is not None
    readers = [
        threading.Thread(target=_copy, args=(child.stdout, log, "out")),
        threading.Thread(target=_copy, args=(child.stderr, log, "err")),
    ]
    for reader in readers:
        reader.start()
    code = child.wait()
    for reader in readers:
        reader.join()
    log.write("end", code=code)
    return code


def _copy(stream: IO[bytes], log: Log, event: str) -> None:
    with stream:
        for line in stream:
            log.write(event, text=line.decode("utf-8", "replace").rstrip("\n")[:_MOST_LINE])


def main(words: Sequence[str]) -> int:
    lock, folder, kind, _, *args = words
    return keep(int(lock), Path(folder), kind, args)


if __name__ == "__main__":
    main(sys.argv[1:])
