"""Chronos: run and train Mixture-of-Experts language models bigger than fast memory.

Importing this package imports no framework: `load` and `Engine` are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load"]

if TYPE_CHECKING:
    from chronos.engine import Engine, load


def __getattr__(name: str) -> Any:
    if name in {"Engine", "load"}:
        from chronos import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'chronos' has no attribute {name!r}")
