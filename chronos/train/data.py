"""What a recipe's [data] names, read and split: the same for every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chronos.common.data import (
    BadRows,
    Document,
    ReadReport,
    counted,
    read_documents,
    split_documents,
    stdlib_documents,
    stdlib_functions,
)
from chronos.common.errors import DataError
from chronos.common.training.recipe import BUILT_IN, STDLIB, Recipe
from chronos.train.loop import Event

_NONE_HELD_OUT = (
    "no evaluation: of {} a validation_share of {} holds out none; a text file is one"
    " document, so give more files or rows"
)


def read_split(
    recipe: Recipe[Any], on_event: Callable[[Event], None]
) -> tuple[list[Document], list[Document], BadRows]:
    """(training, validation, the count of bad rows so far). Raises DataError."""
    report, data = ReadReport(), recipe.data
    bad = BadRows(data.skip_bad, report)
    if data.path == STDLIB:
        documents = stdlib_documents(report)
    elif data.path in BUILT_IN:
        documents = stdlib_functions(data.path.removeprefix("stdlib-"), report)
    else:
        documents = list(read_documents(data.path, data.skip_bad, report))
    on_event({"message": str(report)})
    training, validation = split_documents(documents, data.validation_share)
    if not training:
        raise DataError(
            f"nothing to train on: {counted(len(documents), 'document')}, all held out",
            str(data.path),
            "a text file is one document: give more files or rows, or validation_share = 0",
        )
    if data.validation_share and not validation:
        of_all = counted(len(documents), "document")
        on_event({"warning": _NONE_HELD_OUT.format(of_all, data.validation_share)})
    return training, validation, bad
