"""GGUF files for llama.cpp: `chronos export --to gguf`.

A native model is written as the architecture that has its arithmetic (`architectures`), a guest as
the one llama.cpp has for it. What does not fit is refused by name. The package `gguf` writes the
header and codes the numbers; tensors come one expert at a time. What llama.cpp reads of each
architecture is from its conversion/*.py and src/models/*.cpp, at build 11549.

Shape legend: D hidden, F expert hidden, E experts, H heads, d head_dim, z latent, X any.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.io import FileIO, StrPath, check_free_space, write_error
from chronos.common.disk.tensors import next_pieces, read_pieces
from chronos.common.errors import ConfigError, MissingBackendError, ShapeMismatch, UsageError
from chronos.common.layout import is_packed, verify
from chronos.common.layout.codecs import TRANSFORMERS
from chronos.common.layout.gguf_names import ARCHITECTURES, Architecture, gguf_name
from chronos.common.layout.source import ModelSource, open_source, widened
from chronos.common.model.config import ModelConfig, load_config
from chronos.common.model.defaults import class_defaults
from chronos.interop.architectures import WITH_CODE, Tensor, deepseek_v2, qwen3_moe, refusal
from chronos.interop.export import (
    Exported,
    Progress,
    behind,
    check_new,
    new_folder,
    plain_config,
)
from chronos.interop.gguf_tokenizer import tokenizer_fields

try:
    import gguf
except ImportError as error:
    raise MissingBackendError(
        "writing GGUF needs the package gguf",
        str(error).splitlines()[0],
        "pip install 'chronos-moe[gguf]'",
    ) from error

FILE = "model.gguf"
TYPES = ("f32", "f16", "bf16", "q8_0", "mxfp4")
Array = NDArray[np.float32]
_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_BLOCK = 32  # numbers of a row that Q8_0 and MXFP4 code together
_MXFP4 = "mxfp4"  # a type of ours, and how Chronos calls gpt-oss' encoding
_STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def _windowed(config: dict[str, Any]) -> str:
    window = config.get("sliding_window")
    wanted = config.get("use_sliding_window", True) and window is not None
    if wanted and window < config["max_position_embeddings"]:
        return f"its layers have a window of {window}, which llama.cpp does not apply here"
    return ""


def _qwen2(config: dict[str, Any]) -> str:
    if config.get("norm_topk_prob", False):
        return "norm_topk_prob is true, which llama.cpp's qwen2moe does not do"
    return _windowed({"use_sliding_window": False} | config)


def _qwen3(config: dict[str, Any]) -> str:
    if not config.get("norm_topk_prob", False):
        return "norm_topk_prob is false, which llama.cpp's qwen3moe does not do"
    if config.get("attention_bias"):
        return "attention_bias is true"
    return _windowed({"use_sliding_window": False} | config)


def _olmoe(config: dict[str, Any]) -> str:
    if config.get("norm_topk_prob", False):
        return "norm_topk_prob is true, which llama.cpp's olmoe does not do"
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        return "several heads share their keys"
    return "clip_qkv is set" if config.get("clip_qkv") is not None else ""


def _deepseek(config: dict[str, Any]) -> str:
    if (config.get("n_group") or 1) > 1:
        return f"n_group is {config['n_group']}: experts are chosen among groups"
    return "attention_bias is true" if config.get("attention_bias") else ""


# Why a config does not fit, "" where it does; by Transformers' type.
_REFUSALS: dict[str, Callable[[dict[str, Any]], str]] = {
    "mixtral": _windowed,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": lambda config: "",
}
_BY_TYPE = {
    model_type: (name, table)
    for name, table in ARCHITECTURES.items()
    for model_type in table.model_types
}


def export_gguf(
    src: StrPath, dst: StrPath, *, kind: str = "", progress: Progress | None = None
) -> Exported:
    """Write the model in `src`, packed or not, to model.gguf in the new folder `dst`.

    kind: one of TYPES for matrices, "" for the dtype they have; "mxfp4" codes the routed experts
    and leaves the rest. Norms, gates and biases are float32. Experts that are MXFP4 as gpt-oss is
    published keep their codes and scales. progress: called with bytes done and
    in all. Raises UsageError, ConfigError for what llama.cpp does not have, CorruptFileError,
    DiskFullError.
    """
    src, dst, io = Path(src), Path(dst), FileIO()
    model = open_source(src, io)
    check_new(dst)
    if kind not in ("", *TYPES):
        raise UsageError(f"{kind!r} is no type of a GGUF", "--type", f"use {', '.join(TYPES)}")
    coded = set(model.encodings.values()) == {_MXFP4}
    if coded and kind not in ("", _MXFP4):
        raise UsageError(
            f"experts in MXFP4 are written as such, not as {kind}",
            "--type",
            "leave it out; or chronos export --to hf --dequantize, and export that",
        )
    kind = kind or (_MXFP4 if coded else _STORED[model.config.dtype])
    with _misfits_named(src):
        return _written(src, dst, model, kind, progress, io)


@contextmanager
def _misfits_named(src: Path) -> Iterator[None]:
    """A config.json that lacks a number, or has one that the tensors do not fit, is a ConfigError:
    Chronos reads few of a guest's keys, and a GGUF needs many."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"config.json does not fit the model's tensors: {error!r:.120}",
            str(src / "config.json"),
            "compare it with the one that the checkpoint was published with",
        ) from error


