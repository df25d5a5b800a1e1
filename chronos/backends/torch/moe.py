"""The mixture-of-experts layer of the torch backend, and the LookaheadRouter.

One forward serves training, the resident model and streaming: experts come from a source with
`acquire(layer, experts)`, a step of the feed, or are the layer's own resident weights. They are
computed as they become ready and combined in the fixed order of the routing, so the result does not
depend on the order of arrival, bit for bit. Weights stay in the dtype they are stored in and are
widened where they are used: bf16 products run at 1 % of float32's rate on a CPU without AVX-512.

Shape legend: T tokens, D hidden, F expert hidden, E experts, K top-k, N = T * K routed pairs,
L layers, J lookahead steps + 1, A resident and S streamed experts, G values of rho, C rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronos.backends.torch.attention import RMSNorm
from chronos.backends.torch.codecs import Expert, codec_of
from chronos.backends.torch.products import Linear, linear, routed_experts, trains_experts
from chronos.backends.torch.streamed import recording, routed_sum
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Source
from chronos.common.experts.lease import HeldLease, Lease
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model import history
from chronos.common.model.config import ModelConfig
from chronos.common.model.weights import previous_gate_rows


class Routing(NamedTuple):
    """A layer's decision: ids and weights of the chosen [T, K], all probabilities [T, E], and what
    a frozen gate gives for the same states, where there is one."""

    ids_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor
    reference_TE: Tensor | None = None


def route(probs_TE: Tensor, top_k: int, normalize: bool, ids_TK: Tensor | None = None) -> Routing:
    """Top-k of the router probabilities, or experts that are chosen already, their weights
    renormalised over the chosen if asked (2401.06066)."""
    if ids_TK is None:
        weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    else:
        weights_TK = probs_TE.gather(-1, ids_TK)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Routing(ids_TK, weights_TK, probs_TE)


class Past:
    """What the tokens of a pass have before them, for layers whose routing looks there.

    Made once for all layers: which tokens begin a document, and the matrix that makes means of the
    past (`common.model.history`) of a layer's scores in one product, training and decoding alike.
    """

    def __init__(
        self, config: ModelConfig, first_BT: Tensor, share_GBT: Tensor, same_BTT: Tensor | None
    ) -> None:
        """first_BT: where a document begins. share_GBT: `history.shares` of the tokens before each.
        same_BTT: whether two tokens are of one document; None where all are."""
        device, T = first_BT.device, first_BT.shape[1]
        self.tokens = T
        self._parts = history.parts(config)
        self._powers_GP = torch.from_numpy(history.powers(config, T + 1)).float().to(device)
        gap_TT = torch.arange(T, device=device)[:, None] - 1 - torch.arange(T, device=device)
        weights_GTT = self._powers_GP[:, gap_TT.clamp(min=0)] * (gap_TT >= 0)
        self._weights_GBTT = weights_GTT[:, None]
        if same_BTT is not None:
            self._weights_GBTT = self._weights_GBTT * same_BTT
        self.first_BT1 = first_BT[..., None]
        self._share_GBT1 = share_GBT[..., None]

    def before(self, x_BTX: Tensor, last_BX: Tensor | None) -> Tensor:
        """What the token before has, zeros where there is none. last_BX: of the token before
        all."""
        if last_BX is None:
            last_BX = torch.zeros_like(x_BTX[:, 0])
        shifted_BTX = torch.cat((last_BX[:, None], x_BTX[:, :-1]), dim=1)
        return shifted_BTX.masked_fill(self.first_BT1, 0.0)

    def means(self, z_BTS: Tensor, sum_BS: Tensor | None) -> Tensor:
        """Of the scores of the tokens before; a document's first token has its own. sum_BS: the
        weighted sum over the tokens before all."""
        T, found = z_BTS.shape[1], []
        for group, part in enumerate(self._parts):
            # To whole vectors: MKL takes twice as long for an odd number of columns.
            count = z_BTS[..., part].size(-1)
            z_BTP = F.pad(z_BTS[..., part], (0, -count % 16))
            mean_BTS = (self._weights_GBTT[group] @ z_BTP)[..., :count]
            if sum_BS is not None:
                mean_BTS = mean_BTS + self._powers_GP[group, :T, None] * sum_BS[:, None, part]
            found.append(mean_BTS * self._share_GBT1[group])
        return torch.where(self.first_BT1, z_BTS, torch.cat(found, dim=-1))

    def summed(self, z_BTS: Tensor, sum_BS: Tensor | None) -> Tensor:
        """The weighted sum over all tokens up to the last of these."""
        T, found = z_BTS.shape[1], []
        for group, part in enumerate(self._parts):
            powers_P = self._powers_GP[group]
            total_BS = (powers_P[:T].flip(0)[:, None] * z_BTS[..., part]).sum(1)
            if sum_BS is not None:
                total_BS = total_BS + powers_P[T] * sum_BS[:, part]
            found.append(total_BS)
        return torch.cat(found, dim=-1)


class Next(Past):
    """The same for one token behind others of its document, where little is left of the products
    (0.4 of 0.7 ms that they took of a token of the shipped model): the same bits."""

    def __init__(self, config: ModelConfig, position: int, device: torch.device) -> None:
        def of(value_G: Any) -> Tensor:
            return torch.from_numpy(history.per_expert(config, value_G)).float().to(device)

        self.tokens, self.position = 1, position
        self._share_1S = of(history.shares(config, np.array([position]))[:, 0])
        self._rho_1S = of(np.array(config.decays))

    def before(self, x_BTX: Tensor, last_BX: Tensor | None) -> Tensor:
        assert last_BX is not None
        return last_BX[:, None]

    def means(self, z_BTS: Tensor, sum_BS: Tensor | None) -> Tensor:
        assert sum_BS is not None
        return self.mean(sum_BS)[:, None]

    def mean(self, sum_BS: Tensor) -> Tensor:
        """Of the scores of the tokens before."""
        return sum_BS * self._share_1S

    def summed(self, z_BTS: Tensor, sum_BS: Tensor | None) -> Tensor:
        assert sum_BS is not None
        return z_BTS[:, 0] + self._rho_1S * sum_BS


class RoutingState:
    """What a layer's routing keeps of a sequence: the weighted sum of the scores of streamed
    experts, and what the last token's second gate says."""

    def __init__(self) -> None:
        self.sum_BS: Tensor | None = None
        self.last_BA: Tensor | None = None

    def copied(self) -> RoutingState:
        return copy(self)  # tensors are replaced, never written to


