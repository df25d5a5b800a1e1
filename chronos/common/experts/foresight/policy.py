"""A policy made of predictors: what a cache keeps, takes in and reads ahead, of any sequences.

Each sequence has a predictor of its own, which is told what that sequence needs, whatever company
it has. Knows sequences by number, and no tokens beyond their ids.
Not covered: what predicts (`predictor`, `forecast`), and which of them is chosen (`choose`).

Shape legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.experts.foresight.memory import REMEMBERED
from chronos.common.experts.foresight.predictor import DecayedUse, Predictor, Scores, TokenClock
from chronos.common.experts.residency import NOBODY


class PredictorPolicy:
    """A `residency.Policy` that keeps what predictors score highest, one of each sequence.

    Expected uses of several sequences add up, so their ranks do; the chance that a layer needs an
    expert when asked next is taken to be that of the sequence it is likeliest in
    (bench/log/company.md has the figures). A new sequence begins with what was believed last, so
    sequences one after the other are one stream.

    Chunks of a prompt go layer by layer, and what a layer asks for is what many tokens need: that
    would spoil a predictor's state, so it is told of a prompt at its end, token by token. Meanwhile
    the layer that the pass comes to last, the one just served, gives its slots first.
    """

    can_disable = False  # whether `disable` does anything
    disabled = False

    def __init__(
        self,
        predictor: Predictor,
        layers: Sequence[int] | None = None,
    ) -> None:
        """predictor: of the first sequence, from which others are forked. layers: the model's layer
        that each row of the predictor stands for, where some of the model's layers have no
        experts."""
        self.forecasts = True
        rows = len(predictor.scores())
        self._layers = list(range(rows)) if layers is None else list(layers)
        self._row = {layer: row for row, layer in enumerate(self._layers)}
        self._priority: Scores | None = None
        self._pass: TokenClock | None = None  # while a prompt is read
        self._by_seq: dict[int, Predictor] = {}
        self._now = {0: predictor}  # of the sequences whose tokens are run, in their order
        self._last = predictor  # what a new sequence begins with

    @property
    def name(self) -> str:
        return self._last.name

    @property
    def priority(self) -> Scores:
        if self._priority is None:
            self._priority = self._by_layer(self._rank())
        return self._priority

    def next_uses(self) -> Scores:
        """[L, E], the chance that a layer, when asked next, needs the expert."""
        chances = [predictor.next_uses() for predictor in self._now.values()]
        likeliest = chances[0] if len(chances) == 1 else np.maximum.reduce(chances)
        return self._by_layer(likeliest)

    def follow(self, seqs: Sequence[int]) -> None:
        """Tokens of these sequences are run from now on."""
        if [*self._now] != [*seqs] or not self._now.keys() <= self._by_seq.keys():
            self._now = {seq: self._own(seq) for seq in seqs}
            self._last, self._priority = self._now[seqs[0]], None

    def fork(self, seq: int, new: int) -> None:
        """A sequence `new` begins where `seq` is."""
        self._by_seq[new] = self._by_seq.get(seq, self._last).fork()

    def drop(self, seq: int) -> None:
        """A sequence has ended. The last one's state is what the next one begins with."""
        self._by_seq.pop(seq, None)
        if len(self._now) > 1 and self._now.pop(seq, None) is not None:
            self._priority = None

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        row, self._priority = self._row[layer], None
        if self._pass is not None:
            self._pass.observe(row)
            return
        for seq, predictor in self._now.items():
            if not by or seq in by:
                predictor.observe(row, by.get(seq, experts))

    def reconsider(self) -> None:
        if self._pass is None:
            for predictor in self._now.values():
                predictor.reconsider()
            self._priority = None

    def end_token(self) -> None:
        for predictor in self._now.values():
            predictor.end_token()
        self._priority = None

    @property
    def by_token(self) -> bool:
        """Whether it forecasts a token best when its id is known: `begin_token`."""
        return self._last.by_token

    def begin_token(self, *tokens: int) -> None:
        """The tokens with these ids, one a sequence, are run next."""
        for predictor, token in zip(self._now.values(), tokens, strict=True):
            predictor.begin_token(token)
        self._priority = None

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        """Tokens of a prompt were routed like this."""
        self._last.learn(tokens, ids_TLK)

    def disable(self, disabled: bool) -> None:
        """Rank by something cheaper from the next token on, or not, where `can_disable`."""

    def begin_prompt(self) -> None:
        self._pass, self._priority = TokenClock(len(self._layers)), None
        self.forecasts = False  # what a chunk prefetches it is sure to need

    def end_prompt(self, ids_TLK: NDArray[Any], seq: int = 0) -> None:
        self._own(seq).prime(ids_TLK)
        present = {**self._now, seq: self._by_seq[seq]}
        self._now = {each: present[each] for each in present if each in self._by_seq}
        self._pass, self._priority = None, None
        self.forecasts = True

    def _own(self, seq: int) -> Predictor:
        """The sequence's predictor. A new one has the last one's, or a copy where that goes on."""
        if seq not in self._by_seq:
            taken = any(held is self._last for held in self._by_seq.values())
            self._by_seq[seq] = self._last.fork() if taken else self._last
        return self._by_seq[seq]

    def _rank(self) -> Scores:
        each = [predictor.scores() for predictor in self._now.values()]
        scores = each[0] if len(each) == 1 else np.add.reduce(each)
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
    """Ranks by forecasters, or while these are disabled, by decayed use."""

    can_disable = True

    def __init__(
        self,
        forecaster: Predictor,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(Switchable(forecaster), layers)

    def disable(self, disabled: bool) -> None:
        if disabled == self.disabled:
            return
        self.disabled, self._priority = disabled, None
        for predictor in (*self._by_seq.values(), *self._now.values(), self._last):
            assert isinstance(predictor, Switchable)
            predictor.disable(disabled)


class Switchable:
    """A forecaster, or while that is disabled, decayed use.

    What tokens are routed to meanwhile is kept, and told to the forecaster when it is enabled.
    """

    def __init__(self, forecaster: Predictor) -> None:
        self.name = forecaster.name
        self._layers, experts = forecaster.scores().shape
        self._forecaster, self._plain = forecaster, DecayedUse(self._layers, experts)
        self._current: Predictor = forecaster
        self._missed: deque[list[list[int]]] = deque(maxlen=REMEMBERED)  # [T][L][K]
        self._token: list[list[int]] = []

    def fork(self) -> Switchable:
        other = copy.copy(self)
        other._forecaster, other._plain = self._forecaster.fork(), self._plain.fork()
        other._current = other._plain if self._disabled else other._forecaster
        other._missed, other._token = self._missed.copy(), [*self._token]
        return other

    def disable(self, disabled: bool) -> None:
        if disabled != self._disabled:
            self._catch_up()
            self._current = self._plain if disabled else self._forecaster

    def observe(self, layer: int, experts: Collection[int]) -> None:
        self._current.observe(layer, experts)
        if self._disabled:
            self._token.append(list(experts))
        else:
            self._plain.observe(layer, experts)

    def reconsider(self) -> None:
        self._current.reconsider()

    def end_token(self) -> None:
        self._current.end_token()
        if self._disabled:
            if len(self._token) == self._layers:
                self._missed.append(self._token)
            self._token = []
        else:
            self._plain.end_token()

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        self._catch_up()
        self._plain.prime(ids_TLK)
        self._forecaster.prime(ids_TLK)

    def scores(self) -> Scores:
        return self._current.scores()

    def next_uses(self) -> Scores:
        return self._current.next_uses()

    @property
    def by_token(self) -> bool:
        return self._current.by_token

    def begin_token(self, token: int) -> None:
        self._current.begin_token(token)

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        self._current.learn(tokens, ids_TLK)

    @property
    def _disabled(self) -> bool:
        return self._current is self._plain

    def _catch_up(self) -> None:
        if self._missed:
            # A token whose experts were acquired in parts (`together`) may have fewer of them.
            width = min(len(experts) for token in self._missed for experts in token)
            ids = [[experts[:width] for experts in token] for token in self._missed]
            self._forecaster.prime(np.array(ids, np.intp))
            self._missed.clear()
