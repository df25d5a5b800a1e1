"""The expert store of every backend; and the suite itself, against stores wrong on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos.testing import fake_backend
from chronos.testing.fake_backend import WRONG, FakeBackend, FakeStore
from chronos.testing.store_tests import StoreTests


class TestStore(StoreTests):
    """`backend` comes from conftest.py."""


class TestFakeStore(StoreTests):
    """The correct fake passes: the suite asks for nothing that takes a framework."""

    @pytest.fixture
    def backend(self) -> FakeBackend:
        return FakeBackend()


@pytest.mark.parametrize("wrong", WRONG, ids=lambda store: store.__name__)
def test_the_suite_notices(
    wrong: type[FakeStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chronos.testing.store_rig._PATIENCE_S", 0.5)
    test = getattr(StoreTests(), WRONG[wrong])
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(FakeBackend(wrong), tmp_path)


def test_every_wrong_store_is_tried() -> None:
    stores = {s for s in vars(fake_backend).values() if isinstance(s, type)}
    assert {s for s in stores if issubclass(s, FakeStore)} - {FakeStore} == WRONG.keys()
