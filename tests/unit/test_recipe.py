"""A recipe is refused, file and key named, before anything is read or allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos.common.errors import ConfigError
from chronos.common.training.recipe import Recipe, by_section, load_recipe
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
