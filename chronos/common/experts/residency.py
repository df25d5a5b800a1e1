"""Which expert sits in which slot, what is evicted next, and what must not be.

A `Residency` is bookkeeping only: no tensors, no files, no locks (its owner holds one). A slot is
EMPTY, LOADING (claimed, bytes on their way) or READY; READY slots may be pinned. Slots are pooled
over all layers. A `Policy` ranks keys; the lowest-ranked READY slot nobody holds is the victim.
A prefetched slot is speculative: for a few tokens it is protected, but no more than half of the
slots at a time can be taken from other experts that way, and a demand may always take it back.
Sources: least recently used; frequency with exponential decay (LRFU, Lee et al. 2001).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from chronos.common.model.weights import Key

# On two real traces at a quarter of the experts, 0.90 to 0.96 hit within 0.5 % of the best.
LFU_DECAY = 0.95
_PROTECTED = 1e300  # above every priority, below infinity
NOBODY: Mapping[int, Collection[int]] = MappingProxyType({})
CERTAIN = 1e100  # the priority of what is known to be needed, above all that is only likely to be


class Policy(Protocol):
    """Ranks every (layer, expert), and may forecast what is needed next. Called under the lock of
    the tier it serves, on the thread of whoever runs the model."""

    @property
    def name(self) -> str:
        """As `--predictor` has it."""

    forecasts: bool  # true: it ranks absent keys too, and a prefetch must outrank its victim
    can_disable: bool  # whether `disable` spares time; else it does nothing

    @property
    def by_token(self) -> bool:
        """Whether it forecasts a token best when its id is known: `begin_token`, `learn`."""

    @property
    def priority(self) -> NDArray[np.float64]:
        """[L, E], higher = keep, all below 1e300. CERTAIN: known to be needed, so reading it ahead
        is no speculation. Infinity: never evicted."""

    def follow(self, seqs: Sequence[int]) -> None:
        """Tokens of these sequences, one each, are run from now on."""

    def fork(self, seq: int, new: int) -> None:
        """A sequence `new` begins where `seq` is."""

    def drop(self, seq: int) -> None:
        """A sequence has ended."""

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        """These experts of a layer are needed now. Their reads wait for this to return. by: what
        each of several sequences needs, where that is known."""

    def reconsider(self) -> None:
        """The reads of what was observed last have begun: time for what takes longer."""

    def end_token(self) -> None: ...

    def begin_prompt(self) -> None:
        """Until `end_prompt`, `observe` gets what whole chunks of tokens need of a layer."""

    def end_prompt(self, ids_TLK: NDArray[Any], seq: int = 0) -> None:
        """What each token of the sequence's prompt was routed to, in order."""

    def begin_token(self, *tokens: int) -> None:
        """The tokens with these ids, one of each sequence that is followed, are run next."""

    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None:
        """Tokens of a prompt were routed like this."""

    def next_uses(self) -> NDArray[np.float64]:
        """[L, E], the chance that a layer, when asked next, needs the expert."""

    def disable(self, disabled: bool) -> None:
        """Rank by something cheaper from the next token on, or not any more."""


class Counts:
    """What policies that only count uses make of the other calls. What is told of prompts does not
    change their counts: each layer's chunk counts as one."""

    forecasts = can_disable = by_token = False

    def follow(self, seqs: Sequence[int]) -> None: ...
    def fork(self, seq: int, new: int) -> None: ...
    def drop(self, seq: int) -> None: ...
    def reconsider(self) -> None: ...
    def begin_prompt(self) -> None: ...
    def end_prompt(self, ids_TLK: NDArray[Any], seq: int = 0) -> None: ...
    def begin_token(self, *tokens: int) -> None: ...
    def learn(self, tokens: Sequence[int], ids_TLK: NDArray[Any]) -> None: ...
    def disable(self, disabled: bool) -> None: ...
    def next_uses(self) -> NDArray[np.float64]:
        raise AssertionError("asked of a policy that does not forecast")


