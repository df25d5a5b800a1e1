"""The loops under `simulate`: one stream of requests against one pool of slots, with no frills.

A policy is an array: the rank a key gets at each use and keeps until the next, higher = keep. What
remains is to drop the lowest ranks, which heaps do in pure Python at 1 to 2 microseconds per
routed expert. Knows nothing of files, layers or bytes. `simulate` says what the policies mean.

Shape legend: N requests in order, K keys per request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np
import numpy.typing as npt

_KNOWN = 1e12  # ranks of uses inside the window lie above every LFU rank
_BLOCK = 1 << 10  # requests turned into Python lists at a time

Ranks = npt.NDArray[np.float64]


class Stream:
    """N requests of K keys each to one pool, in order; when each key is used next, last, at all."""

    def __init__(
        self, keys_NK: npt.NDArray[Any], num_keys: int, per_token: int, start: Sequence[int]
    ) -> None:
        self.keys_NK, self.num_keys = keys_NK, num_keys
        self.events_per_token, self.start = per_token, start
        flat = keys_NK.astype(np.int16 if num_keys < 1 << 15 else np.int32).ravel()
        self._order = np.argsort(flat, kind="stable")  # 16 bits: radix sort
        self._event = self._order // keys_NK.shape[1]
        sorted_keys = flat[self._order]
        self._begins = np.flatnonzero(np.diff(sorted_keys, prepend=-1))  # of each key's uses

    def next_NK(self) -> Ranks:
        """Event of the key's next use; inf if there is none."""
        after = np.append(self._event[1:].astype(np.float64), np.inf)
        after[self._begins[1:] - 1] = np.inf
        return self._unsorted(after)

    def previous_NK(self) -> Ranks:
        """Event of the key's last use before this; -inf if there is none."""
        before = np.append(-np.inf, self._event[:-1].astype(np.float64))
        before[self._begins] = -np.inf
        return self._unsorted(before)

    def first_use(self) -> dict[int, int]:
        keys = self.keys_NK.ravel()[self._order[self._begins]]
        return dict(zip(keys.tolist(), self._event[self._begins].tolist(), strict=True))

    def lfu_NK(self, decay: float) -> Ranks:
        """Log of the key's decayed count right after each use, as if every count had grown by
        1 / decay per token since the start: between uses these ranks stay comparable."""
        uses = self._event // self.events_per_token * -math.log(decay)
        for part in np.split(uses, self._begins[1:]):
            np.logaddexp.accumulate(part, out=part)
        return self._unsorted(uses)

    def _unsorted(self, values: Ranks) -> Ranks:
        ranks = np.empty(len(values))
        ranks[self._order] = values
        return ranks.reshape(self.keys_NK.shape)


def missing_keys(stream: Stream, slots: int, policy: str, decay: float) -> Iterator[list[int]]:
    """The keys each request has to read, request by request."""
    if policy in ("lru", "lfu"):
        return _run_ranked(stream, slots, policy, decay)
    return _run_min(stream, slots, policy, decay)


def _run_ranked(stream: Stream, slots: int, policy: str, decay: float) -> Iterator[list[int]]:
    """LRU and LFU. Ranks only rise, so a slot's heap entry may lag until it surfaces.

    One loop with everything inside it: calls would double its time.
    """
    shape = stream.keys_NK.shape
    now_NK = np.broadcast_to(np.arange(shape[0], dtype=np.float64)[:, None], shape)
    ranks_NK = now_NK if policy == "lru" else stream.lfu_NK(decay)
    held_by = list(stream.start)  # slot -> key
    rank = {key: float(place - len(held_by)) for place, key in enumerate(held_by)}
    heap = [(value, slot) for slot, value in enumerate(rank.values())]
    for needed, ranks in _rows(stream.keys_NK, ranks_NK):
        missing = []
        for key, value in zip(needed, ranks, strict=False):
            if key not in rank:
                missing.append(key)
            rank[key] = value
        aside = []  # entries of slots this request needs, which are no victims
        for key in missing:
            if len(held_by) < slots:
                aside.append((rank[key], len(held_by)))
                held_by.append(key)
                continue
            while True:
                value, slot = heap[0]
                victim = held_by[slot]
                if rank[victim] != value:
                    heapreplace(heap, (rank[victim], slot))
                elif victim in needed:
                    aside.append(heappop(heap))
                else:
                    break
            heappop(heap)
            del rank[victim]
            held_by[slot] = key
            aside.append((rank[key], slot))
        for entry in aside:
            heappush(heap, entry)
        yield missing


