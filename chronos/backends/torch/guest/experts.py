"""The experts of a guest model: Transformers' interface for them, fed from our source.

Transformers hands the experts of about sixty architectures to a function chosen by name; "chronos"
is one more. It takes experts one by one from a step of the feed and computes with them as their
codec does, which knows their tensors. Rows are grouped, multiplied, weighted and summed as
Transformers' `grouped_mm` does, its default on a CPU, so the bits are those of the library's own
resident run (measured equal for one to 64 tokens in float32 and bfloat16). Not covered: expert
parallelism, training.

Shape legend: T tokens, D hidden, F expert hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronos.backends.torch.codecs import PARAMETERS, codec_of
from chronos.backends.torch.fast.capture import opaque
from chronos.backends.torch.moe import Routing
from chronos.backends.torch.streamed import climbs, recording, routed_sum
from chronos.common.errors import UsageError
from chronos.common.experts.feed import Source
from chronos.common.experts.prefetch import NEXT_GATE
from chronos.common.layout.codecs import TRANSFORMERS

NAME = "chronos"
Replay = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class ExpertsCall:
    """What one forward pass shares with its layers."""

    source: Source | None = None
    replay: Replay | None = None
    routing: list[Routing] = field(default_factory=list)
    caches: Sequence[Any] = ()  # of the library's layers, which recorded steps find by their index
    through: Callable[..., Any] | None = None  # what layers are called through, in training


# Passes of several sequences take turns inside the library's code, so it is no attribute.
CALL: ContextVar[ExpertsCall] = ContextVar("CALL")


def current() -> ExpertsCall:
    """What the pass under way tells; nothing in particular outside of one."""
    return CALL.get(None) or ExpertsCall()


class Layer:
    """One layer's experts: which layer it is, and what stands in for an expert that is missing."""

    def __init__(
        self,
        layer: int,
        shared: Callable[[Tensor], Tensor] | None,
        kernel: Callable[..., Tensor],
        ahead: tuple[int, Callable[[Tensor], Tensor]] | None = None,
        encoding: str = TRANSFORMERS,
    ) -> None:
        """kernel: Transformers' own function, for experts that the module holds itself.
        ahead: the next layer with experts, and what its own gate would choose."""
        self.layer, self._shared, self._kernel = layer, shared, kernel
        self._ahead, self.codec = ahead, codec_of(encoding)

    def __call__(self, module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        call = current()
        if call.replay is not None:
            ids_TK, weights_TK = call.replay(self.layer)
            weights_TK = weights_TK.to(x_TD.dtype)
        # A layer of a climb is cut off from what is made of it, but for its own output.
        shown_TK = weights_TK.detach() if climbs(call.source) else weights_TK
        call.routing.append(Routing(ids_TK, shown_TK, shown_TK))
        if call.source is None:
            return self._kernel(module, x_TD, ids_TK, weights_TK)
        lora = module._modules.get("lora") or {}
        if recording(x_TD, weights_TK, *(p for each in lora.values() for p in each.arrays())):
            return routed_sum(
                x_TD,
                ids_TK,
                weights_TK,
                call.source,
                self.layer,
                partial(self._compute, module),
                _weighted,
                {int(expert): each.arrays() for expert, each in lora.items()},
            )
        combine = self._one_token if len(x_TD) == 1 else self._grouped
        return combine(module, x_TD, ids_TK, weights_TK, call.source)

    def _compute(self, module: Any, expert: int, x_TD: Tensor, weights: Any) -> Tensor:
        """An expert's output for its rows, with its adapter where it has one."""
        lora = module._modules.get("lora")
        if lora is not None and str(expert) in lora:
            return self.codec.forward(x_TD, weights, module, lora[str(expert)])
        return self.codec.forward(x_TD, weights, module)

    def _one_token(
        self, module: Any, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor, source: Source
    ) -> Tensor:
        ids: list[int] = ids_1K[0].tolist()
        outputs: dict[int, Tensor] = {}
        missing = []
        ready = source.acquire(self.layer, list(dict.fromkeys(ids)))  # its reads go first
        self._forecast(x_1D, source)
        for expert, weights in ready:
            if weights is None:
                missing.append(expert)
            else:
                outputs[expert] = self._compute(module, expert, x_1D, weights)
        if missing:
            shared_1D = self._stand_in(x_1D)
            outputs |= dict.fromkeys(missing, shared_1D)
            for i in (i for i, expert in enumerate(ids) if expert in missing):
                source.record_fallback(float(weights_1K[0, i]))
        y_KD = torch.cat([outputs[expert] for expert in ids]) * weights_1K[0, :, None]
        return y_KD[None].sum(dim=1).to(x_1D.dtype)

    def _grouped(
        self, module: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, source: Source
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
                outputs[expert] = self._compute(module, expert, x_TD[rows[expert]], weights)
        if missing:
            shared_TD = self._stand_in(x_TD)
            gone_TK = torch.isin(ids_TK, ids_TK.new_tensor(missing))
            source.record_fallback(float(weights_TK[gone_TK].sum()))
            outputs |= {expert: shared_TD[rows[expert]] for expert in missing}
        y_ND = torch.cat([outputs[expert] for expert in experts])
        y_ND = y_ND * weights_TK.reshape(-1)[order_N, None]
        return y_ND[order_N.argsort()].view(T, K, -1).sum(dim=1).to(x_TD.dtype)

    def _forecast(self, x_1D: Tensor, source: Source) -> None:
        """The next layer's gate on this layer's state: right more often than not, and in time for
        a read while this layer computes. A prefetcher takes it, where it pays."""
        if self._ahead is not None and source.wants(NEXT_GATE):
            layer, choose = self._ahead
            source.foresee(NEXT_GATE, choose(x_1D)[0].tolist(), layer)

    def _stand_in(self, x_TD: Tensor) -> Tensor:
        shared_TD = None if self._shared is None else self._shared(x_TD)
        if shared_TD is None or shared_TD.shape != x_TD.shape:
            raise UsageError(
                f"no shared expert can stand in for a missing one in layer {self.layer}",
                "",
                "use miss=exact",
            )
        return shared_TD


def _weighted(weights_TK: Tensor, y_TKD: Tensor) -> Tensor:
    """As `grouped_mm` sums."""
    return (y_TKD * weights_TK[..., None]).sum(dim=1).to(y_TKD.dtype)


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
