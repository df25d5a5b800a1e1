"""The routed experts in another library's checkpoint: found, checked, and located.

Every layer with experts must have all of them, alike in names, dtypes and shapes; layers may differ
from each other, and layers without experts are dense. A tensor of a record is one or two ranges of
files: its parts lie one after the other, and stacked experts are ranges of their tensor.
Not known here: what the model computes, and whether a backend can run it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from chronos.common.disk.header import Located
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.layout.ctsr import Template, lay_out
from chronos.common.layout.names import Names, Pattern, pattern_of
from chronos.common.layout.naming import (
    ORDER,
    Part,
    expert_part,
    is_extra,
    layer_of,
    unmerged,
)
from chronos.common.layout.quantised import (
    VALUES,
    coding_of_experts,
    grouped,
    is_coded,
    shape_of,
    split,
)
from chronos.common.model.guest import GuestConfig
from chronos.common.model.weights import Key

_GATE_UP = ("gate_up_proj", "gate_up_proj_bias")
# What a record ends with, and what it must have beside it: one of these.
_DIRECTIONS = {"down_proj": ("gate_up_proj", "up_proj"), "fc2": ("fc1",)}

_MLX_KINDS = frozenset({"weight", "scales", "biases", "bias"})
_FLOATS = ("F64", "F32", "F16", "BF16")
_UNREAD = ("F4", "F6_E2M3", "F6_E3M2")
# The embedding and the head of the text model; those of other parts have other vocabularies.
_VOCABULARY = ("model.embed_tokens.weight", "language_model.embed_tokens.weight", "lm_head.weight")

_Where = dict[int | None, Located]  # by expert; None: all of them, stacked
_Parts = dict[tuple[str, int], _Where]  # by tensor of the record and place in it
_Tensors = dict[str, list[_Where]]  # in record order, each with its parts in order


@dataclass(frozen=True)
class GuestExperts:
    """Where everything is: `dense` in file order, `left_out` what no decoder runs (names)."""

    dense: list[Located]
    left_out: list[str]
    templates: Mapping[int, Template]  # by layer
    _tensors: Mapping[int, _Tensors]

    @property
    def names(self) -> Names:
        """What the tensors of records are called here; none where a layer's are called otherwise
        from expert to expert."""
        found = {
            layer: {name: tuple(map(_pattern, parts)) for name, parts in tensors.items()}
            for layer, tensors in self._tensors.items()
        }
        patterns = (p for tensors in found.values() for parts in tensors.values() for p in parts)
        return found if all(patterns) else {}

    def locate(self, key: Key, tensor: str) -> Iterator[Located]:
        """Where the parts of one tensor of one expert lie, in order."""
        layer, expert = key
        for where in self._tensors[layer][tensor]:
            if expert in where:
                yield where[expert]
            else:
                path, entry = where[None]
                nbytes = entry.nbytes // entry.shape[0]
                start = entry.offset + expert * nbytes
                yield path, entry._replace(shape=entry.shape[1:], offset=start, nbytes=nbytes)


def find_experts(located: Mapping[str, Located], config: GuestConfig) -> GuestExperts:
    """Sort a checkpoint's tensors into experts, dense part and what is left out.

    Raises ShapeMismatch naming a tensor that is missing, unlike its fellows or not understood, and
    ConfigError for a checkpoint quantised in a way that Chronos does not compute with.
    """
    if config.quantization not in ("", "mlx"):
        _check_quantised(located, config)
    found = {name: part for name in located if (part := _part(name))}
    outside = left_out_of(located, config)
    layers: dict[int, _Parts] = defaultdict(lambda: defaultdict(dict))
    dense, left_out = [], []
    for name, at in located.items():
        if name in outside:
            left_out.append(name)
        elif part := found.get(name):
            where = layers[part.layer][part.tensor, part.place]
            if other := where.get(part.expert):
                raise ShapeMismatch(f"{name} and {other[1].name} are the same weights", str(at[0]))
            where[part.expert] = at
        else:
            _check_dense(at, config)
            dense.append(at)
    _check_coded(dense, config)
    if not layers:
        raise ShapeMismatch(
            "no tensor of the checkpoint is named as a routed expert is",
            "",
            "config.json speaks of experts: is it of another model?",
        )
    tensors = {layer: _check_layer(layer, layers[layer], config) for layer in sorted(layers)}
    return GuestExperts(
        dense=sorted(dense, key=lambda at: (at[0], at[1].offset)),
        left_out=left_out,
        templates={layer: lay_out(_shapes(tensors[layer])) for layer in tensors},
        _tensors=tensors,
    )


def _check_quantised(located: Mapping[str, Located], config: GuestConfig) -> None:
    """Refuse a quantization_config that is not that of the weights, which may have been widened
    since, or that Chronos does not compute with."""
    coded = any(
        "scale" in name or (entry.dtype not in _FLOATS and len(entry.shape) > 1)
        for name, (_, entry) in located.items()
    )
    kind = config.quantization
    if not coded:
        raise ConfigError(
            f"config.json has a quantization_config ({kind}), but no weight is quantised",
            "",
            "remove quantization_config from config.json: the weights are plain",
        )
    if not config.coding:
        raise ConfigError(
            f"the checkpoint is quantised ({kind}), which Chronos does not unpack",
            "",
            "save it with Transformers in bfloat16, or convert it with MLX-LM, and pack that",
        )


def _check_coded(dense: Iterable[Located], config: GuestConfig) -> None:
    """Compare the quantised matrices of the dense part with what their encoding stores."""
    if config.coding:
        tensors = ((entry.name, entry.dtype, entry.shape) for _, entry in dense)
        for name, kinds in grouped(tensors).items():
            dtype, shape = kinds.get("weight", ("", ()))
            # Tables of ids are no matrices (DeepSeek-V4 has one of experts by token).
            if is_coded(kinds) or dtype not in ("", "I64", *_FLOATS) and len(shape) > 1:
                shape_of(config.coding, kinds, name)


def _check_dense(at: Located, config: GuestConfig) -> None:
    """Refuse what no library could load, as far as names tell."""
    path, entry = at
    if entry.dtype in _UNREAD:
        raise ShapeMismatch(
            f"tensor {entry.name} is {entry.dtype}, which neither library reads",
            str(path),
            "save the model with Transformers in bfloat16, and pack that",
        )
    if entry.name.endswith("weight"):
        _check_filled(at)
    rows = entry.shape[0] if entry.shape else 0
    if entry.name.endswith(_VOCABULARY) and rows != config.vocab_size:
        wanted = [config.vocab_size, *entry.shape[1:]]
        raise ShapeMismatch(
            f"tensor {entry.name} is {entry.dtype} {list(entry.shape)}, config.json implies"
            f" {wanted}",
            str(path),
            f'if the vocabulary was resized, set "vocab_size": {rows} in config.json',
        )


def _check_filled(at: Located) -> None:
    path, entry = at
    if not entry.nbytes:
        raise ShapeMismatch(
            f"tensor {entry.name} has no elements ({list(entry.shape)})",
            str(path),
            "was it saved under DeepSpeed ZeRO-3? Gather the weights: python zero_to_fp32.py, or"
            " stage3_gather_16bit_weights_on_model_save",
        )


def left_out_of(names: Iterable[str], config: GuestConfig) -> set[str]:
    """The tensors that no decoder runs: multi-token-prediction heads, layers beyond the last."""
    names = list(names)
    tower = _tower({name: part for name in names if (part := _part(name))})

    def outside(name: str) -> bool:
        place = layer_of(name)
        beyond = place is not None and place[0] == tower and place[1] >= config.num_hidden_layers
        return is_extra(name) or beyond

    return {name for name in names if outside(name)}


def _part(name: str) -> Part | None:
    return None if is_extra(name) else expert_part(name)


def _tower(found: Mapping[str, Part]) -> str:
    """The one stack of layers that holds experts."""
    towers = {part.tower: name for name, part in found.items()}
    if len(towers) > 1:
        one, other, *_ = towers.values()
        raise ShapeMismatch(
            f"two models hold routed experts: {one} and {other}",
            "",
            "pack the checkpoint of its text model alone",
        )
    return next(iter(towers), "")


def _check_layer(layer: int, parts: _Parts, config: GuestConfig) -> _Tensors:
    """The layer's tensors as its records have them."""
    if any("." in tensor for tensor, _ in parts):
        parts = {(unmerged(*at), 0): where for at, where in parts.items()}
    stacked = any(None in where for where in parts.values())
    for (tensor, _), where in parts.items():
        _check_expert(tensor, _some(where))
        if not stacked:
            _check_alike(where, config)
        elif where.keys() == {None}:
            _check_stack(where[None], config)
        else:
            name = next(at[1].name for expert, at in where.items() if expert is not None)
            raise ShapeMismatch(f"tensor {name} is of one expert, others of the layer are stacked")
    found: _Tensors = {}
    for tensor, place in sorted(parts):
        found.setdefault(tensor, []).append(parts[tensor, place])
    for tensor in _GATE_UP:
        if tensor in found and (tensor, 0) not in parts:  # no expert of the layer has a gate
            found[tensor.removeprefix("gate_")] = found.pop(tensor)
    tensors = {name: found[name] for name in sorted(found, key=ORDER.__getitem__)}
    _check_whole(layer, tensors, config)
    return tensors


