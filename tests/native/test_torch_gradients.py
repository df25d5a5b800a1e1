"""A gradient through experts of a store is refused on torch; all else about streaming stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chronos.common.errors import UsageError
from chronos.run.engine import load
from chronos.testing.tiny import tiny_packed
from tests.support.guests import tiny_guest

IDS = torch.tensor([[5, 80, 41, 7]])
KINDS = {"native": tiny_packed, "guest": tiny_guest}


@pytest.fixture(params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[..., Any] = KINDS[request.param]
    return Path(make(tmp_path / request.param))


def embedding(model: Any) -> torch.Tensor:
    found: torch.Tensor = next(p for n, p in parts(model) if "embed_tokens" in n)
    return found


def parts(model: Any) -> Any:
    return (model.core if hasattr(model, "core") else model).named_parameters()


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_gradient_through_streamed_experts_is_refused(folder: Path, tokens: int) -> None:
    with load(folder, backend="torch", budget="50%") as engine:
        model, ids = engine.session.model, IDS[:, :tokens]
        embedding(model).requires_grad_()
        with pytest.raises(UsageError, match="gradients through streamed experts"):
            model(ids, source=engine.feed.step())
        with torch.no_grad():
            refused_none = model(ids, source=engine.feed.step()).logits
        embedding(model).requires_grad_(False)
        assert torch.equal(model(ids, source=engine.feed.step()).logits, refused_none)


def test_a_resident_model_has_gradients(folder: Path) -> None:
    from chronos.backends import torch as backend

    model = backend.load(folder, resident=True)
    weight = embedding(model).requires_grad_()
    model(IDS).logits.sum().backward()
    assert weight.grad is not None and bool(weight.grad.any())
