"""How much of what was needed stood among the guesses: one recall for every predictor and head.

Not covered: what a good guess is worth to a cache (`simulate`).

Shape legend: leading dimensions free, E experts, K needed per row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def guesses(scores_E: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The `count` best experts of each row [..., count], best first, ties to the lower index."""
    best: NDArray[np.intp] = np.argsort(-scores_E, axis=-1, kind="stable")[..., :count]
    return best


def recall_at(scores_E: NDArray[Any], needed_K: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Share of each row's needed experts [..., K] among the `count` of highest score [...]."""
    chosen = guesses(scores_E, count)
    found: NDArray[np.float64] = (needed_K[..., :, None] == chosen[..., None, :]).any(-1).mean(-1)
    return found