class ExpertWeights(nn.Module):
    """The parameters of one resident "swiglu" expert, under the names they have on disk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = Linear(D, 2 * F_)
        self.down_proj = Linear(F_, D)

    def view(self) -> Expert:
        return Expert(self.gate_up_proj.weight, self.down_proj.weight)


def _weights(config: ModelConfig, count: int) -> Sequence[ExpertWeights]:
    # A ModuleList is not generic: torch's stub does not say which modules it holds.
    modules = nn.ModuleList(ExpertWeights(config) for _ in range(count))
    return cast("Sequence[ExpertWeights]", modules)


class MoE(nn.Module):
    """Router, routed experts (resident ones only if built so) and shared experts of one layer."""

    def __init__(
        self, config: ModelConfig, layer: int, resident: bool, encoding: str = SWIGLU
    ) -> None:
        """encoding: how the routed experts are coded; shared ones are the dense part's."""
        super().__init__()
        self.codec, self._plain = codec_of(encoding), codec_of(SWIGLU)
        self.layer, self.top_k = layer, config.num_experts_per_tok
        self.normalize, self.mask_prob = config.norm_topk_prob, config.fallback_mask_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.near = (config.num_resident_experts, config.num_resident_experts_per_tok)
        self.follows = config.routing_of(layer) == "history"
        if rows := previous_gate_rows(config, layer):
            self.previous_gate: Linear | None = Linear(config.hidden_size, rows)
        else:
            self.previous_gate = None
        count = config.num_experts if resident and encoding == SWIGLU else 0
        self.experts = _weights(config, count)
        self.shared_experts = _weights(config, config.num_shared_experts)
        # The weights of frozen gates, beside which training stays.
        self.anchor: tuple[Tensor, ...] | None = None
        self.expert_width = config.moe_intermediate_size
        # Adapters of experts by their number; see `lora`.
        self.lora, self.shared_lora = nn.ModuleDict(), nn.ModuleDict()

    def forward(
        self,
        x_TD: Tensor,
        *,
        probs_TE: Tensor | None = None,
        past: Past | None = None,
        state: RoutingState | None = None,
        chosen: tuple[Tensor, Tensor | None] | None = None,
        source: Source | None = None,
        ahead: Next | None = None,
    ) -> tuple[Tensor, Routing]:
        """Output [T, D] and the routing; `probs_TE` or `chosen` (ids, and weights or None for the
        gate's own of these experts) replace the layer's own gate. past, state: what comes before
        the tokens, where the layer's routing looks there. ahead: what the token after them has
        before it; the source is told what that will need, where it is known."""
        ids_TK, weights_TK = chosen or (None, None)
        routing = self.decide(x_TD, probs_TE, past, state, ids_TK)
        if weights_TK is not None:
            routing = routing._replace(weights_TK=weights_TK.to(x_TD.dtype))
        if source is not None and self._recording(x_TD, routing.weights_TK):
            return self._recorded(x_TD, routing, source), routing
        if source is not None and ahead is not None and state is not None and self.follows:
            source.announce(self.layer, self.upcoming(ahead, state)[0].tolist())
        combine = self._one_token if len(x_TD) == 1 and not self.training else self._grouped
        if self.training and source is None and not self.lora:
            if x_TD.is_cuda:
                combine = self._batched
            elif trains_experts(x_TD, self.table[0].gate_up_FD):
                return self._trained(x_TD, routing), routing
        return combine(x_TD, routing, source), routing

    def _recording(self, *inputs: Tensor) -> bool:
        """Whether a gradient through the experts is; walking the adapters costs 10 us."""
        return torch.is_grad_enabled() and recording(*inputs, *self.lora.parameters())

    def gates(self) -> tuple[Tensor, ...]:
        """The weights of the gate and, where there is one, of that which sees the token before."""
        found = (self.gate, self.previous_gate)
        return tuple(gate.weight for gate in found if gate is not None)

    def decide(
        self,
        x_TD: Tensor,
        probs_TE: Tensor | None = None,
        past: Past | None = None,
        state: RoutingState | None = None,
        ids_TK: Tensor | None = None,
    ) -> Routing:
        """The gate's choice, or that of other probabilities, or the weights of experts that are
        chosen already; weights in the dtype of x."""
        reference_TE = None
        if self.previous_gate is not None:
            assert past is not None
            routing = self._informed(x_TD, self.gates(), past, state, ids_TK)
            if self.anchor is not None:
                frozen = self._informed(x_TD.detach(), self.anchor, past, None, None)
                reference_TE = frozen.probs_TE
        else:
            if probs_TE is None:
                probs_TE = self.gate(x_TD).float().softmax(dim=-1)
            routing = route(probs_TE, self.top_k, self.normalize, ids_TK)
            if self.anchor is not None:
                logits_TE = F.linear(x_TD.detach(), self.anchor[0])
                reference_TE = logits_TE.float().softmax(dim=-1)
        return routing._replace(
            weights_TK=routing.weights_TK.to(x_TD.dtype), reference_TE=reference_TE
        )

    def upcoming(self, past: Next, state: RoutingState) -> Tensor:
        """The streamed experts of the token after the last, [B, K]: what `decide` will choose.
        past: of that token."""
        assert state.sum_BS is not None
        return _best(past.mean(state.sum_BS), self.top_k - self.near[1]) + self.near[0]

    def _informed(
        self,
        x_TD: Tensor,
        gates: Sequence[Tensor],
        past: Past,
        state: RoutingState | None,
        ids_TK: Tensor | None,
    ) -> Routing:
        """The choice of a gate that sees the token before; with `follows`, of the resident experts
        only, and the others by the tokens before alone. gates: weights of the gate and the second
        one."""
        shape = (-1, past.tokens)
        z_BTE, v_BTA = (linear(x_TD, weight).float().unflatten(0, shape) for weight in gates)
        known = state or RoutingState()
        before_BTA = past.before(v_BTA, known.last_BA)
        if state is not None:
            state.last_BA = v_BTA[:, -1]
        if not self.follows:
            probs_TE = (z_BTE + before_BTA).flatten(0, 1).softmax(dim=-1)
            return route(probs_TE, self.top_k, self.normalize, ids_TK)
        (resident, near), K = self.near, self.top_k
        z_BTS = z_BTE[..., resident:]
        a_TA = (z_BTE[..., :resident] + before_BTA).flatten(0, 1)
        s_TS = past.means(z_BTS, known.sum_BS).flatten(0, 1)
        if state is not None:
            state.sum_BS = past.summed(z_BTS, state.sum_BS)
        if ids_TK is None:
            near_TK, far_TK = _best(a_TA, near), _best(s_TS, K - near)
            ids_TK = torch.cat((near_TK, far_TK + resident), dim=-1)
        weights_TK = torch.cat((a_TA, s_TS), dim=-1).gather(-1, ids_TK).softmax(dim=-1)
        shares = a_TA.softmax(-1) * (near / K), s_TS.softmax(-1) * (1 - near / K)
        return Routing(ids_TK, weights_TK, torch.cat(shares, dim=-1))

    def mix(self, x_1D: Tensor, weights_1K: Tensor, experts: Sequence[Any]) -> Tensor:
        """One token's output from its experts, in the order of its routing."""
        shared_1D = self._shared(x_1D)
        y_K = [self.codec.forward(x_1D, expert, self) for expert in experts]
        return _summed(weights_1K, y_K, shared_1D)

    def held(self, experts: Sequence[int]) -> Lease:
        """The layer's own experts."""
        return HeldLease([(expert, self.table[expert]) for expert in experts])

    @property
    def table(self) -> list[Any]:
        """Views of the resident experts; cached, since walking modules costs 1 us an attribute."""
        cached = self.__dict__.get("_table")
        if cached is None or self.training:
            if not self.experts:
                raise UsageError("experts that are encoded for running only cannot be trained")
            cached = self.__dict__["_table"] = [expert.view() for expert in self.experts]
        return cached

    def keep(self, table: list[Any]) -> None:
        """Make experts that are no parameters the resident ones, as the codec has them."""
        self.__dict__["_table"] = table

    def compute(self, expert: int, x_TD: Tensor, weights: Any) -> Tensor:
        """An expert's output for its rows, with its adapter where it has one."""
        if self.lora and str(expert) in self.lora:
            return self.codec.forward(x_TD, weights, self, self.lora[str(expert)])
        return self.codec.forward(x_TD, weights, self)

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        total = None
        for index, expert in enumerate(self.shared_experts):
            adapter = self.shared_lora[str(index)] if self.shared_lora else None
            y_TD = self._plain.forward(x_TD, expert.view(), self, adapter)
            total = y_TD if total is None else total + y_TD
        return total

    def _one_token(self, x_1D: Tensor, routing: Routing, source: Source | None) -> Tensor:
        ids = routing.ids_TK[0].tolist()
        # Reads start here, before the shared experts.
        ready = source.acquire(self.layer, ids) if source else self.held(ids)
        shared_1D = self._shared(x_1D)
        rank = {expert: i for i, expert in enumerate(ids)}
        y_K: list[Tensor] = [x_1D] * len(ids)
        for expert, weights in ready:
            if weights is None:
                assert source is not None and shared_1D is not None
                y_K[rank[expert]] = shared_1D
                source.record_fallback(float(routing.weights_TK[0, rank[expert]]))
            else:
                y_K[rank[expert]] = self.compute(expert, x_1D, weights)
        return _summed(routing.weights_TK, y_K, shared_1D)

    def _grouped(self, x_TD: Tensor, routing: Routing, source: Source | None) -> Tensor:
        """Rows sorted by expert, one product per expert, one scatter back: no gradient of the
        whole stack is ever built for a slice of it."""
        T, K = routing.ids_TK.shape
        flat_N = routing.ids_TK.reshape(-1)
        sorted_N, order_N = flat_N.sort(stable=True)
        used, counts = torch.unique_consecutive(sorted_N, return_counts=True)
        experts = used.tolist()
        ready = source.acquire(self.layer, experts) if source else self.held(experts)
        shared_TD = self._shared(x_TD)
        # Repeat, then permute: the gradient of a permutation writes each row once, the same on
        # every run; indexing x by order // K would add rows in whatever order threads run.
        x_ND = x_TD[:, None].expand(T, K, -1).reshape(T * K, -1)[order_N]
        rows = dict(zip(experts, x_ND.split(counts.tolist()), strict=True))
        outputs: dict[int, Tensor] = {}
        missing = []
        for expert, weights in ready:
            if weights is None:
                missing.append(expert)
                outputs[expert] = torch.zeros_like(rows[expert])
            else:
                outputs[expert] = self.compute(expert, rows[expert], weights)
        y_ND = torch.cat([outputs[expert] for expert in experts])
        y_TKD = y_ND[order_N.argsort()].view(T, K, -1)
        if shared_TD is None:
            return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD)
        y_TKD = self._fall_back(y_TKD, shared_TD, routing, missing, source)
        return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD) + shared_TD

    def _trained(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """As `_grouped` for training whole on a CPU. Of an expert that is masked the weight goes to
        the shared ones, which saves two copies of all outputs."""
        weights_TK, shared_TD = routing.weights_TK, self._shared(x_TD)
        if shared_TD is not None and self.mask_prob > 0:
            gone_TK = torch.rand_like(weights_TK) < self.mask_prob
            weights_TK = weights_TK.masked_fill(gone_TK, 0.0)
            given_T1 = (routing.weights_TK - weights_TK).sum(-1, keepdim=True)
            shared_TD = shared_TD * (1 + given_T1)
        y_TD = routed_experts(x_TD, routing.ids_TK, weights_TK, self.table)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _batched(self, x_TD: Tensor, routing: Routing, source: Source | None) -> Tensor:
        """As `_grouped` for training on a GPU: all experts in three products, each with as many
        rows as the one used most, since the launches of one expert after another would take longer
        than their arithmetic."""
        (T, K), table = routing.ids_TK.shape, self.table
        flat_N = routing.ids_TK.reshape(-1)
        order_N = flat_N.argsort(stable=True)
        counts_E = flat_N.new_zeros(len(table)).scatter_add(0, flat_N, flat_N.new_ones(T * K))
        rows = int(counts_E.max())
        first_E = counts_E.cumsum(0) - counts_E
        rank_N = torch.empty_like(order_N)
        rank_N[order_N] = torch.arange(T * K, device=x_TD.device)
        place_N = flat_N * rows + rank_N - first_E[flat_N]
        # Places are taken once each, so no gradient depends on the order in which threads add.
        x_ND = x_TD[:, None].expand(T, K, -1).reshape(T * K, -1)
        x_XD = x_TD.new_zeros(len(table) * rows, x_TD.shape[1]).index_copy(0, place_N, x_ND)
        up_EFD = torch.stack([expert.gate_up_FD for expert in table])
        down_EDF = torch.stack([expert.down_DF for expert in table])
        x_ECD = x_XD.view(len(table), rows, -1)
        gate_ECF, up_ECF = (x_ECD @ up_EFD.transpose(1, 2)).chunk(2, dim=-1)
        y_ECD = (F.silu(gate_ECF) * up_ECF) @ down_EDF.transpose(1, 2)
        y_TKD = y_ECD.flatten(0, 1).index_select(0, place_N).view(T, K, -1)
        shared_TD = self._shared(x_TD)
        if shared_TD is None:
            return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD)
        y_TKD = self._fall_back(y_TKD, shared_TD, routing, [], source)
        return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD) + shared_TD

    def _recorded(self, x_TD: Tensor, routing: Routing, source: Source) -> Tensor:
        """With gradients, from a feed: nothing is masked, and no expert is missing."""
        y_TD = routed_sum(
            x_TD,
            routing.ids_TK,
            routing.weights_TK,
            source,
            self.layer,
            self.compute,
            partial(torch.einsum, "tk,tkd->td"),
            {int(expert): cast("Any", lora).arrays() for expert, lora in self.lora.items()},
        )
        shared_TD = self._shared(x_TD)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _fall_back(
        self,
        y_TKD: Tensor,
        shared_TD: Tensor,
        routing: Routing,
        missing: list[int],
        source: Source | None,
    ) -> Tensor:
        """Put the shared output where an expert is missing, or masked in training."""
        if missing:
            assert source is not None
            gone_TK = torch.isin(routing.ids_TK, routing.ids_TK.new_tensor(missing))
            source.record_fallback(float(routing.weights_TK[gone_TK].sum()))
        elif self.training and self.mask_prob > 0:
            gone_TK = torch.rand_like(routing.weights_TK) < self.mask_prob
        else:
            return y_TKD
        return torch.where(gone_TK[..., None], shared_TD[:, None], y_TKD)


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the largest, along the last axis; of one in a seventh of the time."""
    if count == 1:
        return scores.max(dim=-1, keepdim=True).indices
    return scores.topk(count, dim=-1).indices


def _summed(weights_1K: Tensor, y_K: list[Tensor], shared_1D: Tensor | None) -> Tensor:
    y_1D = weights_1K @ torch.cat(y_K)
    return y_1D if shared_1D is None else y_1D + shared_1D


class LookaheadRouter(nn.Module):
    """After block 0: the routing of tokens t .. t+J-1 in every layer, from the state of token t."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.lookahead_steps + 1, config.num_hidden_layers, config.num_experts)
        D, U = config.hidden_size, config.lookahead_hidden_size
        steps, layers, experts = self.shape
        self.norm = RMSNorm(D, eps=config.rms_norm_eps)
        self.in_proj = Linear(D, U)
        self.out_proj = Linear(U, steps * layers * experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, J, L, E]; a softmax over the last axis gives the distributions Q."""
        hidden = F.silu(self.in_proj(self.norm(x_BTD)))
        logits_BTJLE: Tensor = self.out_proj(hidden).unflatten(-1, self.shape)
        return logits_BTJLE
