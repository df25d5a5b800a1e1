"""A run killed before its first checkpoint leaves nothing behind that the next one uses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chronos.common.errors import ResourceError, UsageError
from chronos.common.training.recipe import (
    CadenceRecipe,
    DataRecipe,
    OptimizerRecipe,
    Recipe,
    TokenizerRecipe,
)
from chronos.testing.tiny import CONFIG, tiny_tokenizer
from chronos.train.loop import Task, run
from chronos.train.pretrain import PretrainRecipe, prepare


class NoStep:
    """A TrainStep that learns nothing."""

    def step(
        self, batches: Sequence[Any], objective: Any, rate: float, number: int
    ) -> dict[str, float]:
        return {"loss": 1.0, "skipped": 0.0}

    def state(self) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
        yield "nothing", "U8", (1,), b"0"

    def load_state(self, tensors: Iterable[Any]) -> None:
        list(tensors)


class NoBackend:
    def build(self, config: Any, **options: Any) -> None:
        return None

    def train_step(self, model: None, recipe: OptimizerRecipe) -> NoStep:
        return NoStep()

    def processes(self) -> Any:
        return SimpleNamespace(rank=0, count=1, any=lambda flag: flag)

    def save(self, model: None, folder: Path) -> None:
        folder.mkdir()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe[PretrainRecipe]:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(
        "def add(left, right):\n    return left\n" * 20, "utf-8"
    )
    return Recipe(
        PretrainRecipe(batch_size=1, seq_len=8),
        CONFIG,
        DataRecipe(str(tmp_path / "text"), validation_share=0.0),
        TokenizerRecipe(vocab_size=262),
        CadenceRecipe(steps=4, log_every=1, save_every=2),
    )


def start(recipe: Recipe[PretrainRecipe], out: Path, **options: Any) -> None:
    run(lambda: prepared(recipe, out), NoBackend(), out, **options)  # type: ignore[arg-type]


def prepared(recipe: Recipe[PretrainRecipe], out: Path) -> Task:
    return prepare(recipe, NoBackend(), out)  # type: ignore[arg-type]


def steps_logged(out: Path) -> list[int]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_its_metrics_are_dropped(recipe: Recipe[PretrainRecipe], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste', "utf-8")
    start(recipe, out)
    assert steps_logged(out) == [1, 2, 3, 4]


def test_its_tokenizer_is_not_used(recipe: Recipe[PretrainRecipe], tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny_tokenizer(280).save(out)
    assert prepared(recipe, out).tokenizer.vocab_size == 262
    start(recipe, out)


def test_that_of_a_run_with_a_checkpoint_is(recipe: Recipe[PretrainRecipe], tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(recipe, out)
    tiny_tokenizer(280).save(out)
    larger = dataclasses.replace(recipe, tokenizer=TokenizerRecipe(vocab_size=270))
    assert prepared(larger, out).tokenizer.vocab_size == 280


def test_a_run_folder_that_cannot_be_made(recipe: Recipe[PretrainRecipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="run"):
        start(recipe, tmp_path / "file" / "run")


def test_a_folder_that_holds_a_run_is_refused_before_the_data_is_read(
    recipe: Recipe[PretrainRecipe], tmp_path: Path
) -> None:
    start(recipe, tmp_path / "run")

    def never() -> Task:
        raise AssertionError("the data was read")

    with pytest.raises(UsageError, match="step 4"):
        run(never, NoBackend(), tmp_path / "run")  # type: ignore[arg-type]


@pytest.mark.parametrize("into_trunk", [False, True])
def test_the_objective_is_the_recipe_s(
    recipe: Recipe[PretrainRecipe], tmp_path: Path, into_trunk: bool
) -> None:
    stage = dataclasses.replace(recipe.stage, lookahead_into_trunk=into_trunk)
    changed = dataclasses.replace(recipe, stage=stage)
    objective = prepare(changed, NoBackend(), tmp_path / "run").objective  # type: ignore[arg-type]
    assert objective.lookahead_into_trunk is into_trunk
    assert objective.weights["anchor"] == 0