class LRU(Counts):
    """Least recently used."""

    name = "lru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.priority = np.zeros((num_layers, num_experts))
        self._rows = list(self.priority)  # views: indexing a row costs half of indexing the matrix
        self._now = 0.0

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        self._now += 1.0
        self._rows[layer][list(experts)] = self._now

    def end_token(self) -> None:
        pass


class DecayedLFU(Counts):
    """Number of uses, each fading by `decay` per token.

    Uses are noted at once and added up when the ranking is asked for: a NumPy update costs 4 us,
    and a layer that misses nothing asks for no ranking.
    """

    name = "lfu"

    def __init__(self, num_layers: int, num_experts: int, decay: float = LFU_DECAY) -> None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], not {decay}")
        self._uses = np.zeros((num_layers, num_experts))
        self._decay = decay
        self._noted: list[int] = []  # indices into the raveled uses

    @property
    def priority(self) -> NDArray[np.float64]:
        if self._noted:
            np.add.at(self._uses.ravel(), self._noted, 1.0)
            self._noted.clear()
        return self._uses

    def observe(
        self, layer: int, experts: Collection[int], by: Mapping[int, Collection[int]] = NOBODY
    ) -> None:
        first = layer * self._uses.shape[1]
        self._noted += [first + expert for expert in experts]

    def end_token(self) -> None:
        uses = self.priority
        uses *= self._decay


class State(Enum):
    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


class Admission(NamedTuple):
    """A slot now LOADING; what it held before, and whether that was prefetched and never used."""

    slot: int
    evicted: Key | None
    wasted: bool


