"""What the tensors of a packed model's experts were called: `experts/names.json`.

Records name tensors as a codec wants them; the checkpoint they came from had names of its own,
which `unpack` gives back. A tensor of a record is one or two tensors of each expert, laid one after
the other, or a slice of a stack of all experts; of each the file keeps what stands before and
behind the expert's number, or the whole name of the stack. Running a model needs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.disk.header import load_json, read_small
from chronos.common.disk.io import FileIO
from chronos.common.errors import CorruptFileError
from chronos.common.layout.manifest import EXPERTS

NAMES = "names.json"
_MAX_BYTES = 32 << 20
Pattern = tuple[str, ...]  # (before, behind) an expert's number; (name,) of a stack
Names = Mapping[int, Mapping[str, tuple[Pattern, ...]]]  # by layer, then tensor of the record


def pattern_of(name: str, expert: int | None) -> Pattern:
    """expert: whose tensor has that name; None for a stack. Empty where the number is spelled
    otherwise ("01")."""
    if expert is None:
        return (name,)
    before, number, behind = name.rpartition(f".{expert}.")
    return (f"{before}.", f".{behind}") if number else ()


def write_names(folder: Path, names: Names, io: FileIO) -> None:
    data = {"format": "chronos-names", "version": 1, "layers": names}
    make_folder(folder / EXPERTS, io)
    raw = json.dumps(data, indent=1).encode()
    atomic_write(folder / EXPERTS / NAMES, [raw], io, nbytes=len(raw))


def read_names(folder: Path, io: FileIO | None = None) -> Names:
    """Empty where packing kept none. Raises CorruptFileError."""
    path = folder / EXPERTS / NAMES
    if not path.exists():
        return {}
    try:
        data = load_json(read_small(path, _MAX_BYTES, io))
        if (data.get("format"), data.get("version")) != ("chronos-names", 1):
            raise ValueError("it is of another format or version")
        return {
            int(layer): {tensor: tuple(map(_checked, parts)) for tensor, parts in tensors.items()}
            for layer, tensors in data["layers"].items()
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"the names of the experts' tensors are damaged: {error}",
            str(path),
            "running needs no names: remove the file, or pack the model again",
        ) from error


def _checked(pattern: list[str]) -> Pattern:
    if len(pattern) not in (1, 2) or not all(isinstance(part, str) for part in pattern):
        raise ValueError(f"{pattern!r:.60} is no name")
    return tuple(pattern)
