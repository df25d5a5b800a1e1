"""Recipes that pages edit: text of TOML files below the root, with what they were before.

The text is the truth: a form changes keys in it and leaves comments where they are. Every version
that was replaced stays in RECIPES/NAME.history.jsonl, which `undo` takes back from.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.disk.io import FileIO, write_error
from chronos.common.errors import ConfigError, UsageError
from chronos.common.training.design import SHARES, design
from chronos.common.training.recipe import Recipe, parse_recipe, shipped, toml_of
from chronos.train import STAGES
from chronos.tune.written import written
from chronos.ui.root import RECIPES, Root

_DRAFT = ".draft.json"
_MOST = 1 << 20  # bytes of a recipe
_HERE = Path("recipe.toml")  # what errors of a text call it


class Recipes:
    """Those that ship, by their names, and the files below a root."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def names(self) -> list[str]:
        return [*shipped(), *self.root.recipes()]

    def path(self, name: str) -> str:
        """As commands take it. Raises UsageError."""
        return name if name in shipped() else str(self.root.existing(name))

    def text(self, name: str) -> str:
        path = shipped().get(name) or self.root.existing(name)
        try:
            if path.stat().st_size > _MOST:
                raise ConfigError("the file is too large for a recipe", name)
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the recipe cannot be read: {error}", name) from None

    def save(self, name: str, text: str) -> str:
        """Check and write a recipe; its path below the root. Raises ConfigError, UsageError."""
        check(text)
        path = self._file(name)
        make_folder(path.parent)
        if path.exists():
            before = path.read_text("utf-8")
            if before == text:
                return self.root.shown(path)
            self._remember(path, before)
        atomic_write(path, [text.encode()])
        return self.root.shown(path)

    def undo(self, name: str) -> str:
        """Put back what a recipe was before it was last saved; its text. Raises UsageError."""
        path = self._file(name)
        history = path.with_suffix(".history.jsonl")
        lines = history.read_text("utf-8").splitlines() if history.exists() else []
        if not lines:
            raise UsageError("nothing was replaced", self.root.shown(path))
        text = str(json.loads(lines[-1])["text"])
        atomic_write(path, [text.encode()])
        atomic_write(history, [line.encode() + b"\n" for line in lines[:-1]])
        return text

    def _remember(self, path: Path, text: str) -> None:
        history = path.with_suffix(".history.jsonl")
        try:
            with history.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "text": text}) + "\n")
        except OSError as error:
            raise write_error(history, error, FileIO()) from error

    def _file(self, name: str) -> Path:
        stem = name.removeprefix(f"{RECIPES}/").removesuffix(".toml")
        self.root.run(stem)  # a plain name
        return self.root.path(f"{RECIPES}/{stem}.toml")

    def keep_draft(self, name: str, text: str) -> None:
        """What is edited and not saved yet, for the next time the page is opened."""
        folder = self.root.path(RECIPES)
        make_folder(folder)
        atomic_write(folder / _DRAFT, [json.dumps({"name": name, "text": text}).encode()])

    def draft(self) -> tuple[str, str]:
        """(name, text); the shipped recipe of the demo model at first."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.root.path(RECIPES) / _DRAFT).read_text("utf-8"))
            return str(found["name"]), str(found["text"])
        return "mine", self.text("demo")


def stage_of(text: str) -> str:
    """The stage that a recipe has a section of; pretraining where it has none."""
    found = toml_of(text, _HERE)
    return next((name for name in STAGES if name in found), "pretrain")


def check(text: str) -> Recipe[Any]:
    """The recipe; what a study has beside it, [tune], is left to `chronos tune`. Raises
    ConfigError."""
    sections = toml_of(text, _HERE)
    sections.pop("tune", None)
    return parse_recipe(sections, STAGES[stage_of(text)].section, _HERE)


def value_of(text: str, section: str, key: str) -> Any:
    """As the text has it, or the default; None where the recipe has no such key."""
    recipe = check(text)
    home: Any = recipe.stage if section in STAGES else getattr(recipe, section, None)
    if section == "loss":
        home = recipe.model.loss_weights
    return getattr(home, key, None)


def with_value(text: str, section: str, key: str, value: Any) -> str:
    """The text with one key changed, and everything else as it was. Raises ConfigError."""
    toml_of(text, _HERE)
    return written(text, {f"{section}.{key}": value})


def designed(text: str, disk_rate: float | None) -> dict[str, Any] | None:
    """What `chronos inspect RECIPE.toml` says; None for a stage that goes on with a model."""
    recipe = check(text)
    if recipe.stage.STARTS:
        return None
    return design(
        recipe.model,
        optimizer=recipe.optimizer,
        rows=recipe.stage.batch_size,
        seq_len=recipe.stage.seq_len,
        budgets=SHARES,
        disk_rate=disk_rate,
    )
