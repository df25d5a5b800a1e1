"""CHRONOS_PLAIN: which words set it; how many threads; whether the machine is busy."""

from __future__ import annotations

import pytest

from chronos.common.errors import UsageError
from chronos.common.tuning import PLAIN, Load, machine_load, plain, threads_for


@pytest.mark.parametrize("word", ["1", "true", "Yes"])
def test_it_is_set(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(PLAIN, word)
    assert plain()


@pytest.mark.parametrize("word", [None, "", "0", "false", "NO"])
def test_it_is_not_set(monkeypatch: pytest.MonkeyPatch, word: str | None) -> None:
    monkeypatch.delenv(PLAIN, raising=False)
    if word is not None:
        monkeypatch.setenv(PLAIN, word)
    assert not plain()


def test_other_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN, "maybe")
    with pytest.raises(UsageError, match="cannot be 'maybe'"):
        plain()


def test_the_user_says_how_many_threads() -> None:
    assert threads_for(3) == 3
    assert threads_for(None) is None
    for count in (0, -1, 99_999):  # OpenMP ends the process over the last
        with pytest.raises(UsageError, match=f"{count} threads"):
            threads_for(count)


def test_a_machine_is_busy_when_threads_wait_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Load(4.1, 4).busy and not Load(4.0, 4).busy
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0.1, 0.1), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert machine_load() == (2.5, 2)


def test_a_system_that_does_not_tell_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.getloadavg", raising=False)  # Windows
    assert machine_load() is None
