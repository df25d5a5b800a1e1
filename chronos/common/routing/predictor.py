"""Predictors of routing: how much each expert is going to be used, and policies made of them.

A `Predictor` is told what each layer asks for, as it happens, and scores every (layer, expert). It
may be asked at any moment of a token: `Moment` names the ones that measurements speak of. A
`PredictorPolicy` lets one rank what a cache keeps, takes in and reads ahead.
Ids and NumPy only: nothing here knows bytes, slots or a model.
Not covered: forecasts that a model makes of itself (LookaheadRouter, next gate); a backend hands
those to `plan` as probabilities.

Shape legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chronos.common.residency import LFU_DECAY

Scores = NDArray[np.float64]
# How much a use counts for each token it lies ahead: the cache that forecasts serve turns over in
# some eight tokens at a quarter of the experts.
DISCOUNT = 0.8


class Moment(Enum):
    """When in a token a forecast is made."""

    END_OF_TOKEN = "end of token"  # all layers served
    AFTER_BLOCK_0 = "after block 0"
    NEXT_GATE = "next gate"  # in layer l, for layer l + 1


class Predictor(Protocol):
    """Scores of every (layer, expert) of one sequence of tokens. Not thread-safe.

    Layers are those of the model in the order a token meets them, 0 to L - 1.
    """

    def observe(self, layer: int, experts: Collection[int]) -> None:
        """The token under way needs these experts of a layer. At most once a layer and token."""

    def end_token(self) -> None: ...

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        """The routing of a prompt, in order: the state as if its tokens had been decoded."""

    def scores(self) -> Scores:
        """[L, E], expected uses from now on, those further ahead counting less. A layer that the
        token under way has not met yet is asked sooner than one it has. Valid until the next call
        of any method; not to be written to."""

    def next_uses(self) -> Scores:
        """[L, E], the chance (or a number that orders like it) that a layer, when asked next,
        needs the expert."""


class PredictorPolicy:
    """A `residency.Policy` that keeps what a predictor scores highest.

    Chunks of a prompt go layer by layer, and what a layer asks for is what many tokens need: that
    would spoil a predictor's state, so it is told of a prompt at its end, token by token. Meanwhile
    the layer that the pass comes to last, the one just served, gives its slots first.
    """

    def __init__(self, predictor: Predictor, layers: Sequence[int] | None = None) -> None:
        """layers: the model's layer that each row of the predictor stands for, where some of the
        model's layers have no experts."""
        self.predictor, self.forecasts = predictor, True
        rows = len(predictor.scores())
        self._layers = list(range(rows)) if layers is None else list(layers)
        self._row = {layer: row for row, layer in enumerate(self._layers)}
        self._priority: Scores | None = None
        self._pass: TokenClock | None = None  # while a prompt is read

    @property
    def priority(self) -> Scores:
        if self._priority is None:
            self._priority = self._by_layer(self._rank())
        return self._priority

    def next_uses(self) -> Scores:
        """[L, E], the chance that a layer, when asked next, needs the expert."""
        return self._by_layer(self.predictor.next_uses())

    def observe(self, layer: int, experts: Collection[int]) -> None:
        (self._pass or self.predictor).observe(self._row[layer], experts)
        self._priority = None

    def end_token(self) -> None:
        self.predictor.end_token()
        self._priority = None

    def begin_prompt(self) -> None:
        self._pass, self._priority = TokenClock(len(self._layers)), None
        self.forecasts = False  # what a chunk prefetches it is sure to need

    def end_prompt(self, ids_TLK: NDArray[Any]) -> None:
        self.predictor.prime(ids_TLK)
        self._pass, self._priority = None, None
        self.forecasts = True

    def _rank(self) -> Scores:
        scores = self.predictor.scores()
        if self._pass is None:
            return scores
        within = scores / (1.0 + scores.max())  # decides between experts of one layer
        return np.asarray(self._pass.weight_L[:, None] + 1e-3 * within)

    def _by_layer(self, rows: Scores) -> Scores:
        if self._layers[-1] == len(self._layers) - 1:
            return rows
        wide = np.zeros((self._layers[-1] + 1, rows.shape[1]))
        wide[self._layers] = rows
        return wide


class TokenClock:
    """Where in a token we are: how far ahead each layer's next turn is."""

    def __init__(self, num_layers: int, discount: float = DISCOUNT) -> None:
        ahead_L = np.arange(num_layers) / num_layers
        # [L, L]: row p holds discount ** (tokens until each layer's turn) when layer p is next.
        self._weight_LL = np.array([discount ** np.roll(ahead_L, p) for p in range(num_layers)])
        self._next, self._layers = 0, num_layers

    def observe(self, layer: int, experts: Collection[int] = ()) -> None:
        self._next = (layer + 1) % self._layers

    def end_token(self) -> None:
        self._next = 0

    @property
    def weight_L(self) -> Scores:
        """discount ** (tokens until the layer's next turn), 1 for the layer that comes now."""
        row: Scores = self._weight_LL[self._next]
        return row


class DecayedUse:
    """The share of a layer's last turns in which it needed the expert, old turns fading.

    Each layer has a clock of its own (its counts fade when it is asked, so within a token all are
    equally fresh), and a layer whose turn is further ahead counts less. Both matter where layers
    share slots: bench/LOG.md has the figures. LRFU: Lee et al. 2001.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        decay: float = LFU_DECAY,
        discount: float = DISCOUNT,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self._rate_LE = np.zeros((num_layers, num_experts))
        self._rows = list(self._rate_LE)  # views: indexing a row costs half of the matrix
        self._decay, self._discount = decay, discount
        self._clock = TokenClock(num_layers, discount)

    def observe(self, layer: int, experts: Collection[int]) -> None:
        row = self._rows[layer]
        row *= self._decay
        row[list(experts)] += 1.0 - self._decay
        self._clock.observe(layer)

    def end_token(self) -> None:
        self._clock.end_token()

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        prime(self, ids_TLK)

    def scores(self) -> Scores:
        # Were every later turn to repeat this rate: rate * (1 + discount + discount^2 ...).
        scores: Scores = self._rate_LE * (self._clock.weight_L / (1.0 - self._discount))[:, None]
        return scores

    def next_uses(self) -> Scores:
        return self._rate_LE


class PreviousToken(DecayedUse):
    """What a layer needed last it needs next; among the rest, what it needed more recently."""

    def __init__(self, num_layers: int, num_experts: int, discount: float = DISCOUNT) -> None:
        super().__init__(num_layers, num_experts, 0.25, discount)


_PRIMED = 128  # tokens of a prompt that count: of a use before these 0.1 % is left


def prime(predictor: Predictor, ids_TLK: NDArray[Any]) -> None:
    """Show a prompt's end to a predictor token by token, where it has no faster way of its own.

    A token costs some 5 microseconds a layer.
    """
    for ids_LK in ids_TLK[-_PRIMED:].tolist():
        for layer, experts in enumerate(ids_LK):
            predictor.observe(layer, experts)
        predictor.end_token()
