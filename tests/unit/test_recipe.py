"""A recipe is refused, file and key named, before anything is read or allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from chronos.cli import recipe_page
from chronos.common.errors import ConfigError, UsageError
from chronos.common.training.recipe import Recipe, by_section, load_recipe, shipped
from chronos.train.pretrain import PretrainRecipe


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, "utf-8")
    return path


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    found = load(written(tmp_path, ""))
    defaults = Recipe(PretrainRecipe())
    assert found.stage == defaults.stage and found.cadence == defaults.cadence
    assert found.optimizer == defaults.optimizer and found.data == defaults.data
    assert found.model.vocab_size == found.tokenizer.vocab_size


def load(path: Path) -> Recipe[PretrainRecipe]:
    return load_recipe(path, PretrainRecipe)


def test_a_recipe_that_ships_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe("demo", PretrainRecipe) == load(shipped()["demo"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("[cadence]\nsteps = 3\n", "utf-8")
    assert load_recipe("demo", PretrainRecipe).cadence.steps == 3  # a file wins over the name
    with pytest.raises(UsageError) as caught:
        load_recipe("dmo", PretrainRecipe)
    assert "name a TOML file, or one that ships with Chronos: demo" in caught.value.fix


def test_paths_are_looked_for_beside_the_recipe_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("recipes", "here"):
        (tmp_path / folder).mkdir()
    for name in ("recipes/own.txt", "here/own.txt", "here/other.txt"):
        (tmp_path / name).write_text("text", "utf-8")
    monkeypatch.chdir(tmp_path / "here")

    def path(name: str) -> str:
        return load(written(tmp_path / "recipes", f'[data]\npath = "{name}"\n')).data.path

    assert Path(path("own.txt")) == tmp_path / "recipes" / "own.txt"
    assert path("other.txt") == "other.txt"  # not there: where one stands
    assert path("nowhere.txt") == "nowhere.txt"
    (tmp_path / "recipes" / "stdlib").mkdir()
    assert path("stdlib") == "stdlib"


def test_every_key_has_its_row_with_default_and_meaning() -> None:
    rows = [line.split(" | ") for line in recipe_page.render().splitlines() if "| `" in line]
    keys = {row[0].strip("| `"): row for row in rows}
    for _, kind in recipe_page.sections():
        for field in dataclasses.fields(kind):
            if field.name != "loss_weights":
                assert len(keys[field.name]) == 4 and len(keys[field.name][3]) > 8, field.name
    assert keys["clip"][1:3] == ["float", "`1.0`"]
    assert keys["hybrid_pattern"][1:3] == ["list of str", '`["mla", "sliding"]`']


def test_a_key_without_a_meaning_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_page, "meanings", lambda kind: {})
    with pytest.raises(ValueError, match="hidden_size has no text below it"):
        recipe_page.render()


def test_keys_of_train_are_those_of_the_sections_it_became(tmp_path: Path) -> None:
    one = "[train]\nsteps = 7\nclip = 0.5\nbatch_size = 3\n"
    many = "[cadence]\nsteps = 7\n[optimizer]\nclip = 0.5\n[pretrain]\nbatch_size = 3\n"
    assert load(written(tmp_path, one)) == load(written(tmp_path, many))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 7\n", "'step'"),
        ("[train]\nclip = nan\n", "clip"),
        ("[train]\nclip = 0.5\n[optimizer]\nclip = 1.0\n", r"\[train\] and in \[optimizer\]"),
        ("[cadence]\nclip = 0.5\n", "'clip'"),
        ("[optimiser]\n", "'optimiser'"),
        ("train = 3\n", r"\[train\] must be a table"),
    ],
)
def test_sections_and_keys_in_the_wrong_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, text))


def test_what_is_saved_with_a_checkpoint_is_a_recipe_by_section(tmp_path: Path) -> None:
    saved = load(written(tmp_path, "[train]\nsteps = 7\nbatch_size = 3\n")).to_json()
    assert saved["cadence"]["steps"] == 7 and saved["pretrain"]["batch_size"] == 3
    assert by_section(saved, PretrainRecipe) == saved


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("cadence", "steps", "0"),
        ("cadence", "max_skipped", "0"),
        ("optimizer", "weight_decay", "-1.0"),
        ("optimizer", "weight_decay", "nan"),
        ("optimizer", "warmup_steps", "-3"),
        ("optimizer", "threads", "-1"),
        ("optimizer", "seed", "-1"),
        ("optimizer", "seed", "99999999999999999"),
        ("optimizer", "clip", "nan"),
        ("optimizer", "learning_rate", "nan"),
        ("pretrain", "accumulate", "0"),
        ("data", "validation_share", "1.0"),
        ("data", "validation_share", "nan"),
        ("data", "skip_bad", "-1"),
    ],
)
def test_values_that_no_run_can_use(tmp_path: Path, section: str, key: str, value: str) -> None:
    path = written(tmp_path, f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ConfigError, match=key) as caught:
        load(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5"])
def test_loss_weights_are_finite_and_not_negative(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="loss_weights"):
        load(written(tmp_path, f"[loss]\nbalance = {value}\n"))
