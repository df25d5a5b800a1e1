"""Model folders of other libraries: `chronos export`.

A native model is written as an architecture that a library has (`architectures`), or as it is with
a modelling file of its own (`modeling_chronos`); a packed guest as the checkpoint it was packed
from. What foresees experts stays behind. A folder is filled beside its place and renamed, so it is
there whole or not at all. Needs no framework; GGUF files have a file of their own (`gguf`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.backends.libraries import who_runs
from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.disk.header import build_header, tensor_nbytes
from chronos.common.disk.io import FileIO, StrPath, check_free_space
from chronos.common.disk.tensors import next_pieces, read_pieces
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import is_packed, unpack, verify
from chronos.common.layout.codecs import MLX, SWIGLU
from chronos.common.layout.finite import first_nonfinite
from chronos.common.layout.pack import copy_side_files, side_files
from chronos.common.layout.source import ModelSource, narrowed, open_source, widened
from chronos.common.layout.unpack import INDEX, Dequantise
from chronos.common.model.config import ModelConfig, load_config
from chronos.common.model.guest import GuestConfig, mlx_lm_keys
from chronos.common.model.weights import SAFETENSORS_DTYPE, Key
from chronos.common.text.tokenizer import Tokenizer
from chronos.interop.architectures import (
    WITH_CODE,
    Architecture,
    architecture,
    as_it_is,
    mistral4,
    refusal,
)

CODE = "modeling_chronos.py"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
PREDICTORS = ("lookahead.safetensors", "forecast.safetensors")
_BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
Progress = Callable[[int, int], None]
Array = NDArray[Any]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the architecture's name, bytes and tensors of weights, and what whoever
    uses it should know."""

    architecture: str
    bytes: int
    tensors: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    src: StrPath,
    dst: StrPath,
    *,
    to: str = "hf",
    dtype: str = "",
    with_code: bool = False,
    dequantise: Dequantise | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model in `src`, packed or not, into the new folder `dst`.

    to: for whom, "hf" (Transformers) or "mlx" (MLX-LM). dtype: "float32", "float16" or "bfloat16",
    for all weights of a native model; else they stay as stored. with_code: write a modelling file
    for Transformers beside a native model. dequantise: make plain matrices of a guest's quantised
    ones. progress: called with bytes done and in all. Raises UsageError, ConfigError for a model
    that no architecture fits, CorruptFileError, DiskFullError.
    """
    src, dst, io = Path(src), Path(dst), FileIO()
    model = open_source(src, io)
    check_new(dst)
    if not isinstance(model.config, ModelConfig):
        if dtype or with_code:
            raise UsageError(
                f"{'--type' if dtype else '--with-code'} is for Chronos' own models, this one is a"
                f" {model.config.model_type}",
                str(src),
                "leave it out: the checkpoint comes back as it was packed",
            )
        kind = model.config.model_type
        _check_guest(src, model, to, dequantise is not None)
        nbytes, tensors = _guest(src, dst, to, dequantise, progress, io)
        return Exported(kind, nbytes, tensors, behind(src))
    config = plain_config(src, model)
    if dequantise:
        raise UsageError("the model is not quantised", str(src), "leave out --dequantize")
    if "lookahead" in config.routing_sources:
        raise ConfigError(
            "a LookaheadRouter chooses this model's experts, and predictors are not exported",
            str(src),
            "run it with Chronos",
        )
    made = as_it_is(config) if with_code else _architecture(src, config, to)
    stored = SAFETENSORS_DTYPE[dtype or config.dtype]
    with new_folder(dst) as folder:
        nbytes, tensors = write_weights(folder, src, model, made, stored, progress, io)
        write_side_files(folder, src, model, io)
        own = made.config | ({"dtype": dtype, "torch_dtype": dtype} if dtype else {})
        write_json(folder / "config.json", own | token_ids(src), io)
        if with_code:
            _copy_code(folder, io)
    notes = [*behind(src)]
    if (to, made.name) == ("hf", "mistral4"):
        notes.append("AutoModelForCausalLM has no Mistral 4: load it with Mistral4ForCausalLM")
    if with_code:
        notes.append("load it with trust_remote_code=True, which runs the modelling file")
    return Exported(made.name, nbytes, tensors, tuple(notes))


def _architecture(src: Path, config: ModelConfig, to: str) -> Architecture:
    """The one that the library has. Raises ConfigError, naming what does not fit."""
    library, why = ("Transformers" if to == "hf" else "MLX-LM"), refusal(config)
    windows = config.attention_kind(0) == "sliding"
    if (
        not why
        and to == "mlx"
        and windows
        and config.sliding_window < config.max_position_embeddings
    ):
        why = f"its layers have a window of {config.sliding_window}"
    if why:
        raise ConfigError(f"{library} has no such architecture: {why}", str(src), WITH_CODE)
    # MLX-LM's DeepSeek-V2 wants scaled positions; its Mistral 4 takes both kinds of weights.
    return mistral4(config) if to == "mlx" and not windows else architecture(config)


def check_new(dst: Path) -> None:
    """UsageError unless `dst` is free to be written."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UsageError("the destination is not empty", str(dst), "name a new or an empty folder")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `dst` at the end; an error or Ctrl-C leaves nothing."""
    dst = dst.resolve()
    filled = dst.with_name(f".{dst.name}.chronos-new")
    shutil.rmtree(filled, ignore_errors=True)  # of a process that was killed
    make_folder(filled)
    try:
        yield filled
        filled.replace(dst)
    except BaseException:
        shutil.rmtree(filled, ignore_errors=True)
        raise
    FileIO().sync_folder(dst.parent)


