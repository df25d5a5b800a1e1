"""Gradients through experts that do not stay in memory, and a model that takes them from a feed.

A slot holds another expert by the time a backward pass comes to it. So a layer's routed outputs are
one custom function: it keeps its input alone, and its backward pass acquires the experts again,
computes them again and differentiates each while it is there (recomputation, 1604.06174, with the
weights fetched again too). Several micro-batches go up and down together, layer by layer (`Climb`):
each expert is then read once for all of them on either way. Values and gradients have the same bits
whatever the budget and the order of arrival. Not covered: second derivatives, `mx.compile` around
it.

Shape legend: T tokens, D hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from chronos.common.experts.feed import Feed, Source
from chronos.common.experts.passes import Kept, Pass, require_all
from chronos.common.experts.together import together

# (expert, its rows, its weights, its adapter's arrays) to their outputs
Compute = Callable[[int, mx.array, Any, Sequence[mx.array]], mx.array]


class Streamed:
    """A model whose experts come from a feed, called as one that holds them is."""

    def __init__(self, model: Any, feed: Feed) -> None:
        self.bare, self.feed = model, feed

    def __call__(self, *args: Any, source: Source | None = None, **options: Any) -> Any:
        if source is None:
            source = Pass(self.feed)
            source = Kept(source) if self.bare.gradient_checkpointing else source
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


def climbs(source: Source | None) -> bool:
    """Whether the pass is one of a `Climb`, whose gradients are taken later."""
    return isinstance(source, Kept) and source.climbs


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

        return source.given(layer, acquired) if isinstance(source, Kept) else acquired()

    @run.vjp
    def back(primals: Any, dy_TKD: mx.array, _: Any) -> Any:
        x_TD, *tensors = primals if isinstance(primals, (tuple, list)) else (primals,)
        mx.eval(x_TD, tensors, dy_TKD)
        if not climbs(source):
            return differentiated(source, x_TD, tensors, dy_TKD)
        assert isinstance(source, Kept)
        if layer in source.noted:
            return source.noted.pop(layer).found
        known = _leaf(x_TD), [_leaf(tensor) for tensor in tensors], _leaf(dy_TKD)
        source.noted[layer] = _Noted(differentiated, known)
        return mx.zeros_like(x_TD), *map(mx.zeros_like, tensors)

    def differentiated(
        source: Source, x_TD: mx.array, tensors: Sequence[mx.array], dy_TKD: mx.array
    ) -> tuple[mx.array, ...]:
        """Gradients by x and the adapters, the experts acquired and computed again."""
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


class _Noted:
    """A layer's routed outputs on the way down: what its gradients are taken of, and these."""

    def __init__(self, differentiated: Callable[..., tuple[mx.array, ...]], known: Any) -> None:
        self._differentiated, self._known = differentiated, known
        self.found: tuple[mx.array, ...] = ()

    def differentiate(self, source: Source) -> None:
        self.found = self._differentiated(source, *self._known)


class Climb:
    """Micro-batches of one update, whose forward passes go up together, layer by layer, and whose
    backward passes come down so. A layer leaves its input and what its experts gave, and is
    computed again on the way down: each expert is read once on either way.

    MLX differentiates functions, so a layer is differentiated twice: to learn the gradients by what
    its experts gave (lazily: nothing else of it is computed), and with theirs.
    """

    def __init__(self, model: Streamed, count: int) -> None:
        self._source, self._module = Pass(model.feed), model.bare
        self._weights = model.bare.trainable_parameters()
        self._names = {id(array): path for path, array in tree_flatten(self._weights)}
        self._lanes = [_Lane(self._names) for _ in range(count)]

    def up(self, forwards: Sequence[Callable[..., Any]]) -> list[Any]:
        """Call each with what the model is to be called with: what they return."""
        lanes = zip(self._lanes, forwards, strict=True)
        outs = together(self._source, [partial(lane.up, forward) for lane, forward in lanes])
        _raise(outs)
        return outs

    def top(self, place: int, function: Callable[..., Any]) -> Any:
        """What a micro-batch's states come to. function: takes what the model is to be called with,
        and begins with what is differentiated."""
        lane = self._lanes[place]

        def called(weights: Any, cuts: Any) -> Any:
            self._module.update(weights)
            return function(source=lane.kept, through=lane.replay(cuts))

        graded = mx.value_and_grad(called, argnums=(0, 1))
        found, (by_weights, lane.cotangents) = graded(self._weights, lane.cuts)
        mx.eval(found, by_weights, lane.cotangents)
        self._module.update(self._weights)
        inside = {id(a) for _, own, *_ in lane.layers for _, a in tree_flatten(own)}
        beside = zip(tree_flatten(self._weights), tree_flatten(by_weights), strict=True)
        lane.gradients = {name: g for (name, a), (_, g) in beside if id(a) not in inside}
        return found

    def down(self) -> dict[str, mx.array]:
        """Gradients of the whole update, by path in the model."""
        for _ in range(len(self._lanes[0].layers)):
            for lane in self._lanes:
                lane.differentiate()
            _raise(together(self._source, [job for lane in self._lanes for job in lane.jobs()]))
            for lane in self._lanes:
                lane.step_down()
        self._module.update(self._weights)
        total = {}
        for name in self._names.values():
            total[name], *rest = (lane.gradients[name] for lane in self._lanes)
            for gradient in rest:
                total[name] = total[name] + gradient
        mx.eval(total)
        return total


