"""Numbered lines of a plain or gzip file, in bounded memory whatever the file holds.

A line above the cap is reported without being held; a gzip file that expands beyond its cap is a
bomb, or might as well be, and ends the reading.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from chronos.common.data.rows import RowError
from chronos.common.errors import DataError

MAX_LINE_BYTES = 16 << 20
# Prose compresses 3 to 6 times, logs 20; a file may always expand to the floor.
MAX_EXPANSION, EXPANSION_FLOOR = 100, 64 << 20
_CHUNK = 1 << 20


def numbered_lines(
    path: Path, name: str, *, floor: int = EXPANSION_FLOOR
) -> Iterator[tuple[int, bytes | RowError]]:
    """(line number from 1, line without its end, or what is wrong with it).

    Raises DataError if the file cannot be read, is no whole gzip file, or expands too far.
    """
    packed = path.name.endswith(".gz")
    number = 0
    try:
        limit = max(floor, MAX_EXPANSION * path.stat().st_size) if packed else None
        with gzip.open(path) if packed else path.open("rb") as file:
            reader = _Reader(file.readline, limit)
            while line := reader.next():
                number += 1
                yield number, line if isinstance(line, RowError) else line.rstrip(b"\r\n")
    except _ExpansionError as error:
        raise DataError(f"{name}:{number + 1}: {error}", str(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}:{number + 1}: damaged gzip data: {error}", str(path)) from None
    except OSError as error:
        raise DataError(f"{name}:{number + 1}: cannot be read: {error}", str(path)) from None


class _ExpansionError(Exception):
    pass


class _Reader:
    """readline with a cap on the line and on all bytes together."""

    def __init__(self, readline: Callable[[int], bytes], limit: int | None) -> None:
        self.readline, self.limit, self.total = readline, limit, 0

    def next(self) -> bytes | RowError:
        """The next line with its end, b"" after the last one."""
        line = self._read(MAX_LINE_BYTES + 1)
        if len(line) <= MAX_LINE_BYTES:
            return line
        size, ended = len(line), line.endswith(b"\n")
        while not ended:
            rest = self._read(_CHUNK)
            size += len(rest)
            ended = not rest or rest.endswith(b"\n")
        return RowError(f"a line of {size >> 20} MiB; the limit is {MAX_LINE_BYTES >> 20} MiB")

    def _read(self, size: int) -> bytes:
        data = self.readline(size)
        self.total += len(data)
        if self.limit is not None and self.total > self.limit:
            raise _ExpansionError(
                f"the file expands beyond {self.limit >> 20} MiB,"
                f" {MAX_EXPANSION} times its own size"
            )
        return data