def _written(
    src: Path, dst: Path, model: ModelSource, kind: str, progress: Progress | None, io: FileIO
) -> Exported:
    config, dense = _as_guest(src, model)
    arch, table = _architecture(src, model, config)
    dense = [made for tensor in dense for made in _renamed(src, tensor, table, config)]
    layout = _Layout(src, kind, _STORED[model.config.dtype])
    for tensor in dense:
        layout.add(tensor.name, tensor.shape)
    biased = _add_experts(layout, model, config)
    writer = gguf.GGUFWriter(None, arch)
    _parameters(writer, config, model, layout.kind)
    tokenizer_fields(writer, src, int(config["vocab_size"]))
    if is_packed(src):
        verify(src, io=io)
    with new_folder(dst) as folder:
        check_free_space(folder, layout.total, io)
        try:
            with _File(folder / FILE, writer, layout, progress) as file:
                for tensor, array in _arrays(model, dense, io):
                    file.put(tensor.name, 0, array)
                for layer, expert, parts in _experts(model, config, biased):
                    for stack, array in parts.items():
                        file.put(f"blk.{layer}.{stack}", expert, array)
        except OSError as error:
            raise write_error(folder / FILE, error, io, layout.total) from error
    return Exported(arch, layout.total, len(layout.items), behind(src))


def _as_guest(src: Path, model: ModelSource) -> tuple[dict[str, Any], list[Tensor]]:
    """A model as a checkpoint of Transformers': its config and the tensors of its dense part."""
    if isinstance(model.config, ModelConfig):
        own = plain_config(src, model)
        why, windows = refusal(own), own.attention_kind(0) == "sliding"
        if why:
            raise ConfigError(f"llama.cpp has no such architecture: {why}", str(src), WITH_CODE)
        made = qwen3_moe(own) if windows else deepseek_v2(own)
        return made.config, made.dense
    if model.dialect != TRANSFORMERS and set(model.encodings.values()) != {_MXFP4}:
        raise UsageError(
            f"experts encoded as {next(iter(model.encodings.values()))} are not written as GGUF",
            str(src),
            "chronos export --to hf --dequantize makes the plain checkpoint; export that",
        )
    raw = load_config(src)[0]
    same = [Tensor(entry.name, entry.shape, (entry.name,), lambda x: x) for _, entry in model.dense]
    return class_defaults(str(raw["model_type"])) | raw, same


