"""What commands print: data on stdout, progress and footers on stderr, JSON when asked.

Bars and colours appear on a terminal only. `configure` is called once per command with its output
flags. Rich is imported when something is drawn, never at start-up.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chronos.common.budget import shown_size
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class _State:
    quiet: bool = False
    json: bool = False


_state = _State()
_FEW = 3  # columns of words, which fold well
_PAUSE_S = 10.0  # between lines of progress where there is no terminal


def configure(*, quiet: bool = False, json: bool = False) -> None:
    _state.quiet, _state.json = quiet, json


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def print_json(data: Any) -> None:
    """One JSON object on one line; NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(data), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def note(text: str) -> None:
    """A line for the person watching; none with -q."""
    if not _state.quiet:
        print(text, file=sys.stderr, flush=True)


def legend(text: str) -> None:
    """Words on a table, folded at the terminal's width; none with -q."""
    note(textwrap.fill(text, shutil.get_terminal_size().columns))


def command_line(label: str, command: str) -> None:
    """A command to copy: on a line of its own, never folded."""
    print(f"{label} {command}")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    align: str = "",
) -> None:
    """Print a table to stdout. align: "l" or "r" per column; the first left, the others right.

    Where a table of many columns is wider than the terminal, each row becomes a list.
    """
    if len(columns) > _FEW and _width(columns, rows) > shutil.get_terminal_size().columns:
        _lists(columns, rows, title)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold",
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for name, side in zip(columns, align or "l" + "r" * len(columns), strict=False):
        grid.add_column(name, justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console().print(grid)


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """What a table takes, with two blanks between columns and one at either side."""
    cells = [max(map(cell_width, column)) for column in zip(columns, *rows, strict=True)]
    return sum(cells) + 2 * len(cells)


def cell_width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _lists(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    if title:
        heading(title)
    for first, *others in rows:
        print(f"{columns[0]} {first}".strip())
        for name, cell in zip(columns[1:], others, strict=True):
            if cell:
                print(f"  {name}: {cell}".rstrip())


def draws() -> bool:
    """Whether bars are drawn: neither with -q nor without a terminal."""
    return not _state.quiet and sys.stderr.isatty()


@contextmanager
def progress(
    label: str, *, rate: bool = False, lines: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields `update(done, total)`. Without a terminal a line now and then; with
    -q nothing.

    rate: what is counted are bytes; show how many a second. lines: False where the work has lines
    of its own.
    """
    if not draws():
        yield _lines(label) if lines else lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    speed = [TransferSpeedColumn()] if rate else []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        *speed, TimeRemainingColumn(), console=console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_target(path: Path, flag: str, *, new: bool = False) -> None:
    """Raises UsageError where no file can be written at `path`: asked before long work. new: one
    that is there took long to make, and is not written over."""
    folder = path.absolute().parent
    if new and path.is_file():
        what, fix = "the file is there already", "name another one, or remove it first"
    elif path.is_dir():
        what, fix = "a folder is there: name a file", ""
    elif not folder.is_dir():
        what, fix = "the folder does not exist", f"make it first: {folder}"
    elif not os.access(folder, os.W_OK):
        what, fix = "the folder may not be written to", "choose another one"
    else:
        return
    raise UsageError(f"{flag} {path}: {what}", flag, fix)


def _lines(label: str) -> Callable[[int, int], None]:
    """Progress as a line every ten seconds."""
    began = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PAUSE_S:
            last = now
            share = f"{100 * done / total:.0f} %, " if total else ""
            note(f"{label}: {share}{now - began:.0f} s")

    return update


size = shown_size  # beside `count` and `percent`


def count(number: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def heading(text: str) -> None:
    """A line that begins a section of what a person reads."""
    from rich.text import Text

    console().print(Text(f"\n{text}", style="bold"))


def paragraph(text: str) -> None:
    """Text folded at the terminal's width."""
    from rich.text import Text

    console().print(Text(text))
