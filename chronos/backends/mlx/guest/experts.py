"""The routed experts of a guest's layer: what takes the place of MLX-LM's `SwitchGLU`, `SwitchMLP`.

MLX-LM's blocks choose experts, call their switch with (x, ids) and weigh what it returns. Here the
ids go to the host and the experts come from an arena's slots; their codec computes, with the bits
that MLX-LM's own products have. The routing weights never reach a
switch and are not recorded. A short input gathers once, when all its experts are there; a longer
one expert by expert as they land.

Shape legend: T tokens, D hidden, F expert hidden, E experts, S slots, K top-k, N routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.backends.mlx.codecs import Switch, codec_of
from chronos.backends.mlx.moe import Routing
from chronos.backends.mlx.streamed import climbs, recording, routed_outputs
from chronos.common.experts.feed import Source
from chronos.common.experts.lease import Lease
from chronos.common.experts.prefetch import NEXT_GATE

# From how many pairs on MLX-LM sorts them by expert: the gather is another kernel then.
_SORT_PAIRS = 64
Shared = Callable[[mx.array], mx.array] | None
# The next layer with experts, and what its own gate would choose.
Ahead = tuple[int, Callable[[mx.array], mx.array]] | None


@dataclass
class ExpertsCall:
    """What one forward pass tells all layers of a guest, and what they tell it."""

    source: Source | None = None  # None: the layers hold their experts
    replay: Callable[[int], tuple[mx.array, mx.array]] | None = None
    last_only: bool = False
    routing: list[Routing] = field(default_factory=list)
    through: Callable[..., Any] | None = None  # what layers are called through, in training
    held: mx.array | None = None  # computed, not evaluated, with slots that the next layer frees


# Passes of several sequences take turns inside the library's code, so it is no attribute.
CALL: ContextVar[ExpertsCall] = ContextVar("CALL")


def current() -> ExpertsCall:
    """What the pass under way tells; nothing in particular outside of one."""
    return CALL.get(None) or ExpertsCall()


def unweighted(ids_TK: mx.array) -> Routing:
    """A layer's routing as far as it is known here."""
    unknown_T0 = mx.zeros((len(ids_TK), 0))
    return Routing(ids_TK, unknown_T0, unknown_T0)


class Layer(nn.Module):
    """One layer's routed experts, for a guest that holds them: records the routing, replays one."""

    def __init__(self, layer: int, block: nn.Module) -> None:
        super().__init__()
        self.layer, self.block = layer, block

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        y: mx.array = self.block(x, self._routed(ids))
        return y

    def _routed(self, ids: mx.array) -> mx.array:
        """The ids to compute: the block's, or those that are replayed. Both in the block's order of
        weights."""
        call, K = current(), ids.shape[-1]
        if call.replay is not None:
            ids = call.replay(self.layer)[0].reshape(ids.shape)
        ids_TK = ids.reshape(-1, K)
        call.routing.append(unweighted(ids_TK))
        return ids


