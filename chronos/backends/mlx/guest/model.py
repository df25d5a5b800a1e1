"""Models that MLX-LM builds, run as the native one is: its skeleton, our experts.

MLX-LM's loader builds and quantises the model (`skeleton`); every `SwitchGLU` and `SwitchMLP` in it
gives way to a switch that takes experts from a feed (`experts`). A resident guest is MLX-LM's own
load. Attention and its caches, norms and routers stay as MLX-LM has them. Not covered: packed rows,
training, saving, and code that a checkpoint brings along, which is refused.

Shape legend: B batch, T new tokens, V vocabulary, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from chronos.backends.mlx.codecs import codec_of
from chronos.backends.mlx.guest.experts import (
    CALL,
    Ahead,
    ExpertsCall,
    Layer,
    Shared,
    StreamedLayer,
    current,
    unweighted,
)
from chronos.backends.mlx.guest.skeleton import Skeleton, find_blocks, mlx_lm_utils
from chronos.backends.mlx.guest.spelling import switch_of
from chronos.backends.mlx.model import Cache, Output
from chronos.backends.mlx.moe import Routing
from chronos.common.data import check_single
from chronos.common.disk.header import TensorEntry
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import Layout, packed_experts
from chronos.common.layout.codecs import MLX, MXFP4
from chronos.common.model.guest import GuestConfig

# Where a block's shared experts hang beside its switch; LLaMA 4 scales what its switch is given.
_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_SCALED = frozenset({"llama4", "llama4_text"})
_log = logging.getLogger("chronos")


class Model(nn.Module):
    """A guest, called as the native model is. It has no forecasts of its own."""

    lookahead = None
    gradient_checkpointing = False  # whether training computes each layer again for its gradients

    def __init__(self, config: GuestConfig, core: nn.Module, resident: bool) -> None:
        super().__init__()
        self.config, self.core, self.resident = config, core, resident
        self._unscaled = min((m.max_position_embeddings for m in _dynamic(core)), default=None)

    @property
    def device(self) -> str:
        return str(mx.default_device().type).removeprefix("DeviceType.")

    def new_cache(self, batch: int = 1) -> Cache:
        from mlx_lm.models.cache import make_prompt_cache

        return GuestCache(make_prompt_cache(self.core))

    def __call__(
        self,
        ids_BT: mx.array,
        *,
        cache: Cache | None = None,
        segments_BT: mx.array | None = None,
        source: Any = None,
        replay: Callable[[int], tuple[mx.array, mx.array]] | None = None,
        last_only: bool = False,
        want_logits: bool = True,
        through: Callable[..., Any] | None = None,
        **forecasts: Any,
    ) -> Output:
        """Run T tokens behind `cache` (or from scratch); logits [B, T, V], T = 1 with `last_only`.

        The routing is that of the layers with experts, in order, without weights. replay(layer)
        gives ids [T, K] in place of the gates' choice; weights stay those of the gates' own.
        segments_BT, of training: each row holds one document, and padding behind it. Raises
        UsageError for other segments, and for a source that falls back where the shared experts are
        not known.
        """
        if segments_BT is not None:
            check_single(np.array(segments_BT))
        if source is not None and not source.exact:
            self._check_fallback()
        if cache is not None:
            self._check_prompt(cache, ids_BT.shape[1])
        if through is None and self.gradient_checkpointing and not want_logits:
            through = mx.checkpoint
        if through is not None:
            self._hook_layers()
        call = ExpertsCall(source, replay, last_only, through=through)
        before = CALL.set(call)
        states: list[mx.array] = []
        try:
            with nullcontext() if want_logits else self._decoder(states.append):
                logits = self.core(ids_BT, cache=cache.layers if cache else None)
        finally:
            CALL.reset(before)
        if cache is not None:
            cache.position += ids_BT.shape[1]
        if want_logits:
            return Output(logits, call.routing)
        routing = [_over_all(each, self.config.num_experts) for each in call.routing]
        return Output(logits, routing, hidden=states[0])  # logits are lazy, and not asked for

    def head(self, x: mx.array) -> mx.array:
        """Logits [..., V] of states [..., D]: the library's own call behind its decoder, since some
        scale or cap them there."""
        flat_1ND = x.reshape(1, -1, x.shape[-1])
        with self._decoder(None, flat_1ND):
            logits = self._owner(mx.zeros(flat_1ND.shape[:2], mx.int32))
        return logits.reshape(*x.shape[:-1], -1)

    @property
    def head_weight(self) -> mx.array:
        """What of `head` is trained: nothing."""
        return mx.zeros(0)

    def head_by(self, weight: mx.array, x: mx.array) -> mx.array:
        return self.head(x)

    @contextmanager
    def _decoder(
        self, note: Callable[[mx.array], None] | None, answer: mx.array | None = None
    ) -> Iterator[None]:
        """Have the library's decoder told of, or answered for."""
        stand_in = _Decoder(self._owner["model"], note, answer)
        vars(self._owner)["model"] = stand_in  # found before what a module holds
        try:
            yield
        finally:  # passes that take turns end in any order
            vars(self._owner).pop("model", None)

    def _hook_layers(self) -> None:
        """Have each layer of the library called as the pass under way wants it, from now on."""
        for block in self.core.layers:
            kind = type(block)
            if not hasattr(kind, "chronos_hooked"):
                # A call is looked up in the class.
                own = {"__call__": partialmethod(_layer, kind.__call__), "chronos_hooked": True}
                block.__class__ = type(kind.__name__, (kind,), own)

    @property
    def _owner(self) -> nn.Module:
        """The module of the library that has a decoder and makes its logits."""
        for _, module in sorted(self.core.named_modules(), key=lambda item: len(item[0])):
            if isinstance(module.get("model"), nn.Module) and "embed_tokens" in module["model"]:
                return module
        raise UsageError(
            "where MLX-LM makes this model's logits is not known, so it is not trained",
            self.config.model_type,
            "use --backend torch",
        )

    def _check_prompt(self, cache: Cache, count: int) -> None:
        """MLX-LM takes a piece of a prompt for all of it, as far as its end."""
        piece = cache.position > 0 or cache.prompt > count
        if self._unscaled is not None and piece and cache.prompt > self._unscaled:
            raise UsageError(
                f"beyond {self._unscaled} tokens the positions of this model depend on the length"
                " of the whole prompt (rope_type dynamic), and MLX-LM sees pieces of it",
                self.config.model_type,
                f"use --backend torch, or a prompt of at most {self._unscaled} tokens",
            )

    def _check_fallback(self) -> None:
        layers = [m for m in self.core.modules() if isinstance(m, StreamedLayer)]
        if any(layer.shared is None for layer in layers):
            raise UsageError(
                "miss=fallback needs the shared experts, and where this model's are is not known",
                self.config.model_type,
                "use miss=exact",
            )