def _run_min(stream: Stream, slots: int, policy: str, decay: float) -> Iterator[list[int]]:
    """MIN and its variants. Ranks fall too, so each is pushed, and untrue entries are dropped."""
    ranks_NK, seen_NK, rank, horizon = _foresight(stream, policy, decay)
    bypass = policy != "min-admit"
    heap = [(value, key) for key, value in rank.items()]
    heapify(heap)
    rows = _rows(stream.keys_NK, ranks_NK, seen_NK)
    for event, (needed, ranks, seen) in enumerate(rows, horizon):
        for key in seen:
            if key in rank:
                rank[key] = _KNOWN - event
                heappush(heap, (rank[key], key))
        missing = []
        for entry in zip(ranks, needed, strict=False):
            value, key = entry
            if key not in rank:
                missing.append(key)
            rank[key] = value
            heappush(heap, entry)
        aside = []
        while len(rank) > slots:
            entry = heappop(heap)
            value, key = entry
            if rank.get(key) != value:
                continue
            if bypass or key not in needed:
                del rank[key]
            else:
                aside.append(entry)
        for entry in aside:
            heappush(heap, entry)
        if len(heap) > 8 * slots + 1024:
            heap = [(value, key) for key, value in rank.items()]
            heapify(heap)
        yield missing


def _foresight(
    stream: Stream, policy: str, decay: float
) -> tuple[Ranks, npt.NDArray[Any], dict[int, float], int]:
    """Rank after each use [N, K]; keys whose use `horizon` requests ahead comes into view [N, K]
    (or [N, 0]); ranks of the starting residents; horizon, 0 for unlimited foresight."""
    count = len(stream.keys_NK)
    now_N1 = np.arange(count)[:, None]
    next_NK, first = stream.next_NK(), stream.first_use()
    window = window_of(policy)
    if window is None:
        start = {key: -float(first.get(key, math.inf)) for key in stream.start}
        return -next_NK, np.empty((count, 0), np.int64), start, 0
    horizon = window * stream.events_per_token
    ranks_NK = np.where(next_NK <= now_N1 + horizon, _KNOWN - next_NK, stream.lfu_NK(decay))
    start = {  # unknown uses rank below every count, in the order given
        key: _KNOWN - first[key] if first.get(key, horizon) < horizon else float(-place)
        for place, key in enumerate(reversed(stream.start), 1)
    }
    # In view already, and ranked, where an earlier use of the same key is closer than horizon.
    fresh_NK = stream.previous_NK()[horizon:] < now_N1[: max(0, count - horizon)]
    seen_NK = np.full(stream.keys_NK.shape, -1)
    seen_NK[: len(fresh_NK)] = np.where(fresh_NK, stream.keys_NK[horizon:], -1)
    return ranks_NK, seen_NK, start, horizon


def window_of(policy: str) -> int | None:
    match = re.fullmatch(r"min-w(\d+)", policy)
    return int(match[1]) if match else None


def _rows(*arrays: npt.NDArray[Any]) -> Iterator[tuple[list[Any], ...]]:
    """Rows of several arrays as lists, converted block by block: short in time and in memory."""
    for at in range(0, len(arrays[0]), _BLOCK):
        yield from zip(*(array[at : at + _BLOCK].tolist() for array in arrays), strict=False)
