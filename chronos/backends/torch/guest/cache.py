"""The cache of a guest: the library's own, what rotated its keys, and its layers as steps see them.

Not known here: what a cache holds, and when it is thrown away (`model`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chronos.backends.torch.fast.capture import opaque
from chronos.backends.torch.model import Cache


@dataclass
class GuestCache(Cache):
    """length: of the sequence when its last piece was rotated; ids: its tokens [1, T], kept where
    the frequencies depend on the length."""

    length: int = 0
    ids: Tensor | None = None


class CacheLayers:
    """The layers of the cache in use, which a replayed step appends to by their index."""

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def watch(self, cache: Any) -> Any:
        """Have a cache's layers updated in calls that a recording keeps whole."""
        for index, layer in enumerate(cache.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                layer.update = partial(self._update, index)
        return cache

    def enter(self, cache: Any) -> bool:
        """Make a cache the one in use. Whether all that it keeps is keys and values."""
        self._layers = getattr(cache, "layers", [])
        return bool(self._layers) and all("update" in vars(layer) for layer in self._layers)

    def _update(self, index: int, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        return opaque(self._append, index, keys, values)

    def _append(self, index: int, keys: Tensor, values: Tensor) -> Any:
        layer = self._layers[index]
        return type(layer).update(layer, keys, values)
