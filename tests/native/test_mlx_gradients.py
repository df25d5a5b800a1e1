"""Gradients through experts of a store on MLX: the same bits at every budget, and the resident
model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

import chronos.backends.mlx as backend  # noqa: E402
from chronos.backends.mlx import moe  # noqa: E402
from chronos.backends.mlx.guest import experts  # noqa: E402
from chronos.backends.mlx.streamed import Streamed  # noqa: E402
from chronos.common.errors import UsageError  # noqa: E402
from chronos.common.experts.feed import FeedOptions, open_feed  # noqa: E402
from chronos.common.experts.passes import UpAndDown  # noqa: E402
from chronos.common.layout import open_layout  # noqa: E402
from chronos.testing.tiny import tiny_packed  # noqa: E402
from tests.support.mlx_guests import packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager")

IDS = [[5, 40, 41, 7, 9, 33, 2, 60, 17, 5], [9, 3, 4, 62, 5, 44, 2, 1, 1, 8]]
BUDGETS = (1.0, 0.5, 0.25, 0.0)  # the last: what one token needs in a layer
GUESTS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_moe-4bit")
KINDS = ("native", *GUESTS)
Gradients = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def at(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    native = tiny_packed(tmp_path_factory.mktemp("native") / "packed")
    return lambda kind: native if kind == "native" else packed(folder(kind))


def gradients(model: Any, called: Any, tokens: int = 10) -> Gradients:
    """By the norms, which lie below and above experts."""
    model.train()
    given = tree_flatten(model.parameters())
    weights = {n: a for n, a in given if "norm" in n and a.ndim == 1 and "lookahead" not in n}

    def loss(given: dict[str, Any]) -> Any:
        model.update(tree_unflatten(list(given.items())))
        logits = called(mx.array(IDS)[:, :tokens]).logits.astype(mx.float32)
        return mx.square(logits).mean(), logits

    (_, logits), found = mx.value_and_grad(loss)(weights)
    mx.eval(logits, found)
    model.update(tree_unflatten(list(weights.items())))
    return {n: np.array(a) for n, a in found.items()} | {"logits": np.array(logits)}


def streamed(folder: Path, share: float, tokens: int = 10) -> Gradients:
    layout = open_layout(folder)
    capacity = max(int(layout.total_bytes * share), 2 * layout.record_nbytes)
    model = backend.load(folder, resident=False)
    order = UpAndDown(layout.moe_layers, (layout.num_layers, layout.num_experts))
    options = FeedOptions(top_k=2)
    with open_feed(backend.open_arena, layout, capacity, options, policy=order) as feed:
        found = gradients(model, Streamed(model, feed), tokens)
        assert feed.stats().peak_expert_bytes <= capacity
    return found


def same(one: Gradients, other: Gradients) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits_at_every_budget(kind: str, at: Callable[[str], Path]) -> None:
    resident = backend.load(at(kind), resident=True)
    expected = gradients(resident, resident)
    found = [streamed(at(kind), share) for share in BUDGETS]
    assert len(expected) > 4 and all(g.any() for g in expected.values())
    for each in found:
        assert same(each, found[0])
    for name, value in found[0].items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5 * scale)


def test_a_single_token_has_them_too(at: Callable[[str], Path]) -> None:
    for kind in ("native", "mixtral"):
        found = [streamed(at(kind), share, 1) for share in BUDGETS]
        assert all(same(each, found[0]) for each in found)


@pytest.mark.parametrize("kind", ["native", "mixtral", "gpt_oss"])
def test_without_acquiring_again_they_are_wrong(
    kind: str, at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: slots are read in the backward pass as they are by then."""
    right = streamed(at(kind), 0.0)
    for module in (moe, experts):
        monkeypatch.setattr(module, "recording", lambda *inputs: False)
    wrong = streamed(at(kind), 0.0)
    np.testing.assert_allclose(wrong["logits"], right["logits"], rtol=1e-4, atol=1e-4)
    assert not same(right | {"logits": wrong["logits"]}, wrong)


def test_experts_that_may_be_missing_have_none(tmp_path: Path) -> None:
    layout = open_layout(tiny_packed(tmp_path / "packed", num_shared_experts=1))
    options = FeedOptions(top_k=2, miss="fallback")
    with open_feed(backend.open_arena, layout, layout.total_bytes, options) as feed:
        model = backend.load(layout.folder, resident=False)
        with pytest.raises(UsageError, match="need every expert"):
            gradients(model, Streamed(model, feed))
        assert mx.isfinite(Streamed(model, feed)(mx.array(IDS)).logits).all()
