"""Gradients through experts that do not stay in memory, and a model that takes them from a feed.

A slot holds another expert by the time a backward pass comes to it. So a layer's routed sum saves
its input and its routing alone; its backward pass acquires the experts again, computes them again
and differentiates each while it is there (recomputation, 1604.06174, with the weights fetched again
too). Every expert's rows are summed in the order of the routing, so values and gradients have the
same bits whatever the budget and the order of arrival. Not covered: second derivatives.

Shape legend: T tokens, D hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from chronos.common.experts.feed import Feed, Source
from chronos.common.experts.passes import Pass, given, require_all

Compute = Callable[[int, Tensor, Any], Tensor]  # (expert, its rows, its weights) to their outputs
# (weights [T, K], outputs [T, K, D]) to sum_k weights * outputs [T, D], as a library rounds it.
Mix = Callable[[Tensor, Tensor], Tensor]


class Streamed:
    """A model whose experts come from a feed, called as one that holds them is."""

    def __init__(self, model: Any, feed: Feed) -> None:
        self.bare, self.feed = model, feed

    def __call__(self, *args: Any, **options: Any) -> Any:
        source = Pass(self.feed, again=self.bare.gradient_checkpointing)
        return self.bare(*args, source=source, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)

    def train(self) -> Streamed:
        self.bare.train()
        return self

    def eval(self) -> Streamed:
        self.bare.eval()
        return self


def recording(*inputs: Tensor) -> bool:
    """Whether a gradient by any of these is being recorded."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def routed_sum(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    source: Source,
    layer: int,
    compute: Compute,
    mix: Mix,
    adapters: Mapping[int, Sequence[Tensor]],
) -> Tensor:
    """The weighted sum of the routed experts' outputs [T, D], differentiable by x, by the weights
    and by what `adapters` lists of each expert that `compute` uses. Raises UsageError for a source
    that may leave experts out."""
    require_all(source)
    sorted_N, order_N = ids_TK.reshape(-1).sort(stable=True)
    used, counts = torch.unique_consecutive(sorted_N, return_counts=True)
    experts: list[int] = used.tolist()
    pairs = dict(zip(experts, order_N.split(counts.tolist()), strict=True))
    tensors = {expert: tuple(adapters.get(expert, ())) for expert in experts}
    call = _Call(source, layer, compute, mix, pairs, tensors)
    flat = [tensor for expert in experts for tensor in tensors[expert]]
    out: Tensor = _RoutedSum.apply(call, x_TD, weights_TK, *flat)  # type: ignore[no-untyped-call]
    return out


class _Call(NamedTuple):
    """pairs: the routed pairs of each expert, by their index t * K + k."""

    source: Source
    layer: int
    compute: Compute
    mix: Mix
    pairs: dict[int, Tensor]
    adapters: dict[int, tuple[Tensor, ...]]


class _RoutedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, x_TD: Tensor, weights_TK: Tensor, *adapters: Tensor
    ) -> Tensor:
        ctx.call, ctx.precision = call, _precision(x_TD.device.type)
        ctx.save_for_backward(x_TD, weights_TK)
        return given(call.source, call.layer, partial(_summed, call, x_TD, weights_TK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        x_TD, weights_TK = ctx.saved_tensors
        T, K = weights_TK.shape
        weights_N = weights_TK.reshape(-1)
        dx_ND = dy_TD.new_zeros(T * K, x_TD.shape[1], dtype=x_TD.dtype)
        dweights_N = torch.zeros_like(weights_N)
        found: dict[int, list[Tensor | None]] = {}
        for expert, weights in call.source.acquire(call.layer, list(call.pairs)):
            at_n, leaves = call.pairs[expert], call.adapters[expert]
            rows_nD = _rows(call, expert, x_TD, weights_TK)
            with torch.enable_grad(), ctx.precision():
                y_nD = call.compute(expert, rows_nD, weights)
            dy_nD = dy_TD[at_n // K]
            dweights_N[at_n] = (y_nD.detach() * dy_nD).sum(-1).to(dweights_N.dtype)
            wanted = [t for t in (rows_nD, *leaves) if t.requires_grad]
            into_nD = (weights_N[at_n, None] * dy_nD).to(y_nD.dtype)
            by = iter(torch.autograd.grad(y_nD, wanted, into_nD) if wanted else ())
            if rows_nD.requires_grad:
                dx_ND[at_n] = next(by)
            found[expert] = [next(by) if leaf.requires_grad else None for leaf in leaves]
        needs_x, needs_weights = ctx.needs_input_grad[1:3]
        return (
            None,
            dx_ND.view(T, K, -1).sum(1) if needs_x else None,
            dweights_N.view(T, K) if needs_weights else None,
            *(d for expert in call.pairs for d in found[expert]),
        )


def _summed(call: _Call, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
    outputs = {}
    for expert, weights in call.source.acquire(call.layer, list(call.pairs)):
        rows_nD = _rows(call, expert, x_TD, weights_TK)
        # The products of a backward pass, which may round otherwise; what they leave for it is
        # nobody's, a checkpoint's around this least of all.
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
            outputs[expert] = call.compute(expert, rows_nD, weights).detach()
    y_ND = torch.cat([outputs[expert] for expert in call.pairs])
    order_N = torch.cat(list(call.pairs.values()))
    y_TKD = y_ND[order_N.argsort()].view(*weights_TK.shape, -1)
    return call.mix(weights_TK, y_TKD)


def _itself(x: Tensor) -> Tensor:
    return x


def _precision(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """What products are made in now: a backward pass, which runs outside, has to make the same."""
    if not hasattr(torch, "get_autocast_dtype"):
        return nullcontext  # Intel Macs end at torch 2.2, and have no fast products in bfloat16
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def _rows(call: _Call, expert: int, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
    """An expert's rows, as a leaf."""
    at_n = call.pairs[expert] // weights_TK.shape[1]
    return x_TD[at_n].detach().requires_grad_(x_TD.requires_grad)
