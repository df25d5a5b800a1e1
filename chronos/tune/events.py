"""RUN/events.jsonl: what a study's workers do, a line each, for whoever watches (docs/tune.md).

Lines are appended whole, by one write each, so several workers share the file and a reader sees
whole lines. It is a log: what the study knows is in its storage.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
Log = Callable[..., None]


def event_log(folder: Path, worker: str, show: Callable[[dict[str, Any]], None]) -> Log:
    """A function `log(event, **fields)` that writes a line and shows it."""
    path = folder / EVENTS

    def log(event: str, **fields: Any) -> None:
        line = {"time": time.time(), "event": event, "worker": worker} | fields
        text = json.dumps(_finite(line), allow_nan=False) + "\n"
        with path.open("ab") as file:
            os.write(file.fileno(), text.encode())
        show(line)

    return log


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
