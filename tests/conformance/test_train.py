"""The training step of each backend against the shipped suite."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

from chronos.common.errors import MissingBackendError, UsageError
from chronos.testing.train_tests import RECIPE, TINY, TrainTests


class TestTrain(TrainTests):
    pass


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_an_optimizer_that_the_framework_lacks(
    backend: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    framework = {"torch": "torch.optim", "mlx": "mlx.optimizers"}[backend.name]
    monkeypatch.delattr(importlib.import_module(framework), name.capitalize())
    with pytest.raises(MissingBackendError, match=f"has no {name.capitalize()}") as caught:
        backend.train_step(backend.build(TINY, seed=7), dataclasses.replace(RECIPE, name=name))
    assert "adamw" in caught.value.fix and caught.value.exit_code == 5


def test_mlx_trains_in_float32_alone(backend: Any) -> None:
    recipe = dataclasses.replace(RECIPE, compute_dtype="bfloat16")
    if backend.name == "torch":  # see tests/native/test_torch_train.py
        assert backend.train_step(backend.build(TINY, seed=7), recipe)
        backend.check_recipe(recipe)
        return
    with pytest.raises(UsageError, match="trains in float32"):
        backend.check_recipe(recipe)  # before there is a model
    with pytest.raises(UsageError, match="trains in float32") as caught:
        backend.train_step(backend.build(TINY, seed=7), recipe)
    assert "--backend torch" in caught.value.fix
