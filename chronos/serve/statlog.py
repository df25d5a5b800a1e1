"""A file of lines that say what a server's experts did, for whoever draws it while it happens.

Each line is a JSON object: `time` (seconds since 1970), `model`, `running` and `waiting` requests,
`generated` tokens of all replies, and where experts are streamed the counters of `StoreStats`
since the model was opened, with `layers`, the same by layer. Counters only rise until the model is
loaded anew; differences of two lines are what happened between them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from chronos.common.disk.io import FileIO, write_error
from chronos.serve.worker import Worker

EVERY_S = 0.5
_MOST_BYTES = 16 << 20  # of the file; what follows begins it anew


def line(worker: Worker) -> dict[str, Any]:
    """What is counted now, but for the time."""
    stats = worker.stats()
    return {
        "model": worker.model,
        "running": worker.running,
        "waiting": worker.waiting,
        "generated": worker.generated,
        **(stats.to_json() if stats is not None else {}),
        "layers": worker.layer_stats(),
    }


async def follow(worker: Worker, path: Path) -> None:
    """Append a line at once, then one every EVERY_S in which something changed. Until cancelled."""
    last: dict[str, Any] | None = None
    while True:
        now = line(worker)
        if now != last:
            append(path, {"time": time.time(), **now})
            last = now
        await asyncio.sleep(EVERY_S)


def append(path: Path, row: dict[str, Any]) -> None:
    """One line more. Raises ResourceError."""
    try:
        if path.exists() and path.stat().st_size > _MOST_BYTES:
            os.truncate(path, 0)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise write_error(path, error, FileIO()) from error
