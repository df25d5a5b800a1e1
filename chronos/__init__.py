"""Chronos: run and train Mixture-of-Experts language models bigger than fast memory.

The names below are the public face. Importing this package imports no framework and none of the
rooms behind it: each name is resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_HOMES = {
    "Engine": "run.engine",
    "Generation": "run.generation",
    "GenerationResult": "run.generation",
    "SamplingParams": "common.text.sampling",
    "Step": "run.generation",
    "load": "run.engine",
}
__all__ = [
    "BudgetError",
    "ChronosError",
    "ConfigError",
    "CorruptClusterError",
    "CorruptFileError",
    "DataError",
    "DiskFullError",
    "Engine",
    "Generation",
    "GenerationResult",
    "MissingBackendError",
    "ResourceError",
    "SamplingParams",
    "ShapeMismatch",
    "Step",
    "StoreError",
    "UsageError",
    "__version__",
    "load",
    "train",
]

if TYPE_CHECKING:
    from chronos import train
    from chronos.common.errors import (
        BudgetError,
        ChronosError,
        ConfigError,
        CorruptClusterError,
        CorruptFileError,
        DataError,
        DiskFullError,
        MissingBackendError,
        ResourceError,
        ShapeMismatch,
        StoreError,
        UsageError,
    )
    from chronos.common.text.sampling import SamplingParams
    from chronos.run.engine import Engine, load
    from chronos.run.generation import Generation, GenerationResult, Step


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("chronos.train")
    if name not in __all__:
        raise AttributeError(f"module 'chronos' has no attribute {name!r}")
    return getattr(import_module(f"chronos.{_HOMES.get(name, 'common.errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
