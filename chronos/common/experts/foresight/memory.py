"""A memory of routing: where was a token routed like this one before, and what came then?

Text repeats itself - names, templates, turns of phrase - and so does its routing, in ways that no
trained weights can hold. The memory knows the last tokens of the stream and, where a forecaster
brings them along, those it was trained on; the ones most like the token under way, layer by layer,
vote on what is used next and later. It learns nothing else.
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
_NOW = 4  # agreement on the token under way weighs so many times that on the token before
_BUILT = 4096  # tokens whose bits are set at once


class Vote(NamedTuple):
    """uses_OLE: shares of the voters' weight. likeness: share of needs the best one agrees on, 0 to
    1; 0 while there is too little to remember."""

    uses_OLE: Floats
    likeness: float


class RoutingMemory:
    """Tokens of the past, and how like each of them the token under way is.

    A need is a bit, so that looking at 37,000 tokens takes a tenth of a millisecond a layer: four
    rows of bits are added up. Places are the known tokens, then a ring of the stream's last ones.

    An example with L = 2 and K = 2, so 4 needs a token, written layer 0 / layer 1. The stream was

        place 0: 1 2 / 5 6      place 1: 3 7 / 0 4      place 2: 3 5 / 1 6      ...

    then came a token of 1 2 / 5 6, and the token under way needs 3 7 of layer 0. A place is
    compared with it as far as it goes, and for layers still to come the place before with the token
    before. Place 1 agrees on 3 and 7 (2 of 2) and, by place 0, on 5 and 6 (2 of 2): 4. Its
    predecessor agreed with the token before on 4. That is _NOW * 4 + 4 = 20 of 20, a likeness of 1.
    Place 2 agrees on 3 alone, and place 1 not at all: _NOW * 1 + 0 = 4 of 20, a likeness of 0.2
    and a weight of exp(_SHARP * (0.2 - 1)) = 2e-9. So place 1 decides: layer 1 will need 0 and 4,
    and layer 0, whose turn is over, needs 3 and 5 in the token after, as in place 2.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        horizon: int,
        discount: float,
        known_TLK: NDArray[Any] | None = None,
    ) -> None:
        """horizon: turns that votes look ahead to; discount: weight of each further turn."""
        L, E = layers, experts
        known = 0 if known_TLK is None else len(known_TLK)
        self._known, self._shape, self._top_k = known, (L, E), top_k
        N = known + REMEMBERED
        self._turns = [_turns(L, E, met, horizon, discount) for met in range(L + 1)]
        self._flat_NLK = np.zeros((N, L, top_k), np.min_scalar_type(L * E - 1))  # l E + e
        self._bits_XM = np.zeros((L * E, -(-N // 8)), np.uint8)  # X: l E + e, M: 8 places a byte
        if known_TLK is not None:
            self._flat_NLK[:known] = self._flat(known_TLK)
            self._set_bits(known)
        self._agree_LN = np.zeros((L, N), np.uint8)  # served layers: with this token; others:
        self._alike_N = np.zeros(N, np.int16)  # as the token before it. Their sum over layers
        self._before_N = np.zeros(N, np.int16)  # the sum when the token began
        self._token_LK = np.zeros((L, top_k), np.intp)
        self._new: list[int] = []  # layers served and not compared yet
        self._served = -1
        self._stored = 0

    def observe(self, layer: int, experts: Collection[int]) -> None:
        chosen = list(experts)[: self._top_k]
        self._token_LK[layer, : len(chosen)] = chosen
        if layer not in self._new:  # twice where an error ended the token before
            self._new.append(layer)
        self._served = layer

    def end_token(self) -> None:
        if self._served < 0:
            return
        self._compare()
        self._store(self._token_LK)
        # What agreed with this token is to be followed by the next: one place on.
        for part in (slice(self._known), slice(self._known, None)):
            self._agree_LN[:, part] = np.roll(self._agree_LN[:, part], 1, 1)
            self._alike_N[part] = np.roll(self._alike_N[part], 1)
        self._before_N[:] = self._alike_N
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
        if not self._stored or self._known + self._stored < VOTERS + 3:
            return None
        self._compare()
        alike_N = _NOW * self._alike_N + self._before_N
        self._strike_out(alike_N)
        voters_V = _largest(alike_N, VOTERS)
        likeness_V = alike_N[voters_V] / (self._shape[0] * self._top_k * (_NOW + 1.0))
        likeness = float(likeness_V.max())
        weight_V = np.exp(_SHARP * (likeness_V - likeness))
        return Vote(self._tally(voters_V, weight_V), likeness)

    def _compare(self) -> None:
        """Bring up to date which places agree with the layers served since the last time."""
        if not self._new:
            return
        rows_XK = self._token_LK[self._new] + np.array(self._new)[:, None] * self._shape[1]
        # The last rows of bits end in places that do not exist.
        used_XKN = np.unpackbits(self._bits_XM[rows_XK], -1, count=len(self._alike_N))
        agree_XN = np.add.reduce(used_XKN, 1, np.uint8)
        self._alike_N += np.add.reduce(agree_XN, 0, np.int16)
        self._alike_N -= np.add.reduce(self._agree_LN[self._new], 0, np.int16)
        self._agree_LN[self._new] = agree_XN
        self._new.clear()

    def _strike_out(self, alike_N: NDArray[np.int16]) -> None:
        """Places without the token that follows, or that went before."""
        known, newest = self._known, (self._stored - 1) % REMEMBERED
        alike_N[known + newest] = alike_N[known + (newest + 1) % REMEMBERED] = -1
        alike_N[known + self._stored :] = -1
        if known:
            alike_N[0] = alike_N[known - 1] = -1

    def _set_bits(self, count: int) -> None:
        """Bits of the first places."""
        for start in range(0, count, _BUILT):
            flat_TLK = self._flat_NLK[start : min(start + _BUILT, count)].astype(np.intp)
            marks = np.zeros((len(flat_TLK), len(self._bits_XM)), np.bool_)
            np.put_along_axis(marks, flat_TLK.reshape(len(flat_TLK), -1), True, 1)
            packed = np.packbits(marks, 0).T
            self._bits_XM[:, start // 8 : start // 8 + packed.shape[1]] = packed

    def _store(self, ids_LK: NDArray[Any]) -> None:
        place = self._known + self._stored % REMEMBERED
        byte, bit = place // 8, np.uint8(0x80 >> place % 8)
        self._bits_XM[:, byte] &= ~bit
        self._flat_NLK[place] = flat_LK = self._flat(ids_LK)
        self._bits_XM[flat_LK.ravel(), byte] |= bit
        self._stored += 1

    def _flat(self, ids_LK: NDArray[Any]) -> NDArray[np.intp]:
        """[..., L, K]: l E + e of each need."""
        flat: NDArray[np.intp] = ids_LK.astype(np.intp)
        flat += np.arange(self._shape[0])[:, None] * self._shape[1]
        return flat

    def _tally(self, voters_V: NDArray[Any], weight_V: NDArray[Any]) -> Floats:
        """[O, L, E]. A voter plays the token under way: a layer that this has met is asked next in
        the token after the voter, others in the voter. Turns not known yet do not count."""
        L, E = self._shape
        weight_AL, first_AL = self._turns[self._served + 1]
        place_VA, known_VA = self._following(voters_V, len(weight_AL))
        weight_VAL = (weight_V[:, None] * known_VA)[:, :, None] * weight_AL
        flat_VALK = self._flat_NLK[place_VA] + first_AL[:, :, None]
        votes = np.bincount(flat_VALK.ravel(), weight_VAL.repeat(self._top_k), 2 * L * E)
        # A turn of a layer votes for K experts, so its votes are K times its weight.
        tally_OLE = votes.reshape(2, L, E)
        mass_OL1 = tally_OLE.sum(-1, keepdims=True) / self._top_k
        return np.asarray(tally_OLE / np.maximum(mass_OL1, 1e-12), np.float32)

    def _following(
        self, voters_V: NDArray[np.intp], count: int
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Places of the voters and of the tokens after them [V, count]; which of them there are."""
        ahead_A, known = np.arange(count), self._known
        place_VA = voters_V[:, None] + ahead_A
        ring_V1 = voters_V[:, None] >= known
        after_V1 = self._stored - 1 - (voters_V[:, None] - known)
        left_V1 = np.where(ring_V1, after_V1 % REMEMBERED, known - 1 - voters_V[:, None])
        place_VA = np.where(ring_V1, known + (place_VA - known) % REMEMBERED, place_VA)
        return np.minimum(place_VA, len(self._flat_NLK) - 1), ahead_A <= left_V1


def _largest(values_N: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Indices of the largest values, in any order. Most lie far below the best: lowering a floor
    until enough stand above it takes a tenth of `argpartition`'s time."""
    best, drop = int(values_N.max()), 8
    while np.count_nonzero(values_N >= best - drop) < count:
        drop *= 2
    found: NDArray[np.intp] = np.flatnonzero(values_N >= best - drop)
    return found[np.argpartition(values_N[found], -count)[-count:]]


def _turns(
    layers: int, experts: int, met: int, horizon: int, discount: float
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """What the uses of a voter and of the tokens after it count, [A, L], and where the votes of the
    answer they count for begin, when the token under way has met so many layers."""
    turn_AL = np.arange(horizon + 1)[:, None] - (np.arange(layers) < met)  # 0: the next turn
    weight_AL = np.where(turn_AL > 0, discount ** (turn_AL - 1.0), 1.0)
    weight_AL[(turn_AL < 0) | (turn_AL >= horizon)] = 0.0
    return weight_AL, layers * experts * (turn_AL > 0).astype(np.intp)
