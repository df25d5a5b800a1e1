"""Parameters of the small NumPy models of routing: kept as side files, stepped by Adam.

Float32 tensors by name (and ids beside them), in a safetensors file whose metadata says whose they
are. Such a file fits into memory, so the safetensors library writes and reads it; the strict header
check and the atomic write are ours. Not known here: which names and shapes a model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import read_whole
from chronos.common.disk.io import FileIO, StrPath, corrupt
from chronos.common.experts.foresight.network import Params

DTYPES = {"F32": np.float32, "U8": np.uint8, "U16": np.uint16}  # by safetensors' names
_MAX_BYTES = 4 << 30
Arrays = Mapping[str, NDArray[Any]]


def write_params(path: StrPath, params: Arrays, metadata: Mapping[str, str]) -> None:
    """Write the side file atomically."""
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(value) for name, value in params.items()}
    raw = save(plain, dict(metadata))
    atomic_write(path, [raw], nbytes=len(raw))


def read_params(path: StrPath, io: FileIO | None = None) -> dict[str, NDArray[Any]]:
    """The tensors of a side file, all known to be of DTYPES. Raises CorruptFileError for a NaN."""
    from safetensors.numpy import load

    params: dict[str, NDArray[Any]] = load(read_whole(path, _MAX_BYTES, io))
    if not all(np.isfinite(value).all() for value in params.values()):
        raise corrupt(path, "holds a NaN or an infinity")
    return params


class Adam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019) and gradients
    clipped to a norm of 1. Works in place: half of the time of fresh arrays."""

    def __init__(self, params: Params) -> None:
        self._first = {name: np.zeros_like(value) for name, value in params.items()}
        self._second = {name: np.zeros_like(value) for name, value in params.items()}
        self._room = {name: np.empty_like(value) for name, value in params.items()}
        self._steps = 0

    def step(self, params: Params, grads: Params, rate: float, weight_decay: float) -> None:
        """One update; the gradients are used up."""
        self._steps += 1
        norm = float(np.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads.values())))
        scale = min(1.0, 1.0 / max(norm, 1e-12))
        rise1, rise2 = 1.0 - 0.9**self._steps, 1.0 - 0.999**self._steps
        for name, grad in grads.items():
            value, first, second = params[name], self._first[name], self._second[name]
            room = self._room[name]
            np.multiply(grad, grad, out=room)
            second *= np.float32(0.999)
            room *= np.float32(0.001 * scale * scale)
            second += room
            first *= np.float32(0.9)
            grad *= np.float32(0.1 * scale)
            first += grad
            np.sqrt(second, out=room)
            room += np.float32(1e-8)
            np.divide(first, room, out=room)
            room *= np.float32(rate / rise1 * rise2**0.5)
            value *= np.float32(1.0 - rate * weight_decay)
            value -= room
