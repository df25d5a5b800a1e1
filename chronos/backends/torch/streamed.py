"""Gradients through experts that do not stay in memory, and a model that takes them from a feed.

A slot holds another expert by the time a backward pass comes to it. So a layer's routed sum saves
its input and its routing alone; its backward pass acquires the experts again, computes them again
and differentiates each while it is there (recomputation, 1604.06174, with the weights fetched again
too). Several micro-batches go up and down together, layer by layer (`Climb`): each expert is then
read once for all of them on either way. Every expert's rows are summed in the order of the routing,
so values and gradients have the same bits whatever the budget and the order of arrival. Not
covered: second derivatives.

Shape legend: T tokens, D hidden, K top-k, N = T * K routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from chronos.common.experts.feed import Feed, Source
from chronos.common.experts.passes import Kept, Pass, require_all
from chronos.common.experts.together import together

Compute = Callable[[int, Tensor, Any], Tensor]  # (expert, its rows, its weights) to their outputs
# (weights [T, K], outputs [T, K, D]) to sum_k weights * outputs [T, D], as a library rounds it.
Mix = Callable[[Tensor, Tensor], Tensor]


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


def recording(*inputs: Tensor) -> bool:
    """Whether a gradient by any of these is being recorded."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def climbs(source: Source | None) -> bool:
    """Whether the pass is one of a `Climb`, whose gradients are taken later."""
    return isinstance(source, Kept) and source.climbs


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
    call.precision, call.by_x = _precision(x_TD.device.type), x_TD.requires_grad
    # Here and not in the function's own forward: passes that take turns in it would leave their
    # mode to one another.
    compute_all = partial(_summed, call, x_TD.detach(), weights_TK.detach())
    call.sum_TD = source.given(layer, compute_all) if isinstance(source, Kept) else compute_all()
    flat = [tensor for expert in experts for tensor in tensors[expert]]
    out: Tensor = _RoutedSum.apply(call, x_TD, weights_TK, *flat)  # type: ignore[no-untyped-call]
    if isinstance(source, Kept) and source.goes_down:
        source.noted[layer] = _Noted(call, x_TD, weights_TK, out)
    return out


@dataclass
class _Call:
    """pairs: the routed pairs of each expert, by their index t * K + k. precision: what products
    are made in, in the backward pass too. by_x: whether a gradient by the layer's input is wanted.
    sum_TD: what it comes to. found: its gradients, where they are taken before."""

    source: Source
    layer: int
    compute: Compute
    mix: Mix
    pairs: dict[int, Tensor]
    adapters: dict[int, tuple[Tensor, ...]]
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    by_x: bool = True
    sum_TD: Tensor | None = None
    found: _Gradients | None = None


class _RoutedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, x_TD: Tensor, weights_TK: Tensor, *adapters: Tensor
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x_TD, weights_TK)
        assert call.sum_TD is not None
        sum_TD, call.sum_TD = call.sum_TD.detach(), None
        return sum_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        found = call.found
        if found is None:
            x_TD, weights_TK = ctx.saved_tensors
            found = _differentiated(call, call.source, x_TD, weights_TK, dy_TD)
        needs_x, needs_weights = ctx.needs_input_grad[1:3]
        return (
            None,
            found.dx_TD if needs_x else None,
            found.dweights_TK if needs_weights else None,
            *(d for expert in call.pairs for d in found.adapters[expert]),
        )


class _Gradients(NamedTuple):
    """By a layer's input, by its routing weights, and by each expert's adapter."""

    dx_TD: Tensor
    dweights_TK: Tensor
    adapters: dict[int, list[Tensor | None]]


class _Noted(NamedTuple):
    """A layer's routed sum as it is recorded: what went in, and what came out."""

    call: _Call
    x_TD: Tensor
    weights_TK: Tensor
    out_TD: Tensor

    def differentiate(self, dy_TD: Tensor, source: Source) -> None:
        """Take its gradients, for the backward pass that comes to it."""
        self.call.found = _differentiated(self.call, source, self.x_TD, self.weights_TK, dy_TD)


