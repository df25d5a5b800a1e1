"""Run a command under a memory cap that counts its page cache too, and read its peak.

    python -m bench.lib.capped 1500000000 -- python -m chronos generate demo -p "def "

Linux as root: memory cgroup v1 (`memory.limit_in_bytes`) or v2 (`memory.max`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextmanager
def group(limit_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A memory cgroup of its own: (its folder, the file that says its peak). What is left running
    in it at the end is killed."""
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    folder = (_V1 if v1 else _V2) / f"chronos-bench-{os.getpid()}"
    folder.mkdir()
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
    try:
        yield folder, folder / ("memory.max_usage_in_bytes" if v1 else "memory.peak")
    finally:
        while left := (folder / "cgroup.procs").read_text().split():
            for process in left:
                os.kill(int(process), signal.SIGKILL)
            time.sleep(0.05)
        folder.rmdir()


def run_lines(
    command: Sequence[str], limit_bytes: int, timeout_s: float | None = None, **popen: Any
) -> tuple[dict[str, Any], list[str]]:
    """Exit status, peak bytes (page cache included), times the cap was hit; and the lines printed.

    A command that takes longer than timeout_s is killed, and its lines until then count.
    """
    with group(limit_bytes) as (folder, peak):

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        pipe = subprocess.PIPE
        process = subprocess.Popen(command, preexec_fn=enter, stdout=pipe, text=True, **popen)
        timed_out = False
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            output, _ = process.communicate()
        fails = folder / "memory.failcnt"
        report = {
            "rc": process.returncode,
            "timed_out": timed_out,
            "limit_bytes": limit_bytes,
            "peak_bytes": int(peak.read_text()),
            "cap_hits": int(fails.read_text()) if fails.exists() else None,
        }
        return report, output.strip().splitlines()


def run(command: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    """What `run_lines` reports, and the last line."""
    report, lines = run_lines(command, limit_bytes)
    return report | {"last_line": lines[-1] if lines else ""}


def run_python(arguments: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    return run([sys.executable, *arguments], limit_bytes)


if __name__ == "__main__":
    print(run(sys.argv[sys.argv.index("--") + 1 :], int(sys.argv[1])))
