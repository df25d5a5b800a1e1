"""Reading JSONL files that another process appends to."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_MOST_ROWS = 50_000  # kept of one file; a run of a million steps is drawn from its newest ones


class Rows:
    """The objects in a JSONL file. `read` parses only what was appended since the last call.

    A last line that is not whole yet is left for the next call; a file that is shorter than before,
    or another one, is read anew. Lines that are no JSON object are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: deque[Row] = deque(maxlen=_MOST_ROWS)
        self._offset, self._inode = 0, -1

    def read(self) -> list[Row]:
        try:
            with self.path.open("rb") as file:
                self._append(file)
        except OSError:
            self._rows.clear()
            self._offset = 0
        return list(self._rows)

    def _append(self, file: Any) -> None:
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._offset:
            self._rows.clear()
            self._offset, self._inode = 0, found.st_ino
        file.seek(self._offset)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self._rows.append(row)
