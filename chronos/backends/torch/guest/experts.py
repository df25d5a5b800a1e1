"""The experts of a guest model: Transformers' interface for them, fed from our source.

Transformers hands the experts of about sixty architectures to a function chosen by name; "chronos"
is one more. It takes weights expert by expert from an ExpertStore and computes with the block's own
gate and activation. Rows are grouped, multiplied, weighted and summed as Transformers' `grouped_mm`
does, its default on a CPU, so the bits are those of the library's own resident run (measured equal
for one to 64 tokens in float32 and bfloat16). Not covered: expert parallelism, training.

Shape legend: T tokens, D hidden, F expert hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronos.backends.torch.fast.capture import opaque
from chronos.backends.torch.moe import Expert, ExpertSource, Routing, refuse_gradients
from chronos.backends.torch.products import onednn_linear, packed, packs
from chronos.common.errors import UsageError
from chronos.common.experts.prefetch import NEXT_GATE, Prefetcher

NAME = "chronos"
# What an experts module may hold, one slice an expert: the names inside a record too.
PARAMETERS = (
    "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias",
)  # fmt: skip
Replay = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class Call:
    """What one forward pass shares with its layers."""

    source: ExpertSource | None = None
    replay: Replay | None = None
    routing: list[Routing] = field(default_factory=list)


class Layer:
    """One layer's experts: which layer it is, and what stands in for an expert that is missing."""

    def __init__(
        self,
        layer: int,
        call: Call,
        shared: Callable[[Tensor], Tensor] | None,
        kernel: Callable[..., Tensor],
        ahead: tuple[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """kernel: Transformers' own function, for experts that the module holds itself.
        ahead: the next layer with experts, and what its own gate would choose."""
        self.layer, self._call, self._shared, self._kernel = layer, call, shared, kernel
        self._ahead = ahead

    def __call__(self, module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        call = self._call
        if call.replay is not None:
            ids_TK, weights_TK = call.replay(self.layer)
            weights_TK = weights_TK.to(x_TD.dtype)
        call.routing.append(Routing(ids_TK, weights_TK, weights_TK))
        if call.source is None:
            return self._kernel(module, x_TD, ids_TK, weights_TK)
        refuse_gradients(x_TD, weights_TK)
        combine = self._one_token if len(x_TD) == 1 else self._grouped
        return combine(module, x_TD, ids_TK, weights_TK, call.source)

    def _one_token(
        self, module: Any, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor, source: ExpertSource
    ) -> Tensor:
        ids: list[int] = ids_1K[0].tolist()
        rank = {expert: i for i, expert in enumerate(ids)}
        y_K: list[Tensor] = [x_1D] * len(ids)
        missing = []
        ready = source.acquire(self.layer, ids)  # its reads go first
        if self._ahead is not None:
            self._forecast(x_1D, source)
        for expert, weights in ready:
            if weights is None:
                missing.append(rank[expert])
            else:
                weights = self._packed(module, expert, weights, source)
                y_K[rank[expert]] = expert_forward(module, x_1D, weights)
        if missing:
            shared_1D = self._stand_in(x_1D)
            for i in missing:
                y_K[i] = shared_1D
                source.record_fallback(float(weights_1K[0, i]))
        y_KD = torch.cat(y_K) * weights_1K[0, :, None]
        return y_KD[None].sum(dim=1).to(x_1D.dtype)

    def _grouped(
        self, module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, source: ExpertSource
    ) -> Tensor:
        T, K = ids_TK.shape
        # Not stable, as in Transformers: a row's place in its group can show in its last bit.
        sorted_N, order_N = ids_TK.reshape(-1).sort()
        used, counts = torch.unique_consecutive(sorted_N, return_counts=True)
        experts: list[int] = used.tolist()
        token_N = order_N // K
        rows = dict(zip(experts, token_N.split(counts.tolist()), strict=True))
        outputs: dict[int, Tensor] = {}
        missing = []
        for expert, weights in source.acquire(self.layer, experts):
            if weights is None:
                missing.append(expert)
            else:
                weights = self._packed(module, expert, weights, source)
                outputs[expert] = expert_forward(module, x_TD[rows[expert]], weights)
        if missing:
            shared_TD = self._stand_in(x_TD)
            gone_TK = torch.isin(ids_TK, ids_TK.new_tensor(missing))
            source.record_fallback(float(weights_TK[gone_TK].sum()))
            outputs |= {expert: shared_TD[rows[expert]] for expert in missing}
        y_ND = torch.cat([outputs[expert] for expert in experts])
        y_ND = y_ND * weights_TK.reshape(-1)[order_N, None]
        return y_ND[order_N.argsort()].view(T, K, -1).sum(dim=1).to(x_TD.dtype)

    def _packed(self, module: Any, expert: int, weights: Any, source: Any) -> Any:
        """An expert in the layout its products want, where it stays in memory: a product then takes
        0.25 to 0.7 of its time, for one of 10 to 30 products' time once."""
        if isinstance(weights, Packed) or getattr(source, "evicts", True):
            return weights
        named, transposed = by_name(weights), module.is_transposed
        if not all(w.dim() < 2 or packs(w, transposed=transposed) for w in named.values()):
            return weights
        ready = Packed()
        for name, w in named.items():  # the memory of all of them is given back
            ready[name] = w.clone() if w.dim() < 2 else packed(w.t() if transposed else w)
        source.replace(self.layer, expert, ready)
        return ready

    def _forecast(self, x_1D: Tensor, source: Any) -> None:
        """The next layer's gate on this layer's state: right more often than not, and in time for
        a read while this layer computes. A prefetcher takes it, where it pays."""
        if isinstance(source, Prefetcher) and source.wanted(NEXT_GATE):
            layer, choose = self._ahead  # type: ignore[misc]
            source.forecast_next(layer, choose(x_1D)[0].tolist())

    def _stand_in(self, x_TD: Tensor) -> Tensor:
        shared_TD = None if self._shared is None else self._shared(x_TD)
        if shared_TD is None or shared_TD.shape != x_TD.shape:
            raise UsageError(
                f"no shared expert can stand in for a missing one in layer {self.layer}",
                "",
                "use miss=exact",
            )
        return shared_TD


class Packed(dict[str, Tensor]):
    """An expert by name, its matrices as oneDNN's products read them."""


def by_name(weights: Expert | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(weights, Expert):
        return {"gate_up_proj": weights.gate_up_FD, "down_proj": weights.down_DF}
    return weights


def expert_forward(module: Any, x_TD: Tensor, weights: Expert | Mapping[str, Tensor]) -> Tensor:
    """One expert on its rows: up (with the gate, where there is one), activation, down."""
    named = by_name(weights)
    if module.has_gate:
        h_TF = module._apply_gate(_project(module, x_TD, named, "gate_up_proj"))
    else:
        h_TF = module.act_fn(_project(module, x_TD, named, "up_proj"))
    y_TD = _project(module, h_TF, named, "down_proj")
    return module.post_expert_norm(y_TD) if module.has_post_expert_norm else y_TD


def _project(module: Any, x_TD: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The bias is added after the product is rounded, as Transformers does."""
    matrix = weights[name]
    if matrix.is_mkldnn:
        out = onednn_linear(x_TD, matrix)
    elif module.is_transposed:
        out = x_TD @ matrix.to(x_TD.dtype)
    else:
        out = F.linear(x_TD, matrix.to(x_TD.dtype))
    return out + weights[f"{name}_bias"].to(x_TD.dtype) if module.has_bias else out


def is_experts(module: nn.Module) -> bool:
    """Whether a module hands its experts to Transformers' interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """The routed experts' own tensors [E, ...] of an experts module, in the order of a record."""
    held = dict(module.named_parameters(recurse=False))
    return {name: held[name] for name in PARAMETERS if name in held}


def shared_of(owners: Sequence[nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """What the shared experts beside a layer's routed ones add to its output."""
    for owner in owners:
        for name in ("shared_experts", "shared_expert", "shared_mlp"):
            experts, gate = getattr(owner, name, None), getattr(owner, f"{name}_gate", None)
            if experts is not None:
                return partial(_gated, experts, gate) if gate is not None else experts
    return None


def chooser_of(owner: nn.Module, like_1D: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The ids [T, K] that the gate of a block would choose; None where it is called otherwise."""
    gate = getattr(owner, "gate", None) or getattr(owner, "router", None)

    def choose(x_TD: Tensor) -> Tensor:
        out = gate(x_TD)  # type: ignore[misc]
        found: Tensor = next(t for t in out if not t.is_floating_point())
        return found

    try:
        return choose if choose(like_1D).shape[:-1] == (1,) else None
    except Exception:  # whatever a foreign gate says to one row of hidden states
        return None


def _gated(experts: nn.Module, gate: nn.Module, x_TD: Tensor) -> Tensor:
    out: Tensor = torch.sigmoid(gate(x_TD)) * experts(x_TD)
    return out


def _forward(module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What "chronos" stands for in Transformers' interface."""
    out: Tensor = opaque(module.chronos, module, x_TD, ids_TK, weights_TK)
    return out


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
