"""What to load next: forecasts into prefetch keys, and how likely a use must be.

`expected_use` turns a forecast into one score per expert, `plan` picks keys within a number of
bytes, `LinkUse` says from which chance of use on a read ahead pays, `SlowStart` how many reads a
source may have before some were used. Policy only: nothing here reads bytes, holds tensors or looks
at a clock, so the same numbers in give the same keys out.
Not covered: what to evict (`residency`), how a forecast is made (the model's LookaheadRouter).

Shape legend: J forecast horizons (0 = this token, 1 = the next ...), L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chronos.common.model.weights import Key

Floats = npt.NDArray[np.floating]

# Chance of use at break-even on an idle link. A used prefetch spares exactly one demand read; a
# wasted one displaces at most one resident, so it costs at most one.
PAYS = 0.5


def expected_use(
    probs_JLE: Floats, top_k: int, *, after_layer: int, discount: float = 0.8
) -> npt.NDArray[np.float64]:
    """Expected discounted uses of each expert, [L, E], from router probabilities per horizon.

    An expert of probability p is picked with chance about min(1, top_k p). Horizon j counts
    `discount`**j. Layers up to and including row `after_layer` have been served for this token, so
    horizon 0 counts for deeper ones only; -1 counts all, L - 1 none.
    """
    use_JLE = np.minimum(1.0, np.asarray(probs_JLE, np.float64) * top_k)
    use_JLE[0, : after_layer + 1] = 0.0
    return np.tensordot(discount ** np.arange(len(use_JLE)), use_JLE, axes=1)


def plan(
    scores_LE: Floats,
    resident_LE: npt.NDArray[np.bool_],
    *,
    budget_bytes: int,
    record_bytes: int,
    layers: Sequence[int] | None = None,
    floor: float = PAYS,
    order_LE: Floats | None = None,
) -> list[Key]:
    """Keys worth prefetching, best first: not resident, score >= `floor`, within `budget_bytes`.

    `layers` gives the absolute layer index of each row (default: the row number). Equal scores go
    to the shallower layer, which needs its experts first. `order_LE` decides what is best among
    those worth it, where that is another number than the score.
    """
    room = budget_bytes // record_bytes
    if room <= 0:
        return []
    scores = np.where(resident_LE, -np.inf, scores_LE).ravel()
    worth = np.flatnonzero(scores >= floor)
    order = scores if order_LE is None else order_LE.ravel()
    best = worth[np.argsort(-order[worth], kind="stable")[:room]].tolist()
    experts = resident_LE.shape[1]
    rows = range(resident_LE.shape[0]) if layers is None else layers
    return [(rows[flat // experts], flat % experts) for flat in best]


class LinkUse:
    """How much of the link's time goes to what is needed, and what that asks of a read ahead.

    A read ahead that is used spares its wait only as far as the link would else have been idle: on
    a link that is busy all the time it moves a read, and one that is not used costs its whole
    time. Where the link is busy for a share b of the time, one that is used with chance p gains
    p (1 - b) and loses (1 - p) b reads' time: it pays from p = b on.

    Rehearsed on two traces, 12.5 to 50 % of the experts, b from 0.2 to 0.97: the fixed floor that
    made tokens fastest lay at b with small budgets and below it with large ones, where what is
    wrong for this token is still there for a later one (bench/log/prefetch.md).
    """

    _SMOOTHING = 0.1  # weight of the newest token

    def __init__(self) -> None:
        self._busy: float | None = None

    @property
    def floor(self) -> float:
        """The chance of use from which on an expert is read ahead. Never below one half, however
        idle the link: 0.4 spared at most 0.8 % of a token there, for 4 to 12 % more bytes."""
        return max(PAYS, self._busy or 0.0)

    def end_token(self, carried: float, needed: float) -> None:
        """Bytes that the link could have carried in the token's time; bytes that it read, without
        those that were evicted unused."""
        if carried > 0:
            busy = min(1.0, max(0.0, needed / carried))
            mean = busy if self._busy is None else self._busy
            self._busy = mean + self._SMOOTHING * (busy - mean)


class SlowStart:
    """How many reads ahead a source may have that were neither used nor given up yet.

    A source may be surer than it is right: a table that has met a token once names all it needed
    then. So it begins with a few records, and what was used of late lets it have twice as many
    more. One that is right has all it asks for within four tokens; one that is wrong spoils a few,
    and one more in some 12 tokens, by which it may come back.
    """

    _FIRST, _GROWTH = 4, 2
    # Weights when the next token has ended: of a use, and of a read of which nothing was heard.
    _KEPT, _OPEN = 0.875, 0.98

    def __init__(self) -> None:
        self._open = self._used = 0.0

    @property
    def room(self) -> int:
        """Records that the source may ask for now."""
        return max(0, int(self._FIRST + self._GROWTH * self._used - self._open))

    def asked(self, records: int) -> None:
        self._open += records

    def end_token(self, used: int, unused: int) -> None:
        """Its reads ahead that met their first need, and that were evicted or cancelled before
        any."""
        self._open = max(0.0, self._OPEN * self._open - used - unused)
        self._used = self._KEPT * self._used + used

    def end_prompt(self) -> None:
        """What became of its reads ahead in a prompt is not told."""
        self._open = 0.0
