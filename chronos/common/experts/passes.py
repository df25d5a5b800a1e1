"""The order of training: every layer's experts are needed on the way up, and again on the way down.

A backward pass visits layers in reverse, so at the turn the latest layers are worth keeping, and
what each layer will need then is known from the forward pass. `UpAndDown` ranks experts by how many
layers pass before their next use, which is MIN (Belady 1966) as far as a layer's experts are all
used; a `Pass` reads the next layers ahead. Not covered: how a gradient is computed (the backends).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from chronos.common.errors import UsageError
from chronos.common.experts.feed import Feed, Foreseen, Source
from chronos.common.experts.lease import Lease
from chronos.common.experts.residency import NOBODY, Counts
from chronos.common.model.weights import Key

_T = TypeVar("_T")
AHEAD = "pass"  # asks for experts that a pass will come to
_DEPTH = 2  # layers read ahead


class UpAndDown(Counts):
    """Ranks an expert by the layers until its next use. [L, E], minus that distance."""

    name = "passes"
    forecasts = True  # a read ahead must be needed sooner than its victim

    def __init__(self, layers: Sequence[int], shape: tuple[int, int]) -> None:
        """layers: those that have experts. shape: layers and experts of the model."""
        self.priority = np.zeros(shape)
        self._layers = sorted(layers)
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._at, self._down = -1, False
        self._used: dict[int, Collection[int]] = {}  # by layer, in the pass before or in this one

    def begin(self) -> None:
        """A forward pass starts."""
        self._at, self._down = -1, False

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        place, top = self._place[layer], len(self._layers) - 1
        self._down = self._down or place <= self._at
        self._at = place
        if not self._down:
            self._used[layer] = list(experts)
        for other, height in self._place.items():
            if self._down:
                again, sooner = place + 1 + height, place - height
                known = height < place
            else:
                again, sooner = 2 * top + 2 - place + height, 2 * top + 1 - place - height
                known = height <= place
                if not known:  # all of a layer that is still to come
                    again = height - place
            self.priority[other] = -again
            if known:
                self.priority[other, list(self._used.get(other, ()))] = -sooner

    def end_token(self) -> None:
        pass

    def upcoming(self) -> list[Key]:
        """What the next layers of this pass need, soonest first: known on the way down, on the way
        up what they needed in the pass before."""
        step = -1 if self._down else 1
        places = [self._at + step * (i + 1) for i in range(_DEPTH)]
        layers = [self._layers[p] for p in places if 0 <= p < len(self._layers)]
        return [(layer, expert) for layer in layers for expert in self._used.get(layer, ())]


class Pass:
    """The source of experts of one forward pass, and of the backward pass that may follow it."""

    def __init__(self, feed: Feed) -> None:
        self._tier, self._step = feed.tier, feed.step()
        policy = feed.tier.policy
        self._order = policy if isinstance(policy, UpAndDown) else None
        if self._order is not None:
            self._order.begin()

    def acquire(
        self, layer: int, experts: Sequence[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> Lease:
        """by: of several passes side by side, which are one here."""
        lease = self._step.acquire(layer, experts)
        if self._order is not None:
            self._tier.prefetch(self._order.upcoming(), AHEAD)
        return lease

    @property
    def exact(self) -> bool:
        return self._step.exact

    def record_fallback(self, weight: float) -> None:
        self._step.record_fallback(weight)

    def wants(self, source: str) -> bool:
        return False

    def foresee(self, source: str, scores: Foreseen, layer: int = -1) -> None: ...

    def announce(self, layer: int, experts: Sequence[int], place: int = 0) -> None: ...


class Kept:
    """A source of one pass whose layers are computed again for their gradients: what a layer's
    experts gave is kept, so that a second time none of them is read or computed.

    climbs: whether the pass is one of several that go up and down together. goes_down: whether it
    is on its way down. noted: what the backend knows of the experts of the layer it is at then, to
    take their gradients for all of them at once.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._given: dict[int, Any] = {}
        self.climbs = self.goes_down = False
        self.noted: dict[int, Any] = {}

    def given(self, layer: int, compute: Callable[[], _T]) -> _T:
        """What a layer's experts give, or gave before."""
        if layer not in self._given:
            self._given[layer] = compute()
        return self._given[layer]  # type: ignore[no-any-return]

    @property
    def exact(self) -> bool:
        return bool(self._source.exact)

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        lease: Lease = self._source.acquire(layer, experts)
        return lease

    def record_fallback(self, weight: float) -> None:
        self._source.record_fallback(weight)

    def wants(self, source: str) -> bool:
        return False

    def foresee(self, source: str, scores: Foreseen, layer: int = -1) -> None: ...

    def announce(self, layer: int, experts: Sequence[int]) -> None: ...


def require_all(source: Source) -> None:
    """Raises UsageError where a lease may yield None: what stands in then has another gradient."""
    if not source.exact:
        raise UsageError(
            "gradients need every expert, and this model may run without some",
            "",
            "load it with miss=exact",
        )
