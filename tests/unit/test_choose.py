"""Which policy a store gets, and what a policy made of a predictor is told of prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from chronos.cli.options import RunOptions
from chronos.common.errors import CorruptFileError, ShapeMismatch, UsageError
from chronos.common.experts.foresight import choose
from chronos.common.experts.foresight.choose import choose_policy
from chronos.common.experts.foresight.forecast import FORECAST, ForecastModel
from chronos.common.experts.foresight.network import Geometry, initial
from chronos.common.experts.foresight.policy import PredictorPolicy, SwitchablePolicy
from chronos.common.experts.foresight.predictor import DecayedUse
from chronos.common.experts.residency import LRU
from chronos.common.layout import Layout
from chronos.testing.store_rig import EXPERTS, LAYERS, tiny_layout

TOP_K = 2


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return tiny_layout(tmp_path)


def write(path: Path, layers: int = LAYERS, fingerprint: str = "") -> Path:
    geometry = Geometry(layers, EXPERTS, TOP_K, hidden=8, rank=2)
    ForecastModel(geometry, initial(geometry, 0), fingerprint).save(path)
    return path


def predictor_of(name: str | Path, layout: Layout) -> str:
    policy = choose_policy(name, layout, TOP_K)
    assert isinstance(policy, PredictorPolicy)
    return policy.name


def test_by_name(layout: Layout) -> None:
    assert isinstance(choose_policy("lru", layout, TOP_K), LRU)
    assert predictor_of("lfu", layout) == "lfu"
    assert predictor_of("token-table", layout) == "token-table"
    assert predictor_of("auto", layout) == "token-table"
    write(layout.folder / FORECAST)
    for name in ("auto", "forecast", layout.folder / FORECAST):
        assert predictor_of(name, layout) == "forecast"
        policy = choose_policy(name, layout, TOP_K)
        assert isinstance(policy, SwitchablePolicy) == (name == "auto")


def test_a_predictor_is_added_in_one_line(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(DecayedUse):
        """Another one."""

        name = "mine"

    with pytest.raises(UsageError, match="cannot be 'mine'"):
        choose_policy("mine", layout, TOP_K)
    monkeypatch.setitem(choose.UNTRAINED, "mine", Mine)
    assert predictor_of("mine", layout) == "mine"
    with pytest.raises(UsageError) as caught:
        choose_policy("other", layout, TOP_K)
    assert "token-table, lfu, mine, lru" in caught.value.fix


def test_help_names_every_predictor() -> None:
    [option] = get_type_hints(RunOptions, include_extras=True)["predictor"].__metadata__
    assert option.metavar.split("|") == choose.predictors()


def test_auto_passes_over_a_forecaster_of_another_model(layout: Layout) -> None:
    for other in ({"layers": LAYERS + 1}, {"fingerprint": "another"}):
        path = write(layout.folder / FORECAST, **other)  # type: ignore[arg-type]
        assert predictor_of("auto", layout) == "token-table"
        for name in ("forecast", path):
            with pytest.raises(ShapeMismatch, match="forecaster"):
                choose_policy(name, layout, TOP_K)


def test_what_cannot_be_had_is_refused(layout: Layout) -> None:
    with pytest.raises(UsageError, match="no forecaster") as error:
        choose_policy("forecast", layout, TOP_K)
    assert error.value.fix.startswith("chronos fit")
    with pytest.raises(UsageError, match="cannot be 'mru'"):
        choose_policy("mru", layout, TOP_K)
    write(layout.folder / FORECAST).write_bytes(b"damaged")
    with pytest.raises(CorruptFileError):
        choose_policy("auto", layout, TOP_K)


def test_layers_without_experts_are_passed_over(layout: Layout) -> None:
    manifest = replace(
        layout.manifest, records={k: r for k, r in layout.records.items() if k[0] != 1}
    )
    policy = choose_policy("lfu", replace(layout, manifest=manifest), TOP_K)
    policy.observe(2, [5])
    policy.observe(0, [3])
    assert policy.priority.shape == (LAYERS, EXPERTS)
    assert sorted(map(tuple, np.argwhere(policy.priority > 0).tolist())) == [(0, 3), (2, 5)]
    policy.end_prompt(np.array([[[1], [4]]]))
    assert policy.priority[2, 4] > 0 and not policy.priority[1].any()


def test_chunks_of_a_prompt_do_not_touch_the_predictor(layout: Layout) -> None:
    policy = choose_policy("lfu", layout, TOP_K)
    assert isinstance(policy, PredictorPolicy)
    policy.observe(0, [1, 2])
    policy.end_token()
    before = policy.next_uses().copy()
    policy.begin_prompt()
    for layer in range(LAYERS):
        policy.observe(layer, range(EXPERTS))
    assert np.array_equal(policy.next_uses(), before) and not policy.forecasts
    policy.end_prompt(np.full((3, LAYERS, 1), 6))
    assert policy.forecasts and (policy.next_uses()[:, 6] > 0).all()
    assert not policy.next_uses()[1:, 1].any()


def test_in_a_prompt_the_layer_just_served_gives_its_slots_first(layout: Layout) -> None:
    policy = choose_policy("lfu", layout, TOP_K)
    policy.observe(1, [7])
    policy.begin_prompt()
    policy.observe(0, range(EXPERTS))
    ranks = policy.priority
    assert ranks[1, 7] > ranks[1].mean() > ranks[2].mean() > ranks[0].mean()
    policy.observe(1, range(EXPERTS))
    assert policy.priority[1].max() < policy.priority[0].min() < policy.priority[2].min()
