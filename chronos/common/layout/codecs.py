"""How the bytes of a routed expert are coded: the name a manifest gives it, and the tensors it has.

An encoding is a name: words joined by hyphens, of which those behind the first are its settings
("mlx-affine4"). Here is the half of a codec that needs no framework: which tensors `pack` writes
and folders are compared with. The half that computes is `codecs.py` of each backend, found by the
same name. Not known here: where tensors lie in a record (`ctsr`), what checkpoints call them
(`naming`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chronos.common.errors import ConfigError, ShapeMismatch, UsageError
from chronos.common.layout.affine import GROUPS, quantise
from chronos.common.layout.naming import layer_of
from chronos.common.layout.quantised import bits_of, coding_of_experts, is_coded, split
from chronos.common.model.config import MODEL_TYPE, ModelConfig
from chronos.common.model.guest import Geometry
from chronos.common.model.weights import EXPERT_TENSORS, TensorSpec, expert_tensors

SWIGLU, TRANSFORMERS, MLX, GGUF = "swiglu", "transformers", "mlx", "gguf"
MXFP4 = "mxfp4"  # gpt-oss'
# What other libraries quantise, each in a layout of its own: see `quantised`.
QUANTISED = (
    r"mxfp4|fp4|fp8-\d{1,5}x\d{1,5}|compressed-(int4|int8|fp8|mxfp4|mxfp8|nvfp4)"
    r"|gptq2?-int[48]|awq-int4"
)


class Codec(Protocol):
    """What an encoding is without a framework."""

    name: str

    def tensors(self, config: Geometry) -> list[TensorSpec]:
        """One expert's tensors in record order; none where the config does not imply them: those
        of a layer are then compared with each other. Raises ShapeMismatch for a config of models
        that cannot have such experts."""


class Encoder(Codec, Protocol):
    """A codec whose records Chronos makes itself."""

    source: str  # the encoding it makes them of

    def tensors_from(self, plain: Sequence[TensorSpec]) -> list[TensorSpec]:
        """The tensors of a record made of one with these. Raises UsageError where none can be."""

    def encode(self, weights: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[Any]]:
        """The tensors of a record, from those of `source`."""


class Swiglu:
    """The experts of Chronos' own models as they are trained: gate_up_proj and down_proj."""

    def __init__(self, name: str = SWIGLU) -> None:
        self.name = name

    def tensors(self, config: Geometry) -> list[TensorSpec]:
        if not isinstance(config, ModelConfig):
            raise ShapeMismatch(f"the experts are {self.name}, the model is another library's")
        return expert_tensors(config)