def _layer(
    block: nn.Module,
    forward: Callable[..., mx.array],
    x_BTD: mx.array,
    *args: Any,
    **options: Any,
) -> mx.array:
    """One layer of the library. What it is called through may do so again when the pass is over."""
    call = current()
    if call.through is None:
        return forward(block, x_BTD, *args, **options)

    def run(parameters: Any, x_BTD: mx.array) -> tuple[mx.array, list[mx.array]]:
        own = replace(call, routing=[])
        before = CALL.set(own)
        try:
            block.update(parameters)
            y_BTD = forward(block, x_BTD, *args, **options)
        finally:
            CALL.reset(before)
        return y_BTD, [routing.ids_TK for routing in own.routing]

    out: mx.array
    out, chosen = call.through(run)(block.trainable_parameters(), x_BTD)
    call.routing += map(unweighted, chosen)
    return out


def _over_all(routing: Routing, experts: int) -> Routing:
    """With 1 / K of each chosen expert in place of probabilities [T, E], zero for the others."""
    hot_TKE = routing.ids_TK[..., None] == mx.arange(experts)
    return routing._replace(probs_TE=hot_TKE.astype(mx.float32).mean(1))


def _dynamic(core: nn.Module) -> list[Any]:
    """Rotations whose frequencies depend on the length of a sequence."""
    return [m for m in core.modules() if type(m).__name__ == "DynamicNTKScalingRoPE"]


def _scales_positions(core: nn.Module) -> bool:
    """Whether a rotation of the model is another than the plain one."""
    ropes = [m for m in core.modules() if "RoPE" in type(m).__name__]
    return not ropes or any(type(m) is not nn.RoPE or m.scale != 1.0 for m in ropes)


class GuestCache(Cache):
    """The library's caches."""

    def copied(self) -> GuestCache:
        return GuestCache(deepcopy(self.layers), self.position)

    def cut(self, tokens: int) -> bool:
        """The library says which of its caches can be trimmed: rings that are full cannot."""
        fewer, self.position = self.position - tokens, tokens
        if not all(layer.is_trimmable() for layer in self.layers):
            return False
        return all(layer.trim(fewer) == fewer for layer in self.layers)

    def arrays(self) -> dict[str, mx.array] | None:
        """See Cache; None where the library keeps more than keys and values."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        found: dict[str, mx.array] = {}
        for at, layer in enumerate(self.layers):
            if type(layer) not in (KVCache, RotatingKVCache) or layer.empty():
                return None
            keys, values = layer.keys_and_values()
            found |= {f"layers.{at}.keys": keys, f"layers.{at}.values": values}
        return found

    def restore(self, tokens: int, arrays: Mapping[str, mx.array]) -> None:
        """See Cache. Behind a prompt's piece the arrays of the library's caches are full."""
        for at, layer in enumerate(self.layers):
            layer.keys, layer.values = arrays[f"layers.{at}.keys"], arrays[f"layers.{at}.values"]
            layer.offset = tokens
            if hasattr(layer, "_idx"):  # where a ring goes on
                layer._idx = layer.keys.shape[2]
        self.position = tokens


class _Decoder:
    """In the place of a decoder: notes what it says, or answers for it."""

    def __init__(
        self,
        decoder: nn.Module,
        note: Callable[[mx.array], None] | None,
        answer: mx.array | None,
    ) -> None:
        self._decoder, self._note, self._answer = decoder, note, answer

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        if self._answer is not None:
            return self._answer
        out: mx.array = self._decoder(*args, **options)
        assert self._note is not None
        self._note(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _Head(nn.Module):
    """A head that computes the last position only where no other is wanted."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def __call__(self, x_BTD: mx.array) -> mx.array:
        logits: mx.array = self.head(x_BTD[:, -1:] if current().last_only else x_BTD)
        return logits


