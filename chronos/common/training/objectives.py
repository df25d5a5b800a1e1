"""What an update minimises and where its batches come from: the seam of a training stage.

A stage (`chronos/train/<stage>.py`) gives the loop a model, `Batches` and an `Objective`. An
objective is a value: its formula is in `losses.py` here, and each backend has its own under the
objective's name. Terms are sums over a batch divided by counts of the *whole update*, so one joined
batch and any split of it have the same terms and gradient. Knows no framework and no stage.

Shape legend: L layers, E experts, B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from chronos.common.data import IGNORE, Batch
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

    def at(self, number: int) -> list[Batch]:
        """The micro-batches of an update, counted from 0."""

    def notes(self) -> Mapping[str, float]:
        """What making the last ones came to, for the log: rewards, lengths."""


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

    def count(self, batch: Batch) -> Mapping[str, float]:
        """What the objective's own terms are divided by, of one batch: labels, pairs, rows."""


# What the log says in place of a term that a stage does not train.
NO_ROUTING = LossWeights(balance=0, temporal=0, locality=0, lookahead=0, lookahead_hit=0)


@dataclass(frozen=True)
class _Stage:
    """What the objectives of all stages have in common."""

    routing: LossWeights = NO_ROUTING
    """Weights of the routing terms."""
    _: KW_ONLY  # the rest by name: a flag in the place of a weight would pass for one
    anchor: float = 0.0
    """Weight of the router's distance from a frozen one."""
    lookahead_into_trunk: bool = False
    name: ClassVar[str]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset()

    def _mix(self, **own: float) -> Mapping[str, float]:
        return own | dataclasses.asdict(self.routing) | {"anchor": self.anchor}


@dataclass(frozen=True)
class NextToken(_Stage):
    """Cross-entropy of the labels: pretraining and SFT.

    dft: each label weighs its own probability, without gradient (2508.05629, eq. 8). details: say
    how often the label was the first choice, and the entropy of the predictions.
    """

    routing: LossWeights = LossWeights()
    dft: bool = False
    details: bool = False
    name: ClassVar[str] = "next-token"

    @property
    def weights(self) -> Mapping[str, float]:
        return self._mix(ce=1.0)

    def count(self, batch: Batch) -> Mapping[str, float]:
        return {"labels": batch.tokens}


@dataclass(frozen=True)
class Preference(_Stage):
    """DPO (2305.18290, eq. 7) and its variants over rows chosen, rejected, chosen, rejected ...

    kind: sigmoid; ipo (2310.12036, eq. 17, of means); robust (2403.00409, eq. 9, with
    label_smoothing); sigmoid_norm (of means). ld_alpha: weight of the tokens of an answer beyond
    the other's length (2409.06411); 1 is off. sft: weight of the chosen answers' cross-entropy.
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float = 1.0
    sft: float = 0.0
    name: ClassVar[str] = "dpo"

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"reference"})

    @property
    def weights(self) -> Mapping[str, float]:
        return self._mix(dpo=1.0, nll_loss=self.sft)

    def count(self, batch: Batch) -> Mapping[str, float]:
        chosen = int((batch.labels_BT[::2] != IGNORE).sum())
        labels = batch.tokens
        counts = {"labels": labels, "chosen": chosen, "rejected": labels - chosen}
        return counts | {"pairs": len(batch.ids_BT) / 2}


@dataclass(frozen=True)
class OddsRatio(_Stage):
    """ORPO (2403.07691, eq. 6-7): cross-entropy of the chosen answers, and their odds over the
    rejected ones', by mean log-probabilities. Labels beyond the answers (`answer` says which are
    theirs) count for the cross-entropy alone."""

    beta: float = 0.1
    name: ClassVar[str] = "orpo"

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"answer"})

    @property
    def weights(self) -> Mapping[str, float]:
        return self._mix(nll_loss=1.0, log_odds_ratio=-self.beta)

    def count(self, batch: Batch) -> Mapping[str, float]:
        chosen = int((batch.labels_BT[::2] != IGNORE).sum())
        return {"pairs": len(batch.ids_BT) / 2, "chosen": chosen}


@dataclass(frozen=True)
class PolicyGradient(_Stage):
    """GRPO (2402.03300, eq. 3) over sampled rows with an advantage each.

    kind: what token losses are divided by: dapo, all tokens of the update (2503.14476, eq. 8);
    grpo, each row's own tokens and the rows; dr_grpo, the rows times `max_tokens` (2503.20783);
    bnpo, each micro-batch's tokens and the micro-batches. level: of the ratio, token or sequence
    (2507.18071, eq. 7). beta: weight of the k3 estimate of the KL divergence from `reference`, per
    token, times the token's ratio, which makes its gradient that of the reverse KL. Without `old`
    the policy is the one that sampled.
    """

    kind: str = "dapo"
    level: str = "token"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    temperature: float = 1.0
    max_tokens: int = 1
    name: ClassVar[str] = "grpo"

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"advantages"} | ({"reference"} if self.beta else set()))

    @property
    def weights(self) -> Mapping[str, float]:
        return self._mix(policy=1.0)  # the divergence is in it: both are divided alike

    def count(self, batch: Batch) -> Mapping[str, float]:
        labels, rows = batch.tokens, int((batch.labels_BT != IGNORE).any(1).sum())
        over = {"dapo": labels, "grpo": rows, "dr_grpo": rows * self.max_tokens, "bnpo": 1}
        return {"labels": labels, "policy": over[self.kind]}


@dataclass(frozen=True)
class Distillation(_Stage):
    """A teacher's distribution at the labels, `teacher`: logits [N, V], N labels in row order.

    jsd None: T^2 KL(teacher || student) of both at the temperature T (1503.02531), beside (1 -
    alpha) cross-entropy. Else GKD's generalised Jensen-Shannon divergence of that beta (2306.13649,
    eq. 1): 0 is the forward, 1 the reverse KL; without T^2.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    jsd: float | None = None
    name: ClassVar[str] = "distill"

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"teacher"})

    @property
    def weights(self) -> Mapping[str, float]:
        return self._mix(kd=self.alpha, ce=1 - self.alpha)

    def count(self, batch: Batch) -> Mapping[str, float]:
        return {"labels": batch.tokens}


