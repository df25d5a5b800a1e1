"""Routings that were tried and did not ship: what `bench.runs.known_ahead` puts for the gates.

A routing is a function of a layer (`Layer`, an MoE with some weights more) and what its gates say
of a pass of whole documents. It runs in training and teacher-forced, never behind a cache. Where
it came to is in bench/log/known-ahead.md.

Shape legend: B rows, T tokens, E experts, S streamed experts, K top-k, C chosen streamed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chronos.backends.torch.moe import MoE, Past, Routing, RoutingState, route
from chronos.common.model.config import ModelConfig


class Layer(MoE):
    """A layer whose choice is made by `routing` (see `install`), with its options."""

    routing: Callable[..., Routing]
    options: dict[str, float]

    def decide(
        self,
        x_TD: Tensor,
        probs_TE: Tensor | None = None,
        past: Past | None = None,
        state: RoutingState | None = None,
        ids_TK: Tensor | None = None,
    ) -> Routing:
        if state is not None or past is None:
            raise NotImplementedError("these routings know whole documents only")
        found = type(self).routing(self, x_TD, past, **self.options)
        return found._replace(weights_TK=found.weights_TK.to(x_TD.dtype))

    def scores(self, x_TD: Tensor, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the resident experts, which see the token before too, and of the streamed ones
        at the token itself, [T, A] and [B, T, S]; and x [B, T, D]."""
        x_BTD = x_TD.unflatten(0, (-1, past.tokens))
        z_BTE, resident = self.gate(x_BTD).float(), self.near[0]
        assert self.previous_gate is not None
        before_BTA = past.before(self.previous_gate(x_BTD).float(), None)
        a_TA = (z_BTE[..., :resident] + before_BTA).flatten(0, 1)
        return a_TA, z_BTE[..., resident:], x_BTD

    def tiered(
        self, a_TA: Tensor, s_BTS: Tensor, far_BTC: Tensor | None = None, own: Tensor | None = None
    ) -> Routing:
        """The best of both tiers. far_BTC: streamed experts that are chosen already. own: what
        their weights are made of, if not of s."""
        (resident, near), K = self.near, self.top_k
        s_TS = s_BTS.flatten(0, 1)
        own_TS = s_TS if own is None else own.flatten(0, 1)
        far_TC = s_TS.topk(K - near, dim=-1).indices if far_BTC is None else far_BTC.flatten(0, 1)
        ids_TK = torch.cat((a_TA.topk(near, dim=-1).indices, far_TC + resident), dim=-1)
        weights_TK = torch.cat((a_TA, own_TS), dim=-1).gather(-1, ids_TK).softmax(dim=-1)
        shares = a_TA.softmax(-1) * (near / K), own_TS.softmax(-1) * (1 - near / K)
        return Routing(ids_TK, weights_TK, torch.cat(shares, dim=-1))


def selective(layer: Layer, x_TD: Tensor, past: Past) -> Routing:
    """How fast the past is forgotten is each token's own: s_t = (1 - r_j) s_j + r_j z_j, j = t - 1,
    r = sigmoid(w x + b), 0.1 at first."""
    a_TA, z_BTS, x_BTD = layer.scores(x_TD, past)
    rate_BT = (layer.extra["rate"](x_BTD).squeeze(-1).float() + np.log(0.1 / 0.9)).sigmoid()
    first_BT = past.first_BT1[..., 0]
    kept_BT = torch.log1p(-rate_BT).masked_fill(first_BT, 0.0).cumsum(-1)
    # s_t = sum_j r_j prod_{j < i < t} (1 - r_i) z_j, r = 1 where a document begins.
    gap_BTT = kept_BT.roll(1, -1)[:, :, None] - kept_BT[:, None]
    rate_BT = rate_BT.masked_fill(first_BT, 1.0)
    seen = past._weights_GBTT[0] > 0
    mean_BTS = torch.where(seen, gap_BTT.clamp(max=0).exp() * rate_BT[:, None], 0.0) @ z_BTS
    return layer.tiered(a_TA, torch.where(past.first_BT1, z_BTS, mean_BTS))


