"""What to load next, and how much: forecasts into prefetch keys, and the rate they may go at.

`expected_use` turns a forecast into one score per expert, `plan` picks keys within an allowance of
bytes, `PrefetchController` sets that allowance from the link time demand reads leave idle and turns
prefetch off where it does not pay. Policy only: nothing here reads bytes, holds tensors or looks
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

PAYS = 0.5  # used fraction of prefetched bytes at break-even; PrefetchController says why


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


class PrefetchController:
    """How many bytes may be prefetched for the next token; turns itself off where it does not pay.

    The rule. The link is idle for `token_s - demand_bytes / link_bytes_per_s` of a token; a share
    of what it could carry in that time is granted. Every `window_tokens` tokens (or later, once
    four records have been prefetched) the used fraction of the prefetched bytes is judged:

    - at least `pays`: the share doubles, up to all of the idle time;
    - below: it halves, and below `min_share` it becomes 0 - prefetch is off. After `rest_tokens`
      tokens a probe runs at `min_share`; every failed probe doubles the rest, up to
      `max_rest_tokens`, and a probe that pays resets it.

    Why one half pays: a used prefetch spares exactly one demand read; a wasted one displaces at
    most one resident, so it costs at most one. At one half or more, demand reads cannot grow; and
    as only idle time is granted and demand reads overtake prefetches in flight, waits cannot
    either. That holds while the link has idle time to speak of; `LinkUse` asks for more on a busy
    one. What is left is the price of probing: for a useless forecast, one window at `min_share`
    of the idle time in every `max_rest_tokens`.
    """

    _EVIDENCE_RECORDS = 4
    _SMOOTHING = 0.25  # weight of the newest token in the averages

    def __init__(
        self,
        record_bytes: int,
        *,
        pays: float = PAYS,
        window_tokens: int = 8,
        start_share: float = 0.25,
        min_share: float = 1 / 16,
        rest_tokens: int = 32,
        max_rest_tokens: int = 2048,
    ) -> None:
        self.record_bytes, self.pays, self.window_tokens = record_bytes, pays, window_tokens
        self.min_share, self.rest_tokens = min_share, rest_tokens
        self.max_rest_tokens = max_rest_tokens
        self.share = start_share  # of the idle link time; 0 while prefetch is off
        self._rest = rest_tokens
        self._tokens = 0  # in this window, or since prefetch went off
        self._prefetched = self._used = 0
        self._token_s = self._demand_bytes = -1.0  # running averages; -1 before the first token
        self._credit = 0.0

    def allowance(self, in_flight_bytes: int = 0) -> int:
        """Bytes that may be prefetched now, given prefetches asked for and not yet finished."""
        if self.share == 0.0:
            return 0
        return max(0, int(self._credit) - in_flight_bytes)

    def end_token(
        self,
        *,
        token_s: float,
        link_bytes_per_s: float,
        demand_bytes: int,
        prefetched_bytes: int,
        used_bytes: int,
    ) -> None:
        """Account for one token: its wall time in seconds, the link's rate for records, and bytes.

        `demand_bytes` were read because they were needed at once, `prefetched_bytes` were asked for
        by prefetch, `used_bytes` were prefetched at some time and first
        used in this token, those that were still on their way (late) included.
        """
        self._token_s = self._average(self._token_s, token_s)
        self._demand_bytes = self._average(self._demand_bytes, demand_bytes)
        self._prefetched += prefetched_bytes
        self._used += used_bytes
        self._tokens += 1
        self._judge()
        idle = max(0.0, self._token_s * link_bytes_per_s - self._demand_bytes) * self.share
        # Credit is carried so that a slow link saves up for a whole record, but no further: what
        # was not wanted in one token is not a burst in a later one.
        room = max(idle, float(self.record_bytes))
        self._credit = min(room, max(0.0, self._credit - prefetched_bytes) + idle)

    def _average(self, mean: float, value: float) -> float:
        return value if mean < 0 else mean + self._SMOOTHING * (value - mean)

    def _judge(self) -> None:
        if self.share == 0.0:
            if self._tokens >= self._rest:
                self._rest = min(2 * self._rest, self.max_rest_tokens)  # if this probe fails too
                self._open_window(self.min_share)
            return
        enough = self._prefetched >= self._EVIDENCE_RECORDS * self.record_bytes
        if self._tokens < self.window_tokens or not enough:
            return
        if self._used >= self.pays * self._prefetched:
            self._rest = self.rest_tokens
            self._open_window(min(1.0, 2 * self.share))
        else:
            half = self.share / 2
            self._open_window(half if half >= self.min_share else 0.0)

    def _open_window(self, share: float) -> None:
        self.share = share
        self._tokens = self._prefetched = self._used = 0
