"""A guest's model object without its routed experts, all else as MLX-LM makes it.

MLX-LM's own loader builds and quantises the model; dense tensors come from the strict reader, and
experts are stand-ins that are never evaluated. A model's `sanitize` works on a checkpoint as a
whole, so it is run with experts among the dense tensors: small numbered ones (`spelling`) where
records have the names of Transformers' modules. What tensors an expert has, its codec knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from chronos.backends.mlx.codecs import DTYPES, Raw, codec_of, memory
from chronos.backends.mlx.guest.spelling import (
    KNOWN,
    LAYER,
    Blocks,
    Spelling,
    Weights,
    experts_in,
    read_rows,
    spellings,
    switch_of,
)
from chronos.common.disk.header import TensorEntry
from chronos.common.disk.tensors import locate_tensors, read_checkpoint, write_tensors
from chronos.common.errors import (
    ChronosError,
    ConfigError,
    MissingBackendError,
    ShapeMismatch,
)
from chronos.common.layout import Layout, Record, read_records
from chronos.common.layout.codecs import MLX, MXFP4, TRANSFORMERS, Affine
from chronos.common.model.config import load_config
from chronos.common.model.guest import GuestConfig, mlx_lm_keys

_DENSE_DTYPES = (
    DTYPES
    | {
        "BOOL": mx.bool_,
        "I64": mx.int64,
        "U64": mx.uint64,
        "C64": mx.complex64,
        "F64": mx.float32,  # narrowed: MLX has float64 on a CPU only
    }
    | dict.fromkeys(  # as MLX reads them, which `sanitize` methods know
        ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), mx.uint8
    )
)


def mlx_lm_utils() -> ModuleType:
    try:
        import mlx_lm.utils as utils
    except ImportError as error:
        raise MissingBackendError(
            f"a model of another library needs MLX-LM ({error})",
            "",
            "pip install 'chronos-moe[guests]'",
        ) from error
    module: ModuleType = utils
    return module


def find_blocks(module: nn.Module, config: GuestConfig) -> Blocks:
    """Each layer's switch. Raises ConfigError where there is none, or one of another kind."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    parts = {
        SwitchGLU: {"gate_proj", "up_proj", "down_proj", "activation"},
        SwitchMLP: {"fc1", "fc2", "activation"},
    }
    blocks: Blocks = {}
    for path, block in module.named_modules():
        if isinstance(block, SwitchGLU | SwitchMLP):
            layer = LAYER.fullmatch(path)
            if type(block) not in parts or block.children().keys() - parts[type(block)]:
                raise _unsupported(config, f"computes its experts with more than a switch ({path})")
            if any("global_scale" in b for b in block.children().values()):
                raise _unsupported(config, "has a scale for each expert (nvfp4)")
            if layer is None or int(layer[3]) in blocks:
                raise _unsupported(config, f"has an expert block of no layer of its own ({path})")
            blocks[int(layer[3])] = path, block
    if not blocks:
        raise _unsupported(config, "computes its experts without SwitchGLU")
    return dict(sorted(blocks.items()))


def _unsupported(config: GuestConfig, why: str) -> ConfigError:
    return ConfigError(
        f"the MLX backend does not run {config.model_type}: MLX-LM's model {why}",
        "",
        "the torch backend may: --backend torch",
    )