def _differentiated(
    call: _Call, source: Source, x_TD: Tensor, weights_TK: Tensor, dy_TD: Tensor
) -> _Gradients:
    """The gradients of a routed sum, its experts acquired and computed again."""
    T, K = weights_TK.shape
    weights_N = weights_TK.reshape(-1)
    dx_ND = dy_TD.new_zeros(T * K, x_TD.shape[1], dtype=x_TD.dtype)
    dweights_N = torch.zeros_like(weights_N)
    found: dict[int, list[Tensor | None]] = {}
    for expert, weights in source.acquire(call.layer, list(call.pairs)):
        at_n, leaves = call.pairs[expert], call.adapters[expert]
        rows_nD = _rows(call, expert, x_TD, weights_TK)
        with torch.enable_grad(), call.precision():
            y_nD = call.compute(expert, rows_nD, weights)
        dy_nD = dy_TD[at_n // K]
        dweights_N[at_n] = (y_nD.detach() * dy_nD).sum(-1).to(dweights_N.dtype)
        into_nD = (weights_N[at_n, None] * dy_nD).to(y_nD.dtype)
        wanted = [t for t in (rows_nD, *leaves) if t.requires_grad]
        by = iter(torch.autograd.grad(y_nD, wanted, into_nD) if wanted else ())
        if rows_nD.requires_grad:
            dx_ND[at_n] = next(by)
        found[expert] = [next(by) if leaf.requires_grad else None for leaf in leaves]
    return _Gradients(dx_ND.view(T, K, -1).sum(1), dweights_N.view(T, K), found)


class Climb:
    """Micro-batches of one update, whose forward passes go up together, layer by layer, and whose
    backward passes come down so. A layer leaves its input and what its experts gave, and is
    computed again on the way down, once for all of them: each expert is read once on either way."""

    def __init__(self, model: Streamed, count: int) -> None:
        self._source = Pass(model.feed)
        self._lanes = [_Lane() for _ in range(count)]

    def up(self, forwards: Sequence[Callable[..., Any]]) -> list[Any]:
        """Call each with what the model is to be called with: what they return."""
        lanes = zip(self._lanes, forwards, strict=True)
        outs = together(self._source, [partial(lane.up, forward) for lane, forward in lanes])
        _raise(outs)
        return outs

    def down(self, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        """Go on with the gradients by the last layer's outputs. precision: as on the way up."""
        for _ in range(len(self._lanes[0].layers)):
            for lane in self._lanes:
                with precision():
                    lane.compute_again()
            jobs = [job for lane in self._lanes for job in lane.jobs()]
            with torch.no_grad():  # one mode for all of them: they take turns
                outs = together(self._source, jobs)
            _raise(outs)
            for lane in self._lanes:
                lane.step_down()


class _Lane:
    """One micro-batch: its layers, each with the inputs and outputs that gradients go through."""

    def __init__(self) -> None:
        self.layers: list[tuple[Callable[..., Any], Any, Any]] = []
        self._kept: Kept | None = None
        self._roots: list[tuple[Tensor, Tensor]] = []  # outputs of the layer, and gradients by them
        self._inputs: list[tuple[Tensor, Tensor]] = []  # its inputs, and the leaves in their place

    def up(self, forward: Callable[..., Any], source: Source) -> Any:
        self._kept = Kept(source)
        self._kept.climbs = True
        return forward(source=self._kept, through=self._through)

    def _through(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A layer's outputs, cut off from what they were made of."""
        given = args, options
        args, options = tree_map(_leaf, given)
        outs = tree_map(_leaf, run(*args, **options))
        self.layers.append((run, given, outs))
        return outs

    def compute_again(self) -> None:
        """The last layer that is left, its experts left out."""
        assert self._kept is not None
        self._kept.goes_down = True
        run, given, outs = self.layers.pop()
        args, options = tree_map(_leaf, given)
        leaves = zip(_tensors(given), _tensors((args, options)), strict=True)
        self._inputs = [(own, leaf) for own, leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            again = run(*args, **options)
        pairs = zip(_tensors(again), _tensors(outs), strict=True)
        self._roots = [(a, leaf.grad) for a, leaf in pairs if leaf.grad is not None]

    def jobs(self) -> list[Callable[[Source], None]]:
        """What is to be done with the layer's experts."""
        assert self._kept is not None
        noted, self._kept.noted = list(self._kept.noted.values()), {}
        found: list[Callable[[Source], None]] = []
        for each in noted if self._roots else ():
            roots, grads = zip(*self._roots, strict=True)
            (dy_TD,) = torch.autograd.grad(
                roots, [each.out_TD], grads, retain_graph=True, allow_unused=True
            )
            if dy_TD is not None:
                found.append(partial(each.differentiate, dy_TD))
        return found

    def step_down(self) -> None:
        """The backward pass of the layer, to its inputs."""
        if self._roots:
            roots, grads = zip(*self._roots, strict=True)
            torch.autograd.backward(roots, grads)
        for own, leaf in self._inputs:
            if leaf.grad is not None:  # what several layers are given is gone through for each
                torch.autograd.backward([own], [leaf.grad], retain_graph=True)
        self._roots, self._inputs = [], []


def _raise(outs: Sequence[Any]) -> None:
    for out in outs:
        if isinstance(out, Exception):
            raise out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _leaf(x: Any) -> Any:
    """A tensor that a gradient goes through, without what it was made of."""
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x


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
    return x_TD[at_n].detach().requires_grad_(call.by_x)
