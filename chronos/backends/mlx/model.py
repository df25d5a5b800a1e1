"""The Chronos decoder of the MLX backend: blocks and caches.

A model is built with its routed experts (training, resident inference) or without (streaming); the
arithmetic is the same. The dense part is computed in float32 on a CPU and in the stored dtype on a
GPU. Arrays are lazy: a forward builds a graph, except where a router's choice must reach the host.
Not covered: batched generation with padding (batches are for training).

Shape legend: B batch, T new tokens, S all keys, D hidden, V vocabulary, L layers, K top-k,
E experts, J lookahead steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from chronos.backends.mlx.attention import (
    LatentAttention,
    Mask,
    Rope,
    Rotary,
    WindowAttention,
    causal_mask,
)
from chronos.backends.mlx.moe import LookaheadRouter, MoE, Next, Past, Routing, RoutingState
from chronos.common.experts.feed import Source
from chronos.common.experts.known import ANNOUNCED
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model import history
from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import stretch

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass
class Output:
    """Logits [B, T, V] (T = 1 with `last_only`, none unless wanted) and the states [B, T, D] that
    `head` makes them of, the routing of each layer over the B * T tokens, and the LookaheadRouter's
    logits [B, T, J, L, E] where they were asked for."""

    logits: mx.array
    routing: list[Routing] = field(default_factory=list)
    lookahead: mx.array | None = None
    hidden: mx.array | None = None


@dataclass
class Cache:
    """What each layer keeps of the past; `position` is the number of tokens seen.

    routing: of the layers whose routing looks at the past.
    prompt: tokens the sequence has once the prompt that is being read is in; 0 while decoding.
    Guests need it: some libraries rotate positions by how long a prompt is.
    """

    layers: list[Any]
    position: int = 0
    prompt: int = 0
    routing: dict[int, RoutingState] = field(default_factory=dict)

    def copied(self) -> Cache:
        """One of its own with the same tokens."""
        routing = {layer: state.copied() for layer, state in self.routing.items()}
        return Cache([layer.copied() for layer in self.layers], self.position, routing=routing)

    def cut(self, tokens: int) -> bool:
        """Keep the first `tokens` tokens; False where a layer cannot: it is worthless then."""
        if self.routing and tokens != self.position:
            return False  # sums do not say what they are made of
        self.position = tokens
        return all(layer.cut(tokens) for layer in self.layers)

    def arrays(self) -> dict[str, mx.array] | None:
        """What `restore` makes the same cache of, by name; None where that cannot be told."""
        found = {f"layers.{at}": layer.kept() for at, layer in enumerate(self.layers)}
        for at, state in self.routing.items():
            there = {name: x for name, x in vars(state).items() if x is not None}
            found |= {f"routing.{at}.{name}": x for name, x in there.items()}
        return found

    def restore(self, tokens: int, arrays: Mapping[str, mx.array]) -> None:
        """Fill an empty cache with what `arrays` gave of one of so many tokens. Raises KeyError for
        what is missing."""
        for at, layer in enumerate(self.layers):
            layer.restore(tokens, arrays[f"layers.{at}"])
        for at, state in self.routing.items():
            vars(state).update({name: arrays.get(f"routing.{at}.{name}") for name in vars(state)})
        self.position = tokens


class Block(nn.Module):
    """Pre-norm attention and mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, resident: bool, encoding: str) -> None:
        super().__init__()
        self.kind = config.attention_kind(layer)
        attention = LatentAttention if self.kind == "mla" else WindowAttention
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoE(config, layer, resident, encoding)
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self, x_BTD: mx.array, rope: Rope, mask: Mask, cache: Any, **routing: Any
    ) -> tuple[mx.array, Routing]:
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache)
        x_BTD = x_BTD + self.dropout(y_BTD)
        h_TD = self.post_attention_layernorm(x_BTD).flatten(0, 1)
        y_TD, decision = self.mlp(h_TD, **routing)
        return x_BTD + self.dropout(y_TD).reshape(x_BTD.shape), decision


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the parameters named `model.*` on disk."""

    def __init__(self, config: ModelConfig, resident: bool, encodings: Mapping[int, str]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            Block(config, layer, resident, encodings.get(layer, SWIGLU))
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Model(nn.Module):
    """A Chronos language model; `resident` says whether it holds its own routed experts."""

    gradient_checkpointing = False  # whether training computes each block again for its gradients

    def __init__(
        self,
        config: ModelConfig,
        resident: bool = True,
        encodings: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """encodings: how each layer's routed experts are coded, "swiglu" where it does not say."""
        super().__init__()
        self.config, self.resident = config, resident
        self.model = Decoder(config, resident, encodings)
        self.lookahead: LookaheadRouter | None = LookaheadRouter(config)
        self._next: Next | None = None
        self._looking_back = [
            layer
            for layer, source in enumerate(config.routing_sources)
            if source in ("informed", "history")
        ]
        self._rotary = {
            kind: Rotary(width, config.rope_theta, stretch(config, kind))
            for kind, width in (("mla", config.rope_dim), ("sliding", config.head_dim))
        }

    @property
    def device(self) -> str:
        """MLX computes on its default device, wherever arrays were made: memory is unified."""
        return str(mx.default_device().type).removeprefix("DeviceType.")

    def new_cache(self, batch: int = 1) -> Cache:
        like = self.model.embed_tokens.weight
        layers = [block.self_attn.new_cache(batch, like) for block in self.model.layers]
        return Cache(layers, routing={layer: RoutingState() for layer in self._looking_back})

    def __call__(
        self,
        ids_BT: mx.array,
        *,
        cache: Cache | None = None,
        segments_BT: mx.array | None = None,
        source: Source | None = None,
        on_lookahead: Callable[[mx.array], None] | None = None,
        want_lookahead: bool = False,
        lookahead_into_trunk: bool = False,
        replay: Callable[[int], tuple[mx.array, mx.array | None]] | None = None,
        last_only: bool = False,
        want_logits: bool = True,
        through: Callable[..., Any] | None = None,
    ) -> Output:
        """Run T tokens behind `cache` (or from scratch).

        segments_BT: document number of each token, -1 for padding; tokens see their own document
        only and positions restart with it. on_lookahead gets probabilities [B*T, J, L, E], not yet
        evaluated, right after block 0. replay(layer) gives (ids, weights) [T, K] in place of the
        gates' choice; weights None: those the gates give these experts. through(function) gives
        what is called in place of a block's function of its weights and inputs.
        """
        x_BTD = self.model.embed_tokens(ids_BT)
        geometry = self._geometry(ids_BT, cache, segments_BT)
        past = None
        if self._looking_back and segments_BT is not None:
            past = self._packed_past(segments_BT)
        elif self._looking_back:
            start = cache.position if cache else 0
            past = self._past_of(range(start, start + ids_BT.shape[1]))
        ahead = None
        if source is not None and cache is not None and source.wants(ANNOUNCED):
            ahead = self._next_at(cache.position + ids_BT.shape[1])
        sources = self.config.routing_sources
        committed = "lookahead" in sources
        out, seed = Output(x_BTD), self._mask_seed()
        if through is None and self.gradient_checkpointing and self.training:
            through = mx.checkpoint
        for layer, block in enumerate(self.model.layers):
            rope, mask = geometry[block.kind]
            probs_TE = None
            if sources[layer] == "lookahead" and layer > 0:
                assert out.lookahead is not None
                probs_TE = _softmax(out.lookahead[:, :, 0, layer].flatten(0, 1))
            run: Callable[..., Any] = partial(_called, through) if through else _run
            x_BTD, decision = run(
                block,
                None if seed is None else seed + layer,
                x_BTD,
                probs_TE,
                rope,
                mask,
                cache.layers[layer] if cache else None,
                past=past,
                state=cache.routing.get(layer) if cache else None,
                chosen=replay(layer) if replay else None,
                source=source,
                ahead=ahead,
            )
            out.routing.append(decision)
            if layer == 0 and (want_lookahead or on_lookahead or committed):
                trunk = x_BTD if lookahead_into_trunk or committed else mx.stop_gradient(x_BTD)
                assert self.lookahead is not None
                out.lookahead = self.lookahead(trunk)
                if on_lookahead:
                    on_lookahead(_softmax(out.lookahead).flatten(0, 1))
        if cache is not None:
            cache.position += ids_BT.shape[1]
        out.hidden = self.model.norm(x_BTD[:, -1:] if last_only else x_BTD)
        if want_logits:
            out.logits = self.head(out.hidden)
        return out

    def _mask_seed(self) -> int | None:
        """What the masks of this pass follow from, where it draws any. A number, not a generator's
        state: a block that is computed again draws the same ones."""
        noisy = self.config.dropout > 0 or self.config.fallback_mask_prob > 0
        if not (self.training and noisy):
            return None
        return cast("int", mx.random.randint(0, 1 << 30).item())

    def head(self, x: mx.array) -> mx.array:
        """Logits [..., V] of normed states [..., D]; the head is tied to the embedding."""
        logits: mx.array = self.model.embed_tokens.as_linear(x)
        return logits

    @property
    def head_weight(self) -> mx.array:
        """What of `head` is trained."""
        weight: mx.array = self.model.embed_tokens.weight
        return weight

    def head_by(self, weight: mx.array, x: mx.array) -> mx.array:
        """`head` by another `head_weight`."""
        return x @ weight.T

    def _geometry(
        self, ids_BT: mx.array, cache: Cache | None, segments_BT: mx.array | None
    ) -> dict[str, tuple[Rope, Mask]]:
        """Positions and mask per kind of attention, shared by all its layers."""
        T, window = ids_BT.shape[1], self.config.sliding_window
        if segments_BT is not None:
            return self._packed_geometry(segments_BT)
        start = cache.position if cache else 0
        masks: dict[str, Mask] = {"mla": None, "sliding": None}
        if T > 1 or cache is None:
            first = max(0, start - window + 1)
            q_T, k_S = mx.arange(start, start + T), mx.arange(first, start + T)
            masks = {"mla": "causal", "sliding": causal_mask(q_T, k_S, window)}
        return {kind: ((self._rotary[kind], start), masks[kind]) for kind in masks}

    def upcoming(self, cache: Cache) -> dict[int, mx.array]:
        """The streamed experts [B, K] that the token after those in the cache will use, of layers
        whose routing follows the past."""
        past = self._next_at(cache.position)
        return {
            layer: self.model.layers[layer].mlp.upcoming(past, state)
            for layer, state in cache.routing.items()
            if self.config.routing_of(layer) == "history"
        }

    def _next_at(self, position: int) -> Next:
        """Of a token behind others; what is ahead of one token is the past of the next."""
        if self._next is None or self._next.position != position:
            self._next = Next(self.config, position)
        return self._next

    def _past_of(self, positions: range) -> Past:
        """What tokens of one document at these positions have before them."""
        if positions.start and len(positions) == 1:
            return self._next_at(positions.start)
        position_T = np.arange(positions.start, positions.stop)
        share_GT = history.shares(self.config, position_T).astype(np.float32)
        return Past(self.config, mx.array(position_T == 0)[None], mx.array(share_GT)[:, None], None)

    def _packed_past(self, segments_BT: mx.array) -> Past:
        position_BT = _positions(segments_BT)
        share_GT = history.shares(self.config, np.arange(segments_BT.shape[1]))
        share_GBT = mx.array(share_GT.astype(np.float32))[:, position_BT]
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return Past(self.config, position_BT == 0, share_GBT, same_BTT)

    def _packed_geometry(self, segments_BT: mx.array) -> dict[str, tuple[Rope, Mask]]:
        index_T = mx.arange(segments_BT.shape[1])
        same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        position_BT = _positions(segments_BT)
        full = same_B1TT & causal_mask(index_T, index_T, None)
        near = same_B1TT & causal_mask(index_T, index_T, self.config.sliding_window)
        return {
            "mla": ((self._rotary["mla"], position_BT), full),
            "sliding": ((self._rotary["sliding"], position_BT), near),
        }

    def initialize(self, seed: int) -> Model:
        """Normal weights, norms at one; projections into the residual stream scaled by
        1 / sqrt(2 L) (GPT-2). Other draws than the torch backend's."""
        key = mx.random.key(seed)
        deep = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        values = []
        for name, parameter in tree_flatten(self.parameters()):
            if parameter.ndim == 1:
                values.append((name, mx.ones_like(parameter)))
                continue
            key, draw = mx.random.split(key)
            deeper = name.endswith(("o_proj.weight", "down_proj"))
            scale = self.config.initializer_range * (deep if deeper else 1.0)
            values.append((name, scale * mx.random.normal(parameter.shape, key=draw)))
        self.update(tree_unflatten(values))
        mx.eval(self.parameters())
        return self


