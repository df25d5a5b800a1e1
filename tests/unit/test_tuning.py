"""CHRONOS_PLAIN: which words set it."""

from __future__ import annotations

import pytest

from chronos.common.errors import UsageError
from chronos.common.tuning import PLAIN, plain


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