class _Lane:
    """One micro-batch: its layers, each with what it was given and its outputs."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """names: paths of the arrays that are trained, by their identity."""
        self._names = names
        self.kept: Kept | None = None
        self.layers: list[tuple[Callable[..., Any], Any, tuple[mx.array, ...], Any]] = []
        self.cotangents: list[list[mx.array]] = []  # by each layer's outputs
        self.gradients: dict[str, mx.array] = {}

    def up(self, forward: Callable[..., Any], source: Source) -> Any:
        self.kept = Kept(source)
        self.kept.climbs = True
        return forward(source=self.kept, through=self._through)

    def _through(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def called(parameters: Any, *inputs: mx.array) -> Any:
            outs = tree_flatten(run(parameters, *inputs))
            mx.eval(inputs, [array for _, array in outs])
            self.layers.append((run, parameters, inputs, outs))
            return tree_unflatten(outs)

        return called

    @property
    def cuts(self) -> list[list[mx.array]]:
        """Each layer's outputs that have a gradient."""
        return [_floating(outs) for *_, outs in self.layers]

    def replay(self, cuts: list[list[mx.array]]) -> Callable[..., Any]:
        """Layers that are not computed: their outputs are these."""
        ready = iter(zip(self.layers, cuts, strict=True))

        def through(run: Callable[..., Any]) -> Callable[..., Any]:
            def called(parameters: Any, *inputs: mx.array) -> Any:
                (*_, outs), own = next(ready)
                cut = iter(own)
                return tree_unflatten([(p, next(cut) if _is_float(a) else a) for p, a in outs])

            return called

        return through

    def differentiate(self) -> list[mx.array]:
        """Gradients of the last layer that is left, by its weights and its inputs."""
        run, parameters, inputs, _ = self.layers[-1]
        flat = tree_flatten(parameters)

        def forward(*arrays: mx.array) -> list[mx.array]:
            own = [(path, array) for (path, _), array in zip(flat, arrays, strict=False)]
            weights = tree_unflatten(own) if own else parameters
            return _floating(tree_flatten(run(weights, *arrays[len(flat) :])))

        primals = [*(array for _, array in flat), *inputs]
        return list(mx.vjp(forward, primals, self.cotangents[-1])[1])

    def jobs(self) -> list[Callable[[Source], None]]:
        """What is to be done with the layer's experts."""
        assert self.kept is not None
        return [noted.differentiate for noted in self.kept.noted.values()]

    def step_down(self) -> None:
        """The layer's gradients, with those of its experts, to the outputs of the one below."""
        found = self.differentiate()
        mx.eval(found)
        _, parameters, *_ = self.layers.pop()
        self.cotangents.pop()
        by_weights = zip(tree_flatten(parameters), found, strict=False)
        for (_, array), gradient in by_weights:
            name = self._names[id(array)]
            known = self.gradients.get(name)
            self.gradients[name] = gradient if known is None else known + gradient
        if self.cotangents:  # an output's first is what the next layer is given
            below, first = self.cotangents[-1], found[len(tree_flatten(parameters))]
            below[0] = below[0] + first
            mx.eval(below[0])


def _raise(outs: Sequence[Any]) -> None:
    for out in outs:
        if isinstance(out, Exception):
            raise out


def _floating(outs: Any) -> list[mx.array]:
    return [array for _, array in outs if _is_float(array)]


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _leaf(array: mx.array) -> mx.array:
    """Its values without what they were computed from, which a transformation would keep."""
    return mx.array(np.array(array.view(mx.uint8))).view(array.dtype)
