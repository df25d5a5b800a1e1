"""Gradients through experts that do not stay in memory, and a model that takes them from a feed.

A slot holds another expert by the time a backward pass comes to it. So a layer's routed outputs are
one custom function: it keeps its input alone, and its backward pass acquires the experts again,
computes them again and differentiates each while it is there (recomputation, 1604.06174, with the
weights fetched again too). Values and gradients have the same bits whatever the budget and the
order of arrival. Not covered: second derivatives, `mx.compile` around it.

Shape legend: T tokens, D hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from chronos.common.experts.feed import Feed, Source
from chronos.common.experts.passes import Pass, given, require_all

# (expert, its rows, its weights, its adapter's arrays) to their outputs
Compute = Callable[[int, mx.array, Any, Sequence[mx.array]], mx.array]


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


def recording(*inputs: mx.array | None) -> bool:
    """Whether a gradient by any of these is being recorded; if not, their evaluation has begun."""
    try:
        mx.async_eval(*inputs)  # unlike `mx.eval` it takes nothing that is being transformed
    except ValueError:
        return True
    return False


def routed_outputs(
    x_TD: mx.array,
    ids_TK: mx.array,
    source: Source,
    layer: int,
    compute: Compute,
    adapters: Mapping[int, Sequence[mx.array]],
) -> mx.array:
    """The routed experts' outputs [T, K, D], not weighted, differentiable by x and by the arrays
    that `adapters` lists of each expert. Raises UsageError for a source that may leave experts
    out."""
    require_all(source)
    T, K = ids_TK.shape
    flat_N = np.array(ids_TK).reshape(-1)
    order_N = np.argsort(flat_N, kind="stable")
    used, starts = np.unique(flat_N[order_N], return_index=True)
    experts: list[int] = used.tolist()
    pairs = dict(zip(experts, np.split(order_N, starts[1:]), strict=True))
    back_N = mx.array(np.argsort(order_N))
    counts = {expert: len(adapters.get(expert, ())) for expert in experts}

    def shared_out(tensors: Sequence[mx.array]) -> dict[int, Sequence[mx.array]]:
        found, start = {}, 0
        for expert, count in counts.items():
            found[expert] = tensors[start : start + count]
            start += count
        return found

    def in_order(parts: Mapping[int, mx.array]) -> mx.array:
        """Rows by expert to [T, K, D]."""
        y_ND = mx.concatenate([parts[expert] for expert in experts])
        return y_ND[back_N].reshape(T, K, -1)

    @mx.custom_function
    def run(x_TD: mx.array, *tensors: mx.array) -> mx.array:
        mx.eval(x_TD)  # the layer before has computed with its slots
        own = shared_out(tensors)

        def acquired() -> mx.array:
            outputs = {}
            for expert, weights in source.acquire(layer, experts):
                rows_nD = x_TD[mx.array(pairs[expert] // K)]
                outputs[expert] = compute(expert, rows_nD, weights, own[expert])
                mx.eval(outputs[expert])  # the slot may be overwritten once the next is asked for
            return _leaf(in_order(outputs))

        return given(source, layer, acquired)

    @run.vjp
    def back(primals: Any, dy_TKD: mx.array, _: Any) -> Any:
        x_TD, *tensors = primals if isinstance(primals, (tuple, list)) else (primals,)
        mx.eval(x_TD, tensors, dy_TKD)
        adapted, dy_ND = shared_out(tensors), dy_TKD.reshape(T * K, -1)
        dx: dict[int, mx.array] = {}
        by: dict[int, Sequence[mx.array]] = {}
        for expert, weights in source.acquire(layer, experts):
            at_n = pairs[expert]

            def forward(
                rows_nD: mx.array,
                *own: mx.array,
                expert: int = expert,
                weights: Any = weights,
            ) -> mx.array:
                return compute(expert, rows_nD, weights, own)

            inputs = [x_TD[mx.array(at_n // K)], *adapted[expert]]
            grads: Any = mx.vjp(forward, inputs, [dy_ND[mx.array(at_n)]])[1]
            mx.eval(grads)
            dx[expert], by[expert] = grads[0], grads[1:]
        dx_TD = _leaf(in_order(dx).sum(1))
        return dx_TD, *(_leaf(d) for expert in experts for d in by[expert])

    flat = [tensor for expert in experts for tensor in adapters.get(expert, ())]
    return cast(mx.array, run(x_TD, *flat))


def _leaf(array: mx.array) -> mx.array:
    """Its values without what they were computed from, which a transformation would keep."""
    return mx.array(np.array(array.view(mx.uint8))).view(array.dtype)
