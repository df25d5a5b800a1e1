"""The mixture-of-experts layer of the MLX backend, and the LookaheadRouter.

Resident experts are one stack per layer and projection. A single token, and training, gather from
a stack by index (`gather_mm`), so a resident model never waits for a router; a streamed one waits
for its ids, then gathers from an arena's slots with the same kernels. Longer inputs run expert by
expert, streamed or not. Outputs are combined in the fixed order of the routing, so streamed and
resident results are equal bit for bit. Weights keep their stored dtype and are widened where they
are used: `gather_mm` on a CPU takes float32 only.

Shape legend: T tokens, D hidden, F expert hidden, E experts, S places of a stack, K top-k,
N = T * K routed pairs, L layers, J lookahead steps + 1, A resident and S streamed experts,
G values of rho.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.backends.mlx.codecs import Expert, codec_of, silu
from chronos.backends.mlx.streamed import climbs, recording, routed_outputs
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Source
from chronos.common.experts.lease import HeldLease, Lease
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model import history
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import previous_gate_rows

# Below this many rows sorting them by expert costs more than the locality it gives (as in MLX-LM).
_SORT_ROWS = 64


class Routing(NamedTuple):
    """A layer's decision: ids and weights of the chosen [T, K], all probabilities [T, E], and what
    a frozen gate gives for the same states, where there is one."""

    ids_TK: mx.array
    weights_TK: mx.array
    probs_TE: mx.array
    reference_TE: mx.array | None = None


def route(
    probs_TE: mx.array, top_k: int, normalize: bool, ids_TK: mx.array | None = None
) -> Routing:
    """Top-k of the router probabilities, or experts that are chosen already, their weights
    renormalised over the chosen if asked (2401.06066). Equal probabilities count as ordered by
    id."""
    if ids_TK is None:
        ids_TK = _best(probs_TE, top_k)
    weights_TK = mx.take_along_axis(probs_TE, ids_TK, axis=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdims=True)
    return Routing(ids_TK, weights_TK, probs_TE)


class Past:
    """What the tokens of a pass have before them, for layers whose routing looks there.

    Made once for all layers: which tokens begin a document, and the matrix that makes means of the
    past (`common.model.history`) of a layer's scores in one product, training and decoding alike.
    """

    def __init__(
        self,
        config: ModelConfig,
        first_BT: mx.array,
        share_GBT: mx.array,
        same_BTT: mx.array | None,
    ) -> None:
        """first_BT: where a document begins. share_GBT: `history.shares` of the tokens before each.
        same_BTT: whether two tokens are of one document; None where all are."""
        T = self.tokens = first_BT.shape[1]
        self._parts = history.parts(config)
        powers_GP = history.powers(config, T + 1)
        gap_TT = np.arange(T)[:, None] - 1 - np.arange(T)
        weights_GTT = powers_GP[:, np.maximum(gap_TT, 0)] * (gap_TT >= 0)
        self._powers_GP = mx.array(powers_GP.astype(np.float32))
        self._weights_GBTT = mx.array(weights_GTT.astype(np.float32))[:, None]
        if same_BTT is not None:
            self._weights_GBTT = self._weights_GBTT * same_BTT
        self.first_BT1 = first_BT[..., None]
        self._share_GBT1 = share_GBT[..., None]

    def before(self, x_BTX: mx.array, last_BX: mx.array | None) -> mx.array:
        """What the token before has, zeros where there is none. last_BX: of the token before
        all."""
        if last_BX is None:
            last_BX = mx.zeros_like(x_BTX[:, 0])
        shifted_BTX = mx.concatenate([last_BX[:, None], x_BTX[:, :-1]], axis=1)
        return mx.where(self.first_BT1, 0.0, shifted_BTX)

    def means(self, z_BTS: mx.array, sum_BS: mx.array | None) -> mx.array:
        """Of the scores of the tokens before; a document's first token has its own. sum_BS: the
        weighted sum over the tokens before all."""
        T, found = z_BTS.shape[1], []
        for group, part in enumerate(self._parts):
            mean_BTS = self._weights_GBTT[group] @ z_BTS[..., part]
            if sum_BS is not None:
                mean_BTS = mean_BTS + self._powers_GP[group, :T, None] * sum_BS[:, None, part]
            found.append(mean_BTS * self._share_GBT1[group])
        return mx.where(self.first_BT1, z_BTS, mx.concatenate(found, axis=-1))

    def summed(self, z_BTS: mx.array, sum_BS: mx.array | None) -> mx.array:
        """The weighted sum over all tokens up to the last of these."""
        T, found = z_BTS.shape[1], []
        for group, part in enumerate(self._parts):
            powers_P = self._powers_GP[group]
            total_BS = (powers_P[:T][::-1][:, None] * z_BTS[..., part]).sum(1)
            if sum_BS is not None:
                total_BS = total_BS + powers_P[T] * sum_BS[:, part]
            found.append(total_BS)
        return mx.concatenate(found, axis=-1)


class Next(Past):
    """The same for one token behind others of its document, where little is left of the products:
    the same bits."""

    def __init__(self, config: ModelConfig, position: int) -> None:
        def of(value_G: Any) -> mx.array:
            return mx.array(history.per_expert(config, value_G).astype(np.float32))

        self.tokens, self.position = 1, position
        self._share_1S = of(history.shares(config, np.array([position]))[:, 0])
        self._rho_1S = of(np.array(config.decays))

    def before(self, x_BTX: mx.array, last_BX: mx.array | None) -> mx.array:
        assert last_BX is not None
        return last_BX[:, None]

    def means(self, z_BTS: mx.array, sum_BS: mx.array | None) -> mx.array:
        assert sum_BS is not None
        return self.mean(sum_BS)[:, None]

    def mean(self, sum_BS: mx.array) -> mx.array:
        """Of the scores of the tokens before."""
        return sum_BS * self._share_1S

    def summed(self, z_BTS: mx.array, sum_BS: mx.array | None) -> mx.array:
        assert sum_BS is not None
        return z_BTS[:, 0] + self._rho_1S * sum_BS


class RoutingState:
    """What a layer's routing keeps of a sequence: the weighted sum of the scores of streamed
    experts, and what the last token's second gate says."""

    def __init__(self) -> None:
        self.sum_BS: mx.array | None = None
        self.last_BA: mx.array | None = None

    def copied(self) -> RoutingState:
        return copy(self)  # arrays are replaced, never written to


