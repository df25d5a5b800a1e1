"""Models that Transformers builds, run as the native one is: its decoder, our experts.

The library builds the model on the meta device and loads what is not a routed expert through its
own renames, from bytes our strict reader gave; routed experts never become parameters. Attention,
caches, norms and routers stay the library's; its experts interface calls `experts`. A resident
guest holds its experts as parameters and computes them with the library's own kernel. Everything
runs in the checkpoint's dtype, so the tokens are the library's. Nothing is fetched, no code of a
checkpoint runs. Not covered: training, saving, packed rows.

Shape legend: B batch, T new tokens, V vocabulary, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeModelOutputWithPast

from chronos.backends.libraries import STACKED_ONLY
from chronos.backends.torch.codecs import codec_of
from chronos.backends.torch.fast.steps import Steps, integers
from chronos.backends.torch.guest.build import (
    align,
    built,
    check_files,
    check_report,
    dense_tensors,
    quiet,
    text_model,
    without_experts,
)
from chronos.backends.torch.guest.cache import GuestCache, is_watched, layers_of, watched
from chronos.backends.torch.guest.experts import (
    CALL,
    NAME,
    ExpertsCall,
    Layer,
    chooser_of,
    current,
    is_experts,
    shared_of,
)
from chronos.backends.torch.guest.rope import LengthRope
from chronos.backends.torch.model import DTYPES, Output
from chronos.backends.torch.moe import Routing
from chronos.backends.torch.products import pack_linears
from chronos.common.data import check_single
from chronos.common.disk.header import TensorEntry
from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.experts.feed import Source
from chronos.common.layout import Layout, packed_experts, read_records
from chronos.common.layout.codecs import MLX, TRANSFORMERS, dense_encoding
from chronos.common.layout.naming import layer_of
from chronos.common.model.config import load_config
from chronos.common.model.guest import GuestConfig
from chronos.common.text.sampling import PIECE
from chronos.common.tuning import plain

# Mamba 1 in Transformers goes on from its state for single tokens only.
_FORGETFUL = frozenset({"jamba"})
# Transformers computes their sequences anew in the step that crosses the border of LongRoPE.
_STARTS_ANEW = frozenset({"phi3", "phimoe"})
# Steps from a checkpoint's tensors to an experts parameter that a record's bytes have taken.
_SAME_BYTES = {"MergeModulelist", "Concatenate"}
Shapes = dict[str, tuple[int, ...]]  # of one expert, by tensor name


class Model:
    """A guest, called as the native model is. It has no forecasts of its own."""

    lookahead = None
    gradient_checkpointing = False  # whether training computes each layer again for its gradients

    def __init__(self, config: GuestConfig, core: Any, resident: bool) -> None:
        self.config, self.core, self.resident = config, core, resident
        self.steps = None if plain() else Steps(integers(core.config.to_dict()))
        self._rope = LengthRope(core)
        self._said: Any = MoeModelOutputWithPast  # the kind of answer of its decoder
        self.device: torch.device = core.device

    def eval(self) -> Model:
        return self

    def train(self) -> Model:
        """As it is run: a guest's own weights are not trained, and its dropout stays off."""
        return self

    def new_cache(self, batch: int = 1) -> GuestCache:
        """The library's own cache: it knows sliding windows and recurrent states. A model with a
        class of its own makes it in its first call."""
        if not self.core._supports_default_dynamic_cache():
            return GuestCache([None])
        return GuestCache([watched(transformers.DynamicCache(config=self.core.config))])

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: GuestCache | None = None,
        segments_BT: Tensor | None = None,
        source: Source | None = None,
        replay: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        last_only: bool = False,
        recorded: bool = False,
        want_logits: bool = True,
        through: Callable[..., Any] | None = None,
        **forecasts: Any,
    ) -> Output:
        """Run T tokens behind `cache` (or from scratch); logits [B, T, V], T = 1 with `last_only`.

        The routing is that of the layers with experts, in order; its probabilities are the weights.
        segments_BT, of training: each row holds one document, and padding behind it. Without
        `want_logits` all experts have a probability in the routing, 0 where they were not chosen.
        replay(layer) gives (ids, weights) [T, K] in place of the gates' choice. recorded: a single
        token may run as a recorded step, which needs that no other pass is under way.
        through(layer, ...), of training, calls each layer in place of a plain call.
        """
        if segments_BT is not None:
            check_single(segments_BT.cpu().numpy())
        if through is None and self.gradient_checkpointing and torch.is_grad_enabled():
            through = partial(checkpoint, use_reentrant=False)
        call = ExpertsCall(source, replay, through=through)
        if not want_logits:
            return self._states(ids_BT, call)
        pieces = [ids_BT] if cache is None else self._pieces(ids_BT, cache)
        before = CALL.set(call)
        try:
            logits = [self._run(piece, cache, last_only, recorded) for piece in pieces]
        finally:
            CALL.reset(before)
        if pieces[0] is ids_BT:
            return Output(logits[0], call.routing)
        T = ids_BT.shape[1]  # a sequence computed anew has more
        logits_BTV = logits[-1] if last_only else torch.cat(logits, 1)[:, -T:]
        return Output(logits_BTV, _joined(call, pieces, T))

    def _states(self, ids_BT: Tensor, call: ExpertsCall) -> Output:
        """The states [B, T, D] that `head` makes logits of, by the library's own forward."""
        self._rope.enter(0, 0)
        if call.through is not None:
            self._hook_layers()
        before = CALL.set(call)
        try:
            found = self.core.base_model(input_ids=ids_BT, use_cache=False)
        finally:
            CALL.reset(before)
        routing = [_over_all(each, self.config.num_experts) for each in call.routing]
        self._said, hidden = type(found), found.last_hidden_state
        return Output(hidden[:, :0], routing, hidden=hidden)

    def _hook_layers(self) -> None:
        """Have each layer of the library called as the pass under way wants it, from now on."""
        for block in _blocks(self.core):
            if "forward" not in vars(block):
                block.forward = partial(_layer, block.forward)

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]: the library's own forward behind its decoder, since
        some scale or cap them there."""
        decoder, flat_1ND = self.core.base_model, x.reshape(1, -1, x.shape[-1])
        decoder.forward = lambda *_, **__: self._said(last_hidden_state=flat_1ND)
        try:
            ids_1N = torch.zeros(flat_1ND.shape[:2], dtype=torch.long, device=x.device)
            logits = self.core(input_ids=ids_1N, use_cache=False).logits
        finally:
            del decoder.forward
        return logits.view(*x.shape[:-1], -1)

    def step(self, ids_BT: Tensor, **options: Any) -> Output:
        """A single token behind a cache, recorded where that is possible; see `fast.steps`."""
        return self(ids_BT, recorded=True, **options)

    def _pieces(self, ids_BT: Tensor, cache: GuestCache) -> list[Tensor]:
        """What to run for new tokens: them; the whole sequence, where its keys in the cache were
        rotated by other frequencies than it would have from the start."""
        if cache.position and self.config.model_type in _FORGETFUL:
            return list(ids_BT.split(1, dim=1))
        if not self._rope:
            return [ids_BT]
        before, cache.length = cache.length, max(cache.prompt, cache.position + ids_BT.shape[1])
        past = ids_BT[:, :0] if cache.ids is None else cache.ids[:, : cache.position]
        cache.ids = torch.cat([past, ids_BT], 1)
        follows = cache.prompt or self.config.model_type in _STARTS_ANEW
        if not follows or not cache.position or self._same_table(before, cache.length):
            return [ids_BT]
        cache.layers, cache.position = self.new_cache().layers, 0
        return list(cache.ids.split(PIECE, dim=1))

    def _same_table(self, one: int, other: int) -> bool:
        return self._rope.table(one) == self._rope.table(other)

    def _run(
        self, ids_BT: Tensor, cache: GuestCache | None, last_only: bool, recorded: bool
    ) -> Tensor:
        if cache is None:
            self._rope.enter(0, 0)
            return self._forward(ids_BT, None, last_only)
        self._rope.enter(cache.length, cache.position + ids_BT.shape[1])
        forward = partial(self._forward, cache=cache, last_only=last_only)
        layers = CALL.get().caches = layers_of(cache)
        single = recorded and last_only and cache.position > 0 and ids_BT.shape == (1, 1)
        if single and self.steps is not None and is_watched(layers):
            logits = self.steps.run(ids_BT, cache.position, forward)
        else:
            logits = forward(ids_BT)
        cache.position += ids_BT.shape[1]
        return logits

    def _forward(self, ids_BT: Tensor, cache: GuestCache | None, last_only: bool) -> Tensor:
        """The library's own forward."""
        out = self.core(
            input_ids=ids_BT,
            past_key_values=cache.layers[0] if cache else None,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        if cache is not None:
            cache.layers[0] = out.past_key_values
        logits: Tensor = out.logits
        return logits


def _blocks(core: Any) -> Iterator[Any]:
    """The library's layers: those of the stacks that hold experts."""
    owners = ((n, m.chronos.layer) for n, m in core.named_modules() if hasattr(m, "chronos"))
    for stack in sorted({name.partition(f".{layer}.")[0] for name, layer in owners}):
        yield from core.get_submodule(stack)


def _layer(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """One layer of the library. What it is called through may do so again when the pass is over."""
    call = current()
    if call.through is None:
        return forward(*args, **options)
    return call.through(partial(_within, call, forward), *args, **options)


def _within(call: ExpertsCall, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A forward of the library, its layers told of a pass."""
    before = CALL.set(call)
    try:
        return forward(*args, **options)
    finally:
        CALL.reset(before)


def _over_all(routing: Routing, experts: int) -> Routing:
    """With the weights of the chosen in place of probabilities [T, E]; zero for the others."""
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK.float()
    none_TE = weights_TK.new_zeros(len(ids_TK), experts)
    return routing._replace(probs_TE=none_TE.scatter(1, ids_TK, weights_TK))


def _joined(call: ExpertsCall, pieces: list[Tensor], count: int) -> list[Routing]:
    """The routing of the last of the tokens that ran one after the other, layer by layer."""
    layers = len(call.routing) // len(pieces)
    decisions = [one[:3] for one in call.routing]  # a guest has no frozen gate beside its own
    return [
        Routing(*(torch.cat(p)[-count:] for p in zip(*decisions[layer::layers], strict=True)))
        for layer in range(layers)
    ]


def load_guest(
    folder: Path,
    device: torch.device,
    resident: bool,
    dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
    layout: Layout | None = None,
) -> Model:
    """The model of a folder; without `resident` of a packed one, whose experts stay on disk.

    layout: its packed experts, where somebody has opened them.
    Raises ConfigError for what Transformers cannot build and for experts it computes otherwise,
    ShapeMismatch, CorruptFileError.
    """
    config = GuestConfig.from_json(folder)
    layout = layout or packed_experts(folder, config, checked=resident)
    _check_runnable(config, folder, layout)
    with quiet():
        settings, kind = text_model(config, folder)
        if layout is None:
            check_files(folder)
            options: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        else:
            found = read_checkpoint(folder) if dense is None else dense
            encoding_of = partial(dense_encoding, load_config(folder)[0], coding=config.coding)
            tensors = dense_tensors(found, encoding_of, DTYPES[config.dtype])
            kind = without_experts(kind)
            options = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        core, report = built(
            lambda: kind.from_pretrained(
                **options,
                config=settings,
                dtype=DTYPES[config.dtype],
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name below
            ),
            config,
            folder,
        )
    modules = _find_experts(core, config, folder)
    check_report(report, folder)
    if layout is None:
        align(core)
    else:
        _check_records(layout, core, modules)
        if resident:
            _fill(layout, modules, DTYPES[config.dtype])
    if device.type == "cpu":
        options.clear()  # holds the weights too, which are freed as they are packed
        pack_linears(core)
    _connect(core, modules, {} if layout is None else layout.encodings)
    core.to(device).requires_grad_(False).eval()
    return Model(config, core, resident)


def connect_experts(core: Any, config: GuestConfig, layout: Layout) -> None:
    """Have a model whose experts modules are empty take them from the source of its pass.

    Raises ConfigError where the library computes experts otherwise, ShapeMismatch.
    """
    modules = _find_experts(core, config, layout.folder)
    _check_records(layout, core, modules)
    _connect(core, modules, layout.encodings)


def _check_runnable(config: GuestConfig, folder: Path, layout: Layout | None) -> None:
    encodings = () if layout is None else layout.encodings.values()
    by_mlx = config.quantization == MLX or any(name.startswith(MLX) for name in encodings)
    if by_mlx and config.model_type not in STACKED_ONLY:
        raise ConfigError(
            f"MLX-LM's {config.model_type} has not the weights of Transformers'",
            str(folder),
            "use --backend mlx",
        )
    if config.quantization not in ("", MLX) and not config.coding:
        raise ConfigError(
            f"the checkpoint is quantised ({config.quantization}), which Chronos does not run",
            str(folder),
            "use a bfloat16 checkpoint of the model",
        )
    if config.quantization and layout is None:
        raise ConfigError(
            f"the checkpoint is quantised ({config.quantization}): only packed ones run",
            str(folder),
            f"pack it: chronos pack {folder} -o {folder}-packed",
        )


def _find_experts(core: Any, config: GuestConfig, folder: Path) -> dict[int, tuple[str, Any]]:
    """Name and experts module of each layer that has one."""
    modules: dict[int, tuple[str, Any]] = {}
    for name, module in core.named_modules():
        place = layer_of(name)
        if is_experts(module) and place is not None:
            modules[place[1]] = (name, module)
    if not modules:
        raise ConfigError(
            f"{config.model_type} does not hand its experts to Transformers' experts interface",
            str(folder),
            "Chronos cannot run this architecture on PyTorch",
        )
    return modules


def _check_records(layout: Layout, core: Any, modules: Mapping[int, tuple[str, Any]]) -> None:
    """Compare the records with the experts the model computes with."""
    for step in get_model_conversion_mapping(core):
        targets = [target.rpartition(".")[2] for target in step.target_patterns]
        steps = {type(operation).__name__ for operation in getattr(step, "operations", ())}
        if steps - _SAME_BYTES and any("experts" in t for t in step.target_patterns):
            raise ConfigError(
                f"Transformers rearranges {targets[0]} of this architecture ({', '.join(steps)})",
                str(layout.folder),
                "Chronos cannot run this architecture on PyTorch",
            )
    if odd := sorted(modules.keys() ^ set(layout.moe_layers)):
        raise ShapeMismatch(
            f"layer {odd[0]} has experts in the model or on disk, not in both",
            str(layout.folder),
        )
    for layer, (_, module) in modules.items():
        record = layout.records[layer, 0]  # all of a layer are alike
        codec = codec_of(record.encoding)
        raw = torch.empty(record.nbytes, dtype=torch.uint8, device="meta")
        codec.view(raw, record)  # refuses what it has no dtype for
        shapes: Shapes = codec.shapes(record, module)
        if shapes != module.chronos_shapes:
            raise ShapeMismatch(
                f"{record.label}: {shapes} found, the model wants {module.chronos_shapes}",
                record.file,
            )


def _fill(layout: Layout, modules: Mapping[int, tuple[str, Any]], dtype: torch.dtype) -> None:
    """Read the experts into parameters [E, ...] of the model itself."""
    stacks = {
        layer: {
            name: torch.empty((layout.num_experts, *shape), dtype=dtype)
            for name, shape in module.chronos_shapes.items()
        }
        for layer, (_, module) in modules.items()
    }
    for record, data in read_records([(layout.path(k), r) for k, r in layout.records.items()]):
        layer, expert = record.key
        codec = codec_of(record.encoding)
        held = codec.view(torch.frombuffer(data, dtype=torch.uint8), record)
        for name, tensor in codec.parameters(held, modules[layer][1], dtype).items():
            stacks[layer][name][expert] = tensor
    for layer, (_, module) in modules.items():
        for name, stack in stacks[layer].items():
            module.register_parameter(name, nn.Parameter(stack, requires_grad=False))


def _connect(
    core: Any, modules: Mapping[int, tuple[str, Any]], encodings: Mapping[int, str]
) -> None:
    """Send every experts module to its `Layer`."""
    kernel = core.get_correct_experts_implementation(None)  # the library's choice for this device
    like_1D = core.get_input_embeddings().weight.new_zeros(1, _width(core))
    ahead = None
    for layer, (name, module) in sorted(modules.items(), reverse=True):
        parent, _, _ = name.rpartition(".")
        block, around = (core.get_submodule(p) for p in (parent, parent.rpartition(".")[0]))
        own = ALL_EXPERTS_FUNCTIONS.get(
            kernel, type(module).forward.__wrapped__
        )  # "eager": its own
        shared = shared_of((block, around))
        encoding = encodings.get(layer, TRANSFORMERS)
        module.chronos = Layer(layer, shared, own, ahead, encoding)
        module.config._experts_implementation = NAME
        choose = chooser_of(block, like_1D)
        ahead = None if choose is None else (layer, choose)


def _width(core: Any) -> int:
    return int(core.config.get_text_config(decoder=True).hidden_size)
