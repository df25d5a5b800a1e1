"""A memory of recent routing: where was a token routed like this one before, and what came then?

Text repeats itself - names, templates, turns of phrase - and so does its routing, in ways that no
trained weights can know beforehand. The memory holds the last tokens of the stream; those most like
the one under way, layer by layer, vote on what is used next and later. It learns nothing else.
The idea is that of induction heads (Olsson et al. 2022) and kNN-LM (Khandelwal et al. 2020).
Not covered: how far to trust a vote (`forecast` weighs it by the likeness).

Shape legend: T tokens, L layers, E experts, K top-k, N tokens remembered, V voters, O two answers
(use at the layer's next turn; discounted use over the turns after it).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

REMEMBERED, VOTERS = 2048, 16
_SHARP = 25.0  # a voter's weight falls by e for each 4 % of needs it agrees less on
_BEFORE = 0.25  # weight of agreement on the token before


class Vote(NamedTuple):
    """uses_OLE: shares of the voters' weight. likeness: share of needs the best one agrees on, 0 to
    1; 0 while there is too little to remember."""

    uses_OLE: Floats
    likeness: float


class RoutingMemory:
    """The last tokens of one stream, and how like each of them the token under way is."""

    def __init__(
        self, layers: int, experts: int, top_k: int, horizon: int, discount: float
    ) -> None:
        """horizon: turns that votes look ahead to; discount: weight of each further turn."""
        L, E, N = layers, experts, REMEMBERED
        self._shape, self._top_k = (L, E), top_k
        self._turns = [_turns(L, met, horizon, discount) for met in range(L + 1)]
        self._used_LEN = np.zeros((L, E, N), np.uint8)
        self._flat_NLK = np.zeros((N, L, top_k), np.intp)  # l E + e of each need
        self._agree_LN = np.zeros((L, N), np.float32)  # served layers: with this token; others:
        self._alike_N = np.zeros(N, np.float32)  # as the token before it. Their sum over layers
        self._before_N = np.zeros(N, np.float32)  # the sum when the token began
        self._token_LK = np.zeros((L, top_k), np.intp)
        self._served = -1
        self._stored = 0

    def observe(self, layer: int, experts: Collection[int]) -> None:
        chosen = list(experts)[: self._top_k]
        agree_N = self._used_LEN[layer, chosen].sum(0, dtype=np.float32)
        self._alike_N += agree_N - self._agree_LN[layer]
        self._agree_LN[layer] = agree_N
        self._token_LK[layer, : len(chosen)] = chosen
        self._served = layer

    def end_token(self) -> None:
        if self._served < 0:
            return
        self._store(self._token_LK)
        # What agreed with this token is to be followed by the next: one place on.
        self._agree_LN = np.roll(self._agree_LN, 1, 1)
        self._alike_N = self._agree_LN.sum(0)
        self._before_N = self._alike_N.copy()
        self._served = -1

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        """As `observe` and `end_token`, token by token; what the last two decide, by those two."""
        for ids_LK in ids_TLK[-REMEMBERED:-2]:
            self._store(ids_LK)
        for ids_LK in ids_TLK[-2:].tolist():
            for layer, experts in enumerate(ids_LK):
                self.observe(layer, experts)
            self.end_token()

    def vote(self) -> Vote | None:
        """What came after the tokens most like this one; None before there are enough."""
        if self._stored < VOTERS + 3:
            return None
        alike_N = self._alike_N + _BEFORE * self._before_N
        newest = (self._stored - 1) % REMEMBERED
        alike_N[newest] = alike_N[(newest + 1) % REMEMBERED] = -1.0  # what follows, or went before,
        alike_N[self._stored :] = -1.0  # is not there
        voters_V = np.argpartition(alike_N, -VOTERS)[-VOTERS:]
        likeness_V = alike_N[voters_V] / (self._needs * (1.0 + _BEFORE))
        likeness = float(likeness_V.max())
        weight_V = np.exp(_SHARP * (likeness_V - likeness))
        return Vote(self._tally(voters_V, weight_V), likeness)

    @property
    def _needs(self) -> int:
        return self._shape[0] * self._top_k

    def _store(self, ids_LK: NDArray[Any]) -> None:
        slot, (L, E) = self._stored % REMEMBERED, self._shape
        self._used_LEN[:, :, slot] = 0
        np.put_along_axis(self._used_LEN[:, :, slot], ids_LK.astype(np.intp), 1, 1)
        self._flat_NLK[slot] = ids_LK + np.arange(L)[:, None] * E
        self._stored += 1

    def _tally(self, voters_V: NDArray[Any], weight_V: NDArray[Any]) -> Floats:
        """[O, L, E]. A voter plays the token under way: a layer that this has met is asked next in
        the token after the voter, others in the voter. Turns not known yet do not count."""
        L, E = self._shape
        weight_AL, answer_AL = self._turns[self._served + 1]
        ahead = np.arange(len(weight_AL))
        known_VA = ahead <= ((self._stored - 1 - voters_V) % REMEMBERED)[:, None]
        weight_VAL = (weight_V[:, None] * known_VA)[:, :, None] * weight_AL
        flat_VALK = self._flat_NLK[(voters_V[:, None] + ahead) % REMEMBERED]
        flat_VALK += (answer_AL * (L * E))[..., None]
        weights = np.repeat(weight_VAL.ravel(), self._top_k)
        votes = np.bincount(flat_VALK.ravel(), weights, 2 * L * E)
        weight_AL = weight_VAL.sum(0)
        mass_OL = np.stack([(weight_AL * (answer_AL == answer)).sum(0) for answer in (0, 1)])
        tally = votes.reshape(2, L, E) / np.maximum(mass_OL, 1e-12)[..., None]
        return np.asarray(tally, np.float32)


def _turns(
    layers: int, met: int, horizon: int, discount: float
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """What the uses of a voter and of the tokens after it count, [A, L], and for which answer, when
    the token under way has met so many layers."""
    turn_AL = np.arange(horizon + 1)[:, None] - (np.arange(layers) < met)  # 0: the next turn
    weight_AL = np.where(turn_AL > 0, discount ** (turn_AL - 1.0), 1.0)
    weight_AL[(turn_AL < 0) | (turn_AL >= horizon)] = 0.0
    return weight_AL, (turn_AL > 0).astype(np.intp)
