"""One token on an NVIDIA GPU, in as few launches as its routing allows.

A token of 24 layers is 2,000 launches: 29 ms of a host's time around 3.3 ms of kernels (an H200).
Of each block three stages have fixed shapes and become CUDA graphs, one launch each: up to the
query and the cache's new entry; from attention to the gate's choice; the experts. Between them
stay what grows with the cache, the look at the chosen ids on the host (the one wait of a layer),
and the copies of the chosen experts to where the third graph reads them. The functions are those
of a step without graphs, so are the bits. Where nothing can be captured a stage runs its function
each time.
Not covered: prompts, fallback for experts that are not there, routing committed by the lookahead.

Shape legend: D hidden, K top-k, R rotated width.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from chronos.backends.torch.model import Block, Cache, Model, Output
from chronos.backends.torch.moe import Routing
from chronos.backends.torch.products import linear
from chronos.common.experts.feed import Source
from chronos.common.tuning import plain

_log = logging.getLogger("chronos")
Tensors = tuple[Tensor, ...]


class Stage:
    """A function of tensors that stay where they are, captured once; its results stay too."""

    def __init__(self, function: Callable[[], Tensors], recorder: GraphRecorder | None) -> None:
        self._function, self._graph = function, None
        if recorder is not None:
            self.out, self._graph = recorder.capture(function)
        if self._graph is None:
            self.out = tuple(tensor.clone() for tensor in function())

    def run(self) -> Tensors:
        if self._graph is not None:
            self._graph.replay()
        else:
            for kept, new in zip(self.out, self._function(), strict=True):
                kept.copy_(new)
        return self.out


class GraphRecorder:
    """Captures functions on a stream of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._works = True

    def capture(self, function: Callable[[], Tensors]) -> tuple[Tensors, Any]:
        """Its results and the graph that makes them anew; no graph after a capture that failed."""
        if not self._works:
            return (), None
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        out: Tensors = ()
        with torch.cuda.stream(self._stream), _no_collection():
            function()  # libraries set themselves up in their first call, which no graph may hold
            try:
                # Other threads go on copying experts meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = function()
                finally:
                    graph.capture_end()
            except RuntimeError:
                _log.warning("a decode step is not captured: slower, all the same", exc_info=True)
                self._works = False
        current.wait_stream(self._stream)
        return out, graph if self._works else None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Graphs of another model that the collector finds meanwhile would end the capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class BlockStages:
    """The stages of one block, captured at its first token."""

    def __init__(self, block: Block, layer: int, steps: Steps, x_11D: Tensor) -> None:
        """x_11D: where the residual stream comes in, at every token."""
        self._block, self._layer, self._steps, self.x_11D = block, layer, steps, x_11D
        self._ids_1K, self._weights_1K = steps.ids_L1K[layer], steps.weights_L1K[layer]
        self._front = steps.stage(self._to_query)
        self._core = block.self_attn.core
        self._places = steps.experts.setdefault(block.mlp.codec, [])
        self._y: Tensor | None = None
        self._middle: Stage | None = None
        self._experts: Stage | None = None

    def run(
        self, cache: Any, source: Source | None, chosen: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The residual stream behind the block, at the same place at every token."""
        query, entry = self._front.run()
        y = self._core(query, entry, cache)
        if self._y is None:
            self._y = torch.empty_like(y, memory_format=torch.contiguous_format)
        self._y.copy_(y)
        if self._middle is None:
            self._middle = self._steps.stage(self._to_choice)
        self._middle.run()
        if chosen is not None:
            self._ids_1K.copy_(chosen[0])
            self._weights_1K.copy_(chosen[1])
        ids: list[int] = self._ids_1K[0].tolist()  # the wait of this layer
        place = {expert: i for i, expert in enumerate(ids)}
        lease = source.acquire(self._layer, ids) if source else self._block.mlp.held(ids)
        for expert, weights in lease:
            assert weights is not None
            self._steps.put(self._places, place[expert], weights)
        if self._experts is None:
            self._experts = self._steps.stage(self._to_output)
        return self._experts.run()[0]

    # The stages.

    def _to_query(self) -> Tensors:
        block = self._block
        rope = self._steps.rope[block.kind]
        return block.self_attn.front(block.input_layernorm(self.x_11D), rope)

    def _to_choice(self) -> Tensors:
        block = self._block
        assert self._y is not None
        x_11D = self.x_11D + block.self_attn.back(self._y)
        h_1D = block.post_attention_layernorm(x_11D).flatten(0, 1)
        routing = block.mlp.decide(h_1D)
        self._ids_1K.copy_(routing.ids_TK)
        self._weights_1K.copy_(routing.weights_TK)
        return x_11D, h_1D

    def _to_output(self) -> Tensors:
        assert self._middle is not None
        x_11D, h_1D = self._middle.out
        y_1D = self._block.mlp.mix(h_1D, self._weights_1K, self._places)
        return (x_11D + y_1D.view_as(x_11D),)


class Steps:
    """Single tokens of a model behind a cache, called as the model is."""

    def __init__(self, model: Model, capture: bool = True) -> None:
        """capture: False computes stage by stage without graphs, for tests on a CPU."""
        config = model.config
        self._model, self._recorder = model, GraphRecorder(model.device) if capture else None
        like = model.model.norm.weight
        self._x_11D = like.new_empty((1, 1, config.hidden_size))
        self.rope: dict[str, tuple[Tensor, Tensor]] = {
            kind: (like.new_empty((1, rotary.dim)), like.new_empty((1, rotary.dim)))
            for kind, rotary in model._rotary.items()
        }
        self.experts: dict[Any, list[Any]] = {}  # by codec: where stages read a token's experts
        top_k, layers = config.num_experts_per_tok, config.num_hidden_layers
        self.ids_L1K = torch.empty((layers, 1, top_k), dtype=torch.int64, device=model.device)
        self.weights_L1K = like.new_empty((layers, 1, top_k))
        self._blocks: list[BlockStages] = []

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: Cache,
        source: Source | None = None,
        on_lookahead: Callable[[Tensor], None] | None = None,
        replay: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        last_only: bool = True,
    ) -> Output:
        """One token: logits [1, 1, V], and the routing, whose probabilities are the weights."""
        model = self._model
        x_11D = model.model.embed_tokens(ids_BT).to(self._x_11D.dtype)
        self._x_11D.copy_(x_11D)
        for kind, (tables, _) in model._geometry(ids_BT, cache, None, x_11D).items():
            for kept, table in zip(self.rope[kind], tables, strict=True):
                kept.copy_(table)
        x_11D = self._x_11D
        for layer, block in enumerate(model.model.layers):
            if layer == len(self._blocks):
                self._blocks.append(BlockStages(block, layer, self, x_11D))
            x_11D = self._blocks[layer].run(
                cache.layers[layer], source, replay(layer) if replay else None
            )
            if layer == 0 and on_lookahead is not None:
                assert model.lookahead is not None
                on_lookahead(model.lookahead(x_11D).float().softmax(-1).flatten(0, 1))
        cache.position += 1
        logits = linear(model.model.norm(x_11D), model.model.embed_tokens.weight)
        ids, weights = self.ids_L1K.clone(), self.weights_L1K.clone()
        return Output(logits, [Routing(i, w, w) for i, w in zip(ids, weights, strict=True)])

    def stage(self, function: Callable[[], Tensors]) -> Stage:
        return Stage(function, self._recorder)

    def put(self, places: list[Any], place: int, weights: Any) -> None:
        """Copy an expert to where the stages read it: 6 MB in 3 us, and its slot is free again."""
        if not places:  # tuples of tensors, whatever the codec
            top_k = self._model.config.num_experts_per_tok
            places += [type(weights)(*map(torch.empty_like, weights)) for _ in range(top_k)]
        torch._foreach_copy_(places[place], weights)


def usable(model: Any, exact: bool) -> bool:
    """Whether steps of a model can be captured, and what they leave out is not asked for."""
    if plain() or not isinstance(model, Model) or model.device.type != "cuda":
        return False
    if any(block.mlp.lora for block in model.model.layers):
        return False
    return exact and set(model.config.routing_sources) == {"gate"}