@dataclass(frozen=True)
class Counts:
    """What an update's sums are divided by: known before its first micro-batch is computed.

    own: of the objective's terms, at least 1 each. pairs[j]: tokens whose j-th successor is of the
    same document, padding left out; pairs[0] are all tokens.
    """

    own: Mapping[str, float]
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
    own: dict[str, float] = {}
    for batch in batches:
        for name, number in objective.count(batch).items():
            own[name] = own.get(name, 0) + number
    return Counts({name: max(number, 1) for name, number in own.items()}, tuple(pairs))


_OF_PARTS: Mapping[str, Callable[[list[float]], float]] = {"_min": min, "_max": max}


class Part(NamedTuple):
    """What one micro-batch adds to its update: its terms, and the picks and the probabilities of
    its tokens, summed."""

    terms: Terms
    picks_LE: Floats
    probs_LE: Floats


def own_share(batches: Sequence[Batch], rank: int, count: int) -> list[tuple[int, Batch]]:
    """The micro-batches of one of `count` processes, by their numbers in the update. Raises
    UsageError where a process would have none."""
    if len(batches) < count:
        raise UsageError(
            f"an update of {len(batches)} micro-batches cannot be shared by {count} processes",
            "accumulate",
            f"raise it to {count} or a multiple, or start fewer processes",
        )
    return list(enumerate(batches))[rank::count]


def flattened(parts: Sequence[Part]) -> Floats:
    """The sum of parts as one vector: what processes add up."""
    names = sorted(parts[0].terms)
    terms = [sum(part.terms[name] for part in parts) for name in names]
    rest = (
        np.stack([array.ravel() for array in arrays]).sum(0, np.float64)
        for arrays in ([part.picks_LE for part in parts], [part.probs_LE for part in parts])
    )
    return np.concatenate([np.array(terms, np.float64), *rest])


def restored(vector: Floats, like: Part) -> Part:
    """The part that `flattened` was given, of the form of another one."""
    names, size = sorted(like.terms), like.picks_LE.size
    picks, probs = vector[len(names) : -size], vector[-size:]
    terms = {name: float(value) for name, value in zip(names, vector, strict=False)}
    return Part(terms, picks.reshape(like.picks_LE.shape), probs.reshape(like.probs_LE.shape))


def report(parts: Sequence[Part], counts: Counts, objective: Objective) -> Terms:
    """The terms of a whole update: the sums over its micro-batches, the balance of all its picks,
    the loss, and how evenly experts are used. Of a term called `..._min` or `..._max` the least or
    the most of the micro-batches, which share no update with other processes then."""
    terms: Terms = {}
    for name in parts[0].terms:
        values = [part.terms[name] for part in parts]
        terms[name] = _OF_PARTS.get(name[-4:], sum)(values)
    share_LE = losses.shares(np.stack([part.picks_LE for part in parts]).sum(0))
    probs_LE = np.stack([part.probs_LE for part in parts]).sum(0, np.float64)
    effective_L = losses.effective_experts(share_LE)
    terms |= {
        "balance": losses.balance_of(share_LE, probs_LE / max(counts.tokens, 1)),
        "router/largest_share": losses.largest_share(share_LE),
        "router/effective_experts": float(effective_L.mean()),
        "router/effective_experts_min": float(effective_L.min()),
    }
    mix = {name: weight for name, weight in objective.weights.items() if weight and name in terms}
    return terms | {"loss": sum(weight * terms[name] for name, weight in mix.items())}
