"""The cache of a guest: the library's own, what rotated its keys, and its layers as steps see them.

Not known here: what a cache holds, and when it is thrown away (`model`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chronos.backends.torch.fast.capture import opaque
from chronos.backends.torch.guest.experts import current
from chronos.backends.torch.model import Cache


@dataclass
class GuestCache(Cache):
    """length: of the sequence when its last piece was rotated; ids: its tokens [1, T], kept where
    the frequencies depend on the length."""

    length: int = 0
    ids: Tensor | None = None

    def copied(self) -> GuestCache:
        return replace(self, layers=deepcopy(self.layers))

    def cut(self, tokens: int) -> bool:
        """Keys and values can be cut, recurrent states and windows that are full cannot."""
        layers = layers_of(self)
        if not is_watched(layers) or any(map(_is_full, layers)):
            return False
        for layer in layers:
            layer.crop(tokens - self.position)
        self.position = tokens
        return True

    def arrays(self) -> dict[str, Tensor] | None:
        """See Cache; None where the library keeps more than keys and values."""
        layers = layers_of(self)
        if not is_watched(layers) or self.ids is not None:
            return None
        found: dict[str, Tensor] = {}
        for at, layer in enumerate(layers):
            if layer.is_initialized:
                found |= {f"layers.{at}.keys": layer.keys, f"layers.{at}.values": layer.values}
        return found

    def restore(self, tokens: int, arrays: Mapping[str, Tensor]) -> None:
        """See Cache."""
        for at, layer in enumerate(layers_of(self)):
            keys, values = (arrays.get(f"layers.{at}.{name}") for name in ("keys", "values"))
            if keys is None or values is None:
                continue
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = tokens
        self.position = tokens


def layers_of(cache: Cache | None) -> Sequence[Any]:
    """The library's layers, where its cache has some."""
    return () if cache is None else getattr(cache.layers[0], "layers", ())


def watched(cache: Any) -> Any:
    """Have a cache's layers updated in calls that a recording keeps whole."""
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.update = partial(_update, index)
    return cache


def is_watched(layers: Sequence[Any]) -> bool:
    """Whether all that they keep is keys and values."""
    return bool(layers) and all("update" in vars(layer) for layer in layers)


def _is_full(layer: Any) -> bool:
    sliding = type(layer) is DynamicSlidingWindowLayer
    return sliding and layer.cumulative_length >= layer.sliding_window


def _update(index: int, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
    return opaque(_append, index, keys, values)


def _append(index: int, keys: Tensor, values: Tensor) -> Any:
    layer = current().caches[index]
    return type(layer).update(layer, keys, values)