def _run(
    block: Block,
    seed: int | None,
    x_BTD: mx.array,
    probs_TE: mx.array | None,
    *rest: Any,
    **own: Any,
) -> tuple[mx.array, Routing]:
    """A block's output, its masks drawn from a seed of their own."""
    if seed is not None:
        mx.random.seed(seed)
    return block(x_BTD, *rest, probs_TE=probs_TE, **own)


def _called(
    through: Callable[..., Any],
    block: Block,
    seed: int | None,
    x_BTD: mx.array,
    probs_TE: mx.array | None,
    *rest: Any,
    **own: Any,
) -> tuple[mx.array, Routing]:
    """The same, through what may leave x alone to the backward pass, and compute it again."""

    def run(parameters: Any, *inputs: mx.array) -> tuple[mx.array, Any]:
        block.update(parameters)
        probs_TE = inputs[1] if len(inputs) > 1 else None
        y_BTD, decision = _run(block, seed, inputs[0], probs_TE, *rest, **own)
        return y_BTD, [array for array in decision if array is not None]

    # What has a gradient is an argument; MLX takes no None among them, and returns none.
    inputs = (x_BTD,) if probs_TE is None else (x_BTD, probs_TE)
    y_BTD, decision = through(run)(block.trainable_parameters(), *inputs)
    return y_BTD, Routing(*decision)


def _softmax(logits: mx.array) -> mx.array:
    return mx.softmax(logits.astype(mx.float32), axis=-1)


def _positions(segments_BT: mx.array) -> mx.array:
    """How far each token is from the first of its segment."""
    index_T = mx.arange(segments_BT.shape[1])
    changed_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    # The first token of a document carries its index onwards as the largest seen so far.
    return index_T - mx.cummax(mx.pad(changed_BT * index_T[1:], [(0, 0), (1, 0)]), axis=1)
