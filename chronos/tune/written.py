"""Recipes as text: other values of some keys, with the comments and the order that a user gave."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronos.common.errors import MissingBackendError
from chronos.common.training.recipe import BUILT_IN, DEMO, Recipe

FIX = "pip install 'chronos-moe[tune]'"


def required(name: str) -> Any:
    """A package of the extra [tune]. Raises MissingBackendError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingBackendError(f"the tuner needs {name}, which is not here", "", FIX) from None


def written(text: str, values: Mapping[str, Any], *, drop: str = "") -> str:
    """A recipe's TOML with values of "section.key" set, and a section left out.

    A key that the recipe has in [train], where recipes once kept them all, is set there.
    """
    tomlkit = required("tomlkit")
    document = tomlkit.parse(text)
    document.pop(drop, None)
    for name, value in values.items():
        section, _, key = name.partition(".")
        old = document.get("train", {})
        if key in old and section not in ("model", "data", "tokenizer", "loss"):
            section = "train"
        if section not in document:
            document[section] = tomlkit.table()
        document[section][key] = list(value) if isinstance(value, tuple) else value
    return str(tomlkit.dumps(document))


def absolute(recipe: Recipe[Any]) -> dict[str, str]:
    """The recipe's paths as keys, wherever the process stands."""
    named = {"data.path": recipe.data.path}
    named |= (
        {"model.path": recipe.start} if recipe.stage.STARTS
        else {"tokenizer.path": recipe.tokenizer.path}
    )  # fmt: skip
    return {
        name: path if path in (DEMO, *BUILT_IN) or not Path(path).exists()
        else str(Path(path).resolve())
        for name, path in named.items() if path
    }  # fmt: skip
