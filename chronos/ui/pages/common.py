"""What several pages show alike."""

from __future__ import annotations

from typing import Any

from chronos.common.budget import shown_size
from chronos.ui.face import table
from chronos.ui.jobs import Job


def finished_numbers(job: Job | None) -> str:
    """The result of a job as a table: what its command printed as JSON."""
    found = job.result() if job is not None and not job.alive else None
    if not isinstance(found, dict):
        return ""
    rows = [(key.replace("_", " "), plain(key, value)) for key, value in found.items()]
    return table((), [row for row in rows if row[1]])


def plain(key: str, value: Any) -> str:
    """A number or a word of a result; lists of objects are left to those who know them."""
    if isinstance(value, int | float) and not isinstance(value, bool) and "bytes" in key:
        return shown_size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(k, v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) if not any(isinstance(v, dict) for v in value) else ""
    return "" if value is None else str(value)
