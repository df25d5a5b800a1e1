"""What a model would be is what its tensors then are; what a budget lets it read, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos.common.errors import UsageError
from chronos.common.layout import inspect, open_layout
from chronos.common.model.weights import count_parameters
from chronos.common.training import memory
from chronos.common.training.design import design
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing.tiny import CONFIG, tiny_packed


def test_sizes_are_those_of_the_folder_that_is_written(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path / "model")
    found, held = design(CONFIG, budgets=["25%"]), inspect(packed, budgets=["25%"])
    assert found["parameters"] == count_parameters(CONFIG)
    for name in ("dense_bytes", "expert_bytes_total", "expert_bytes_per_token"):
        assert found[name] == held[name]
    layout = open_layout(packed)
    assert found["expert_bytes"] == next(iter(layout.records.values())).nbytes
    budget, real = found["budgets"][0], held["budgets"][0]
    assert {k: budget[k] for k in real} == real


def test_what_is_read_by_hand() -> None:
    """Half of 8 experts in memory: of 2 experts in 3 layers, one in each is read."""
    found = design(CONFIG, budgets=["50%", "all"], disk_rate=3e6)
    half, everything = found["budgets"]
    assert half["read_bytes_per_token"] == 3 * found["expert_bytes"]
    assert half["tokens_per_s_at_most"] == pytest.approx(3e6 / (3 * found["expert_bytes"]))
    assert (everything["read_bytes_per_token"], everything["tokens_per_s_at_most"]) == (0, None)
    shared = CONFIG.num_shared_experts * CONFIG.expert_parameters
    dense = found["dense_bytes"] // 4
    assert shared * CONFIG.num_hidden_layers < dense
    assert found["active_parameters"] == dense + 3 * 2 * CONFIG.expert_parameters
    assert found["flops_per_token"] == 2 * found["active_parameters"]


def test_an_update_is_the_plan_of_memory() -> None:
    recipe = OptimizerRecipe()
    found = design(CONFIG, optimizer=recipe, rows=4, seq_len=32)["update"]
    plan = memory.of_update(CONFIG, recipe, 4, 32, 128, lookahead=True)
    assert found == {"rows": 4, "seq_len": 32} | plan
    assert "update" not in design(CONFIG)


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError):
        design(CONFIG, budgets=["much"])
    small = design(CONFIG, budgets=["101b"], disk_rate=1.0)
    assert not small["budgets"][0]["enough"]
    assert small["budgets"][0]["tokens_per_s_at_most"] is None
