"""Predictors of routing: how much each expert is going to be used, and policies made of them.

A `Predictor` is told what each layer asks for, as it happens, and scores every (layer, expert). It
may be asked at any moment of a token. A `PredictorPolicy` lets one rank what a cache keeps, takes
in and reads ahead.
Ids and NumPy only: nothing here knows bytes, slots or a model.
Not covered: forecasts that a model makes of itself (LookaheadRouter, next gate); a backend hands
those to `plan` as probabilities.

Shape legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chronos.common.experts.foresight.memory import REMEMBERED

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


class PredictorPolicy:
    """A `residency.Policy` that keeps what a predictor scores highest.

    Chunks of a prompt go layer by layer, and what a layer asks for is what many tokens need: that
    would spoil a predictor's state, so it is told of a prompt at its end, token by token. Meanwhile
    the layer that the pass comes to last, the one just served, gives its slots first.
    """

    def __init__(
        self,
        predictor: Predictor,
        layers: Sequence[int] | None = None,
    ) -> None:
        """layers: the model's layer that each row of the predictor stands for, where some of the
        model's layers have no experts."""
        self.predictor, self.forecasts = predictor, True
        rows = len(predictor.scores())
        self._layers = list(range(rows)) if layers is None else list(layers)
        self._row = {layer: row for row, layer in enumerate(self._layers)}
        self._priority: Scores | None = None
        self._pass: TokenClock | None = None  # while a prompt is read

    @property
    def name(self) -> str:
        return self.predictor.name

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

    def reconsider(self) -> None:
        if self._pass is None:
            self.predictor.reconsider()
            self._priority = None

    def end_token(self) -> None:
        self.predictor.end_token()
        self._priority = None

    @property
    def by_token(self) -> bool:
        """Whether it forecasts a token best when its id is known: `begin_token`."""
        return isinstance(self.predictor, TokenTable)

    def begin_token(self, token: int) -> None:
        """The token with this id is run next, where `by_token`."""
        if isinstance(self.predictor, TokenTable):
            self.predictor.begin_token(token)
            self._priority = None

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        """Tokens of a prompt were routed like this, where `by_token`."""
        if isinstance(self.predictor, TokenTable):
            self.predictor.learn(tokens, ids_TLK)

    can_disable = False  # whether `disable` does anything
    disabled = False

    def disable(self, disabled: bool) -> None:
        """Rank by something cheaper from the next token on, or not, where `can_disable`."""

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


class SwitchablePolicy(PredictorPolicy):
    """Ranks by a forecaster, or while that is disabled, by decayed use.

    What tokens are routed to meanwhile is kept, and told to the forecaster when it is enabled.
    """

    can_disable = True

    @property
    def name(self) -> str:
        return self._forecaster.name

    def __init__(
        self,
        forecaster: Predictor,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(forecaster, layers)
        self._forecaster, self._plain = forecaster, DecayedUse(*forecaster.scores().shape)
        self._missed: deque[list[list[int]]] = deque(maxlen=REMEMBERED)  # [T][L][K]
        self._token: list[list[int]] = []

    def disable(self, disabled: bool) -> None:
        if disabled == self.disabled:
            return
        self.disabled = disabled
        self._catch_up()
        self.predictor, self._priority = self._plain if disabled else self._forecaster, None

    def observe(self, layer: int, experts: Collection[int]) -> None:
        super().observe(layer, experts)
        if self._pass is None and self.disabled:
            self._token.append(list(experts))
        elif self._pass is None:
            self._plain.observe(self._row[layer], experts)

    def end_token(self) -> None:
        super().end_token()
        if self.disabled:
            if len(self._token) == len(self._layers):
                self._missed.append(self._token)
            self._token = []
        else:
            self._plain.end_token()

    def end_prompt(self, ids_TLK: NDArray[Any]) -> None:
        self._catch_up()
        other = self._forecaster if self.disabled else self._plain
        other.prime(ids_TLK)
        super().end_prompt(ids_TLK)

    def _catch_up(self) -> None:
        if self._missed:
            # Tokens of several sequences, run together, needed more experts than one.
            width = min(len(experts) for token in self._missed for experts in token)
            ids = [[experts[:width] for experts in token] for token in self._missed]
            self._forecaster.prime(np.array(ids, np.intp))
            self._missed.clear()


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


class DecayedUse:
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
    """What the token to be run needed when it was run before; without a before, decayed use.

    Needs the token's id, which is known as soon as it was sampled: `begin_token`.
    """

    name = "token-table"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._table: dict[int, Shares] = {}  # token -> [L, E] share of its runs, old ones fading
        self._most = max(1, _TABLE_BYTES // (4 * num_layers * num_experts))
        self._now_LE = np.zeros((num_layers, num_experts), np.float32)
        self._token: int | None = None
        self._met = 0

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
