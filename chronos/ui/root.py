"""The folder that a UI works in. Nothing outside it is read or written, whatever a page sends."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from chronos.common.errors import UsageError

RUNS, RECIPES = "runs", "recipes"
# What runs write beside their results; no data to train on.
LOGS = frozenset(
    "job.jsonl metrics.jsonl completions.jsonl experts.jsonl chat.jsonl trials.jsonl".split()
)
_TEXTS = (".jsonl", ".jsonl.gz", ".txt", ".md")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_DEEPEST, _MOST = 5, 20_000  # folders below the root, entries: what a listing looks at


class Root:
    """Paths in pages are relative to `folder`, as a user sees them."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where there is no such folder."""
        if not folder.is_dir():
            raise UsageError("there is no such folder", str(folder), "make it, or name another")
        self.folder = folder.resolve()

    @property
    def runs(self) -> Path:
        return self.folder / RUNS

    def path(self, text: str) -> Path:
        """A path in a page as an absolute one. Raises UsageError where it leaves the root, by `..`,
        by a symbolic link or by being another's, and where it cannot be a path at all."""
        bad = not text.strip() or "\0" in text or len(text) > 1024
        if bad or text.startswith(("~", "-")) or ".." in Path(text).parts:
            raise UsageError(f"not a path below the root: {text[:80]!r}")
        path = self.folder / text
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self.folder):
            raise UsageError("the path leads out of the root", text[:200], "--root names another")
        return path

    def existing(self, text: str) -> Path:
        """The same of what must be there. Raises UsageError."""
        path = self.path(text)
        if not path.exists():
            raise UsageError("there is no such file or folder", text[:200])
        return path

    def run(self, name: str) -> Path:
        """The run folder of a name. Raises UsageError for what is no plain name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name[:80]!r} is no name for a run", "", "letters, digits, dots, - and _"
            )
        return self.path(f"{RUNS}/{name}")

    def shown(self, path: Path) -> str:
        """A path below the root as pages show it."""
        return path.relative_to(self.folder).as_posix()

    def models(self) -> list[str]:
        """Model folders, packed or not."""
        return self._found(lambda at, names: "config.json" in names)

    def adapters(self) -> list[str]:
        return self._found(lambda at, names: "adapter_config.json" in names)

    def recipes(self) -> list[str]:
        return self._files(".toml")

    def traces(self) -> list[str]:
        return self._files(".npz")

    def data(self) -> list[str]:
        """Files of text or rows."""
        return [name for name in self._files(*_TEXTS) if Path(name).name not in LOGS]

    def _found(self, fits: Callable[[Path, list[str]], bool]) -> list[str]:
        return sorted(self.shown(at) for at, names in self._walk() if fits(at, names))

    def _files(self, *endings: str) -> list[str]:
        return sorted(
            self.shown(at / name)
            for at, names in self._walk()
            for name in names
            if name.endswith(endings)
        )

    def _walk(self) -> Iterator[tuple[Path, list[str]]]:
        """Folders below the root with the names of their files; links and hidden ones left out."""
        left = _MOST
        for at, folders, names in os.walk(self.folder, followlinks=False):
            here = Path(at)
            left -= 1 + len(names)
            if left < 0:
                return
            deep = len(here.relative_to(self.folder).parts) >= _DEEPEST
            folders[:] = [] if deep else sorted(n for n in folders if not n.startswith("."))
            yield here, names
