"""What is packed: a model folder as a dense part, records to lay out, and a source of experts.

Three kinds of folder give the same `ModelSource`: Chronos' own models, those of other libraries,
and packed ones of either. Each is compared with its config before anything is written; Chronos' own
tensor by tensor, others as far as names and counts go. Of the weights only samples are read, for
the fingerprint. Not here: writing (`pack`), and what other libraries call their tensors (`naming`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.header import Located, tensor_nbytes
from chronos.common.disk.io import FileIO
from chronos.common.disk.linked import sample_digest
from chronos.common.disk.tensors import Stream, locate_tensors, next_pieces, read_pieces
from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.layout.affine import DEFAULT_GROUPS
from chronos.common.layout.codecs import MLX, SWIGLU, TRANSFORMERS, encoder_of, encoding_of
from chronos.common.layout.ctsr import Source, Template, read_records, record_template
from chronos.common.layout.folder import Layout, is_packed, open_layout, refuse_unfinished
from chronos.common.layout.guest import find_experts, left_out_of
from chronos.common.layout.names import Names, pattern_of, read_names
from chronos.common.layout.quantised import grouped, is_coded, shape_of
from chronos.common.model.config import ModelConfig, load_config
from chronos.common.model.guest import GuestConfig, read_config
from chronos.common.model.weights import (
    Key,
    TensorSpec,
    dense_tensors,
    expert_name,
    expert_tensors,
    routed_tensors,
)

Experts = Generator[tuple[Key, Mapping[str, Any]], None, None]


@dataclass(frozen=True)
class ModelSource:
    """A model to pack: where the dense tensors are, how to get experts, and which model it is.

    templates: the record of an expert, by layer. identify: reads the samples for the fingerprint.
    names: what the experts' tensors are called, where that is known. left_out: names of tensors no
    decoder runs. dense_pieces: gives the dense tensors where they are not written as they lie.
    """

    config: ModelConfig | GuestConfig
    dense: list[Located]
    templates: Mapping[int, Template]
    experts: Source
    identify: Callable[[], str]
    names: Names = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    dense_pieces: Callable[[FileIO], Stream] | None = None

    def read_dense(self, io: FileIO) -> Stream:
        """The dense tensors as they are to be written, in order and in pieces."""
        return self.dense_pieces(io) if self.dense_pieces else read_pieces(self.dense, io)

    @cached_property
    def fingerprint(self) -> str:
        return self.identify()

    @property
    def dense_nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.dense)

    @property
    def dense_memory_nbytes(self) -> int:
        """Of the dense part in memory, where quantised matrices are dequantised at loading."""
        if not isinstance(self.config, GuestConfig) or not self.config.coding:
            return self.dense_nbytes
        nbytes = 0
        matrices = grouped((e.name, e.dtype, e.shape) for _, e in self.dense)
        for name, kinds in matrices.items():
            if is_coded(kinds):
                rows, columns = shape_of(self.config.coding, kinds, name)
                nbytes += rows * columns * self.config.dtype_bytes
            else:
                nbytes += sum(tensor_nbytes(*kind) for kind in kinds.values())
        return nbytes

    @property
    def expert_nbytes(self) -> int:
        """Of all records, padding included."""
        return self.config.num_experts * sum(t.nbytes for t in self.templates.values())

    @property
    def dialect(self) -> str:
        """Whose modules the records fit: "chronos", "transformers", "mlx", or "quantised" for those
        that another library quantised."""
        if isinstance(self.config, ModelConfig):
            return "chronos"
        first = next(iter(self.templates.values())).encoding.partition("-")[0]
        return first if first in (TRANSFORMERS, MLX) else "quantised"

    @property
    def encodings(self) -> dict[int, str]:
        """How the experts of each layer are coded."""
        return {layer: template.encoding for layer, template in self.templates.items()}

    @property
    def layers(self) -> list[list[Key]]:
        """The experts of each layer that has some."""
        return [[(layer, e) for e in range(self.config.num_experts)] for layer in self.templates]


def open_source(src: Path, io: FileIO) -> ModelSource:
    """Look at a model folder of any kind. Raises ConfigError, ShapeMismatch, CorruptFileError."""
    config = read_config(src)
    if is_packed(src):
        return _packed(src, config, io)
    refuse_unfinished(src, io)
    if isinstance(config, ModelConfig):
        return _native(src, config, locate_tensors(src, io), io)
    located = locate_tensors(src, io, unused=partial(left_out_of, config=config))
    return _guest(src, config, located, io)


def encoded(model: ModelSource, encoding: str) -> ModelSource:
    """The same model with its experts converted, each as it is packed. Raises ConfigError for an
    encoding that Chronos does not make, UsageError for experts that it is not made of.
    """
    codec = encoder_of(encoding)
    if odd := set(model.encodings.values()) - {codec.source}:
        raise UsageError(
            f"experts encoded as {min(odd)} are not converted to {encoding}",
            "",
            "pack the model from the folder it was trained into, or a checkpoint in bfloat16",
        )
    templates = {
        layer: record_template(codec.tensors_from(_specs(plain)), encoding)
        for layer, plain in model.templates.items()
    }

    def experts(keys: Sequence[Key]) -> Experts:
        with closing(model.experts(keys)) as given:
            for key, data in given:
                tensors = model.templates[key[0]].tensors
                weights = {t.name: widened(data[t.name], t.dtype, t.shape) for t in tensors}
                made = {n: np.ascontiguousarray(a) for n, a in codec.encode(weights).items()}
                yield key, {name: array.data.cast("B") for name, array in made.items()}

    return replace(model, templates=templates, experts=experts, names={})


def own_encoding(model: ModelSource, bits: int, group: int | None = None) -> str:
    """The encoding of Chronos' own quantisation for a model's experts. group: columns that share a
    scale, by default 32 for four bits and 64 for eight."""
    native = isinstance(model.config, ModelConfig)
    return f"{SWIGLU if native else TRANSFORMERS}-affine{bits}-g{group or DEFAULT_GROUPS[bits]}"


def _specs(template: Template) -> list[TensorSpec]:
    return [TensorSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in template.tensors]


def widened(data: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor in float32; data: its bytes, or an iterator of them in pieces."""
    whole = b"".join(data) if isinstance(data, Iterator) else data
    if dtype == "BF16":  # NumPy has none: the upper half of a float32
        flat = (np.frombuffer(whole, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(whole, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
    return flat.reshape(shape)


def narrowed(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Numbers rounded to safetensors' dtype; BF16 as the upper half of each, rounded to even.
    What does not fit is infinite."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return x.astype({"F32": "<f4", "F16": "<f2"}[dtype])
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _packed(src: Path, config: ModelConfig | GuestConfig, io: FileIO) -> ModelSource:
    layout, located = open_layout(src, config=config, io=io), locate_tensors(src, io)
    dense = list(located.values())
    if isinstance(config, ModelConfig):
        dense = pick_all(dense_tensors(config), located, src)
    return ModelSource(
        config,
        dense,
        {layer: layout.template(layer) for layer in layout.moe_layers},
        partial(_packed_experts, layout, io),
        lambda: layout.fingerprint,
        read_names(src, io),
    )


def _packed_experts(layout: Layout, io: FileIO, keys: Sequence[Key]) -> Experts:
    wanted = [(layout.path(key), layout.records[key]) for key in keys]
    with closing(read_records(wanted, io)) as stream:
        for record, data in stream:
            yield record.key, record.views(data)


def _native(
    src: Path, config: ModelConfig, located: Mapping[str, Located], io: FileIO
) -> ModelSource:
    dense = dense_tensors(config)
    picked = pick_all([*dense, *routed_tensors(config)], located, src)
    record = record_template(expert_tensors(config))
    templates = dict.fromkeys(range(config.num_hidden_layers), record)

    def locate(key: Key, tensor: str) -> list[Located]:
        return [located[expert_name(*key, tensor)]]

    return ModelSource(
        config,
        picked[: len(dense)],
        templates,
        partial(_gathered, templates, locate, io),
        partial(sample_digest, located, io),
        {
            layer: {t.name: (pattern_of(expert_name(layer, 0, t.name), 0),) for t in record.tensors}
            for layer in templates
        },
    )


def _guest(
    src: Path, config: GuestConfig, located: Mapping[str, Located], io: FileIO
) -> ModelSource:
    found, raw = find_experts(located, config), load_config(src)[0]
    templates = {
        layer: laid._replace(encoding=encoding_of(raw, layer, laid.tensors, config.coding))
        for layer, laid in found.templates.items()
    }
    left_out = set(found.left_out)
    kept = {name: at for name, at in located.items() if name not in left_out}
    return ModelSource(
        config,
        found.dense,
        templates,
        partial(_gathered, templates, found.locate, io),
        partial(sample_digest, kept, io),
        found.names,
        tuple(found.left_out),
    )


def _gathered(
    templates: Mapping[int, Template],
    locate: Callable[[Key, str], Iterable[Located]],
    io: FileIO,
    keys: Sequence[Key],
) -> Experts:
    """Experts whose tensors lie anywhere, in parts that are laid one after the other."""
    wanted = (
        at
        for key in keys
        for tensor in templates[key[0]].tensors
        for at in locate(key, tensor.name)
    )
    with closing(read_pieces(wanted, io)) as stream:
        for key in keys:
            tensors = templates[key[0]].tensors
            yield key, {tensor.name: next_pieces(stream, tensor.nbytes) for tensor in tensors}


def pick(specs: Iterable[TensorSpec], located: Mapping[str, Located], src: Path) -> list[Located]:
    """The tensors of `specs`, each compared with the file. Raises ShapeMismatch by name."""
    picked = []
    for spec in specs:
        at = located.get(spec.name)
        if at is None:
            raise ShapeMismatch(f"tensor {spec.name} is missing", str(src))
        if (at[1].dtype, at[1].shape) != (spec.stored, spec.shape):
            raise ShapeMismatch(
                f"tensor {spec.name} is {at[1].dtype} {list(at[1].shape)}, the config implies"
                f" {spec.stored} {list(spec.shape)}",
                str(at[0]),
            )
        picked.append(at)
    return picked


def pick_all(
    specs: Iterable[TensorSpec], located: Mapping[str, Located], src: Path
) -> list[Located]:
    """As `pick`, and nothing else may be there."""
    specs = list(specs)
    picked = pick(specs, located, src)
    if odd := min(located.keys() - {spec.name for spec in specs}, default=None):
        raise ShapeMismatch(f"tensor {odd} is not one the config implies", str(src))
    return picked