class Residency:
    """Slots, their keys and their pins. Not thread-safe."""

    def __init__(
        self, num_layers: int, num_experts: int, slots: int, policy: Policy, patience: int = 2
    ) -> None:
        """patience: end_token() calls for which a prefetch is protected."""
        assert slots > 0
        self.slots, self.policy = slots, policy
        self.ready: dict[Key, int] = {}  # read by the owner's fast path; written here only
        self.unused: set[int] = set()  # slots prefetched and not needed yet
        self.peak = 0
        self._shape = (num_layers, num_experts)
        self._loading: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * slots
        self._flat = np.zeros(slots, np.intp)  # slot -> index of its key into the raveled priority
        self._pins: dict[int, int] = {}
        self._empty = list(range(slots))[::-1]
        self._protected: dict[int, int] = {}  # slot -> token its protection ends at
        self._patience, self._token = patience, 0
        self._scores: NDArray[np.float64] | None = None  # by slot; see `reconsider`

    @property
    def live(self) -> int:
        """Slots LOADING or READY."""
        return self.slots - len(self._empty)

    def reconsider(self) -> None:
        """The policy's ranks may have changed. Until then, what admissions in a row compare is
        worked out once: each of them takes a slot away and changes nothing else."""
        self._scores = None

    def lookup(self, key: Key) -> int | None:
        """The slot that holds `key` or is being filled with it."""
        slot = self.ready.get(key)
        return self._loading.get(key) if slot is None else slot

    def key(self, slot: int) -> Key | None:
        """What the slot holds or is being filled with."""
        return self._keys[slot]

    def state(self, slot: int) -> State:
        key = self._keys[slot]
        if key is None:
            return State.EMPTY
        return State.READY if key in self.ready else State.LOADING

    def admit(self, key: Key, *, demand: bool) -> Admission | None:
        """Claim a slot for an absent key, evicting if need be.

        None: every slot is pinned or loading; or the key is a prefetch and would displace another
        protected one, exceed the prefetches' half, or not outrank its victim under a forecasting
        policy. One that is certain to be needed displaces all that is not.
        """
        assert self.lookup(key) is None, f"{key} is admitted twice"
        assert 0 <= key[0] < self._shape[0] and 0 <= key[1] < self._shape[1], key
        certain = not demand and self._certain(key)
        if self._empty:
            slot, evicted = self._empty.pop(), None
        else:
            victim = self._victim(key, demand, certain)
            if victim is None:
                return None
            slot, evicted = victim, self._keys[victim]
            assert evicted is not None
            del self.ready[evicted]
        wasted = slot in self.unused
        self.unused.discard(slot)
        self._protected.pop(slot, None)
        self._keys[slot] = key
        self._flat[slot] = key[0] * self._shape[1] + key[1]
        self._loading[key] = slot
        if self._scores is not None:
            self._scores[slot] = np.inf
        if not demand:
            self.unused.add(slot)
            if not certain:  # its priority keeps it, and no longer than until its use
                self._protected[slot] = self._token + self._patience
        self.peak = max(self.peak, self.live)
        return Admission(slot, evicted, wasted)

    def mark_ready(self, slot: int) -> None:
        key = self._keys[slot]
        assert key is not None
        del self._loading[key]
        self.ready[key] = slot
        self._scores = None

    def mark_failed(self, slot: int) -> None:
        """LOADING back to EMPTY; whoever pinned the slot loses the pin."""
        key = self._keys[slot]
        assert key is not None
        del self._loading[key]
        self.touch(slot)
        self._pins.pop(slot, None)
        self._keys[slot] = None
        self._empty.append(slot)
        self._scores = None

    def restore(self, slot: int, evicted: Key) -> None:
        """Take an admission back before anything was overwritten."""
        self.mark_failed(slot)
        self._empty.remove(slot)
        self._keys[slot] = evicted
        self._flat[slot] = evicted[0] * self._shape[1] + evicted[1]
        self.ready[evicted] = slot

    def pin(self, slot: int) -> None:
        """Hold a slot for use: it is not evicted before as many `unpin`, and no longer unused."""
        pins = self._pins
        pins[slot] = pins.get(slot, 0) + 1
        if self._scores is not None:
            self._scores[slot] = np.inf
        if slot in self.unused:
            self.touch(slot)

    def touch(self, slot: int) -> None:
        """Its key was needed: not unused any more, and in need of no protection."""
        self.unused.discard(slot)
        if self._protected.pop(slot, None) is not None:
            self._scores = None

    def unpin(self, slot: int) -> None:
        count = self._pins[slot] - 1
        if count:
            self._pins[slot] = count
        else:
            del self._pins[slot]
            self._scores = None

    def pinned(self, slot: int) -> bool:
        return slot in self._pins

    def protect(self, slot: int) -> None:
        """Its key is expected to be needed soon: spare it for `patience` tokens if possible."""
        self._scores = None
        self._protected[slot] = self._token + self._patience

    def end_token(self) -> None:
        """Protections run out. Whoever owns the policy tells it."""
        self._token += 1
        if self._protected:
            kept = {s: until for s, until in self._protected.items() if until > self._token}
            self._protected = kept
        self._scores = None

    def _certain(self, key: Key) -> bool:
        return bool(self.policy.priority[key] >= CERTAIN)

    def _victim(self, key: Key, demand: bool, certain: bool) -> int | None:
        speculative = not (demand or certain)
        if speculative and 2 * len(self.unused & self._protected.keys()) >= self.slots:
            return None
        score = self._scores
        if score is None:
            score = self._scores = self.policy.priority.ravel()[self._flat]
            _put(score, self._protected, _PROTECTED)
            _put(score, self._loading.values(), np.inf)
            _put(score, self._pins, np.inf)
        slot = int(score.argmin())
        lowest = float(score[slot])
        if lowest == np.inf:
            return None
        if not demand:
            ranks = certain or self.policy.forecasts
            bar = self.policy.priority[key] if ranks else _PROTECTED
            if lowest >= bar:
                return None
        return slot


def _put(score: NDArray[np.float64], slots: Iterable[int], value: float) -> None:
    chosen = list(slots)
    if chosen:
        score[chosen] = value