def load_guest(
    folder: Path,
    device: mx.Device,
    resident: bool,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """The model of a folder; without `resident` of a packed one, whose experts stay on disk.

    layout: its packed experts, where somebody has opened them.
    Raises ConfigError for what MLX-LM cannot build and for experts it computes otherwise,
    ShapeMismatch, CorruptFileError, MissingBackendError.
    """
    config = GuestConfig.from_json(folder)
    skeleton = Skeleton(mlx_lm_utils(), folder, config)
    layout = layout or packed_experts(folder, config, checked=resident)
    if layout is not None and config.coding not in ("", MXFP4):
        raise ConfigError(
            f"the checkpoint is quantised ({config.quantization}), which MLX does not compute with",
            str(folder),
            "use --backend torch, or convert the checkpoint with MLX-LM and pack that",
        )
    for encoding in () if layout is None else layout.encodings.values():
        codec_of(encoding)  # refuses what MLX does not compute with
    core = skeleton.whole() if layout is None else skeleton.without_experts(layout, dense)
    if config.rope_type and not _scales_positions(core):
        _log.warning(
            "config.json scales positions (%s), which MLX-LM's %s leaves out: long texts may make"
            " no sense",
            config.rope_type,
            config.model_type,
        )
    blocks = find_blocks(core, config)
    if layout is not None and resident:
        skeleton.fill(layout, blocks)
    layers: list[tuple[str, Layer]] = []
    ahead: Ahead = None
    for layer, (path, block) in sorted(blocks.items(), reverse=True):
        if resident or layout is None:
            layers.append((path, Layer(layer, block)))
            continue
        around = _parent(core, path)
        plain = config.model_type not in _SCALED
        shared = _shared(around) if plain else None
        switch, encoding = switch_of(block, skeleton.spelling), layout.encodings[layer]
        streamed = StreamedLayer(layer, block, switch, encoding, shared, ahead)
        layers.append((path, streamed))
        choose = _chooser(around, block, config.num_experts_per_tok) if plain else None
        ahead = None if choose is None else (layer, choose)
    core.update_modules(tree_unflatten(layers))
    _place_head(core)
    if device == mx.cpu and config.quantization != MLX:
        core.set_dtype(mx.float32)  # as the native model's: it has no fast 16-bit products
    mx.eval(core.parameters())
    model = Model(config, core, resident)
    model.eval()
    return model


def _parent(module: nn.Module, path: str) -> nn.Module:
    at: Any = module
    for name in path.split(".")[:-1]:
        at = at[int(name)] if isinstance(at, list) else getattr(at, name)
    return at


def _shared(block: nn.Module) -> Shared:
    """What the shared experts of a block add to its output."""
    experts = next((block[name] for name in _SHARED if block.get(name) is not None), None)
    if experts is None:
        return None
    if "shared_expert_gate" in block:
        return lambda x: mx.sigmoid(block.shared_expert_gate(x)) * experts(x)
    return lambda x: experts(x)


def _chooser(
    around: nn.Module, block: nn.Module, top_k: int
) -> Callable[[mx.array], mx.array] | None:
    """The ids [..., K] that a block's gate would choose; None where it is called otherwise."""
    gate = around["gate"] if "gate" in around else around.get("router")
    first = block["fc1"] if "fc1" in block else block["gate_proj"]

    def choose(x: mx.array) -> mx.array:
        out = gate(x)
        if isinstance(out, tuple):
            ids: mx.array = next(a for a in out if mx.issubdtype(a.dtype, mx.integer))
            return ids
        return mx.argpartition(-out, kth=top_k - 1, axis=-1)[..., :top_k]

    try:  # lazily: only shapes are computed
        fits = choose(mx.zeros((1, 1, first.input_dims))).shape == (1, 1, top_k)
    except Exception:  # whatever a foreign gate says to one row of hidden states
        return None
    return choose if fits else None


def _place_head(module: nn.Module) -> None:
    """Logits of a whole prompt, of which one row is read, would be the largest array of all."""
    heads = [path for path, _ in module.named_modules() if path.split(".")[-1] == "lm_head"]
    for path in heads:
        parent = _parent(module, path)
        parent.lm_head = _Head(parent.lm_head)
    for embedding in module.modules():
        if isinstance(embedding, nn.Embedding | nn.QuantizedEmbedding):
            _shorten(embedding)


def _shorten(embedding: nn.Module) -> None:
    whole = embedding.as_linear
    embedding.as_linear = lambda x: whole(x[:, -1:] if current().last_only else x)