class AsStored:
    """The experts of another library's model, with the names, shapes and dtypes of its modules."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tensors(self, config: Geometry) -> list[TensorSpec]:
        if isinstance(config, ModelConfig):
            raise ShapeMismatch(f"the experts are {self.name}, the model is Chronos' own")
        return []


class Affine:
    """Experts that Chronos quantised (`affine`): "swiglu-affine4-g32" of its own models,
    "transformers-affine4-g32" of others, 4 bits in groups of 32 columns.

    Each matrix is [N, K] (rows out) and has the kinds weight U32, scales and biases BF16. What is
    added behind the products, "bias", is F32."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source, bits, group = name.split("-")
        self.bits, self.group = bits_of(bits), bits_of(group)

    def tensors(self, config: Geometry) -> list[TensorSpec]:
        plain = codec_of(self.source).tensors(config)
        return self.tensors_from(plain) if plain else []

    def tensors_from(self, plain: Sequence[TensorSpec]) -> list[TensorSpec]:
        matrices = {spec.name: spec.shape for spec in plain if len(spec.shape) > 1}
        swapped = _is_swapped(matrices, self.name)
        made = []
        for spec in plain:
            if len(spec.shape) == 1:
                made.append(TensorSpec(_bias(spec.name), spec.shape, "float32"))
                continue
            rows, columns = spec.shape[::-1] if swapped else spec.shape
            if columns % self.group:
                raise UsageError(
                    f"{spec.name} of an expert has {columns} columns, no multiple of the group of"
                    f" {self.group}",
                    "--group-size",
                    f"use one of {', '.join(map(str, GROUPS))} that divides it, where there is one",
                )
            grouped = rows, columns // self.group
            made += [
                TensorSpec(f"{spec.name}.weight", (rows, columns * self.bits // 32), "U32"),
                TensorSpec(f"{spec.name}.scales", grouped, "bfloat16"),
                TensorSpec(f"{spec.name}.biases", grouped, "bfloat16"),
            ]
        return made

    def encode(self, weights: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[Any]]:
        matrices = {name: weight.shape for name, weight in weights.items() if weight.ndim > 1}
        swapped = _is_swapped(matrices, self.name)
        made: dict[str, NDArray[Any]] = {}
        for name, weight in weights.items():
            if weight.ndim == 1:
                made[_bias(name)] = weight
                continue
            kinds = quantise(weight.T if swapped else weight, self.bits, self.group)
            made |= {f"{name}.{kind}": array for kind, array in kinds.items()}
        return made


def _bias(name: str) -> str:
    return f"{name.removesuffix('_bias')}.bias"


def _is_swapped(shapes: Mapping[str, tuple[int, ...]], encoding: str) -> bool:
    """Whether matrices lie [in, out]. Raises UsageError for experts without a gate: their two
    matrices do not tell."""
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        raise UsageError(
            f"experts of {', '.join(shapes)} are not converted to {encoding}",
            "",
            "Chronos quantises experts with a gate; MLX-LM others: python -m mlx_lm convert -q",
        )
    (rows, columns), down = shapes["gate_up_proj"], shapes["down_proj"]
    return (columns, rows // 2) != down and (columns // 2, rows) == down


# By the pattern of their names. MLX-LM quantises projection by projection: one word for all of
# them, or one for each.
CODECS: dict[str, Callable[[str], Codec]] = {
    SWIGLU: Swiglu,
    TRANSFORMERS: AsStored,
    rf"{MLX}(-[a-z]+\d+)*": AsStored,
    QUANTISED: AsStored,
    GGUF: AsStored,
}
ENCODERS: dict[str, Callable[[str], Encoder]] = {
    rf"({SWIGLU}|{TRANSFORMERS})-affine[48]-g({'|'.join(map(str, GROUPS))})": Affine,
}


def codec_of(encoding: str) -> Codec:
    """The codec of that name. Raises ConfigError for one that is not known."""
    for pattern, make in (CODECS | ENCODERS).items():
        if re.fullmatch(pattern, encoding):
            return make(encoding)
    raise ConfigError(
        f"the experts are encoded as {encoding[:80]!r}, which this version does not know",
        "",
        "upgrade Chronos, or pack the model again from its source",
    )


def encoder_of(encoding: str) -> Encoder:
    """The codec that makes such records. Raises ConfigError."""
    for pattern, make in ENCODERS.items():
        if re.fullmatch(pattern, encoding):
            return make(encoding)
    raise ConfigError(
        f"experts cannot be converted to {encoding[:80]!r}",
        "",
        "leave the encoding out to keep their bytes as they are",
    )


class Stored(Protocol):
    """A tensor of a record."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...


def encoding_of(
    config: Mapping[str, Any], layer: int, tensors: Sequence[Stored], coding: str = ""
) -> str:
    """The encoding of a layer's records where nothing but the source's config.json says it: in a
    checkpoint, and in a packed folder of version 2. config: {} where there is none. coding: of what
    is quantised otherwise than by MLX-LM (`GuestConfig.coding`)."""
    names = [tensor.name for tensor in tensors]
    if coding and any(is_coded([split(name).kind]) for name in names):
        return coding_of_experts(coding, [tensor.dtype for tensor in tensors])
    if any("." in name for name in names):
        return _mlx(config.get("quantization") or {}, layer, tensors)
    native = config.get("model_type", MODEL_TYPE) == MODEL_TYPE
    return SWIGLU if native and tuple(names) == EXPERT_TENSORS else TRANSFORMERS


def encodings_of(encoding: str, matrices: Iterable[str]) -> dict[str, str]:
    """The encoding of each matrix of a record: MLX-LM's records have a word for each where they
    differ."""
    name, *words = encoding.split("-")
    if name != MLX:
        return dict.fromkeys(matrices, encoding)
    matrices = list(matrices)
    each = words * len(matrices) if len(words) == 1 else words
    return {matrix: f"{MLX}-{word}" for matrix, word in zip(matrices, each, strict=False)}


def dense_encoding(config: Mapping[str, Any], matrix: str, coding: str) -> str:
    """The encoding of a quantised matrix of the dense part. config: the source's config.json;
    coding: as `encoding_of` takes it."""
    if coding:
        return coding
    settings = config.get("quantization") or {}
    own = settings.get(matrix)
    return f"{MLX}-{mlx_word(settings | own if isinstance(own, dict) else settings)}"


def mlx_word(settings: Mapping[str, Any]) -> str:
    """Mode and bits of a matrix, of MLX-LM's settings for it: "affine4"."""
    mode, bits = str(settings.get("mode", "affine")), settings.get("bits", 4)
    return mode if mode[-1:].isdigit() else f"{mode}{bits}"


def _mlx(settings: Mapping[str, Any], layer: int, tensors: Sequence[Stored]) -> str:
    """MLX-LM's settings are those of all projections, and of single ones under their paths."""
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    if not any(name.endswith(".scales") for name in dtypes):
        return MLX
    words = []
    for name in [n.removesuffix(".weight") for n in dtypes if n.endswith(".weight")]:
        own = dict(settings)
        for path, value in settings.items():
            place = layer_of(path)
            if isinstance(value, dict) and place and place[1] == layer and path.endswith(name):
                own |= value
        coded = f"{name}.scales" in dtypes
        words.append(mlx_word(own) if coded else dtypes[f"{name}.weight"].lower())
    return "-".join([MLX, *(words if len(set(words)) > 1 else words[:1])])
