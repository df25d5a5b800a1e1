"""docs/api.md has what a notebook needs: every public name, every number of `stats`; and completion
finds the names."""

from __future__ import annotations

import rlcompleter
from pathlib import Path
from typing import Any

import pytest

import chronos
from chronos.cli import api_page


def test_every_public_name_is_on_the_page() -> None:
    page = api_page.render()
    for name in set(chronos.__all__) - {"__version__", "train"}:
        assert f"chronos.{name}" in page, name
    assert "### chronos.train.pretrain" in page
    for words in ("temperature 0 is greedy", "Engine.generate_many(", "RoutingTrace.save("):
        assert words in page


def test_a_public_name_without_words_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronos.Engine, "__doc__", None)
    with pytest.raises(ValueError, match="Engine has no docstring"):
        api_page.render()


@pytest.mark.needs_backend
@pytest.mark.parametrize("budget", ["50%", "resident"])
def test_the_numbers_of_stats_are_those_of_the_page(packed: Path, budget: str) -> None:
    with chronos.load(packed, budget=budget) as engine:
        stats: dict[str, Any] = engine.generate([1, 2, 3], max_tokens=4).result.stats
    again = {name for name in stats if name.removeprefix("decode_") in stats.keys() - {name}}
    again -= {"decode_tokens"}  # `tokens` is another number
    assert (stats.keys() - again) | {"prefetch", "decode_<name>"} == api_page.STATS.keys()
    assert {"decode_hits", "decode_bytes_read", "decode_stall_s"} <= again
    if budget == "resident":
        assert not any(stats[name] for name in ("routed", "hits", "misses", "bytes_read"))


def test_completion_finds_what_is_public() -> None:
    completer = rlcompleter.Completer({"chronos": chronos})
    found = {str(completer.complete("chronos.", state)).rstrip("()") for state in range(60)}
    public = {f"chronos.{name}" for name in chronos.__all__ if not name.startswith("_")}
    assert public <= found
    assert set(chronos.__all__) <= set(dir(chronos))
