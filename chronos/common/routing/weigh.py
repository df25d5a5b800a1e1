"""Forecasts for as long as they spare more time than they take, else decayed use.

A forecaster keeps better experts, and its arithmetic takes time that a small model or a fast disk
never gives back. Which it is depends on the machine, so it is measured while the model runs: beside
the cache that forecasts keep, a shadow of the one that decayed use would keep counts what that
would have missed, each miss at the wait that misses really had. Bookkeeping only: the shadow reads
nothing. Not covered: prefetch, whose controller weighs its own planning (`plan`, `prefetch`).

Shape legend: T tokens, L layers, K top-k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from numpy.typing import NDArray

from chronos.common.residency import Residency
from chronos.common.routing.predictor import DecayedUse, Intent, Predictor, PredictorPolicy
from chronos.common.simulate import serve

FILL, JUDGED = 48, 64  # tokens that fill the shadow, and that are counted after them
KEPT = 1024  # tokens until forecasts that paid are weighed again
_REST, _LONGEST = 256, 16_384  # tokens that dropped ones rest, doubled each time


class WeighedPolicy(PredictorPolicy):
    """A policy that ranks by a forecaster until it turns out to cost more than it spares. Dropped,
    it is tried again after a later prompt, whose routing brings it up to date."""

    def __init__(
        self,
        forecaster: Predictor,
        experts: int,
        slots: int,
        layers: Sequence[int] | None = None,
        intent: Intent | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """experts: of a layer. slots: of the cache that it ranks. clock: seconds."""
        super().__init__(forecaster, layers, intent)
        self._forecaster, self._clock = forecaster, clock
        self._shape, self._slots = (self._layers[-1] + 1, experts), slots
        self._rest, self._since = _REST, 0  # tokens: to rest if dropped, since the last verdict
        self._begin_trial()

    @property
    def dropped(self) -> bool:
        """Whether decayed use ranks now."""
        return self.predictor is not self._forecaster

    def observe(self, layer: int, experts: Collection[int]) -> None:
        begin = self._clock()
        super().observe(layer, experts)
        if self._shadow is not None and self._pass is None:
            self._spent_s += self._clock() - begin
            missed = serve([self._cache], layer, list(experts), self._shadow)[0]
            self._missed += missed if self._tokens >= FILL else 0

    def end_token(self) -> None:
        super().end_token()
        self._since += 1
        if self._shadow is not None:
            self._shadow.end_token()
            self._cache.end_token()
        elif not self.dropped and self._since >= KEPT:
            self._begin_trial()

    def end_prompt(self, ids_TLK: NDArray[Any]) -> None:
        if self.dropped and self._since >= self._rest:
            self.predictor = self._forecaster
            self._rest = min(2 * self._rest, _LONGEST)
            self._begin_trial()
        if self._shadow is not None:
            self._shadow.end_prompt(ids_TLK)
        super().end_prompt(ids_TLK)

    def note_waits(self, absent: int, stall_s: float) -> None:
        if self._shadow is None:
            return
        self._tokens += 1
        if self._tokens <= FILL:
            self._spent_s = 0.0
            return
        self._absent += absent
        self._stall_s += stall_s
        if self._tokens == FILL + JUDGED:
            self._judge()

    def _begin_trial(self) -> None:
        self._plain = DecayedUse(len(self._layers), self._shape[1])
        self._shadow: PredictorPolicy | None = PredictorPolicy(self._plain, self._layers)
        self._cache = Residency(*self._shape, self._slots, self._shadow)
        self._tokens = self._absent = self._missed = 0
        self._spent_s = self._stall_s = 0.0

    def _judge(self) -> None:
        """Time waited and spent forecasting against what decayed use would have waited. Where no
        expert was waited for, any miss spared is worth the forecasts."""
        wait_s = self._stall_s / self._absent if self._absent else float("inf")
        other_s = self._missed * wait_s if self._missed else 0.0
        if self._stall_s + self._spent_s > other_s:
            self.predictor, self._priority = self._plain, None
        else:
            self._rest = _REST
        self._shadow, self._since = None, 0