def weighted(layer: Layer, x_TD: Tensor, past: Past) -> Routing:
    """The mean of the past with a weight of each token's own beside its age, 1 at first."""
    a_TA, z_BTS, x_BTD = layer.scores(x_TD, past)
    own_BT = layer.extra["rate"](x_BTD).squeeze(-1).float().clamp(-5, 5).exp()
    weights_BTT = past._weights_GBTT[0] * own_BT[:, None]
    mean_BTS = weights_BTT @ z_BTS / weights_BTT.sum(-1, keepdim=True).clamp(min=1e-12)
    return layer.tiered(a_TA, torch.where(past.first_BT1, z_BTS, mean_BTS))


def scaled(layer: Layer, x_TD: Tensor, past: Past, by: float) -> Routing:
    """The mean of the past times a number: a mean of ten scores varies less than one of them."""
    a_TA, z_BTS, _ = layer.scores(x_TD, past)
    return layer.tiered(a_TA, by * past.means(z_BTS, None))


def two_back(layer: Layer, x_TD: Tensor, past: Past) -> Routing:
    """The resident experts' gate sees the last two tokens."""
    a_TA, z_BTS, x_BTD = layer.scores(x_TD, past)
    before_BTA = past.before(past.before(layer.extra["second"](x_BTD).float(), None), None)
    return layer.tiered(a_TA + before_BTA.flatten(0, 1), past.means(z_BTS, None))


def bent(layer: Layer, x_TD: Tensor, past: Past) -> Routing:
    """The streamed gate has a layer of 32 units beside it."""
    a_TA, z_BTS, x_BTD = layer.scores(x_TD, past)
    unit_BTU = nn.functional.silu(layer.extra["into"](x_BTD))
    return layer.tiered(a_TA, past.means(z_BTS + layer.extra["out"](unit_BTU).float(), None))


def pool(layer: Layer, x_TD: Tensor, past: Past, size: float) -> Routing:
    """The past chooses a few streamed experts, all of them announced, the present one of them."""
    a_TA, z_BTS, _ = layer.scores(x_TD, past)
    s_BTS = past.means(z_BTS, None)
    there = torch.zeros_like(s_BTS, dtype=torch.bool)
    there.scatter_(-1, s_BTS.topk(int(size), dim=-1).indices, True)
    own_BTS = z_BTS + s_BTS
    best = own_BTS.masked_fill(~there, -1e9).topk(layer.top_k - layer.near[1], dim=-1)
    return layer.tiered(a_TA, s_BTS, best.indices, own_BTS)


def working_set(layer: Layer, x_TD: Tensor, past: Past, bonus: float, decay: float) -> Routing:
    """The mean of the past, and a bonus for streamed experts by how much they were used lately
    (a leaky mean of the choices): the choice moves quickly among few."""
    a_TA, z_BTS, _ = layer.scores(x_TD, past)
    s_BTS = past.means(z_BTS, None)
    chosen = used_lately(
        s_BTS.detach().numpy(),
        past.first_BT1[..., 0].expand(s_BTS.shape[:2]).numpy(),
        layer.top_k - layer.near[1],
        bonus,
        decay,
    )
    return layer.tiered(a_TA, s_BTS, torch.from_numpy(chosen))


def used_lately(
    s_BTS: np.ndarray, first_BT: np.ndarray, count: int, bonus: float, decay: float
) -> np.ndarray:
    """The best of each token's scores, those used lately with a bonus. [B, T, C]"""
    B, T, S = s_BTS.shape
    used_BS, rows_B1 = np.zeros((B, S), np.float32), np.arange(B)[:, None]
    chosen_BTC = np.empty((B, T, count), np.int64)
    for t in range(T):
        used_BS[first_BT[:, t]] = 0
        best_BC = np.argsort(-(s_BTS[:, t] + bonus * (1 - decay) * used_BS), axis=-1)[:, :count]
        chosen_BTC[:, t] = best_BC
        used_BS *= decay
        used_BS[rows_B1, best_BC] += 1
    return chosen_BTC


# Baselines with published prices, of all experts, on the plain twin's gate.


def lately(z_BTE: Tensor, past: Past) -> Tensor:
    """The leaky mean of all experts' scores over the tokens before."""
    mean_BTE = past._weights_GBTT[0] @ z_BTE * past._share_GBT1[0]
    return torch.where(past.first_BT1, z_BTE, mean_BTE)


