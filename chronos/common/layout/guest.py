"""The routed experts in another library's checkpoint: found, checked, and located.

Every layer with experts must have all of them, alike in names, dtypes and shapes; layers may differ
from each other, and layers without experts are dense. A tensor of a record is one or two ranges of
files: its parts lie one after the other, and stacked experts are ranges of their tensor.
Not known here: what the model computes, and whether a backend can run it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.guest import GuestConfig
from chronos.common.layout.ctsr import Template, lay_out
from chronos.common.layout.manifest import Key
from chronos.common.layout.naming import ORDER, Part, expert_part, is_extra, layer_of
from chronos.common.tensorfile import Located

_GATE_UP = ("gate_up_proj", "gate_up_proj_bias")
_MUST_HAVE = ("down_proj", "down_proj.weight", "fc2.weight")

# (tensor in the record, part of it) -> the expert, None for all of them -> where it lies
_Layer = dict[tuple[str, int], dict[int | None, Located]]


@dataclass(frozen=True)
class GuestExperts:
    """Where everything is: `dense` in file order, `left_out` what no decoder runs (names)."""

    dense: list[Located]
    left_out: list[str]
    templates: Mapping[int, Template]  # by layer
    _parts: Mapping[int, Mapping[str, list[Mapping[int | None, Located]]]]

    def locate(self, key: Key, tensor: str) -> Iterator[Located]:
        """Where the parts of one tensor of one expert lie, in order."""
        layer, expert = key
        for where in self._parts[layer][tensor]:
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
    ConfigError for a quantised checkpoint other than MLX-LM's.
    """
    if config.quantization not in ("", "mlx"):
        raise ConfigError(
            f"the checkpoint is quantised ({config.quantization}), which Chronos does not unpack",
            "",
            "save it with Transformers in bfloat16, or convert it with MLX-LM, and pack that",
        )
    found = {name: part for name in located if (part := _part(name))}
    tower = _tower(found)
    layers: dict[int, _Layer] = defaultdict(lambda: defaultdict(dict))
    dense, left_out = [], []
    for name, at in located.items():
        place = layer_of(name)
        beyond = place is not None and place[0] == tower and place[1] >= config.num_hidden_layers
        if is_extra(name) or beyond:
            left_out.append(name)
        elif part := found.get(name):
            layers[part.layer][part.tensor, part.place][part.expert] = at
        else:
            dense.append(at)
    if not layers:
        raise ShapeMismatch(
            "no tensor of the checkpoint is named as a routed expert is",
            "",
            "config.json speaks of experts: is it of another model?",
        )
    parts = {layer: _check_layer(layer, layers[layer], config) for layer in sorted(layers)}
    return GuestExperts(
        dense=sorted(dense, key=lambda at: (at[0], at[1].offset)),
        left_out=left_out,
        templates={layer: lay_out(_shapes(parts[layer])) for layer in parts},
        _parts=parts,
    )


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


def _check_layer(
    layer: int, parts: _Layer, config: GuestConfig
) -> dict[str, list[Mapping[int | None, Located]]]:
    """The layer's tensors in record order, each with its parts in order."""
    experts: set[int | None] = set(range(config.num_experts))
    stacked = any(None in where for where in parts.values())
    for where in parts.values():
        if stacked and where.keys() != {None}:
            name = next(at[1].name for expert, at in where.items() if expert is not None)
            raise ShapeMismatch(f"tensor {name} is of one expert, others of the layer are stacked")
        if stacked:
            _check_stack(where[None], config)
        else:
            _check_alike(where, experts, config)
    tensors: dict[str, list[Mapping[int | None, Located]]] = {}
    for tensor, place in sorted(parts, key=lambda at: (ORDER[at[0]], at[1])):
        tensors.setdefault(tensor, []).append(parts[tensor, place])
    for tensor in set(_GATE_UP) & tensors.keys():
        if (tensor, 0) not in parts:  # no expert of the layer has a gate
            tensors[tensor.removeprefix("gate_")] = tensors.pop(tensor)
    ordered = {name: tensors[name] for name in sorted(tensors, key=ORDER.__getitem__)}
    _check_whole(layer, ordered)
    return ordered


def _check_stack(at: Located, config: GuestConfig) -> None:
    entry = at[1]
    if len(entry.shape) < 2 or entry.shape[0] != config.num_experts:
        raise ShapeMismatch(
            f"tensor {entry.name} is {entry.dtype} {list(entry.shape)},"
            f" {config.num_experts} stacked experts wanted",
            str(at[0]),
        )


def _check_alike(
    where: Mapping[int | None, Located], experts: set[int | None], config: GuestConfig
) -> None:
    """All experts, each once, with one dtype and shape."""
    some, (path, entry) = next(iter(where.items()))
    if odd := sorted((e for e in where.keys() ^ experts if e is not None), reverse=True):
        if odd[0] in where:
            what = where[odd[0]][1].name
            raise ShapeMismatch(
                f"tensor {what} is of expert {odd[0]}, config.json names {config.num_experts}",
                str(where[odd[0]][0]),
            )
        name = f".{odd[-1]}.".join(entry.name.rsplit(f".{some}.", 1))
        raise ShapeMismatch(f"tensor {name} is missing ({len(odd)} experts in all)", str(path))
    for path_, other in where.values():
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            raise ShapeMismatch(
                f"tensor {other.name} is {other.dtype} {list(other.shape)},"
                f" {entry.name} is {entry.dtype} {list(entry.shape)}",
                str(path_),
            )


def _check_whole(layer: int, tensors: Mapping[str, list[Mapping[int | None, Located]]]) -> None:
    """Both directions are there, in one dialect, and as wide as each other."""
    last = next((name for name in _MUST_HAVE if name in tensors), None)
    first = {"down_proj": ("gate_up_proj", "up_proj"), "fc2.weight": ("fc1.weight",)}
    needed = first.get(last or "", ("up_proj.weight",))
    dialects = {"." in name for name in tensors}
    if last is None or len(dialects) > 1 or not set(needed) & tensors.keys():
        raise ShapeMismatch(
            f"the experts of layer {layer} have only {', '.join(tensors)}",
            str(next(iter(tensors.values()))[0][next(iter(next(iter(tensors.values()))[0]))][0]),
            "are shards missing?",
        )
    shapes = {name: (dtype, shape) for name, dtype, shape in _shapes(tensors)}
    if last == "down_proj":
        wide = math.prod(shapes.get("gate_up_proj", shapes.get("up_proj", ("", ())))[1])
        if wide != math.prod(shapes["down_proj"][1]) * (2 if "gate_up_proj" in shapes else 1):
            spelled = ", ".join(f"{n} {d} {list(s)}" for n, (d, s) in shapes.items())
            raise ShapeMismatch(f"the experts of layer {layer} do not fit together: {spelled}")


def _shapes(
    tensors: Mapping[str, list[Mapping[int | None, Located]]],
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor in the record of one expert."""
    for name, parts in tensors.items():
        entries = [next(iter(where.values()))[1] for where in parts]
        shapes = [
            e.shape[1:] if None in w else e.shape for e, w in zip(entries, parts, strict=True)
        ]
        if len({e.dtype for e in entries}) > 1 or len({shape[1:] for shape in shapes}) > 1:
            one, other = entries
            raise ShapeMismatch(
                f"tensor {one.name} is {one.dtype} {list(one.shape)},"
                f" {other.name} is {other.dtype} {list(other.shape)}: they are one matrix"
            )
        yield name, entries[0].dtype, (sum(shape[0] for shape in shapes), *shapes[0][1:])