def plain_config(src: Path, model: ModelSource) -> ModelConfig:
    """The config of a native model whose experts are as they were trained. Raises UsageError for
    others, ConfigError for a context that was lengthened."""
    assert isinstance(model.config, ModelConfig)
    if odd := set(model.encodings.values()) - {SWIGLU}:
        raise UsageError(
            f"the experts are encoded as {min(odd)}, which other libraries do not read",
            str(src),
            "export the folder that the model was packed from",
        )
    if model.config.rope_scaling is not None:
        raise ConfigError(
            "the model's context was lengthened (YaRN), and what scales it is not exported",
            str(src),
            "run it with Chronos, or with Transformers once chronos.interop.transformers is"
            " imported",
        )
    return model.config


def behind(src: Path) -> tuple[str, ...]:
    """What is said of predictors that are there."""
    left = [name for name in PREDICTORS if (src / name).exists()]
    return (f"{' and '.join(left)} stay behind: no other library reads them",) if left else ()


def write_weights(
    folder: Path,
    src: Path,
    model: ModelSource,
    made: Architecture,
    dtype: str,
    progress: Progress | None,
    io: FileIO,
) -> tuple[int, int]:
    """A shard of the dense part, one of each layer's experts, and their index. dtype: safetensors'
    name. Returns bytes and tensors."""
    config = model.config
    assert isinstance(config, ModelConfig)
    if is_packed(src):
        verify(src, io=io)
    shards: list[tuple[list[tuple[str, tuple[int, ...]]], Iterator[Array]]] = [
        ([(tensor.name, tensor.shape) for tensor in made.dense], _dense(model, made, io))
    ]
    for keys in model.layers:
        names = made.routed(config, keys[0][0])
        shards.append((names, made.spelled(_records(model, keys))))
    sizes = [sum(tensor_nbytes(dtype, shape) for _, shape in names) for names, _ in shards]
    check_free_space(folder, sum(sizes), io)
    where: dict[str, str] = {}
    stored = SAFETENSORS_DTYPE[config.dtype]
    for number, (names, arrays) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = build_header(((name, dtype, shape) for name, shape in names), {"format": "pt"})
        made_of = _checked(names, arrays, stored, dtype)
        atomic_write(folder / file, _after(header, made_of), io, nbytes=sizes[number - 1])
        where |= {name: file for name, _ in names}
        if progress:
            progress(sum(sizes[:number]), sum(sizes))
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where}, io)
    return sum(sizes), len(where)


def _after(header: bytes, data: Iterator[Any]) -> Iterator[Any]:
    yield header
    yield from data


def _checked(
    names: list[tuple[str, tuple[int, ...]]], arrays: Iterator[Array], stored: str, dtype: str
) -> Iterator[Any]:
    """The bytes of tensors, in another dtype where that is asked for."""
    for (name, shape), array in zip(names, arrays, strict=True):
        if array.shape != shape:
            raise AssertionError(f"{name} was made as {array.shape}, not {shape}")
        data = np.ascontiguousarray(array).data.cast("B")
        if dtype != stored:
            data = memoryview(narrowed(widened(data, stored, shape), dtype)).cast("B")
            if first_nonfinite(data, dtype) is not None:
                raise UsageError(
                    f"{name} has numbers that {dtype} does not hold", "--type", "use bf16 or f32"
                )
        yield data


