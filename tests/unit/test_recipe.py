"""A recipe is refused, file and key named, before anything is read or allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos.common.errors import ConfigError
from chronos.common.training.recipe import Recipe, load_recipe


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, "utf-8")
    return path


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    found = load_recipe(written(tmp_path, ""))
    assert found.train == Recipe().train and found.data == Recipe().data
    assert found.model.vocab_size == found.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", "0"),
        ("train", "max_skipped", "0"),
        ("train", "weight_decay", "-1.0"),
        ("train", "weight_decay", "nan"),
        ("train", "warmup_steps", "-3"),
        ("train", "threads", "-1"),
        ("train", "seed", "-1"),
        ("train", "seed", "99999999999999999"),
        ("train", "clip", "nan"),
        ("train", "learning_rate", "nan"),
        ("data", "validation_share", "1.0"),
        ("data", "validation_share", "nan"),
        ("data", "skip_bad", "-1"),
    ],
)
def test_values_that_no_run_can_use(tmp_path: Path, section: str, key: str, value: str) -> None:
    path = written(tmp_path, f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ConfigError, match=key) as caught:
        load_recipe(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.5"])
def test_loss_weights_are_finite_and_not_negative(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="loss_weights"):
        load_recipe(written(tmp_path, f"[loss]\nbalance = {value}\n"))