def _check_expert(tensor: str, at: Located) -> None:
    """It has elements, in a dtype that is computed with; names tell a quantised one."""
    path, entry = at
    _check_filled(at)
    plain = "." not in tensor and not is_coded([split(tensor).kind])
    if plain and entry.dtype not in _FLOATS[1:]:
        raise ShapeMismatch(
            f"tensor {entry.name} is {entry.dtype}, which experts are not computed in",
            str(path),
            "save the model with Transformers in bfloat16, and pack that",
        )


def _check_stack(at: Located, config: GuestConfig) -> None:
    entry = at[1]
    whole = entry.nbytes % config.num_experts == 0  # four-bit values might share a byte
    if len(entry.shape) < 2 or entry.shape[0] != config.num_experts or not whole:
        raise ShapeMismatch(
            f"tensor {entry.name} is {entry.dtype} {list(entry.shape)},"
            f" {config.num_experts} stacked experts wanted",
            str(at[0]),
        )


def _check_alike(where: _Where, config: GuestConfig) -> None:
    """All experts, each once, with one dtype and shape."""
    some, (path, entry) = next(iter(where.items()))
    for expert, (path_, other) in where.items():
        if expert is not None and expert >= config.num_experts:
            raise ShapeMismatch(
                f"tensor {other.name} is of expert {expert}, config.json names"
                f" {config.num_experts}",
                str(path_),
            )
    if lost := [expert for expert in range(config.num_experts) if expert not in where]:
        name = f".{lost[0]}.".join(entry.name.rsplit(f".{some}.", 1))
        raise ShapeMismatch(f"tensor {name} is missing ({len(lost)} experts in all)", str(path))
    for path_, other in where.values():
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            raise ShapeMismatch(
                f"tensor {other.name} is {other.dtype} {list(other.shape)},"
                f" {entry.name} is {entry.dtype} {list(entry.shape)}",
                str(path_),
            )


