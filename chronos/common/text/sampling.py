"""How the next token is chosen: the parameters, and their meaning written down in NumPy.

Backends filter on their own device; this is what they are compared with. Order: temperature,
top-k, top-p of what is left, min-p. Equal logits count as ordered by id, lower first.
Not covered: penalties, grammars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chronos.common.errors import ChronosError, UsageError


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. A seed repeats the draws.

    Raises UsageError naming the value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("seed", 0, (1 << 64) - 1),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            whole = isinstance(low, int)
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            # NaN fails the comparison as well.
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "a whole number" if whole else "a number"
                raise UsageError(f"{name} must be {what} from {low} to {high}, not {value!r}")
        if self.top_p == 0:
            raise UsageError("top_p must be above 0; temperature 0 is greedy")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Work:
    """What one pass of a model does for one sequence.

    seq: names the sequence. tokens: what is appended to it, a piece of a prompt or the token drawn
    last. last: the prompt ends with this piece, or it is a single token after one: sample the next.
    mask: bool [V], which tokens may be drawn; None for all.
    """

    seq: int
    tokens: Sequence[int]
    sampling: SamplingParams
    last: bool = True
    mask: npt.NDArray[np.bool_] | None = None


def filter_logits(logits_V: npt.ArrayLike, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Logits over temperature with every token that may not be drawn at -inf. [V] -> [V].

    At least one token stays. Raises ChronosError if a logit is NaN or +inf, or all are -inf.
    """
    logits = np.array(logits_V, np.float64)
    if np.isnan(logits).any() or not math.isfinite(logits.max(initial=-math.inf)):
        raise ChronosError("the logits are not finite", "", "check the weights with chronos verify")
    order = np.argsort(-logits, kind="stable")
    if params.greedy:
        return _keep(logits, order[:1])
    logits = (logits - logits.max()) / params.temperature
    order = order[: params.top_k or None]
    ranked = np.exp(logits[order])
    ranked /= ranked.sum()
    # A token stays while the mass before it has not reached top_p: the smallest set that does.
    before = np.concatenate(([0.0], np.cumsum(ranked)[:-1]))
    stays = (before < params.top_p) & (ranked >= params.min_p * ranked[0])
    return _keep(logits, order[stays])


def probabilities(logits_V: npt.ArrayLike, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The distribution a token is drawn from. [V]"""
    filtered = filter_logits(logits_V, params)
    weights = np.exp(filtered - filtered.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def draw(logits_V: npt.ArrayLike, params: SamplingParams, uniform: float) -> int:
    """The token a uniform number in [0, 1) selects: the first id whose cumulated probability
    exceeds it."""
    cumulated = np.cumsum(probabilities(logits_V, params))
    # Rounding may leave the last sum below 1; scaling keeps every uniform inside.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], "right"))


def _keep(logits: npt.NDArray[np.float64], kept: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    filtered = np.full_like(logits, -np.inf)
    filtered[kept] = logits[kept]
    return filtered
