"""A gradient through experts of a store is refused on MLX; all else about streaming stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="tests of the MLX backend")
pytest.importorskip("mlx_lm.utils", reason="guests of the MLX backend")

import chronos.backends.mlx as backend  # noqa: E402
from chronos.common.errors import UsageError  # noqa: E402
from chronos.run.engine import load  # noqa: E402
from chronos.testing.tiny import tiny_packed  # noqa: E402
from tests.support.guests import tiny_guest  # noqa: E402

IDS = [[5, 80, 41, 7]]
KINDS = {"native": tiny_packed, "guest": tiny_guest}


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[..., Any] = KINDS[request.param]
    return Path(make(tmp_path / request.param))


def gradient(model: Any, tokens: int, source: Any) -> Any:
    """Of the sum of all logits, by the embedding."""
    embedding = (model.core if hasattr(model, "core") else model).model.embed_tokens
    weight = embedding.weight

    def total(w: Any) -> Any:
        embedding.weight = w
        return model(mx.array(IDS)[:, :tokens], source=source).logits.sum()

    try:
        return mx.grad(total)(weight)
    finally:
        embedding.weight = weight


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_gradient_through_streamed_experts_is_refused(folder: Path, tokens: int) -> None:
    with load(folder, backend="mlx", budget="50%") as engine:
        model = engine.session.model
        with pytest.raises(UsageError, match="gradients through streamed experts"):
            gradient(model, tokens, engine.feed.step())
        assert mx.isfinite(model(mx.array(IDS), source=engine.feed.step()).logits).all()


def test_a_resident_model_has_gradients(folder: Path) -> None:
    assert mx.any(gradient(backend.load(folder, resident=True), 4, None) != 0)
