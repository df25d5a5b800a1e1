"""What ranks the experts of a model that announces its needs (`routing_source = "history"`).

Such a model has experts that stay in memory, and for the others it says, the moment a layer has
routed a token, which of them that layer will need for the next one. That is exact, so nothing is
forecast: what is announced is read behind what is needed now, and kept until it was used.
Announcements are kept by sequence; a fork has those of the sequence it came from.
Not covered: the choice itself (`common.model.history`, `Model.upcoming`), and when reads begin
(`feed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chronos.common.errors import UsageError
from chronos.common.experts.residency import CERTAIN, NOBODY, Counts, DecayedLFU
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import Geometry
from chronos.common.model.weights import Key

ANNOUNCED = "announced"  # asks for what a layer will need for the next token


class KnownAhead(Counts):
    """Always-resident experts first, then what is announced, then what was used more."""

    name = "known-ahead"

    def __init__(self, config: ModelConfig) -> None:
        layers, experts = config.num_hidden_layers, config.num_experts
        self.counts = DecayedLFU(layers, experts)  # of uses; all that a tier behind this one needs
        resident = config.num_resident_experts
        follow = [layer for layer in range(layers) if config.routing_of(layer) == "history"]
        self.resident: list[Key] = [(layer, e) for layer in follow for e in range(resident)]
        # Slots below which what is announced could not be kept until it was used.
        self.least = config.least_slots
        self._streamed = dict.fromkeys(follow, resident)  # number of the first one
        self._width = experts
        self._stay = np.array(self._places(self.resident), np.intp)
        self._announced: dict[int, dict[int, tuple[int, ...]]] = {}  # by sequence and layer
        self._keys: Counter[Key] = Counter()  # how many sequences announced each
        self._rank: NDArray[np.float64] | None = None

    @property
    def priority(self) -> NDArray[np.float64]:
        if self._rank is None:
            self._rank = self.counts.priority.copy()
            self._rank.ravel()[self._places(self._keys)] = CERTAIN
            self._rank.ravel()[self._stay] = np.inf
        return self._rank

    @property
    def announced(self) -> list[Key]:
        """What the next tokens of all sequences will need."""
        return list(self._keys)

    def streamed(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts whose use is announced."""
        first = self._streamed.get(layer)
        return [] if first is None else [expert for expert in experts if expert >= first]

    def announce(self, seq: int, layer: int, experts: Sequence[int]) -> tuple[int, ...]:
        """The next token of a sequence will need these of a layer. Returns what was announced for
        the token before."""
        layers = self._announced.setdefault(seq, {})
        before = layers.get(layer, ())
        if before == (now := tuple(experts)):  # 19 of 20 tokens of the shipped model
            return before
        layers[layer] = now
        self._keys.update((layer, expert) for expert in experts)
        self._forget(layer, before)
        self._rank = None
        return before

    def fork(self, seq: int, new: int) -> None:
        """A sequence `new` begins where `seq` is."""
        for layer, experts in self._announced.get(seq, {}).items():
            self.announce(new, layer, experts)

    def drop(self, seq: int) -> None:
        """A sequence has ended."""
        for layer, experts in self._announced.pop(seq, {}).items():
            self._forget(layer, experts)
        self._rank = None

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        self.counts.observe(layer, experts)
        self._rank = None

    def end_token(self) -> None:
        self.counts.end_token()
        self._rank = None

    def _forget(self, layer: int, experts: Iterable[int]) -> None:
        for expert in experts:
            self._keys[layer, expert] -= 1
            if not self._keys[layer, expert]:
                del self._keys[layer, expert]

    def _places(self, keys: Iterable[Key]) -> list[int]:
        """Indices into a raveled ranking."""
        return [layer * self._width + expert for layer, expert in keys]


def known_ahead(config: Geometry, predictor: str | Path = "auto") -> KnownAhead | None:
    """The policy of a model that announces its needs, None for another.

    predictor: the one that was asked for. Raises UsageError where that would have nothing to do.
    """
    if not isinstance(config, ModelConfig) or "history" not in config.routing_sources:
        return None
    if str(predictor) != "auto":
        raise UsageError(
            f"predictor {str(predictor)!r} has nothing to forecast: this model announces which"
            " experts it needs next",
            "--predictor",
            "leave it out",
        )
    return KnownAhead(config)
