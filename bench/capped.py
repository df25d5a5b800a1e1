"""Run a command under a memory cap that counts its page cache too, and read its peak.

    python -m bench.capped 1500000000 -- python -m chronos generate demo -p "def "

Linux as root: memory cgroup v1 (`memory.limit_in_bytes`) or v2 (`memory.max`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextmanager
def group(limit_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A memory cgroup of its own: (its folder, the file that says its peak)."""
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    folder = (_V1 if v1 else _V2) / f"chronos-bench-{os.getpid()}"
    folder.mkdir()
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
    try:
        yield folder, folder / ("memory.max_usage_in_bytes" if v1 else "memory.peak")
    finally:
        folder.rmdir()


def run(command: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    """Exit status, peak bytes (page cache included), times the cap was hit, and the last line."""
    with group(limit_bytes) as (folder, peak):

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        pipe = subprocess.PIPE
        done = subprocess.run(command, preexec_fn=enter, stdout=pipe, text=True, check=False)
        fails = folder / "memory.failcnt"
        return {
            "rc": done.returncode,
            "limit_bytes": limit_bytes,
            "peak_bytes": int(peak.read_text()),
            "cap_hits": int(fails.read_text()) if fails.exists() else None,
            "last_line": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "",
        }


def run_python(arguments: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    return run([sys.executable, *arguments], limit_bytes)


if __name__ == "__main__":
    print(run(sys.argv[sys.argv.index("--") + 1 :], int(sys.argv[1])))
