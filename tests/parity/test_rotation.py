"""Rotations of each backend: the oracle's, norms kept, and scores that know distances only."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from chronos.testing import oracle
from chronos.testing.tolerances import assert_close

THETA, WIDTH = 10_000.0, 16
X = np.random.default_rng(0).standard_normal((2, 3, 5, WIDTH)).astype(np.float32)  # B H T R
FIRST = [0, 3, 250, 255, 256, 1000]  # torch's tables begin with 256 positions and grow


class Rotation:
    """One backend's rotary of a width, in NumPy terms. The object lives on, as in a model."""

    def __init__(self, backend: Any) -> None:
        self.room = importlib.import_module(f"{backend.__name__}.attention")
        self.rotary = self.room.Rotary(WIDTH, THETA)
        self.torch = backend.name == "torch"

    def __call__(self, x_BHTR: np.ndarray, position: int | np.ndarray) -> np.ndarray:
        """position: of the first token, or of every token [B, T]."""
        if self.torch:
            torch = importlib.import_module("torch")
            x, like = torch.from_numpy(x_BHTR), torch.zeros(1)
            span: Any = (
                range(position, position + x.shape[2])
                if isinstance(position, int)
                else torch.from_numpy(position)
            )
            return self.room.rotate(x, self.rotary.tables(span, like)).numpy()
        mx = importlib.import_module("mlx.core")
        at = position if isinstance(position, int) else mx.array(position)
        return np.array(self.room.rotate(mx.array(x_BHTR), (self.rotary, at)))


@pytest.fixture
def rotation(backend: Any) -> Rotation:
    return Rotation(backend)


def test_it_is_the_oracle_s(rotation: Rotation) -> None:
    for first in FIRST:
        expected = oracle.rope(X.astype(np.float64), np.arange(first, first + 5), THETA)
        assert_close(rotation(X, first), expected, "rotations", f"from {first}")


def test_tokens_of_packed_documents_have_positions_of_their_own(rotation: Rotation) -> None:
    position_BT = np.array([[0, 1, 2, 0, 1], [7, 8, 0, 1, 300]])
    expected = oracle.rope(X.astype(np.float64), position_BT[:, None], THETA)
    assert_close(rotation(X, position_BT), expected, "rotations")


def test_norms_are_kept(rotation: Rotation) -> None:
    for first in FIRST:
        norms = np.linalg.norm(rotation(X, first), axis=-1)
        assert_close(norms, np.linalg.norm(X, axis=-1), "rotations", f"from {first}")


def test_scores_know_distances_only(rotation: Rotation) -> None:
    """Also across the growth of tables: both at 250 against one before and one after it."""
    q, k = X[:1, :, :1], X[1:, :, :1]
    for distance in (0, 1, 6, 40):
        scores = [(rotation(q, at + distance) * rotation(k, at)).sum(-1) for at in FIRST]
        for at, score in zip(FIRST, scores, strict=True):
            assert_close(score, scores[0], "rotations", f"{distance} apart at {at}")
