"""The mixture-of-experts layer of the torch backend, and the LookaheadRouter.

One forward serves training, the resident model and streaming: experts come from a source with
`acquire(layer, experts)`, a step of the feed, or are the layer's own resident weights. They are
computed as they become ready and combined in the fixed order of the routing, so the result does not
depend on the order of arrival, bit for bit. Weights stay in the dtype they are stored in and are
widened where they are used: bf16 products run at 1 % of float32's rate on a CPU without AVX-512.

Shape legend: T tokens, D hidden, F expert hidden, E experts, K top-k, N = T * K routed pairs,
L layers, J lookahead steps + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chronos.backends.torch.attention import RMSNorm
from chronos.backends.torch.codecs import Expert, codec_of
from chronos.backends.torch.products import Linear
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Source
from chronos.common.experts.tier import HeldLease, Lease
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model.config import ModelConfig


class Routing(NamedTuple):
    """A layer's decision: ids and weights of the chosen [T, K], all probabilities [T, E], and what
    a frozen gate gives for the same states, where there is one."""

    ids_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor
    reference_TE: Tensor | None = None


def route(probs_TE: Tensor, top_k: int, normalize: bool) -> Routing:
    """Top-k of the router probabilities, renormalised over the chosen if asked (2401.06066)."""
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    return Routing(ids_TK, _normal(weights_TK, normalize), probs_TE)


def _normal(weights_TK: Tensor, normalize: bool) -> Tensor:
    return weights_TK / weights_TK.sum(-1, keepdim=True) if normalize else weights_TK


def refuse_gradients(*inputs: Tensor) -> None:
    """Raises UsageError where a gradient is being recorded through streamed experts: a backward
    pass would read slots that hold other experts by then."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise UsageError(
            "gradients through streamed experts would be wrong: their memory is used again before "
            "the backward pass",
            "",
            "load the model with all its experts (resident=True), or run it under torch.no_grad()",
        )


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
        count = config.num_experts if resident and encoding == SWIGLU else 0
        self.experts = _weights(config, count)
        self.shared_experts = _weights(config, config.num_shared_experts)
        self.anchor: Tensor | None = None  # a frozen gate's weight, beside which training stays

    def forward(
        self,
        x_TD: Tensor,
        *,
        probs_TE: Tensor | None = None,
        chosen: tuple[Tensor, Tensor | None] | None = None,
        source: Source | None = None,
    ) -> tuple[Tensor, Routing]:
        """Output [T, D] and the routing; `probs_TE` or `chosen` (ids, and weights or None for the
        gate's own of these experts) replace the layer's own gate."""
        routing = self.decide(x_TD, probs_TE)
        if chosen is not None:
            ids_TK, weights_TK = chosen
            if weights_TK is None:
                weights_TK = _normal(routing.probs_TE.gather(-1, ids_TK), self.normalize)
            routing = routing._replace(ids_TK=ids_TK, weights_TK=weights_TK.to(x_TD.dtype))
        if source is not None:
            refuse_gradients(x_TD, routing.weights_TK)
        combine = self._one_token if len(x_TD) == 1 and not self.training else self._grouped
        return combine(x_TD, routing, source), routing

    def decide(self, x_TD: Tensor, probs_TE: Tensor | None = None) -> Routing:
        """The gate's choice, or that of other probabilities; weights in the dtype of x."""
        if probs_TE is None:
            probs_TE = self.gate(x_TD).float().softmax(dim=-1)
        routing = route(probs_TE, self.top_k, self.normalize)
        reference_TE = None
        if self.anchor is not None:
            reference_TE = F.linear(x_TD.detach(), self.anchor).float().softmax(dim=-1)
        return routing._replace(
            weights_TK=routing.weights_TK.to(x_TD.dtype), reference_TE=reference_TE
        )

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

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        total = None
        for expert in self.shared_experts:
            y_TD = self._plain.forward(x_TD, expert.view())
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
                y_K[rank[expert]] = self.codec.forward(x_1D, weights, self)
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
                outputs[expert] = self.codec.forward(rows[expert], weights, self)
        y_ND = torch.cat([outputs[expert] for expert in experts])
        y_TKD = y_ND[order_N.argsort()].view(T, K, -1)
        if shared_TD is None:
            return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD)
        y_TKD = self._fall_back(y_TKD, shared_TD, routing, missing, source)
        return torch.einsum("tk,tkd->td", routing.weights_TK, y_TKD) + shared_TD

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
        return self.out_proj(hidden).unflatten(-1, self.shape)
