"""The expert store of every backend, and the suite itself against stores that are wrong on purpose."""

from __future__ import annotations

from chronos.testing.store_tests import StoreTests


class TestStore(StoreTests):
    """`backend` comes from conftest.py."""
