"""The Chronos decoder of the torch backend: blocks, caches, loading and saving.

A model is built with its routed experts (training, resident inference) or without (streaming); the
arithmetic is the same. A CPU computes in float32, an accelerator in the stored dtype.
Checkpoints go through `common.disk.tensors` only: no mmap, no pickle.
Not covered: batched generation with padding (batches are for training).

Shape legend: B batch, T new tokens, D hidden, V vocabulary, L layers, E experts, J lookahead
steps + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chronos.backends.torch.attention import (
    LatentAttention,
    RMSNorm,
    Rotary,
    WindowAttention,
    causal_mask,
)
from chronos.backends.torch.moe import LookaheadRouter, MoE, Next, Past, Routing, RoutingState
from chronos.backends.torch.products import linear
from chronos.common.experts.feed import Source
from chronos.common.experts.known import ANNOUNCED
from chronos.common.layout.codecs import SWIGLU
from chronos.common.model import history
from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import stretch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Output:
    """Logits [B, T, V] (T = 1 with `last_only`, none unless wanted) and the states [B, T, D] that
    `head` makes them of, the routing of each layer over the B * T tokens, and the LookaheadRouter's
    logits [B, T, J, L, E] where they were asked for."""

    logits: Tensor
    routing: list[Routing] = field(default_factory=list)
    lookahead: Tensor | None = None
    hidden: Tensor | None = None


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

    def arrays(self) -> dict[str, Tensor] | None:
        """What `restore` makes the same cache of, by name; None where that cannot be told."""
        found = {f"layers.{at}": layer.kept() for at, layer in enumerate(self.layers)}
        for at, state in self.routing.items():
            there = {name: x for name, x in vars(state).items() if x is not None}
            found |= {f"routing.{at}.{name}": x for name, x in there.items()}
        return found

    def restore(self, tokens: int, arrays: Mapping[str, Tensor]) -> None:
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
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoE(config, layer, resident, encoding)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, rope: Any, mask: Tensor | None, cache: Any, **routing: Any
    ) -> tuple[Tensor, Routing]:
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache)
        x_BTD = x_BTD + self.dropout(y_BTD)
        h_TD = self.post_attention_layernorm(x_BTD).flatten(0, 1)
        y_TD, decision = self.mlp(h_TD, **routing)
        return x_BTD + self.dropout(y_TD).view_as(x_BTD), decision


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the parameters named `model.*` on disk."""

    def __init__(self, config: ModelConfig, resident: bool, encodings: Mapping[int, str]) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        # Given its weight: the default, normal_, on the meta device imports 800 modules (2 s).
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        blocks = nn.ModuleList(
            Block(config, layer, resident, encodings.get(layer, SWIGLU))
            for layer in range(config.num_hidden_layers)
        )
        # A ModuleList is not generic: torch's stub does not say which modules it holds.
        self.layers = cast("Sequence[Block]", blocks)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Model(nn.Module):
    """A Chronos language model; `resident` says whether it holds its own routed experts."""

    step = None  # single tokens are run as prompts are
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
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def new_cache(self, batch: int = 1) -> Cache:
        like = self.model.norm.weight
        layers = [block.self_attn.new_cache(batch, like) for block in self.model.layers]
        return Cache(layers, routing={layer: RoutingState() for layer in self._looking_back})

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cache: Cache | None = None,
        segments_BT: Tensor | None = None,
        source: Source | None = None,
        on_lookahead: Callable[[Tensor], None] | None = None,
        want_lookahead: bool = False,
        lookahead_into_trunk: bool = False,
        replay: Callable[[int], tuple[Tensor, Tensor | None]] | None = None,
        last_only: bool = False,
        want_logits: bool = True,
        through: Callable[..., Any] | None = None,
    ) -> Output:
        """Run T tokens behind `cache` (or from scratch).

        segments_BT: document number of each token, -1 for padding; tokens see their own document
        only and positions restart with it. on_lookahead gets probabilities [B*T, J, L, E] right
        after block 0. replay(layer) gives (ids, weights) [T, K] in place of the gates' choice;
        weights None: those the gates give these experts. through(block, ...) calls each block in
        place of a plain call.
        """
        x_BTD = self.model.embed_tokens(ids_BT).to(self.model.norm.weight.dtype)
        geometry = self._geometry(ids_BT, cache, segments_BT, x_BTD)
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
        out = Output(x_BTD)
        if through is None and self.gradient_checkpointing and self.training:
            through = partial(checkpoint, use_reentrant=False)  # draws the same masks again
        for layer, block in enumerate(self.model.layers):
            rope, mask = geometry[block.kind]
            probs_TE = None
            if sources[layer] == "lookahead" and layer > 0:
                assert out.lookahead is not None
                probs_TE = out.lookahead[:, :, 0, layer].flatten(0, 1).float().softmax(-1)
            run: Callable[..., Any] = partial(through, block) if through else block
            x_BTD, decision = run(
                x_BTD,
                rope,
                mask,
                cache.layers[layer] if cache else None,
                probs_TE=probs_TE,
                past=past,
                state=cache.routing.get(layer) if cache else None,
                chosen=replay(layer) if replay else None,
                source=source,
                ahead=ahead,
            )
            out.routing.append(decision)
            if layer == 0 and (want_lookahead or on_lookahead or committed):
                trunk = x_BTD if lookahead_into_trunk or committed else x_BTD.detach()
                assert self.lookahead is not None
                out.lookahead = self.lookahead(trunk)
                if on_lookahead:
                    on_lookahead(out.lookahead.float().softmax(-1).flatten(0, 1))
        if cache is not None:
            cache.position += ids_BT.shape[1]
        out.hidden = self.model.norm(x_BTD[:, -1:] if last_only else x_BTD)
        if want_logits:
            out.logits = self.head(out.hidden)
        return out

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] of normed states [..., D]; the head is tied to the embedding."""
        return linear(x, self.model.embed_tokens.weight)

    def _geometry(
        self, ids_BT: Tensor, cache: Cache | None, segments_BT: Tensor | None, like: Tensor
    ) -> dict[str, tuple[Any, Tensor | None]]:
        """Rotary tables and mask per kind of attention, shared by all its layers."""
        T, window = ids_BT.shape[1], self.config.sliding_window
        if segments_BT is not None:
            return self._packed_geometry(segments_BT, like)
        start = cache.position if cache else 0
        span = range(start, start + T)
        masks: dict[str, Tensor | None] = {"mla": None, "sliding": None}
        if T > 1 or cache is None:
            q_T = torch.arange(start, start + T, device=ids_BT.device)
            masks["mla"] = causal_mask(q_T, torch.arange(start + T, device=q_T.device), None)
            first = max(0, start - window + 1)
            k_S = torch.arange(first, start + T, device=q_T.device)
            masks["sliding"] = causal_mask(q_T, k_S, window)
        return {k: (self._rotary[k].tables(span, like), masks[k]) for k in masks}

    def upcoming(self, cache: Cache) -> dict[int, Tensor]:
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
            self._next = Next(self.config, position, self.device)
        return self._next

    def _past_of(self, positions: range) -> Past:
        """What tokens of one document at these positions have before them."""
        if positions.start and len(positions) == 1:
            return self._next_at(positions.start)
        position_T = np.arange(positions.start, positions.stop)
        share_GT = torch.from_numpy(history.shares(self.config, position_T)).float()
        first_1T = torch.from_numpy(position_T == 0)[None].to(self.device)
        return Past(self.config, first_1T, share_GT[:, None].to(self.device), None)

    def _packed_past(self, segments_BT: Tensor) -> Past:
        position_BT = _positions(segments_BT)
        share_GT = history.shares(self.config, np.arange(segments_BT.shape[1]))
        share_GBT = torch.from_numpy(share_GT).float().to(self.device)[:, position_BT]
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return Past(self.config, position_BT == 0, share_GBT, same_BTT)

    def _packed_geometry(
        self, segments_BT: Tensor, like: Tensor
    ) -> dict[str, tuple[Any, Tensor | None]]:
        index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
        same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        position_BT = _positions(segments_BT)
        full = same_B1TT & causal_mask(index_T, index_T, None)
        near = same_B1TT & causal_mask(index_T, index_T, self.config.sliding_window)
        return {
            "mla": (self._rotary["mla"].tables(position_BT, like), full),
            "sliding": (self._rotary["sliding"].tables(position_BT, like), near),
        }

    @torch.no_grad()
    def initialize(self, seed: int) -> Model:
        """Normal weights, norms at one; projections into the residual stream scaled by
        1 / sqrt(2 L) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        deep = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            scale = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.normal_(0.0, self.config.initializer_range * scale, generator=generator)
        return self


def _positions(segments_BT: Tensor) -> Tensor:
    """How far each token is from the first of its segment."""
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    fresh_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    fresh_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return index_T - torch.where(fresh_BT, index_T, 0).cummax(dim=1).values
