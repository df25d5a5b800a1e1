"""Choosing a backend: the flag, then CHRONOS_BACKEND, then what suits this machine.

Importing this package imports no framework; `load` imports exactly one. A backend that was named
and cannot be used is an error that says what is missing, never a silent change to another.
The device is the backend's own choice (CUDA where there is one, else the CPU; MPS by name).
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, cast

from chronos.backends import probe
from chronos.backends.startup import wait_asleep
from chronos.common.errors import MissingBackendError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chronos.backends.protocol import Backend

NAMES = probe.NAMES
__all__ = ["NAMES", "available", "dequantiser", "load", "select"]


def available() -> dict[str, probe.Finding]:
    """What `find_spec` says about each backend; no framework is imported."""
    return {name: probe.find(name) for name in probe.NAMES}


def select(prefer: str | None = None) -> str:
    """The backend's name. Raises UsageError for an unknown name, MissingBackendError where the
    named one (or, with "auto", every one) is missing."""
    name, asked_by = (prefer, "--backend") if prefer not in (None, "auto") else _from_environment()
    if name == "auto":
        return _best(available())
    if name not in probe.NAMES:
        raise UsageError(
            f"unknown backend {name!r}", asked_by, f"use one of: auto, {', '.join(probe.NAMES)}"
        )
    found = probe.find(name)
    if not found.usable:
        raise _missing(found)
    return name


def load(prefer: str | None = None) -> Backend:
    """Select a backend and import it. Raises as `select` does."""
    name = select(prefer)
    wait_asleep()
    try:
        return cast("Backend", importlib.import_module(f"chronos.backends.{name}"))
    except (ImportError, OSError) as error:
        found = probe.inspect(name)
        if not found.usable:
            raise _missing(found) from error
        raise


def dequantiser() -> Callable[..., memoryview]:
    """What makes plain matrices of quantised ones (`common.layout.unpack`), which is PyTorch's.
    Raises MissingBackendError."""
    load("torch")
    module = importlib.import_module("chronos.backends.torch.checkpoint")
    return cast("Callable[..., memoryview]", module.dequantised_bytes)


def _from_environment() -> tuple[str, str]:
    return os.environ.get("CHRONOS_BACKEND") or "auto", "CHRONOS_BACKEND"


def _best(found: dict[str, probe.Finding]) -> str:
    """MLX leads on Apple silicon only: on Linux it imports, but has no GPU to run on."""
    order = ("mlx", "torch") if probe.is_apple_silicon() else ("torch", "mlx")
    for name in order:
        if found[name].usable:
            return name
    reasons = "; ".join(f"{name}: {found[name].reason}" for name in order)
    raise MissingBackendError("no backend can be used here", reasons, found[order[0]].fix)


def _missing(found: probe.Finding) -> MissingBackendError:
    return MissingBackendError(f"backend {found.name!r} cannot be used", found.reason, found.fix)
