"""Predictors of routing: how much each expert of one sequence is going to be used.

A `Predictor` is told what each layer asks for, as it happens, and scores every (layer, expert). It
may be asked at any moment of a token. `policy` lets them rank what a cache keeps, takes in and
reads ahead.
Ids and NumPy only: nothing here knows bytes, slots or a model.
Not covered: forecasts that a model makes of itself (LookaheadRouter, next gate); a backend hands
those to `plan` as probabilities.

Shape legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Shares = NDArray[np.float32]
# How much a use counts for each token it lies ahead: the cache that forecasts serve turns over in
# some eight tokens at a quarter of the experts.
DISCOUNT = 0.8
# In a rank, uses further ahead count less than that, and older ones fade faster than in a plain
# LFU: on validation sequences of two real traces 0.9 and 0.7 close 8 to 10 % of the gap, LFU's 0.95
# and 0.8 close 5 %.
RANK_DISCOUNT = 0.7
USE_DECAY = 0.9


class Predictor(Protocol):
    """Scores of every (layer, expert) of one sequence of tokens. Not thread-safe.

    Layers are those of the model in the order a token meets them, 0 to L - 1.
    """

    name: str  # as `--predictor` has it

    def observe(self, layer: int, experts: Collection[int]) -> None:
        """The token under way needs these experts of a layer. At most once a layer and token.
        Reads wait for this: what takes long is left to `reconsider`."""

    def reconsider(self) -> None:
        """Take in what was observed, where `observe` has not; before the next layer's turn."""

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

    @property
    def by_token(self) -> bool:
        """Whether it is told of token ids: `begin_token`, `learn`."""

    def begin_token(self, token: int) -> None:
        """The token with this id is run next."""

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        """Tokens of a prompt were routed like this."""

    def fork(self) -> Predictor:
        """One of another sequence that begins where this one is."""


class ByRouting:
    """What predictors that go by the routing alone make of token ids; and a fork that suits where
    no state is large or a view of another."""

    by_token = False

    def fork(self) -> Self:
        return copy.deepcopy(self)

    def begin_token(self, token: int) -> None: ...
    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None: ...


class TokenClock:
    """Where in a token we are: how far ahead each layer's next turn is."""

    def __init__(self, num_layers: int, discount: float = RANK_DISCOUNT) -> None:
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


class DecayedUse(ByRouting):
    """The share of a layer's last turns in which it needed the expert, old turns fading.

    Each layer has a clock of its own (its counts fade when it is asked, so within a token all are
    equally fresh), and a layer whose turn is further ahead counts less. Both matter where layers
    share slots: bench/log/forecasts.md has the figures. LRFU: Lee et al. 2001.
    """

    name = "lfu"

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        decay: float = USE_DECAY,
        discount: float = RANK_DISCOUNT,
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

    def reconsider(self) -> None:
        pass

    def fork(self) -> Self:
        other = copy.copy(self)
        other._rate_LE, other._clock = self._rate_LE.copy(), copy.copy(self._clock)
        other._rows = list(other._rate_LE)
        return other

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
    """Expects of each layer what it needed last; of other experts, what it needed more recently."""

    name = "previous-token"

    def __init__(self, num_layers: int, num_experts: int, discount: float = RANK_DISCOUNT) -> None:
        super().__init__(num_layers, num_experts, 0.25, discount)


_TABLE_BYTES = 32 << 20  # of a token table, at most
_PRIMED = 128  # tokens of a prompt that count: of a use before these 0.1 % is left


class TokenTable(DecayedUse):
    """What the token to be run needed when it was run before; without a before, decayed use. Forks
    share what is known of tokens.

    Needs the token's id, which is known as soon as it was sampled: `begin_token`.
    """

    name = "token-table"
    by_token = True

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._table: dict[int, Shares] = {}  # token -> [L, E] share of its runs, old ones fading
        self._most = max(1, _TABLE_BYTES // (4 * num_layers * num_experts))
        self._now_LE = np.zeros((num_layers, num_experts), np.float32)
        self._token: int | None = None
        self._met = 0

    def fork(self) -> Self:
        other = super().fork()
        other._now_LE = self._now_LE.copy()
        return other

    def begin_token(self, token: int) -> None:
        """The token with this id is run next."""
        self._token = token

    def observe(self, layer: int, experts: Collection[int]) -> None:
        super().observe(layer, experts)
        self._now_LE[layer] = 0.0
        self._now_LE[layer, list(experts)] = 1.0
        self._met = layer + 1

    def end_token(self) -> None:
        super().end_token()
        if self._token is not None:
            self._note(self._token, self._now_LE)
        self._token, self._met = None, 0

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        """Tokens of a prompt were routed like this."""
        used_LE = np.zeros_like(self._now_LE)
        for token, ids_LK in zip(tokens, ids_TLK, strict=True):
            used_LE[:] = 0.0
            np.put_along_axis(used_LE, ids_LK, 1.0, 1)
            self._note(token, used_LE)

    def _note(self, token: int, used_LE: Shares) -> None:
        """Note what a token needed. A full table drops the token that was run least recently."""
        before = self._table.pop(token, used_LE)
        if len(self._table) >= self._most:
            del self._table[next(iter(self._table))]
        self._table[token] = np.float32(0.5) * (before + used_LE)

    def scores(self) -> Scores:
        further = self._discount * self._rate_LE / (1.0 - self._discount)
        return np.asarray((self.next_uses() + further) * self._clock.weight_L[:, None])

    def next_uses(self) -> Scores:
        known = None if self._token is None else self._table.get(self._token)
        if known is None:
            return self._rate_LE
        likely = self._rate_LE.copy()
        # A millionth of the rate decides between experts that the token never needed.
        likely[self._met :] = known[self._met :] + 1e-6 * likely[self._met :]
        return likely


def prime(predictor: Predictor, ids_TLK: NDArray[Any]) -> None:
    """Show a prompt's end to a predictor token by token, where it has no faster way of its own.

    A token costs some 5 microseconds a layer.
    """
    for ids_LK in ids_TLK[-_PRIMED:].tolist():
        for layer, experts in enumerate(ids_LK):
            predictor.observe(layer, experts)
            predictor.reconsider()
        predictor.end_token()
