"""Reads run ahead of their consumer and fail where it looks; deferred modules come when asked."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chronos.backends.startup import (
    ReadAhead,
    _Deferred,
    fast_import,
    wait_asleep,
    waiting,
)


def test_read_ahead_yields_everything_in_order() -> None:
    with ReadAhead(iter(range(100))) as ahead:
        assert list(ahead) == list(range(100))


def test_it_runs_before_it_is_asked() -> None:
    ran = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        ran.set()
        yield 2

    with ReadAhead(items()) as ahead:
        assert ran.wait(10)
        assert list(ahead) == [1, 2]


def test_an_error_is_raised_where_it_happened() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("bad header")

    with ReadAhead(items()) as ahead:
        iterator = iter(ahead)
        assert next(iterator) == 1
        with pytest.raises(ValueError, match="bad header"):
            next(iterator)


def test_leaving_early_stops_the_thread_and_closes_the_reads() -> None:
    threads, closed = threading.active_count(), threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with ReadAhead(endless()) as ahead:
        assert next(iter(ahead)) == 0
    assert closed.is_set()
    assert threading.active_count() == threads


def test_a_deferred_module_is_imported_when_a_name_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chronos_test_late.py").write_text("loaded = []\nanswer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_in = _Deferred("chronos_test_late")
    monkeypatch.setitem(sys.modules, "chronos_test_late", stand_in)
    import chronos_test_late  # type: ignore[import-not-found]

    assert chronos_test_late is stand_in
    assert "answer" not in vars(stand_in)
    assert chronos_test_late.answer == 42
    assert sys.modules["chronos_test_late"] is not stand_in


def test_collection_goes_on_after_an_import() -> None:
    assert gc.isenabled()
    with fast_import("no-such-backend", own_process=False):
        assert not gc.isenabled()
    assert gc.isenabled()


def test_only_the_first_import_is_kept_from_collection() -> None:
    """What the import of a second model froze was the first model: 5 GB a budget in a replay."""
    before = gc.get_freeze_count()
    with fast_import("json", own_process=True):  # there already
        pass
    assert gc.get_freeze_count() == before
    try:
        with fast_import("no-such-backend", own_process=True):
            pass
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("named", ["", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_wait_asleep_unless_the_environment_says_how(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {named: "7"} if named else {}
    monkeypatch.setattr("chronos.backends.startup.os.environ", environment)
    monkeypatch.setattr("chronos.backends.startup.neighbours", lambda: True)
    wait_asleep.cache_clear()
    wait_asleep()
    assert environment == ({named: "7"} if named else {"OMP_WAIT_POLICY": "passive"})
    assert waiting() == (f"as {named}=7 says" if named else "asleep")


def test_threads_spin_where_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr("chronos.backends.startup.os.environ", environment)
    monkeypatch.setattr("chronos.backends.startup.neighbours", lambda: False)
    wait_asleep.cache_clear()
    wait_asleep()
    assert environment == {}
    wait_asleep.cache_clear()
