"""The mixture-of-experts layer of the MLX backend, and the LookaheadRouter.

Resident experts are one stack per layer and projection. A single token, and training, gather from
a stack by index (`gather_mm`), so a resident model never waits for a router; a streamed one waits
for its ids, then gathers from an arena's slots with the same kernels. Longer inputs run expert by
expert, streamed or not. Outputs are combined in the fixed order of the routing, so streamed and
resident results are equal bit for bit. Weights keep their stored dtype and are widened where they
are used: `gather_mm` on a CPU takes float32 only.

Shape legend: T tokens, D hidden, F expert hidden, E experts, S places of a stack, K top-k,
N = T * K routed pairs, L layers, J lookahead steps + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.backends.mlx.codecs import Expert, codec_of, silu
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Source
from chronos.common.experts.tier import HeldLease, Lease
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model.config import ModelConfig

# Below this many rows sorting them by expert costs more than the locality it gives (as in MLX-LM).
_SORT_ROWS = 64


class Routing(NamedTuple):
    """A layer's decision: ids and weights of the chosen [T, K], all probabilities [T, E], and what
    a frozen gate gives for the same states, where there is one."""

    ids_TK: mx.array
    weights_TK: mx.array
    probs_TE: mx.array
    reference_TE: mx.array | None = None


def route(probs_TE: mx.array, top_k: int, normalize: bool) -> Routing:
    """Top-k of the router probabilities, renormalised over the chosen if asked (2401.06066). Equal
    probabilities count as ordered by id."""
    # Without stop_gradient the backward pass raises: choosing has no derivative.
    ids_TK = mx.argsort(-mx.stop_gradient(probs_TE), axis=-1)[:, :top_k]
    return Routing(ids_TK, _weights_of(probs_TE, ids_TK, normalize), probs_TE)


def _weights_of(probs_TE: mx.array, ids_TK: mx.array, normalize: bool) -> mx.array:
    weights_TK = mx.take_along_axis(probs_TE, ids_TK, axis=-1)
    return weights_TK / weights_TK.sum(-1, keepdims=True) if normalize else weights_TK


def refuse_gradients(*inputs: mx.array | None) -> None:
    """Starts the evaluation of what a layer needs from the host; raises UsageError where a gradient
    is being recorded through streamed experts: its products would be differentiated with slots
    that hold other experts by then."""
    try:
        mx.async_eval(*inputs)  # unlike `mx.eval` it takes nothing that is being transformed
    except ValueError as error:
        raise UsageError(
            "gradients through streamed experts would be wrong: their memory is used again before "
            "the backward pass",
            "",
            "load the model with all its experts (resident=True), or run it outside of mx.grad",
        ) from error


class ExpertWeights(nn.Module):
    """The parameters of `count` resident "swiglu" experts as two stacks; on disk each expert has
    its own."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = mx.zeros((count, 2 * F, D))
        self.down_proj = mx.zeros((count, D, F))

    def view(self) -> Expert:
        return Expert(self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router, routed experts (resident ones only if built so) and shared experts of one layer."""

    def __init__(
        self, config: ModelConfig, layer: int, resident: bool, encoding: str = SWIGLU
    ) -> None:
        """encoding: how the routed experts are coded; shared ones are the dense part's."""
        super().__init__()
        self.codec, self._plain = codec_of(encoding), codec_of(SWIGLU)
        self._stack: Any = None
        self.layer, self.top_k = layer, config.num_experts_per_tok
        self.normalize, self.mask_prob = config.norm_topk_prob, config.fallback_mask_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        if resident and encoding == SWIGLU:
            self.experts = ExpertWeights(config, config.num_experts)
        if config.num_shared_experts:
            self.shared_experts = ExpertWeights(config, config.num_shared_experts)
        # A frozen gate's weight, beside which training stays; in a list, which is no parameter.
        self._anchor: list[mx.array] = []

    def __call__(
        self,
        x_TD: mx.array,
        *,
        probs_TE: mx.array | None = None,
        chosen: tuple[mx.array, mx.array | None] | None = None,
        source: Source | None = None,
    ) -> tuple[mx.array, Routing]:
        """Output [T, D] and the routing; `probs_TE` or `chosen` (ids, and weights or None for the
        gate's own of these experts) replace the layer's own gate."""
        if probs_TE is None:
            probs_TE = mx.softmax(self.gate(x_TD).astype(mx.float32), axis=-1)
        routing = route(probs_TE, self.top_k, self.normalize)
        if self._anchor:
            logits_TE = mx.stop_gradient(x_TD) @ self._anchor[0].T
            reference_TE = mx.softmax(logits_TE.astype(mx.float32), axis=-1)
            routing = routing._replace(reference_TE=reference_TE)
        if chosen is not None:
            ids_TK, weights_TK = chosen
            if weights_TK is None:
                weights_TK = _weights_of(probs_TE, ids_TK, self.normalize)
            routing = routing._replace(ids_TK=ids_TK, weights_TK=weights_TK)
        routing = routing._replace(weights_TK=routing.weights_TK.astype(x_TD.dtype))
        if source is None and (self.training or len(x_TD) == 1):
            return self._gathered(x_TD, routing), routing
        if source is not None:
            refuse_gradients(x_TD, routing.ids_TK, routing.weights_TK)
        # The one wait of this layer: the host must know the ids to find the experts. The input is
        # in it lest ids that do not depend on it (replay, committed lookahead) overtake the layer
        # before, whose experts may lose their places now.
        mx.eval(x_TD, routing.ids_TK, routing.weights_TK)
        if source is not None and len(x_TD) == 1:
            return self._one_token(x_TD, routing, source), routing
        return self._grouped(x_TD, routing, source), routing

    def held(self, experts: Sequence[int]) -> Lease:
        """The layer's own experts."""
        stack = self.table
        return HeldLease([(e, type(stack)(*(array[e] for array in stack))) for e in experts])

    @property
    def table(self) -> Any:
        """The resident experts as one stack."""
        if "experts" in self:
            return self.experts.view()
        if self.training:
            raise UsageError("experts that are encoded for running only cannot be trained")
        return self._stack

    def keep(self, table: Any) -> None:
        """Make experts that are no parameters the resident ones, as the codec has them."""
        self._stack = table

    def _shared(self, x_TD: mx.array) -> mx.array | None:
        if "shared_experts" not in self:
            return None
        stack = self.shared_experts.view()
        total = None
        for gate_up_FD, down_DF in zip(stack.gate_up_FD, stack.down_DF, strict=True):
            y_TD = self._plain.forward(x_TD, Expert(gate_up_FD, down_DF))
            total = y_TD if total is None else total + y_TD
        return total

    def _gathered(self, x_TD: mx.array, routing: Routing) -> mx.array:
        """All pairs at once from the layer's own stack; nothing reaches the host."""
        shared_TD = self._shared(x_TD)
        y_TKD = self._by_place(x_TD, self.table, routing.ids_TK)
        if self.training and self.mask_prob > 0 and shared_TD is not None:
            gone_TK = mx.random.uniform(shape=routing.ids_TK.shape) < self.mask_prob
            y_TKD = mx.where(gone_TK[..., None], shared_TD[:, None], y_TKD)
        return _combine(routing.weights_TK, y_TKD, shared_TD)

    def _by_place(self, x_TD: mx.array, stack: Any, places_TK: mx.array) -> mx.array:
        """Every routed pair's output [T, K, D] from the experts at these places of a stack."""
        T, K = places_TK.shape
        place_N = places_TK.reshape(-1)
        x_ND = mx.broadcast_to(x_TD[:, None], (T, K, x_TD.shape[-1])).reshape(T * K, -1)
        sort = T * K >= _SORT_ROWS
        if sort:
            order_N = mx.argsort(place_N)
            # A permutation of repeated rows: its gradient writes each row once, in any order.
            place_N, x_ND = place_N[order_N], x_ND[order_N]
        y_ND = self.codec.gathered(x_ND, stack, place_N, self, sort)
        if sort:
            y_ND = y_ND[mx.argsort(order_N)]
        return y_ND.reshape(T, K, -1)

    def _one_token(self, x_1D: mx.array, routing: Routing, source: Source) -> mx.array:
        """The same gather from an arena's slots, once all experts are there."""
        # MLX's stub has one type for the lists of all ranks and dtypes.
        (ids,) = cast("list[list[int]]", routing.ids_TK.tolist())
        lease = source.acquire(self.layer, ids)  # reads start here, before the shared experts
        shared_1D = self._shared(x_1D)
        if shared_1D is not None and lease.waits:
            mx.async_eval(shared_1D)
        places = lease.all()
        missing = [expert for expert, place in places.items() if place is None]
        if len(missing) < len(places):
            stack = next(place.stack for place in places.values() if place is not None)
            places_1K = mx.array([[places[e].slot if places[e] else 0 for e in ids]])
            y_1KD = self._by_place(x_1D, stack, places_1K)
        else:
            y_1KD = mx.zeros((1, len(ids), x_1D.shape[1]), x_1D.dtype)
        y_1KD = self._fall_back(y_1KD, shared_1D, routing, missing, source)
        return _combine(routing.weights_TK, y_1KD, shared_1D)

    def _grouped(self, x_TD: mx.array, routing: Routing, source: Source | None) -> mx.array:
        """Rows sorted by expert and one product per expert, each expert taken once."""
        T, K = routing.ids_TK.shape
        flat_N = np.array(routing.ids_TK).reshape(-1)
        order_N = np.argsort(flat_N, kind="stable")
        used, starts = np.unique(flat_N[order_N], return_index=True)
        experts = used.tolist()
        lease = source.acquire(self.layer, experts) if source else self.held(experts)
        shared_TD = self._shared(x_TD)
        x_ND = x_TD[mx.array(order_N // K)]
        rows = dict(zip(experts, mx.split(x_ND, starts[1:].tolist()), strict=True))
        outputs: dict[int, mx.array] = {}
        missing = []
        for expert, weights in lease:
            if weights is None:
                missing.append(expert)
                outputs[expert] = mx.zeros_like(rows[expert])
                continue
            own = weights if source is None else weights.expert
            outputs[expert] = self.codec.forward(rows[expert], own, self)
            if source is not None:  # its slot may be overwritten once the next is asked for
                mx.eval(outputs[expert])
        y_ND = mx.concatenate([outputs[expert] for expert in experts])
        y_TKD = y_ND[mx.array(np.argsort(order_N))].reshape(T, K, -1)
        y_TKD = self._fall_back(y_TKD, shared_TD, routing, missing, source)
        return _combine(routing.weights_TK, y_TKD, shared_TD)

    def _fall_back(
        self,
        y_TKD: mx.array,
        shared_TD: mx.array | None,
        routing: Routing,
        missing: list[int],
        source: Source | None,
    ) -> mx.array:
        """Put the shared output where an expert is missing. Routing is on the host already."""
        if not missing:
            return y_TKD
        assert source is not None and shared_TD is not None
        gone_TK = np.isin(np.array(routing.ids_TK), missing)
        source.record_fallback(
            float(np.array(routing.weights_TK.astype(mx.float32))[gone_TK].sum())
        )
        return mx.where(mx.array(gone_TK)[..., None], shared_TD[:, None], y_TKD)


class LookaheadRouter(nn.Module):
    """After block 0: the routing of tokens t .. t+J-1 in every layer, from the state of token t."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.lookahead_steps + 1, config.num_hidden_layers, config.num_experts)
        D, U = config.hidden_size, config.lookahead_hidden_size
        steps, layers, experts = self.shape
        self.norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.in_proj = nn.Linear(D, U, bias=False)
        self.out_proj = nn.Linear(U, steps * layers * experts, bias=False)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        """Logits [B, T, J, L, E]; a softmax over the last axis gives the distributions Q."""
        hidden = silu(self.in_proj(self.norm(x_BTD)))
        return mx.unflatten(self.out_proj(hidden), -1, self.shape)


def _combine(weights_TK: mx.array, y_TKD: mx.array, shared_TD: mx.array | None) -> mx.array:
    y_TD = (weights_TK[:, None] @ y_TKD)[:, 0]
    return y_TD if shared_TD is None else y_TD + shared_TD