def _architecture(
    src: Path, model: ModelSource, config: dict[str, Any]
) -> tuple[str, Architecture]:
    """What llama.cpp calls the model. Raises ConfigError where its arithmetic is another."""
    model_type = str(config["model_type"])
    if model_type not in _REFUSALS:
        why = f"only {', '.join(_REFUSALS)} and models of Chronos' own are"
    else:
        why = _REFUSALS[model_type](config) or _scaled(config, model_type)
        first = _leading(config)
        if not why and list(model.templates) != list(range(first, _layers(config))):
            why = "some layers between others have no experts"
        if not why:
            return _BY_TYPE[model_type]
    raise ConfigError(
        f"this {model_type} is not written as GGUF: {why}",
        str(src),
        WITH_CODE
        if isinstance(model.config, ModelConfig)
        else "chronos export --to hf writes its checkpoint, for llama.cpp's own converter",
    )


def _scaled(config: dict[str, Any], model_type: str) -> str:
    """Why positions are rotated otherwise than here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "yarn" and model_type == "gpt_oss"):
        return ""
    return f"its positions are scaled ({kind})"


def _layers(config: dict[str, Any]) -> int:
    return int(config["num_hidden_layers"])


def _leading(config: dict[str, Any]) -> int:
    """Layers at the start that have no experts."""
    return int(config.get("first_k_dense_replace") or 0)


def _renamed(
    src: Path, tensor: Tensor, table: Architecture, config: dict[str, Any]
) -> Iterator[Tensor]:
    """A tensor of the dense part as llama.cpp has it: one, or the two of keys' and values' rows."""
    if tensor.name == "lm_head.weight" and config.get("tie_word_embeddings"):
        return
    known = gguf_name(table, tensor.name)
    if known is None:
        raise ConfigError(f"llama.cpp has no tensor for {tensor.name} in such a model", str(src))
    H = int(config["num_attention_heads"])
    if table.permuted and known.endswith(("attn_q.weight", "attn_k.weight")):
        rows = H if "attn_q" in known else int(config["num_key_value_heads"])

        def interleaved(*sources: Array) -> Array:
            x_XD = tensor.make(*sources)
            return x_XD.reshape(rows, 2, -1, x_XD.shape[1]).swapaxes(1, 2).reshape(x_XD.shape)

        yield tensor._replace(name=known, make=interleaved)
    elif known.endswith(".attn_kv_b.weight"):
        d, v = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
        z = tensor.shape[1]

        def keys(*sources: Array) -> Array:
            return tensor.make(*sources).reshape(H, d + v, z)[:, :d].swapaxes(1, 2)

        def values(*sources: Array) -> Array:
            return tensor.make(*sources).reshape(H, d + v, z)[:, d:]

        at = known.removesuffix("attn_kv_b.weight")
        yield Tensor(f"{at}attn_k_b.weight", (H, z, d), tensor.sources, keys)
        yield Tensor(f"{at}attn_v_b.weight", (H, v, z), tensor.sources, values)
    else:
        yield tensor._replace(name=known)


@dataclass(frozen=True)
class _Item:
    """A tensor of the file, and where its bytes begin behind the header."""

    shape: tuple[int, ...]
    quant: gguf.GGMLQuantizationType
    offset: int

    @property
    def nbytes(self) -> int:
        per_block, size = gguf.GGML_QUANT_SIZES[self.quant]
        return math.prod(self.shape) // per_block * size


class _Layout:
    """What a file will hold, all of it known before the first byte is written. kind: one of TYPES;
    stored: the one that the model has."""

    def __init__(self, src: Path, kind: str, stored: str) -> None:
        self.src, self.kind, self.stored = src, kind, stored
        self.items: dict[str, _Item] = {}
        self.total = 0

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        item = _Item(shape, self._quant(name, shape), self.total)
        self.items[name] = item
        self.total += gguf.GGUFWriter.ggml_pad(item.nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)

    def _quant(self, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        kind, routed = self.kind, "_exps.weight" in name
        if len(shape) == 1 or ".ffn_gate_inp" in name or name.endswith(".bias"):
            kind = "f32"
        elif kind == "mxfp4" and not routed:
            kind = self.stored
        elif kind in ("q8_0", "mxfp4") and shape[-1] % _BLOCK:
            if routed:
                raise ConfigError(
                    f"{name} has rows of {shape[-1]} numbers, and {kind} blocks of {_BLOCK}",
                    str(self.src),
                    f"use --type {self.stored}",
                )
            kind = "f16"  # as llama.cpp's converter does
        return gguf.GGMLQuantizationType[kind.upper()]


def _add_experts(layout: _Layout, model: ModelSource, config: dict[str, Any]) -> bool:
    """Add the stacks of all layers' experts. Returns whether they have biases."""
    D, F, E = int(config["hidden_size"]), _width(model, config), model.config.num_experts
    biased = any(t.name.endswith("_bias") for at in model.templates.values() for t in at.tensors)
    for layer in model.templates:
        for stack, (rows, columns) in zip(_STACKS, ((F, D), (F, D), (D, F)), strict=True):
            layout.add(f"blk.{layer}.{stack}.weight", (E, rows, columns))
            if biased:
                layout.add(f"blk.{layer}.{stack}.bias", (E, rows))
    return biased


