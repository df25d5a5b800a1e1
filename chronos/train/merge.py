"""A model and an adapter made one: new weights where the adapter has some, all else as it is.

A packed model's experts are linked, not copied, and its dense part is written anew; so adapters of
its routed experts are merged before packing. Every matrix is summed in float32 and rounded to its
own dtype once. Needs no framework. Not covered: quantised matrices.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.atomic import RunLock
from chronos.common.disk.header import Located, read_header
from chronos.common.disk.io import FileIO
from chronos.common.disk.linked import LINK
from chronos.common.disk.tensors import DTYPE, locate_tensors, read_located, write_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import is_packed
from chronos.common.layout.digests import renew
from chronos.common.layout.folder import FINGERPRINT
from chronos.common.layout.manifest import EXPERTS, MANIFEST
from chronos.common.layout.source import narrowed, open_source, widened
from chronos.common.model.guest import GuestConfig
from chronos.common.training.lora import AdapterFile, parsed, read_adapter
from chronos.train.adapters import MERGED, identity

_DENSE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")  # of matrices that an adapter can be added to


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote: the folder, and how many matrices are others than the model's."""

    folder: Path
    matrices: int


def merge(model: Path, adapter: Path, out: Path) -> Merged:
    """Write the model of both into `out`, a new or an empty folder.

    Raises UsageError for another model's adapter, and for experts of a packed model; ConfigError
    for matrices that the model does not have; both before anything is written.
    """
    file = read_adapter(adapter)
    file.check_model(identity(model))
    packed = is_packed(model)
    if packed and file.experts:
        raise UsageError(
            "the experts of a packed model are not merged",
            str(model),
            "merge into the folder that it was packed from, then pack that",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("the destination is not empty", str(out), "name a new folder")
    located = _located(model, packed)
    parts = _parts(file, located)
    with RunLock(out):
        tensors = [
            (name, entry.dtype, entry.shape, partial(_bytes, file, parts.get(name), (path, entry)))
            for name, (path, entry) in located.items()
        ]
        metadata = {"format": "pt"}
        if packed:
            source, dense = open_source(model, FileIO()), model / _DENSE
            known = read_header(dense).metadata if dense.exists() else {}
            metadata |= known | {FINGERPRINT: source.fingerprint}
            if isinstance(source.config, GuestConfig):
                metadata[DTYPE] = source.config.dtype
            metadata[MERGED] = f"{known.get(MERGED, '')}+{file.digest}"
            (out / EXPERTS).mkdir()
            for path in sorted((model / EXPERTS).iterdir(), key=lambda p: p.name == MANIFEST):
                if path.name != MANIFEST:
                    _link(path, out / EXPERTS / path.name)
        write_tensors(out / _DENSE, tensors, metadata)
        names = [_DENSE, LINK]
        for path in _beside(model):
            shutil.copyfile(path, out / path.name)
            names.append(path.name)
        if packed:  # its digests are a file of its own from here on, and the manifest comes last
            _own(out / EXPERTS / "digests.json")
            renew(out, names)
            _link(model / EXPERTS / MANIFEST, out / EXPERTS / MANIFEST)
    return Merged(out, len(parts))


def _located(model: Path, packed: bool) -> dict[str, Located]:
    if packed:
        return {entry.name: (path, entry) for path, entry in open_source(model, FileIO()).dense}
    return dict(locate_tensors(model))


def _parts(
    file: AdapterFile, located: Mapping[str, Located]
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """A, B and lengths of each matrix that changes, by its name in the model."""
    parts: dict[str, dict[str, NDArray[np.float32]]] = {}
    for entry, data in file.tensors():
        path, part = parsed(entry.name)
        name = f"{path}.weight"
        if name not in located or located[name][1].dtype not in _DTYPES:
            raise ConfigError(
                f"the model has no matrix {name} that an adapter can be added to",
                str(file.folder),
                "merge into the folder of the library that the adapter was trained with",
            )
        values = widened(bytes(data), entry.dtype, entry.shape)
        parts.setdefault(name, {})[part] = values.reshape(entry.shape)
    return parts


def _bytes(
    file: AdapterFile, parts: Mapping[str, NDArray[np.float32]] | None, located: Located
) -> Any:
    """A tensor as it is written."""
    entry = located[1]
    raw = b"".join(bytes(data) for _, data in read_located([located]))
    if parts is None:
        return raw
    weight_OI = widened(raw, entry.dtype, entry.shape).reshape(entry.shape)
    whole_OI = weight_OI + file.recipe.scale * (parts["lora_B"] @ parts["lora_A"])
    if "magnitude" in parts:
        length_O1 = np.linalg.norm(whole_OI, axis=1, keepdims=True)
        whole_OI = whole_OI * (parts["magnitude"].reshape(-1, 1) / length_O1)
    return narrowed(whole_OI.astype(np.float32), entry.dtype).tobytes()


def _beside(model: Path) -> list[Path]:
    """The files that are copied: all but weights."""
    return [
        path
        for path in sorted(model.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != LINK
        and (".safetensors" not in path.name or path.name == "lookahead.safetensors")
    ]


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(path, to)


def _own(path: Path) -> None:
    """Make a linked file one of its own."""
    if path.exists():
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(raw)
