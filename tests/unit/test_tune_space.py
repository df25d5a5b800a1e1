"""What a study searches: every parameter changes a recipe, and no choice changes the compute."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chronos.common.errors import ConfigError
from chronos.common.model.config import ModelConfig
from chronos.common.training import flops
from chronos.common.training.recipe import Recipe, load_recipe
from chronos.train import STAGES
from chronos.tune.settings import TuneSettings, load_tuning, operations, rungs_of
from chronos.tune.space import (
    SPACE,
    Parameter,
    changed,
    changes,
    own_values,
    space_of,
    suggest,
    value_of,
)
from chronos.tune.written import written

DEMO = load_recipe("demo", STAGES["pretrain"].section)
INTO_TRUNK = dataclasses.replace(
    DEMO, stage=dataclasses.replace(DEMO.stage, lookahead_into_trunk=True)
)


class Draws:
    """Suggests what a random generator, or a dictionary, says."""

    def __init__(self, seed: int = 0, said: dict[str, Any] | None = None) -> None:
        self._random, self._said = random.Random(seed), said
        self.asked: list[str] = []

    def _pick(self, name: str, draw: Any) -> Any:
        self.asked.append(name)
        return draw() if self._said is None else self._said[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return float(self._pick(name, lambda: self._random.uniform(low, high)))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._pick(name, lambda: self._random.randint(low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._pick(name, lambda: self._random.choice(choices))


def test_operations_are_those_of_the_matrices() -> None:
    config = ModelConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, vocab_size=10, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
        moe_intermediate_size=6, hybrid_pattern=("sliding",), sliding_window=2, lookahead_steps=0,
    )  # fmt: skip
    attention = 8 * (2 * 4) * 2 + 8 * 4 * 2  # q, o; k, v of one head
    experts, gate, head = 3 * (3 * 8 * 6), 4 * 8, 10 * 8
    # A window of 2 over rows of 4 sees 1, 2, 2, 2 positions: queries with keys, shares with values.
    seen = 2 * 2 * (4 + 4) * (1 + 2 + 2 + 2) / 4
    assert flops.forward(config, 4) == 2 * (attention + experts + gate + head) + seen


@pytest.mark.parametrize("width", [24, 64, 1000])
def test_the_width_that_takes_so_many_operations_is_found(width: int) -> None:
    config = dataclasses.replace(DEMO.model, moe_intermediate_size=width)
    assert flops.solve_width(DEMO.model, 128, flops.forward(config, 128)) == width


@pytest.mark.parametrize("recipe", [DEMO, INTO_TRUNK])
def test_the_own_recipe_is_a_choice_like_others(recipe: Recipe[Any]) -> None:
    space = space_of(recipe, structure=True)
    draws = Draws(said=own_values(recipe, space))
    values = suggest(draws, recipe, space)
    assert changes(recipe, values) == {}
    assert set(draws.asked) == own_values(recipe, space).keys()


def test_every_parameter_has_a_use_where_it_is_sampled() -> None:
    """Another value of it alone makes another recipe; its condition keeps it out of others."""
    for parameter in space_of(INTO_TRUNK, structure=True):
        base = INTO_TRUNK
        if parameter.when is not None and parameter.when[0] == "model.routing_source":
            base = changed(base, {"model.routing_source": "history"})
        value = value_of(base, parameter.name)
        other = next(v for v in reversed(parameter.within) if v != value)
        assert changed(base, {parameter.name: other}).to_json() != base.to_json(), parameter.name
    assert {"loss.lookahead", "model.lookahead_steps"} <= {p.name for p in space_of(INTO_TRUNK)}
    # Without its gradient in the trunk a LookaheadRouter moves neither loss nor reads.
    names = {parameter.name for parameter in space_of(DEMO)}
    assert not names & {"loss.lookahead", "model.lookahead_steps"}
    gate = {p.name: p.within[0] for p in space_of(DEMO)} | {"model.routing_source": "gate"}
    gate |= {"loss.temporal.on": False, "loss.locality.on": True, "loss.locality": 0.1}
    draws = Draws(said=gate)
    suggest(draws, DEMO, space_of(DEMO))
    assert not [name for name in draws.asked if "history" in name or "resident" in name]
    assert "loss.temporal" not in draws.asked and "loss.locality" in draws.asked


@pytest.mark.parametrize("structure", [False, True])
def test_every_choice_costs_the_same(structure: bool) -> None:
    space, sizes = space_of(DEMO, structure=structure), set()
    own = operations(DEMO)
    for seed in range(60):
        try:
            recipe = changed(DEMO, changes(DEMO, suggest(Draws(seed), DEMO, space)))
        except ConfigError:
            continue  # refused before anything is built
        assert abs(operations(recipe) / own - 1) < 0.005
        sizes.add((recipe.model.hidden_size, recipe.model.moe_intermediate_size))
    assert len(sizes) > (10 if structure else 0)


def test_a_rate_takes_its_floor_along() -> None:
    found = changes(DEMO, {"optimizer.learning_rate": 1e-3})
    assert found == {
        "optimizer.learning_rate": 1e-3,
        "optimizer.min_learning_rate": pytest.approx(5e-5),
    }


def test_a_model_that_is_given_keeps_its_sizes() -> None:
    recipe = load_recipe("sft", STAGES["sft"].section)
    names = {parameter.name for parameter in space_of(recipe)}
    assert "optimizer.learning_rate" in names and not [n for n in names if n.startswith("model.")]
    with pytest.raises(ConfigError, match="whose sizes are given"):
        space_of(recipe, structure=True)


def test_ranges_and_names_are_the_user_s() -> None:
    [rate] = space_of(DEMO, search=["optimizer"], ranges={"optimizer.learning_rate": [1e-4, 5e-3]})
    assert rate.within == (1e-4, 5e-3) and rate.log
    assert {p.name.partition(".")[0] for p in space_of(DEMO, search=["loss"])} == {"loss"}
    for wrong in ({"optimizer.learning_rate": [0, 1]}, {"optimizer.learning_rate": [3, 1]},
                  {"model.routing_source": []}, {"optimizer.learning_rate": 3}):  # fmt: skip
        with pytest.raises(ConfigError, match="cannot be"):
            space_of(DEMO, ranges=wrong)
    with pytest.raises(ConfigError, match="does not search 'loss.balanse'"):
        space_of(DEMO, search=["loss.balanse"])


def test_the_space_is_declared_once() -> None:
    names = [parameter.name for parameter in SPACE]
    assert len(set(names)) == len(names)
    assert all(isinstance(parameter, Parameter) for parameter in SPACE)


@pytest.mark.parametrize(("steps", "rungs"), [(2200, (244, 732, 2200)), (9, (1, 3, 9)), (1, (1,))])
def test_rungs_are_multiples_of_the_first(steps: int, rungs: tuple[int, ...]) -> None:
    assert rungs_of(steps, TuneSettings()) == rungs
    assert rungs_of(steps, TuneSettings(rungs=1)) == (steps,)


def test_the_page_s_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    page = (Path(__file__).parents[2] / "docs" / "tune.md").read_text("utf-8")
    [text] = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "study.toml").write_text(text, "utf-8")
    (tmp_path / "books").mkdir()
    tuning = load_tuning(tmp_path / "study.toml", trials=7)
    assert tuning.settings.trials == 7 and tuning.settings.budget == "25%"
    assert tuning.space[0].within == (3e-4, 3e-3)
    assert "[tune" not in tuning.text and str(tmp_path / "books") in tuning.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tune]\ntrails = 3", "unknown key in \\[tune\\]: 'trails'"),
        ("[tune]\npruner = 'median'", "compares one objective"),
        ("[tune]\nbudget = 'much'", "budget cannot be 'much'"),
        ("[tune]\nmin_effective = 2.0", "must be in"),
        ("[data]\nvalidation_share = 0.0", "holds out nothing"),
        ("[dpo]\nbeta = 0.1", "held-out cross-entropy, which dpo has not"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as found:
        load_tuning(tmp_path / "study.toml")
    assert "study.toml" in found.value.where


def test_a_recipe_keeps_its_words() -> None:
    pytest.importorskip("tomlkit")
    text = "# why\n[train]\nsteps = 3  # few\nlearning_rate = 1e-3\n\n[tune]\ntrials = 2\n"
    found = written(
        text, {"optimizer.learning_rate": 2e-3, "loss.balance": 0.1, "cadence.steps": 4},
        drop="tune",
    )  # fmt: skip
    lines = found.strip().splitlines()
    assert lines[:4] == ["# why", "[train]", "steps = 4  # few", "learning_rate = 0.002"]
    assert lines[-2:] == ["[loss]", "balance = 0.1"] and "[tune]" not in lines