def _width(model: ModelSource, config: dict[str, Any]) -> int:
    """Numbers inside an expert, as its tensors have them."""
    first = next(iter(model.templates.values()))
    shapes = {tensor.name: tensor.shape for tensor in first.tensors}
    if (scales := shapes.get("down_proj_scales")) is not None:
        return scales[1] * _BLOCK
    shape = shapes["down_proj"]
    return shape[0] if config["model_type"] == "gpt_oss" else shape[1]


def _arrays(model: ModelSource, dense: list[Tensor], io: FileIO) -> Iterator[tuple[Tensor, Array]]:
    """The tensors of the dense part in float32."""
    located = {entry.name: (path, entry) for path, entry in model.dense}
    wanted = [located[name] for tensor in dense for name in tensor.sources]
    with closing(read_pieces(wanted, io)) as stream:
        for tensor in dense:
            sources = []
            for name in tensor.sources:
                entry = located[name][1]
                raw = b"".join(next_pieces(stream, entry.nbytes))
                sources.append(widened(raw, entry.dtype, entry.shape))
            yield tensor, tensor.make(*sources)


def _experts(
    model: ModelSource, config: dict[str, Any], biased: bool
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Layer, expert, and its matrices and biases by the ends of their names: in float32, or rows
    of bytes where they are coded already."""
    crossed = config["model_type"] == "gpt_oss"  # columns first, gate and up rows in turn

    def halves(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        half = len(x) // 2
        return (x[::2], x[1::2]) if crossed else (x[:half], x[half:])

    for keys in model.layers:
        tensors = model.templates[keys[0][0]].tensors
        with closing(model.experts(keys)) as stream:
            for (layer, expert), data in stream:
                found: dict[str, NDArray[Any]] = {}
                for t in tensors:
                    raw = data[t.name]
                    raw = raw if isinstance(raw, memoryview) else b"".join(raw)
                    if t.dtype == "U8":
                        found[t.name] = np.frombuffer(raw, np.uint8).reshape(t.shape)
                        continue
                    array = widened(raw, t.dtype, t.shape)
                    found[t.name] = array.T if crossed and array.ndim == 2 else array
                for name in ("gate_up_proj", "down_proj"):
                    if name not in found:
                        found[name] = _blocks(found[f"{name}_blocks"], found[f"{name}_scales"])
                parts = {
                    f"{stack}.weight": array
                    for stack, array in zip(
                        _STACKS, (*halves(found["gate_up_proj"]), found["down_proj"]), strict=True
                    )
                }
                if biased:
                    three = (*halves(found["gate_up_proj_bias"]), found["down_proj_bias"])
                    parts |= {
                        f"{stack}.bias": array for stack, array in zip(_STACKS, three, strict=True)
                    }
                yield layer, expert, parts


def _blocks(codes_NGb: NDArray[np.uint8], scales_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """MXFP4 as gpt-oss is published as rows of GGUF's blocks [N, G * 17]: a scale, then codes. A
    byte of the one holds two neighbours, of the other those 16 apart."""
    one = np.stack([codes_NGb & 15, codes_NGb >> 4], -1).reshape(*scales_NG.shape, _BLOCK)
    both = one[..., : _BLOCK // 2] | one[..., _BLOCK // 2 :] << 4
    return np.concatenate([scales_NG[..., None], both], -1).reshape(len(scales_NG), -1)


def _parameters(
    writer: gguf.GGUFWriter, config: dict[str, Any], model: ModelSource, kind: str
) -> None:
    """The header's fields of the geometry, as llama.cpp reads them."""
    H, heads = int(config["num_attention_heads"]), config.get("num_key_value_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_block_count(_layers(config))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_head_count(H)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 1e4)))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_expert_count(model.config.num_experts)
    writer.add_expert_used_count(model.config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(_width(model, config))
    if wide := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(wide))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(int(config["sliding_window"]))
    if "kv_lora_rank" in config:
        _latent_parameters(writer, config)
        return
    width = int(config.get("head_dim") or int(config["hidden_size"]) // H)
    writer.add_head_count_kv(int(heads or H))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)


def _latent_parameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Latent attention is attention of one key, as wide as the latent and the rotated part."""
    z, r = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(z)
    # 0: queries have no latent. llama.cpp wants the field, but of models of 26 or 27 layers.
    writer.add_q_lora_rank(int(config.get("q_lora_rank") or 0))
    writer.add_key_length(z + r)
    writer.add_value_length(z)
    writer.add_key_length_mla(int(config["qk_nope_head_dim"]) + r)
    writer.add_value_length_mla(int(config["v_head_dim"]))
    writer.add_rope_dimension_count(r)
    writer.add_leading_dense_block_count(_leading(config))
    writer.add_expert_shared_count(int(config.get("n_shared_experts") or 0))
    writer.add_expert_weights_scale(float(config.get("routed_scaling_factor") or 1.0))
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob")))
    sigmoid = config["model_type"] == "deepseek_v3"
    functions = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(functions.SIGMOID if sigmoid else functions.SOFTMAX)


_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}


class _File:
    """A file that is being written: its header by the package `gguf`, then tensors in any order."""

    def __init__(
        self, path: Path, writer: gguf.GGUFWriter, layout: _Layout, progress: Progress | None
    ) -> None:
        self.layout, self.progress, self.done = layout, progress, 0
        for name, item in layout.items.items():
            like = np.dtype(np.float32)
            writer.add_tensor_info(name, item.shape, like, item.nbytes, raw_dtype=item.quant)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        self.writer, self.out = writer, writer.fout[0]
        self.start = writer.ggml_pad(self.out.tell(), writer.data_alignment)

    def __enter__(self) -> _File:
        return self

    def put(self, name: str, part: int, array: NDArray[Any]) -> None:
        """Write the numbers of a tensor, or of one expert of a stack; bytes are coded numbers."""
        item = self.layout.items[name]
        coded, shape = array.dtype == np.uint8, array.shape
        if coded:
            shape = gguf.quant_shape_from_byte_shape(shape, item.quant)
        if shape not in (item.shape, item.shape[1:]):
            raise ShapeMismatch(f"{name} is {list(shape)}, the config implies {item.shape}")
        if not coded:
            array = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), item.quant)
        raw = array.tobytes()
        self.out.seek(self.start + item.offset + part * len(raw))
        self.out.write(raw)
        self.done += len(raw)
        if self.progress:
            self.progress(min(self.done, self.layout.total), self.layout.total)

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.out.truncate(self.start + self.layout.total)
                self.out.flush()
                os.fsync(self.out.fileno())
        finally:
            self.writer.close()