def _dense(model: ModelSource, made: Architecture, io: FileIO) -> Iterator[Array]:
    located = {entry.name: (path, entry) for path, entry in model.dense}
    wanted = [located[name] for tensor in made.dense for name in tensor.sources]
    with closing(read_pieces(wanted, io)) as stream:
        for tensor in made.dense:
            parts = []
            for name in tensor.sources:
                entry = located[name][1]
                raw = b"".join(next_pieces(stream, entry.nbytes))
                parts.append(np.frombuffer(raw, _BITS[entry.dtype]).reshape(entry.shape))
            yield tensor.make(*parts)


def _records(model: ModelSource, keys: list[Key]) -> Iterator[tuple[Array, Array]]:
    """gate_up_proj and down_proj of experts of a layer."""
    tensors = {tensor.name: tensor for tensor in model.templates[keys[0][0]].tensors}
    with closing(model.experts(keys)) as stream:
        for _, data in stream:
            found = {}
            for name, tensor in tensors.items():
                raw = data[name] if isinstance(data[name], memoryview) else b"".join(data[name])
                found[name] = np.frombuffer(raw, _BITS[tensor.dtype]).reshape(tensor.shape)
            yield found["gate_up_proj"], found["down_proj"]


def write_side_files(folder: Path, src: Path, model: ModelSource, io: FileIO) -> None:
    """Tokenizer, template, licenses; a generation config where there is none but a tokenizer."""
    left = {*PREDICTORS, "config.json"}
    files = [path for path in side_files(src) if path.name not in left]
    copy_side_files(files, folder, model.config, io)
    ids = token_ids(src)
    if ids and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", ids, io)


def token_ids(src: Path) -> dict[str, Any]:
    """What ends a reply and what fills rows, as config.json names them; {} without a tokenizer."""
    if not (src / "tokenizer.json").exists():
        return {}
    tokenizer = Tokenizer.load(src)
    ends = sorted(tokenizer.stop_ids)
    return {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}


def write_json(path: Path, data: Any, io: FileIO) -> None:
    raw = (json.dumps(data, indent=2) + "\n").encode()
    atomic_write(path, [raw], io, nbytes=len(raw))


def _copy_code(folder: Path, io: FileIO) -> None:
    raw = Path(__file__).with_name(CODE).read_bytes()
    atomic_write(folder / CODE, [raw], io, nbytes=len(raw))


def _check_guest(src: Path, model: ModelSource, to: str, plain: bool) -> None:
    """Raises UsageError or ConfigError for a guest that the library would not read.

    plain: whether its quantised matrices are made plain.
    """
    assert isinstance(model.config, GuestConfig)
    kind = model.config.model_type
    if to == "hf":
        if model.dialect == "mlx" and not plain:
            raise UsageError(
                "the model is MLX-LM's, whose names Transformers does not know",
                str(src),
                "--to mlx writes it for MLX-LM; for Transformers pack the original",
            )
        return
    verdict = who_runs(kind, MLX)[0]
    released = model.dialect == "quantised" and not plain
    if not verdict.may_run:
        raise ConfigError(f"MLX-LM does not run it: {verdict.text}", str(src), "--to hf writes it")
    if kind == "gpt_oss" and not released:  # its `sanitize` loses experts that are not MXFP4
        raise ConfigError(
            "MLX-LM reads gpt-oss in the MXFP4 it was released in alone",
            str(src),
            "pack the checkpoint as it was released, and export that without --dequantize",
        )
    if released and kind != "gpt_oss":
        raise UsageError(
            f"MLX-LM is not known to read a {kind} quantised by {model.config.quantization}",
            str(src),
            "--dequantize makes the plain checkpoint, which mlx_lm.convert -q quantises its way",
        )


def _guest(
    src: Path,
    dst: Path,
    to: str,
    dequantise: Dequantise | None,
    progress: Progress | None,
    io: FileIO,
) -> tuple[int, int]:
    """The checkpoint it was packed from, as `unpack` writes it, without predictors."""
    with new_folder(dst) as folder:
        report = unpack(src, folder, dequantise=dequantise, progress=progress, io=io)
        for name in PREDICTORS:
            (folder / name).unlink(missing_ok=True)
        if to == "mlx":
            config = load_config(folder)[0]
            write_json(folder / "config.json", config | mlx_lm_keys(config), io)
    return report.bytes, report.tensors