def mask(layer: Layer, x_TD: Tensor, past: Past, size: float) -> Routing:
    """The present token's best among the experts with the best leaky mean of the past."""
    z_BTE = layer.gate(x_TD).float().unflatten(0, (-1, past.tokens))
    s_BTE = lately(z_BTE.detach(), past)
    there = torch.zeros_like(s_BTE, dtype=torch.bool)
    there.scatter_(-1, s_BTE.topk(int(size), dim=-1).indices, True)
    probs_TE = z_BTE.masked_fill(~there, -1e9).flatten(0, 1).softmax(-1)
    found = route(probs_TE, layer.top_k, layer.normalize)
    # The balance term sees the gate as if it were free: a masked one cannot ask for others.
    return found._replace(probs_TE=z_BTE.flatten(0, 1).softmax(-1))


def bias(layer: Layer, x_TD: Tensor, past: Past, size: float, by: float) -> Routing:
    """The present token's best, with a number added to the score of the experts that have the best
    leaky mean of the past: those were announced."""
    z_BTE = layer.gate(x_TD).float().unflatten(0, (-1, past.tokens))
    best = lately(z_BTE.detach(), past).topk(int(size), dim=-1).indices
    added_BTE = z_BTE.scatter_add(-1, best, torch.full_like(best, by, dtype=z_BTE.dtype))
    return route(added_BTE.flatten(0, 1).softmax(-1), layer.top_k, layer.normalize)


def rolling(layer: Layer, x_TD: Tensor, past: Past, size: float) -> Routing:
    """A set of experts of which at most one is exchanged a token: the best outside for the one with
    the lowest leaky mean inside. The token chooses within (rolling residency)."""
    z_BTE = layer.gate(x_TD).float().unflatten(0, (-1, past.tokens))
    there_BTE = resident_sets(
        z_BTE.detach().numpy(),
        lately(z_BTE.detach(), past).numpy(),
        past.first_BT1[..., 0].expand(z_BTE.shape[:2]).numpy(),
        int(size),
    )
    masked_BTE = z_BTE.masked_fill(~torch.from_numpy(there_BTE), -1e9)
    found = route(masked_BTE.flatten(0, 1).softmax(-1), layer.top_k, layer.normalize)
    return found._replace(probs_TE=z_BTE.flatten(0, 1).softmax(-1))


def resident_sets(
    z_BTE: np.ndarray, s_BTE: np.ndarray, first_BT: np.ndarray, size: int
) -> np.ndarray:
    """Which experts each token of `rolling` has. [B, T, E]"""
    B, T, _ = z_BTE.shape
    rows_B, there_BE = np.arange(B), np.zeros((B, z_BTE.shape[2]), bool)
    found = np.empty(z_BTE.shape, bool)
    for t in range(T):
        fresh_B, z_BE = first_BT[:, t], z_BTE[:, t]
        if fresh_B.any():
            best_FX = np.argsort(-z_BE[fresh_B])[:, :size]
            there_BE[fresh_B] = False
            there_BE[rows_B[fresh_B, None], best_FX] = True
        best_B = np.where(there_BE, -np.inf, z_BE).argmax(-1)
        worst_B = np.where(there_BE, s_BTE[:, t], np.inf).argmin(-1)
        swap_B = ~fresh_B & (z_BE[rows_B, best_B] > z_BE[rows_B, worst_B])
        there_BE[rows_B[swap_B], worst_B[swap_B]] = False
        there_BE[rows_B[swap_B], best_B[swap_B]] = True
        found[:, t] = there_BE
    return found


def install(model: Any, config: ModelConfig, routing: str, options: dict[str, float]) -> None:
    """Put a function of this module in the place of all gates of a model that is new. Weights that
    it has beside them begin at zero."""
    D, (resident, streamed) = config.hidden_size, _sizes(config)
    wanted = {
        "selective": {"rate": (D, 1)},
        "weighted": {"rate": (D, 1)},
        "two_back": {"second": (D, resident)},
        "bent": {"into": (D, 32), "out": (32, streamed)},
    }.get(routing, {})
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        block.mlp.__class__ = type(routing, (Layer,), {"routing": staticmethod(globals()[routing])})
        block.mlp.options = options
        block.mlp.extra = nn.ModuleDict(
            {name: nn.Linear(*shape, bias=False) for name, shape in wanted.items()}
        )
        for name, part in block.mlp.extra.items():
            part.weight.data.zero_()
            if name == "into":
                part.weight.data.normal_(0, D**-0.5, generator=generator)
    model._looking_back = list(range(config.num_hidden_layers))


def _sizes(config: ModelConfig) -> Sequence[int]:
    return config.num_resident_experts, config.num_experts - config.num_resident_experts
