"""Recipes as pages edit them: comments stay, what is no recipe is refused, undo undoes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tomlkit", reason="recipes are edited with tomlkit, of the extra [ui]")

from chronos.common.errors import ConfigError, UsageError
from chronos.ui import recipes
from chronos.ui.recipes import Recipes
from chronos.ui.root import Root

TEXT = """\
# mine
[model]
hidden_size = 64  # a comment
[cadence]
steps = 10
"""


@pytest.fixture
def store(tmp_path: Path) -> Recipes:
    return Recipes(Root(tmp_path))


def test_a_form_changes_a_key_and_nothing_else() -> None:
    text = recipes.with_value(TEXT, "model", "hidden_size", 128)
    assert text == TEXT.replace("64", "128")
    assert recipes.with_value(TEXT, "cadence", "steps", 10) == TEXT
    added = recipes.with_value(TEXT, "optimizer", "learning_rate", 0.002)
    assert added.startswith(TEXT) and recipes.value_of(added, "optimizer", "learning_rate") == 0.002


def test_values_are_the_texts_or_the_defaults() -> None:
    assert recipes.value_of(TEXT, "model", "hidden_size") == 64
    assert recipes.value_of(TEXT, "pretrain", "seq_len") == 256
    assert recipes.value_of(TEXT, "loss", "balance") == 0.01
    assert recipes.value_of(TEXT, "pretrain", "alpha") is None
    assert recipes.stage_of(TEXT) == "pretrain"
    assert recipes.stage_of("[dpo]\nbatch_size = 2\n") == "dpo"


def test_saved_and_undone_twice(store: Recipes, tmp_path: Path) -> None:
    first = store.save("mine", TEXT)
    assert first == "recipes/mine.toml" and first in store.names()
    second = TEXT.replace("64", "128")
    store.save("mine", second)
    store.save("recipes/mine.toml", second)  # the same again replaces nothing
    store.save("mine", TEXT.replace("64", "256"))
    assert store.undo("mine") == second == (tmp_path / first).read_text()
    assert Recipes(Root(tmp_path)).undo("mine") == TEXT
    with pytest.raises(UsageError, match="nothing was replaced"):
        store.undo("mine")


def test_what_is_no_recipe_is_not_written(store: Recipes, tmp_path: Path) -> None:
    for text in ("[model", "[model]\nhiden_size = 1\n", "[model]\nhidden_size = -1\n", "x = 1\n"):
        with pytest.raises(ConfigError):
            store.save("mine", text)
    for name in ("../x", "a/b", ".x", ""):
        with pytest.raises(UsageError):
            store.save(name, TEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_is_kept(store: Recipes, tmp_path: Path) -> None:
    assert store.draft()[0] == "mine" and "[tokenizer]" in store.draft()[1]  # the demo's at first
    store.keep_draft("half", "[model")
    assert Recipes(Root(tmp_path)).draft() == ("half", "[model")
    (tmp_path / "recipes" / ".draft.json").write_text("{torn")
    assert store.draft()[0] == "mine"


def test_a_design_is_what_inspect_says(store: Recipes) -> None:
    found = recipes.designed(TEXT, 1e9)
    assert found is not None and found["budgets"][0]["budget"] == "12.5%"
    assert found["update"]["rows"] == 8
    assert recipes.designed("[sft]\nbatch_size = 2\n", None) is None
    assert store.path("demo") == "demo"
    with pytest.raises(UsageError):
        store.path("absent.toml")