def _best(scores_TX: mx.array, count: int) -> mx.array:
    """Where the highest scores are, best first; equal ones count as ordered by place."""
    # Without stop_gradient the backward pass raises: choosing has no derivative.
    return mx.argsort(-mx.stop_gradient(scores_TX), axis=-1)[..., :count]


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
        self.near = (config.num_resident_experts, config.num_resident_experts_per_tok)
        self.follows = config.routing_of(layer) == "history"
        if rows := previous_gate_rows(config, layer):
            self.previous_gate = nn.Linear(config.hidden_size, rows, bias=False)
        if resident and encoding == SWIGLU:
            self.experts = ExpertWeights(config, config.num_experts)
        if config.num_shared_experts:
            self.shared_experts = ExpertWeights(config, config.num_shared_experts)
        # The weights of frozen gates, beside which training stays; in a list: no parameters.
        self._anchor: list[mx.array] = []
        self.expert_width, self.num_shared = config.moe_intermediate_size, config.num_shared_experts
        # Adapters of experts, that of expert 3 as "e3" (MLX takes numbers for places of a list).
        self.lora: dict[str, Any] = {}
        self.shared_lora: dict[str, Any] = {}

    def __call__(
        self,
        x_TD: mx.array,
        *,
        probs_TE: mx.array | None = None,
        past: Past | None = None,
        state: RoutingState | None = None,
        chosen: tuple[mx.array, mx.array | None] | None = None,
        source: Source | None = None,
        ahead: Next | None = None,
    ) -> tuple[mx.array, Routing]:
        """Output [T, D] and the routing; `probs_TE` or `chosen` (ids, and weights or None for the
        gate's own of these experts) replace the layer's own gate. past, state: what comes before
        the tokens, where the layer's routing looks there. ahead: what the token after them has
        before it; the source is told what that will need, where it is known."""
        ids_TK, weights_TK = chosen or (None, None)
        routing = self.decide(x_TD, probs_TE, past, state, ids_TK)
        if weights_TK is not None:
            routing = routing._replace(weights_TK=weights_TK)
        routing = routing._replace(weights_TK=routing.weights_TK.astype(x_TD.dtype))
        if source is None and not self.lora and (self.training or len(x_TD) == 1):
            return self._gathered(x_TD, routing), routing
        inputs = (x_TD, routing.ids_TK, routing.weights_TK)
        if source is not None and (climbs(source) or recording(*inputs, *_arrays(self.lora))):
            return self._recorded(x_TD, routing, source), routing
        # The one wait of this layer: the host must know the ids to find the experts. The input is
        # in it lest ids that do not depend on it (replay, committed lookahead) overtake the layer
        # before, whose experts may lose their places now.
        upcoming_BK = None
        if source is not None and ahead is not None and state is not None and self.follows:
            upcoming_BK = self.upcoming(ahead, state)
        mx.eval(x_TD, routing.ids_TK, routing.weights_TK, upcoming_BK)
        if source is not None and upcoming_BK is not None:
            source.announce(self.layer, np.array(upcoming_BK)[0].tolist())
        if source is not None and len(x_TD) == 1 and not self.lora:
            return self._one_token(x_TD, routing, source), routing
        return self._grouped(x_TD, routing, source), routing

    def gates(self) -> list[mx.array]:
        """The weights of the gate and, where there is one, of that which sees the token before."""
        second = [self.previous_gate.weight] if "previous_gate" in self else []
        return [self.gate.weight, *second]

    def decide(
        self,
        x_TD: mx.array,
        probs_TE: mx.array | None = None,
        past: Past | None = None,
        state: RoutingState | None = None,
        ids_TK: mx.array | None = None,
    ) -> Routing:
        """The gate's choice, or that of other probabilities, or the weights of experts that are
        chosen already."""
        reference_TE = None
        if "previous_gate" in self:
            assert past is not None
            routing = self._informed(x_TD, self.gates(), past, state, ids_TK)
            if self._anchor:
                frozen = self._informed(mx.stop_gradient(x_TD), self._anchor, past, None, None)
                reference_TE = frozen.probs_TE
        else:
            if probs_TE is None:
                probs_TE = mx.softmax(self.gate(x_TD).astype(mx.float32), axis=-1)
            routing = route(probs_TE, self.top_k, self.normalize, ids_TK)
            if self._anchor:
                logits_TE = mx.stop_gradient(x_TD) @ self._anchor[0].T
                reference_TE = mx.softmax(logits_TE.astype(mx.float32), axis=-1)
        return routing._replace(reference_TE=reference_TE)

    def upcoming(self, past: Next, state: RoutingState) -> mx.array:
        """The streamed experts of the token after the last, [B, K]: what `decide` will choose.
        past: of that token."""
        assert state.sum_BS is not None
        return _best(past.mean(state.sum_BS), self.top_k - self.near[1]) + self.near[0]

    def _informed(
        self,
        x_TD: mx.array,
        gates: Sequence[mx.array],
        past: Past,
        state: RoutingState | None,
        ids_TK: mx.array | None,
    ) -> Routing:
        """The choice of a gate that sees the token before; with `follows`, of the resident experts
        only, and the others by the tokens before alone. gates: weights of the gate and the second
        one."""
        shape = (-1, past.tokens)
        z_BTE, v_BTA = (
            mx.unflatten((x_TD @ weight.T).astype(mx.float32), 0, shape) for weight in gates
        )
        known = state or RoutingState()
        before_BTA = past.before(v_BTA, known.last_BA)
        if state is not None:
            state.last_BA = v_BTA[:, -1]
        if not self.follows:
            probs_TE = mx.softmax((z_BTE + before_BTA).flatten(0, 1), axis=-1)
            return route(probs_TE, self.top_k, self.normalize, ids_TK)
        (resident, near), K = self.near, self.top_k
        z_BTS = z_BTE[..., resident:]
        a_TA = (z_BTE[..., :resident] + before_BTA).flatten(0, 1)
        s_TS = past.means(z_BTS, known.sum_BS).flatten(0, 1)
        if state is not None:
            state.sum_BS = past.summed(z_BTS, state.sum_BS)
        if ids_TK is None:
            near_TK, far_TK = _best(a_TA, near), _best(s_TS, K - near)
            ids_TK = mx.concatenate([near_TK, far_TK + resident], axis=-1)
        scores_TE = mx.concatenate([a_TA, s_TS], axis=-1)
        weights_TK = mx.softmax(mx.take_along_axis(scores_TE, ids_TK, axis=-1), axis=-1)
        shares = [
            mx.softmax(a_TA, axis=-1) * (near / K),
            mx.softmax(s_TS, axis=-1) * (1 - near / K),
        ]
        return Routing(ids_TK, weights_TK, mx.concatenate(shares, axis=-1))

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

    def compute(
        self, expert: int, x_TD: mx.array, weights: Any, own: Sequence[mx.array] = ()
    ) -> mx.array:
        """An expert's output for its rows, with its adapter where it has one. own: the adapter's
        arrays, where these are being transformed."""
        adapter = self.lora.get(f"e{expert}")
        if adapter is None:
            return self.codec.forward(x_TD, weights, self)
        return self.codec.forward(x_TD, weights, self, adapter.of(own) if own else adapter)

    def _recorded(self, x_TD: mx.array, routing: Routing, source: Source) -> mx.array:
        """With gradients, from a feed: nothing is masked, and no expert is missing."""

        def compute(expert: int, x: mx.array, place: Any, own: Sequence[mx.array]) -> mx.array:
            return self.compute(expert, x, place.expert, own)

        adapters = {int(name[1:]): lora.arrays() for name, lora in self.lora.items()}
        y_TKD = routed_outputs(x_TD, routing.ids_TK, source, self.layer, compute, adapters)
        return _combine(routing.weights_TK, y_TKD, self._shared(x_TD))

    def _shared(self, x_TD: mx.array) -> mx.array | None:
        if "shared_experts" not in self:
            return None
        stack = self.shared_experts.view()
        total = None
        pairs = zip(stack.gate_up_FD, stack.down_DF, strict=True)
        for index, (gate_up_FD, down_DF) in enumerate(pairs):
            adapter = self.shared_lora.get(f"e{index}")
            y_TD = self._plain.forward(x_TD, Expert(gate_up_FD, down_DF), self, adapter)
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
        y_TKD: mx.array = y_ND.reshape(T, K, -1)
        return y_TKD

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
            outputs[expert] = self.compute(expert, rows[expert], own)
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


def _arrays(lora: dict[str, Any]) -> list[mx.array]:
    return [array for adapter in lora.values() for array in adapter.arrays()]


def _combine(weights_TK: mx.array, y_TKD: mx.array, shared_TD: mx.array | None) -> mx.array:
    y_TD = (weights_TK[:, None] @ y_TKD)[:, 0]
    return y_TD if shared_TD is None else y_TD + shared_TD