class StreamedLayer(Layer):
    """The same from an arena's slots."""

    def __init__(
        self,
        layer: int,
        block: nn.Module,
        switch: Switch,
        encoding: str,
        shared: Shared,
        ahead: Ahead,
    ) -> None:
        """shared: what the layer's shared experts make of x, for fallback; None where they are not
        known."""
        super().__init__(layer, block)
        self.shapes = _shapes(block)
        del self.block  # its weights are stand-ins
        self._switch, self.codec = switch, codec_of(encoding)
        self.lora: dict[str, Any] = {}  # as in the native MoE
        self.shared = shared
        self._ahead = ahead

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        ids, call = self._routed(ids), current()
        source = call.source
        assert source is not None
        next_ids = self._guess(x, source) if ids.size == ids.shape[-1] else None
        # The one wait of this layer, with the input in it as in the native MoE; and the last
        # layer's output, which the input need not depend on in every architecture.
        own = [array for lora in self.lora.values() for array in lora.arrays()]
        if climbs(source) or recording(x, ids, next_ids, call.held, *own):
            return self._recorded(x, ids, source)
        mx.eval(x, ids, next_ids, call.held)
        x_TD, ids_TK = x.reshape(-1, x.shape[-1]), np.array(ids).reshape(-1, ids.shape[-1])
        used = np.unique(ids_TK).tolist()
        lease = source.acquire(self.layer, used)  # its reads go first
        if next_ids is not None:
            assert self._ahead is not None
            best: list[int] = np.array(next_ids).reshape(-1).tolist()
            source.foresee(NEXT_GATE, best, self._ahead[0])
        at_once = len(ids_TK) == 1 and not self.lora
        compute = self._at_once if at_once else self._as_they_land
        y_NA, missing = compute(x_TD, ids_TK, lease)
        call.held = y_NA
        y_TKA = y_NA.reshape(*ids_TK.shape, -1)
        if missing:
            assert self.shared is not None
            gone_TK = np.isin(ids_TK, missing)
            source.record_fallback(float(gone_TK.sum()) / ids_TK.shape[1])
            y_TKA = mx.where(mx.array(gone_TK)[..., None], self.shared(x_TD)[:, None], y_TKA)
        return y_TKA.reshape(*ids.shape, -1).astype(y_NA.dtype)

    def _guess(self, x: mx.array, source: Source) -> mx.array | None:
        """The next layer's gate on this layer's state: right more often than not, and in time for a
        read while this layer computes. A prefetcher takes it, where it pays."""
        if self._ahead is None or not source.wants(NEXT_GATE):
            return None
        return self._ahead[1](x)

    def _at_once(
        self, x_1D: mx.array, ids_1K: np.ndarray, lease: Lease
    ) -> tuple[mx.array, list[int]]:
        places, ids = lease.all(), ids_1K[0].tolist()
        x_KD = mx.broadcast_to(x_1D, (len(ids), x_1D.shape[1]))
        missing = [expert for expert, place in places.items() if place is None]
        if len(missing) == len(places):
            return mx.zeros(x_KD.shape, x_KD.dtype), missing
        stack = next(place.stack for place in places.values() if place is not None)
        places_K = np.array([places[expert].slot if places[expert] else 0 for expert in ids])
        return self._experts(x_KD, places_K, stack, False), missing

    def _as_they_land(
        self, x_TD: mx.array, ids_TK: np.ndarray, lease: Lease
    ) -> tuple[mx.array, list[int]]:
        K, missing = ids_TK.shape[1], []
        flat_N, order, outputs = ids_TK.reshape(-1), [], []
        for expert, place in lease:
            pairs = np.flatnonzero(flat_N == expert)
            order.append(pairs)
            if place is None:
                missing.append(expert)
                outputs.append(mx.zeros((len(pairs), x_TD.shape[1]), x_TD.dtype))
                continue
            places_N = np.full(len(pairs), place.slot)
            sort = len(flat_N) >= _SORT_PAIRS
            x_nD = x_TD[mx.array(pairs // K)]
            adapter = self.lora.get(f"e{expert}")
            outputs.append(self._experts(x_nD, places_N, place.stack, sort, adapter))
            mx.eval(outputs[-1])  # the slot may be overwritten once the next is asked for
        return mx.concatenate(outputs)[mx.array(np.argsort(np.concatenate(order)))], missing

    def _recorded(self, x: mx.array, ids: mx.array, source: Source) -> mx.array:
        """With gradients: the layer's own call, and no expert is missing."""
        sort = ids.size >= _SORT_PAIRS

        def compute(expert: int, x_nD: mx.array, place: Any, own: Sequence[mx.array]) -> mx.array:
            adapter = self.lora[f"e{expert}"].of(own) if own else None
            places_N = np.full(len(x_nD), place.slot)
            return self._experts(x_nD, places_N, place.stack, sort, adapter)

        adapters = {int(name[1:]): lora.arrays() for name, lora in self.lora.items()}
        x_TD, ids_TK = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        y_TKD = routed_outputs(x_TD, ids_TK, source, self.layer, compute, adapters)
        return y_TKD.reshape(*ids.shape, -1)

    def _experts(
        self,
        x_ND: mx.array,
        places_N: np.ndarray,
        stack: Any,
        sort: bool,
        adapter: Callable[[str, mx.array], mx.array] | None = None,
    ) -> mx.array:
        """The expert at place n of a stack for row n: [N, D]."""
        at_N = mx.array(places_N.astype(np.uint32))
        more = () if adapter is None else (adapter,)
        y_ND: mx.array = self.codec.gathered(x_ND, stack, at_N, self._switch, sort, *more)
        return y_ND


def _shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of an expert, gate and up as one."""
    if "fc1" in block:
        first, last, name, parts = block["fc1"], block["fc2"], "up_proj", 1
    else:
        first, last, name, parts = block["gate_proj"], block["down_proj"], "gate_up_proj", 2
    return {
        name: (parts * first.output_dims, first.input_dims),
        "down_proj": (last.output_dims, last.input_dims),
    }
