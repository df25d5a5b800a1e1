"""Runs Python as if packages were not installed, child processes included.

PYTHONPATH=tests/absent CHRONOS_TEST_WITHOUT=torch,mlx python -m pytest tests/unit tests/cli
`make absent` does so without MLX, without PyTorch and without either.
"""

import os
from importlib.machinery import PathFinder

_WITHOUT = frozenset(os.environ.get("CHRONOS_TEST_WITHOUT", "").split(",")) - {""}
_find_spec = PathFinder.find_spec


@classmethod
def _find_spec_except(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
    return None if name.partition(".")[0] in _WITHOUT else _find_spec(name, path, target)


PathFinder.find_spec = _find_spec_except  # type: ignore[method-assign]