class Skeleton:
    """The model of a folder, all lazy. How its records spell experts is known once
    `without_experts` was called."""

    def __init__(self, utils: ModuleType, folder: Path, config: GuestConfig) -> None:
        self.folder, self.config = folder, config
        self.spelling: Spelling = "", False
        self._utils, self._json = utils, load_config(folder)[0]
        if "model_file" in self._json:
            raise ConfigError(
                "config.json asks for code from the checkpoint (model_file); Chronos runs none",
                str(folder),
                "remove model_file if the architecture is a built-in one",
            )
        self._records: dict[int, Record] = {}  # one of each layer
        self._dense: Weights = {}

    def whole(self) -> nn.Module:
        """With its experts, as MLX-LM loads an unpacked folder. Raises CorruptFileError first."""
        locate_tensors(self.folder)
        return self._load(self.folder, model_config=mlx_lm_keys(self._json))

    def without_experts(
        self, layout: Layout, dense: Iterable[tuple[TensorEntry, memoryview]] | None
    ) -> nn.Module:
        """With stand-ins for the experts of a packed folder. dense: its dense tensors, where they
        are being read already."""
        self._records = {layer: layout.records[layer, 0] for layer in layout.moe_layers}
        if dense is None:
            dense = read_checkpoint(self.folder, list(locate_tensors(self.folder)))
        self._dense = {entry.name: _array(entry, data) for entry, data in dense}
        with TemporaryDirectory() as name:  # MLX-LM's loader is shown no weights but an empty file
            folder = Path(name)
            write_tensors(folder / "model.safetensors", [])
            shown = self._json | mlx_lm_keys(self._json)
            if self.config.coding:  # its experts are ours, and nothing else is quantised
                shown.pop("quantization_config", None)
            config = json.dumps(shown)
            (folder / "config.json").write_text(config)
            return self._load(folder, get_model_classes=self._classes)

    def fill(self, layout: Layout, blocks: Blocks) -> None:
        """Read the experts of a packed folder in place of their stand-ins."""
        stacks = {
            layer: {
                t.name: mx.zeros((experts_in(block), *t.shape), DTYPES[t.dtype])
                for t in self._records[layer].tensors
            }
            for layer, (_, block) in blocks.items()
        }
        records = [(layout.path(key), record) for key, record in layout.records.items()]
        for record, data in read_records(records):
            layer, expert = record.key
            for name, view in record.views(data).items():
                array: Any = stacks[layer][name]  # a buffer, which its stub does not say
                stack = memory(array)
                stack[expert * len(view) : (expert + 1) * len(view)] = view
        for layer, (_, block) in blocks.items():
            codec = codec_of(layout.encodings[layer])
            own = codec.parameters(stacks[layer], switch_of(block, self.spelling))
            block.update(tree_unflatten(list(own.items())))

    def _load(self, folder: Path, **options: Any) -> nn.Module:
        try:
            return self._utils.load_model(folder, lazy=True, **options)[0]
        except ChronosError:
            raise
        except Exception as error:  # anything a hostile or unknown config.json can cause
            raise ConfigError(
                f"MLX-LM cannot build this model: {' '.join(str(error).split())[:300]}",
                str(self.folder),
                "--backend torch may; so may MLX once the model is packed"
                if folder == self.folder
                else "--backend torch may",
            ) from error

    def _classes(self, config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], Any]:
        """For MLX-LM's loader: a model whose `sanitize` gives our tensors, not the file's."""
        kind, arguments = self._utils._get_classes(config)

        def build(args: Any) -> nn.Module:
            module = kind(args)
            sanitize = getattr(module, "sanitize", lambda weights: weights)

            def ours(_: Weights) -> Weights:
                del module.sanitize
                return self._sanitized(sanitize, find_blocks(module, self.config))

            module.sanitize = ours  # of this object alone
            return module

        return build, arguments

    def _sanitized(self, sanitize: Callable[[Weights], Weights], blocks: Blocks) -> Weights:
        """The dense tensors as the model wants them, with stand-ins of the experts' shapes."""
        if odd := sorted(blocks.keys() ^ self._records.keys()):
            where = "config.json" if odd[0] in blocks else "the packed folder"
            raise ShapeMismatch(f"layer {odd[0]} has experts in {where} only", str(self.folder))
        if any(r.encoding.startswith(MLX) for r in self._records.values()):
            return sanitize(self._dense | self._stand_ins(blocks))  # MLX-LM's names already
        plain = {f"{path}.{name}" for path, b in blocks.values() for name, _ in _flat(b)}
        for layer, (_, block) in blocks.items():
            _quantise_like(self._records[layer], block)
        wanted = {f"{path}.{name}": a for path, b in blocks.values() for name, a in _flat(b)}
        if self.config.model_type in KNOWN:
            self.spelling = KNOWN[self.config.model_type]
            self._check_shapes(blocks)
            return sanitize(dict(self._dense)) | wanted
        for swapped, numbered in spellings(self._dense, blocks, self._records):
            try:
                found = sanitize(self._dense | numbered)
            except (KeyError, ValueError):  # another spelling was looked for
                continue
            rows = read_rows(found, blocks) if plain <= found.keys() else None
            if rows is not None:
                self.spelling = rows, swapped
                self._check_shapes(blocks)
                return found | wanted
        raise _unsupported(self.config, "reads no experts from this checkpoint")

    def _stand_ins(self, blocks: Blocks) -> Weights:
        return {
            f"{path}.{t.name}": mx.zeros((experts_in(block), *t.shape), DTYPES[t.dtype])
            for layer, (path, block) in blocks.items()
            for t in self._records[layer].tensors
        }

    def _check_shapes(self, blocks: Blocks) -> None:
        """A record, as its codec reads it, against the block."""
        for layer, (path, block) in blocks.items():
            record = self._records[layer]
            codec, raw = codec_of(record.encoding), Raw(mx.zeros((8,), mx.uint8), 0, (1, 0))
            view = codec.view(raw, record)  # of no bytes, never evaluated
            own = codec.parameters(view, switch_of(block, self.spelling))
            found = {name: tuple(a.shape[1:]) for name, a in own.items()}
            wanted = {name: tuple(array.shape[1:]) for name, array in _flat(block)}
            if found != wanted:
                raise ShapeMismatch(
                    f"the experts of layer {layer} are {found}; MLX-LM's {path} wants {wanted}",
                    str(self.folder),
                )


def _quantise_like(record: Record, block: nn.Module) -> None:
    """Make a block's projections those of MLX-LM's quantised models, where the record is quantised
    by Chronos or MXFP4. Raises ShapeMismatch."""
    if record.encoding == TRANSFORMERS:
        return
    settings: tuple[int, int, str] = 32, 4, MXFP4
    if record.encoding != MXFP4:
        codec = Affine(record.encoding)
        settings = codec.group, codec.bits, "affine"
    for name, linear in block.children().items():
        if isinstance(linear, nn.Module) and "weight" in linear:
            try:
                block[name] = linear.to_quantized(*settings)
            except ValueError as error:
                what = f"{record.label}: {name} is no {record.encoding}: {error}"
                raise ShapeMismatch(what, record.file) from None


def _array(entry: TensorEntry, data: memoryview) -> mx.array:
    """A copy of a dense tensor."""
    if entry.dtype not in _DENSE_DTYPES:
        raise ShapeMismatch(f"{entry.name} is {entry.dtype}, which MLX does not have")
    if 0 in entry.shape:
        return mx.zeros(entry.shape, _DENSE_DTYPES[entry.dtype])
    if entry.dtype == "F64":
        return mx.array(np.frombuffer(data, np.float64).astype(np.float32).reshape(entry.shape))
    # In its own shape: MLX counts a dimension in 31 bits, which bytes in a row may not fit in.
    rows = np.frombuffer(data, np.uint8).reshape(*entry.shape[:-1], -1)
    return mx.array(rows).view(_DENSE_DTYPES[entry.dtype]).reshape(entry.shape)


def _flat(block: nn.Module) -> list[tuple[str, mx.array]]:
    """A switch's parameters by name, without its activation's."""
    return [item for item in tree_flatten(block.parameters()) if not item[0].startswith("act")]