def _check_whole(layer: int, tensors: _Tensors, config: GuestConfig) -> None:
    """Both directions are there, in one dialect, and as wide as each other."""
    shapes = {name: (dtype, shape) for name, dtype, shape in _shapes(tensors)}
    matrices = grouped((name, *rest) for name, rest in shapes.items())
    filled = [name for name, kinds in matrices.items() if not kinds.keys().isdisjoint(VALUES)]
    last = next((name for name in _DIRECTIONS if name in filled), "")
    whole = last and any(name in filled for name in _DIRECTIONS[last])
    if not whole or len({"." in name for name in tensors}) > 1:
        path, entry = _some(next(iter(tensors.values()))[0])
        raise ShapeMismatch(
            f"the experts of layer {layer} have only {', '.join(tensors)} ({entry.name})",
            str(path),
            "are shards missing?",
        )
    coded = any(map(is_coded, matrices.values()))
    if coded and config.coding:
        where = f"of the experts of layer {layer}"
        coding = coding_of_experts(config.coding, [dtype for dtype, _ in shapes.values()])
        sizes = {n: shape_of(coding, k, f"{n} {where}") for n, k in matrices.items()}
        ups = [size for name, size in sizes.items() if name != last]
        wide, down = sum(rows for rows, _ in ups), sizes[last]
        gated = any(name.startswith("gate") for name in sizes)
        fits = wide == (1 + gated) * down[1] and {columns for _, columns in ups} == {down[0]}
    elif coded:  # by MLX-LM, projection by projection: a backend compares them with its model
        _check_mlx(tensors)
        fits = True
    elif last == "down_proj" and last in shapes:
        times = 2 if "gate_up_proj" in shapes else 1
        wide = math.prod(shapes["gate_up_proj" if times == 2 else "up_proj"][1])
        fits = wide == times * math.prod(shapes["down_proj"][1])
    else:
        fits = True
    if not fits:
        spelled = ", ".join(f"{n} {d} {list(s)}" for n, (d, s) in shapes.items())
        raise ShapeMismatch(f"the experts of layer {layer} do not fit together: {spelled}")


def _check_mlx(tensors: _Tensors) -> None:
    """Refuse what is quantised in another way, of which config.json does not speak."""
    for name, parts in tensors.items():
        path, entry = _some(parts[0])
        if split(name).kind not in _MLX_KINDS:
            raise ShapeMismatch(
                f"tensor {entry.name} is of a quantised expert, and config.json does not say how",
                str(path),
                "add the quantization_config it was published with; or save the model with"
                " Transformers in bfloat16, or convert it with MLX-LM, and pack that",
            )


def _shapes(tensors: _Tensors) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor in the record of one expert."""
    for name, parts in tensors.items():
        entries = [_some(where)[1] for where in parts]
        shapes = [e.shape[None in w :] for e, w in zip(entries, parts, strict=True)]
        if not all(shapes):
            raise ShapeMismatch(f"tensor {entries[0].name} of the experts is a single number")
        if len({e.dtype for e in entries}) > 1 or len({shape[1:] for shape in shapes}) > 1:
            one, other = entries
            raise ShapeMismatch(
                f"tensor {one.name} is {one.dtype} {list(one.shape)},"
                f" {other.name} is {other.dtype} {list(other.shape)}: they are one matrix"
            )
        yield name, entries[0].dtype, (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _pattern(where: _Where) -> Pattern:
    """How all of them are called; empty where there is no such rule."""
    expert, (_, entry) = next(iter(where.items()))
    pattern = pattern_of(entry.name, expert)
    named = (str(expert).join(pattern) == at[1].name for expert, at in where.items())
    return pattern if expert is None or all(named) else ()


def _some(where: _Where) -> Located:
    """Any of them: they are alike."""
    return next(iter(where.values()))
