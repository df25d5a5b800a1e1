"""What an update minimises and where its batches come from: the seam of a training stage.

A stage (`chronos/train/<stage>.py`) gives the loop a model, `Batches` and an `Objective`. An
objective is a value: its formula is in `losses.py` here, and each backend has its own under the
objective's name. Terms are sums over a batch divided by counts of the *whole update*, so one joined
batch and any split of it have the same terms and gradient. Knows no framework and no stage.

Shape legend: L layers, E experts, B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from chronos.common.data import Batch
from chronos.common.errors import UsageError
from chronos.common.model.config import LossWeights
from chronos.common.training import losses
from chronos.common.training.losses import Floats

Terms = dict[str, float]


class Batches(Protocol):
    """The batches of a stage; the same number always gives the same ones."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything they depend on, for a run that wants to know its data again."""

    @property
    def tokens_per_step(self) -> int: ...

    def at(self, number: int) -> list[Batch]:
        """The micro-batches of an update, counted from 0."""


class Objective(Protocol):
    """What an update minimises: the sum of its terms, each times its weight."""

    @property
    def name(self) -> str:
        """The key of each backend's own formula, in its `losses.py`."""

    @property
    def fields(self) -> frozenset[str]:
        """Arrays that a batch must carry in `extra`: references, advantages, a teacher's ids."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> weight in the loss. Terms without one are reported only."""

    @property
    def lookahead_into_trunk(self) -> bool:
        """Whether the LookaheadRouter's gradient reaches the model below it."""

    def count(self, batch: Batch) -> float:
        """What the objective's own terms are divided by, of one batch: labels, pairs, rows."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the labels and the routing terms of `losses.py`."""

    routing: LossWeights = LossWeights()
    lookahead_into_trunk: bool = False
    name: ClassVar[str] = "next-token"
    fields: ClassVar[frozenset[str]] = frozenset()

    @property
    def weights(self) -> Mapping[str, float]:
        return {"ce": 1.0} | dataclasses.asdict(self.routing)

    def count(self, batch: Batch) -> float:
        return batch.tokens


@dataclass(frozen=True)
class Counts:
    """What an update's sums are divided by: known before its first micro-batch is computed.

    own: of the objective's terms. pairs[j]: tokens whose j-th successor is of the same document,
    padding left out; pairs[0] are all tokens.
    """

    own: float
    pairs: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.pairs[0]


def count(batches: Sequence[Batch], objective: Objective, steps: int) -> Counts:
    """The counts of an update, with pairs up to `steps` tokens apart (at least neighbours).

    Raises UsageError for a batch without an array that the objective needs.
    """
    for batch in batches:
        if missing := sorted(objective.fields - batch.extra.keys()):
            raise UsageError(f"the objective {objective.name!r} needs {missing[0]!r} in a batch")
    pairs = (
        sum(int(losses.same_segment(batch.segments_BT, j).sum()) for batch in batches)
        for j in range(max(steps, 1) + 1)
    )
    return Counts(sum(objective.count(batch) for batch in batches), tuple(pairs))


class Part(NamedTuple):
    """What one micro-batch adds to its update: its terms, and the picks and the probabilities of
    its tokens, summed."""

    terms: Terms
    picks_LE: Floats
    probs_LE: Floats


def report(parts: Sequence[Part], counts: Counts, objective: Objective) -> Terms:
    """The terms of a whole update: the sums over its micro-batches, the balance of all its picks,
    the loss, and how evenly experts are used."""
    terms: Terms = {}
    for part in parts:
        for name, value in part.terms.items():
            terms[name] = terms.get(name, 0.0) + value
    share_LE = losses.shares(np.stack([part.picks_LE for part in parts]).sum(0))
    probs_LE = np.stack([part.probs_LE for part in parts]).sum(0, np.float64)
    effective_L = losses.effective_experts(share_LE)
    terms |= {
        "balance": losses.balance_of(share_LE, probs_LE / max(counts.tokens, 1)),
        "largest_share": losses.largest_share(share_LE),
        "effective_experts": float(effective_L.mean()),
        "effective_experts_min": float(effective_L.min()),
    }
    mix = {name: weight for name, weight in objective.weights.items() if weight and name in terms}
    return terms | {"loss": sum(weight * terms[name] for name, weight in mix.items())}
