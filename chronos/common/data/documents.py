"""Where text comes from: JSONL, plain text, folders of it, and the Python standard library.

Every row is used, or named with its reason and counted against the caller's budget of bad rows;
nothing is dropped in silence. Blank lines are counted too. Files are read in a fixed order.
Not covered: other file formats, streaming from a network.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chronos.common.data.lines import numbered_lines
from chronos.common.data.rows import Document, RowError, decode_utf8, parse_row
from chronos.common.errors import DataError, UsageError

__all__ = ["Document", "ReadReport", "read_documents", "split_documents", "stdlib_documents"]

_ROW_SUFFIXES = (".jsonl", ".jsonl.gz")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
MAX_TEXT_BYTES = 1 << 30
_FOREIGN_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test idlelib lib2to3 __pycache__".split()
)


@dataclass
class ReadReport:
    """What reading came to; filled while the documents are consumed."""

    files: int = 0
    documents: int = 0
    blank: int = 0
    ignored: int = 0
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{counted(self.documents, 'document')} from {counted(self.files, 'file')}"
        for count, one, what in (
            (len(self.bad), "bad row", " skipped"),
            (self.blank, "blank line", ""),
            (self.ignored, "file", " of another kind"),
        ):
            text += f", {counted(count, one)}{what}" if count else ""
        return text


def counted(number: int, one: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"


def read_documents(
    path: str | Path, skip_bad: int = 0, report: ReadReport | None = None
) -> Iterator[Document]:
    """Documents of a .jsonl, .jsonl.gz or text file, or of all such files in a folder.

    Up to `skip_bad` bad rows are passed over and listed in `report`; one more raises DataError,
    `file:line: reason`. A folder's other files are counted. Hidden files and links are ignored.
    """
    path, report = Path(path), report if report is not None else ReadReport()
    budget = BadRows(skip_bad, report)
    for file, name in _files(path, report):
        report.files += 1
        read = _rows if name.endswith(_ROW_SUFFIXES) else _text
        for document in read(file, name, budget):
            report.documents += 1
            yield document
    if not report.documents:
        fix = "give .jsonl, .jsonl.gz or text, or a folder of it"
        raise DataError(f"no documents: {report}", str(path), fix)


def stdlib_documents(report: ReadReport | None = None) -> list[Document]:
    """The standard library's own Python sources, some 10 MB on every machine with Python.

    Left out: installed packages, tests, IDLE, lib2to3, character tables, empty files, and this
    installation's build settings. Files that do not decode are listed in `report`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    report = report if report is not None else ReadReport()
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _FOREIGN_FOLDERS & set(relative.parts) or _machine_specific(path):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            report.bad.append(f"{relative.as_posix()}: {error}")
            continue
        if text and not _character_table(relative, text):
            report.files += 1
            documents.append(Document(relative.as_posix(), text=text, key=relative.as_posix()))
    report.documents = len(documents)
    return documents


def split_documents(
    documents: Iterable[Document], validation_share: float = 0.02
) -> tuple[list[Document], list[Document]]:
    """(training, validation) by a hash of each document's key: the file's relative path, or the
    row's content. Independent of order and of the other documents; equal rows stay together."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.key.encode("utf-8", "surrogatepass")).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (validation if share < validation_share else train).append(document)
    return train, validation


class BadRows:
    """Counts bad rows; the first beyond the budget is raised."""

    def __init__(self, allowed: int, report: ReadReport) -> None:
        self.allowed, self.report = allowed, report

    def spend(self, where: str, reason: str, fix: str = "correct the row") -> None:
        message = f"{where}: {reason}"
        if len(self.report.bad) >= self.allowed:
            skipped = f" ({self.allowed} bad rows were skipped before it)" if self.allowed else ""
            more = f", or pass over it: --skip-bad {self.allowed + 1}"
            raise DataError(message + skipped, "", fix + more)
        self.report.bad.append(message)


def _files(path: Path, report: ReadReport) -> Iterator[tuple[Path, str]]:
    """(file, name in messages) in sorted order; only regular files are ever opened."""
    suffixes = _ROW_SUFFIXES + _TEXT_SUFFIXES
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = f"no such data: {error.strerror}"
        raise UsageError(what, str(path), "name a text, JSON lines or a folder of them") from None
    if stat.S_ISREG(mode):
        if not path.name.endswith(suffixes):
            kinds = " ".join(suffixes)
            raise DataError(f"{path.suffix or 'no suffix'} is none of {kinds}", str(path))
        yield path, path.name
        return
    if not stat.S_ISDIR(mode):
        raise DataError("neither a file nor a folder", str(path))
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            if name.startswith(".") or not stat.S_ISREG(file.lstat().st_mode):
                continue
            if name.endswith(suffixes):
                yield file, file.relative_to(path).as_posix()
            else:
                report.ignored += 1


def _rows(file: Path, name: str, budget: BadRows) -> Iterator[Document]:
    kind, number = "", 0
    for number, line in numbered_lines(file, name):
        where = f"{name}:{number}"
        try:
            if isinstance(line, RowError):
                raise line
            if not line.strip():
                budget.report.blank += 1
                continue
            document = parse_row(line, where)
            if kind and document.kind != kind:
                raise RowError(f"a {document.kind!r} row in a file that began with {kind!r} rows")
        except RowError as error:
            budget.spend(where, str(error))
            continue
        kind = document.kind
        yield document
    if not number:
        budget.spend(name, "the file is empty", "remove it")


def _text(file: Path, name: str, budget: BadRows) -> Iterator[Document]:
    """One document per file, without a byte order mark, its lines ended by LF."""
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise RowError(f"a text file above {MAX_TEXT_BYTES >> 20} MiB; split it, or use JSONL")
        text = decode_utf8(file.read_bytes()).replace("\r\n", "\n")
        if not text.strip():
            raise RowError("the file is empty")
    except (RowError, OSError) as error:
        budget.spend(name, str(error), "save it as UTF-8 text, or remove it")
        return
    yield Document(name, text=text, key=name)


def _machine_specific(path: Path) -> bool:
    return path.name.startswith("_sysconfigdata") or path.name in {
        "sitecustomize.py",
        "usercustomize.py",
    }


def _character_table(relative: Path, text: str) -> bool:
    """encodings/cp1252.py and its like: 256 lines of numbers each."""
    return relative.parts[0] == "encodings" and (
        "\ndecoding_table = " in text or "\ndecoding_map = " in text
    )
