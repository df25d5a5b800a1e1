"""Comparisons with libraries that nobody here wrote (requirements.txt says which).

A file names what it needs in NEEDS; each of its tests is skipped by name where that is absent.
"""

from __future__ import annotations

import importlib.util

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    needs: tuple[str, ...] = getattr(getattr(item, "module", None), "NEEDS", ())
    if absent := [name for name in needs if importlib.util.find_spec(name) is None]:
        pytest.skip(
            f"{', '.join(absent)} not installed: pip install -r tests/oracle/requirements.txt"
        )
