"""What the MLX backend makes of a routed expert's bytes: views of its tensors, and its output.

One codec an encoding (`chronos.common.layout.codecs` has the other half). `view` says what an
expert is where its record lies, without a copy; of many records in a row the same views are stacks
[S, ...]. `forward` computes with one expert, `gathered` with a stack, each row by the expert at its
place. Weights of fewer bits are widened or dequantised there and nowhere else. Nothing above knows
what tensors an expert has.

Shape legend: T tokens, D hidden, F expert hidden, S places of a stack, N routed pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.layout.codecs import MLX, MXFP4, SWIGLU, TRANSFORMERS
from chronos.common.layout.quantised import split

if TYPE_CHECKING:
    from collections.abc import Buffer

    from chronos.common.layout import Record

# safetensors' names of the dtypes a record may hold here; bits where MLX has no such dtype.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F8_E4M3": mx.uint8,
    "F8_E5M2": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
}
_KINDS = ("weight", "scales", "biases", "bias")
Tensors = Mapping[str, mx.array]
# (matrix, its input) to what is added to the product; see `lora`.
Adapter = Callable[[str, mx.array], mx.array] | None


class Raw(NamedTuple):
    """The bytes of a record, or of records in a row: an array of uint8 and where in it they begin;
    slots: their number and the bytes from one to the next, for a stack."""

    pages: mx.array
    start: int
    slots: tuple[int, int] | None = None


def memory(array: mx.array) -> memoryview:
    """Where an evaluated array lies, as bytes that may be written: its values change with them."""
    # MLX's stub leaves out that arrays export their buffer.
    return memoryview(cast("Buffer", array)).cast("B")


class Codec(Protocol):
    """How one encoding is computed. It holds no state: a layer hands in its own."""

    adapts: bool  # whether adapters are taken
    stacked: bool  # whether layers ask for stacks alone, and views of single experts are not made

    def view(self, raw: Raw, record: Record) -> Any:
        """The expert, or the stack of experts, in bytes that will be those of `record`s. The bytes
        are not there yet."""

    def forward(self, x_TD: mx.array, expert: Any, block: Any, adapter: Adapter = None) -> mx.array:
        """The expert's output for its rows. block: the layer's module, or its `Switch`, for what
        all its experts share (activation, scales). adapter: what it adds to its products."""

    def gathered(
        self, x_ND: mx.array, stack: Any, places_N: mx.array, block: Any, sort: bool
    ) -> mx.array:
        """The same, [N, D], for row n by the expert at place n. sort: places are in order."""


class Expert(NamedTuple):
    """One expert's weights: gate_up [2F, D] (gate rows first) and down [D, F]; or a stack of them,
    [S, 2F, D] and [S, D, F]."""

    gate_up_FD: mx.array
    down_DF: mx.array


class Swiglu:
    """The experts of Chronos' own models, as they are trained."""

    adapts, stacked = True, False

    def view(self, raw: Raw, record: Record) -> Expert:
        return Expert(*tensors_of(raw, record).values())

    def forward(
        self, x_TD: mx.array, expert: Expert, block: Any = None, adapter: Adapter = None
    ) -> mx.array:
        """SwiGLU (2002.05202): down(silu(gate x) * up x), weights widened to the dtype of x."""
        gate_up_TF = x_TD @ expert.gate_up_FD.astype(x_TD.dtype).T
        h_TF = swiglu(_adapted(gate_up_TF, adapter, "gate_up_proj", x_TD))
        return _adapted(h_TF @ expert.down_DF.astype(x_TD.dtype).T, adapter, "down_proj", h_TF)

    def gathered(
        self, x_ND: mx.array, stack: Expert, places_N: mx.array, block: Any, sort: bool
    ) -> mx.array:
        def product(x_N1A: mx.array, weight_SBA: mx.array) -> mx.array:
            weight_SAB = weight_SBA.swapaxes(-1, -2)
            if weight_SBA.dtype == x_N1A.dtype:
                return mx.gather_mm(x_N1A, weight_SAB, rhs_indices=places_N, sorted_indices=sort)
            return x_N1A @ weight_SBA[places_N].astype(x_N1A.dtype).swapaxes(-1, -2)

        h_N1F = swiglu(product(x_ND[:, None], stack.gate_up_FD))
        return product(h_N1F, stack.down_DF)[:, 0]


class AffineExpert(NamedTuple):
    """The same in groups of columns: codes, scales and biases of either matrix."""

    gate_up: mx.array
    gate_up_scales: mx.array
    gate_up_biases: mx.array
    down: mx.array
    down_scales: mx.array
    down_biases: mx.array


class Affine:
    """The same experts as Chronos quantises them: MLX's own quantised products."""

    adapts, stacked = True, False

    def view(self, raw: Raw, record: Record) -> AffineExpert:
        return AffineExpert(*tensors_of(raw, record).values())

    def forward(
        self, x_TD: mx.array, expert: AffineExpert, block: Any = None, adapter: Adapter = None
    ) -> mx.array:
        def product(x_TA: mx.array, weight: mx.array, scales: mx.array, biases: mx.array) -> Any:
            scales, biases = scales.astype(x_TA.dtype), biases.astype(x_TA.dtype)
            settings = _settings(x_TA, weight, scales)
            return mx.quantized_matmul(x_TA, weight, scales, biases, **settings)

        gate_up_TF = product(x_TD, *expert[:3])
        h_TF = swiglu(_adapted(gate_up_TF, adapter, "gate_up_proj", x_TD))
        return _adapted(product(h_TF, *expert[3:]), adapter, "down_proj", h_TF)

    def gathered(
        self, x_ND: mx.array, stack: AffineExpert, places_N: mx.array, block: Any, sort: bool
    ) -> mx.array:
        def product(x_N1A: mx.array, *tensors: mx.array) -> mx.array:
            settings = _settings(x_N1A, *tensors[:2])
            kinds = dict(zip(_KINDS, tensors, strict=False))
            return _product(x_N1A, kinds, places_N, sort, settings)

        h_N1F = swiglu(product(x_ND[:, None], *stack[:3]))
        return product(h_N1F, *stack[3:])[:, 0]


def _settings(x: mx.array, weight: mx.array, scales: mx.array) -> dict[str, Any]:
    """Group and bits of a quantised matrix, or a stack of them, by what it is multiplied with."""
    columns = x.shape[-1]
    bits = 32 * weight.shape[-1] // columns
    return {"group_size": columns // scales.shape[-1], "bits": bits, "mode": "affine"}


@dataclass(frozen=True)
class Switch:
    """What a `SwitchGLU` or `SwitchMLP` of MLX-LM adds to the tensors of its experts.

    quantised: the settings of each quantised projection. rows: how gate and up share a matrix in
    records of Transformers' modules: "halves", "interleaved", or "" where there is no gate;
    swapped: matrices lie [in, out] there.
    """

    activation: Callable[..., mx.array]
    gated: bool
    quantised: Mapping[str, Mapping[str, Any]]
    rows: str = ""
    swapped: bool = False


class MlxLm:
    """Experts as MLX-LM's own switches hold them, quantised or not: the products are MLX-LM's own,
    gathers over a stack by index, so each row has the bits it has there."""

    adapts, stacked = True, True

    def view(self, raw: Raw, record: Record) -> Tensors:
        return tensors_of(raw, record)

    def forward(
        self, x_TD: mx.array, expert: Tensors, block: Switch, adapter: Adapter = None
    ) -> mx.array:
        stack = {name: array[None] for name, array in expert.items()}
        return self.gathered(x_TD, stack, mx.zeros(len(x_TD), mx.uint32), block, True, adapter)

    def gathered(
        self,
        x_ND: mx.array,
        stack: Tensors,
        places_N: mx.array,
        block: Switch,
        sort: bool,
        adapter: Adapter = None,
    ) -> mx.array:
        """adapter: of the one expert that all places hold."""
        tensors = self._named(stack, block)

        def linear(name: str, x_N1A: mx.array) -> mx.array:
            kinds = {kind: t for kind in _KINDS if (t := tensors.get(f"{name}.{kind}")) is not None}
            like = "gate_proj" if name == "gate_up_proj" else name
            return _product(x_N1A, kinds, places_N, sort, block.quantised.get(like))

        x_N1D = x_ND[:, None]
        if not block.gated:
            up_N1F = _adapted(linear("fc1", x_N1D), adapter, "up_proj", x_N1D)
            h_N1F = block.activation(up_N1F)
            return _adapted(linear("fc2", h_N1F), adapter, "down_proj", h_N1F)[:, 0]
        if "gate_up_proj.weight" in tensors:
            both_N1F = _adapted(linear("gate_up_proj", x_N1D), adapter, "gate_up_proj", x_N1D)
            gate_N1F, up_N1F = both_N1F[..., ::2], both_N1F[..., 1::2]
        else:
            up_N1F, gate_N1F = linear("up_proj", x_N1D), linear("gate_proj", x_N1D)
            if adapter is not None:
                more_gate, more_up = mx.split(adapter("gate_up_proj", x_N1D), 2, axis=-1)
                gate_N1F = gate_N1F + more_gate.astype(gate_N1F.dtype)
                up_N1F = up_N1F + more_up.astype(up_N1F.dtype)
        h_N1F = block.activation(up_N1F, gate_N1F)
        return _adapted(linear("down_proj", h_N1F), adapter, "down_proj", h_N1F)[:, 0]

    def parameters(self, stack: Tensors, block: Switch) -> dict[str, mx.array]:
        """The parameters of MLX-LM's switch [S, ...], by its names."""
        found = dict(self._named(stack, block))
        for kind in _KINDS:
            if (both := found.pop(f"gate_up_proj.{kind}", None)) is not None:
                found[f"gate_proj.{kind}"], found[f"up_proj.{kind}"] = both[:, ::2], both[:, 1::2]
        return found

    def _named(self, stack: Tensors, block: Switch) -> Tensors:
        """Views by MLX-LM's names."""
        return stack


class Transformers(MlxLm):
    """The same, from records with the names of Transformers' modules."""

    def view(self, raw: Raw, record: Record) -> Tensors:
        for entry in record.tensors:
            if entry.dtype not in ("F32", "F16", "BF16"):  # quantised, and nothing says how
                raise ShapeMismatch(f"expert {record.key}: {entry.name} is {entry.dtype}")
        return tensors_of(raw, record)

    def _named(self, stack: Tensors, block: Switch) -> Tensors:
        """Interleaved rows stay one matrix: a gather over a matrix with gaps copies the stack."""
        found = self._by_kind(stack, block)
        if block.rows == "halves":
            for kind in _KINDS:
                if (both := found.pop(f"gate_up_proj.{kind}", None)) is not None:
                    found[f"gate_proj.{kind}"], found[f"up_proj.{kind}"] = mx.split(both, 2, 1)
        if not block.rows:
            names = {"up_proj": "fc1", "down_proj": "fc2"}
            found = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in found.items()}
        return found

    def _by_kind(self, stack: Tensors, block: Switch) -> dict[str, mx.array]:
        """Matrices [S, out, in] as "up_proj.weight", their biases as "up_proj.bias"."""
        found = {}
        for name in ("gate_up_proj" if block.rows else "up_proj", "down_proj"):
            weight = stack[name]
            found[f"{name}.weight"] = weight.swapaxes(1, 2) if block.swapped else weight
            if f"{name}_bias" in stack:
                found[f"{name}.bias"] = stack[f"{name}_bias"]
        return found


class TransformersAffine(Transformers):
    """The same as Chronos quantises them, [out, in] wherever their matrices lay."""

    def view(self, raw: Raw, record: Record) -> Tensors:
        return tensors_of(raw, record)

    def _by_kind(self, stack: Tensors, block: Switch) -> dict[str, mx.array]:
        return dict(stack)


class TransformersMxfp4(TransformersAffine):
    """gpt-oss' experts as they are published: MLX's mode mxfp4 has their very bits, in words."""

    def view(self, raw: Raw, record: Record) -> Tensors:
        tensors = tuple(
            replace(t, dtype="U32", shape=(t.shape[0], 4 * t.shape[1])) if len(t.shape) == 3 else t
            for t in record.tensors
        )
        return tensors_of(raw, replace(record, tensors=tensors))

    def _by_kind(self, stack: Tensors, block: Switch) -> dict[str, mx.array]:
        found = {}
        for name, array in stack.items():
            matrix, kind = split(name)
            if array.ndim == 4:  # bytes, as they lie in a record
                array = array.view(mx.uint32).flatten(-2)
            found[f"{matrix}.{'weight' if kind == 'blocks' else kind}"] = array
        return found


def _adapted(y_TD: mx.array, adapter: Adapter, name: str, x_TD: mx.array) -> mx.array:
    return y_TD if adapter is None else y_TD + adapter(name, x_TD).astype(y_TD.dtype)


def _product(
    x_N1A: mx.array,
    kinds: Tensors,
    places_N: mx.array,
    sort: bool,
    quantised: Mapping[str, Any] | None,
) -> mx.array:
    """Row n times the matrix at place n of a stack. A stack of another dtype than the rows, or that
    this device does not gather from, is never converted: the experts at hand are."""
    dtype = kinds["scales" if quantised else "weight"].dtype
    widened = not quantised and dtype != mx.float32 and mx.default_device() == mx.cpu
    if widened or dtype not in (x_N1A.dtype, mx.uint8):
        used, places = np.unique(np.array(places_N), return_inverse=True)
        kinds = {kind: stack[mx.array(used)] for kind, stack in kinds.items()}
        places_N = mx.array(places.astype(np.uint32))
    if quantised:
        y_N1A = mx.gather_qmm(
            x_N1A,
            kinds["weight"],
            kinds["scales"],
            kinds.get("biases"),
            rhs_indices=places_N,
            sorted_indices=sort,
            **quantised,
        ).astype(x_N1A.dtype)
    else:
        wide = mx.float32 if widened else x_N1A.dtype
        weight = kinds["weight"].astype(wide).swapaxes(-1, -2)
        y_N1A = mx.gather_mm(x_N1A.astype(wide), weight, rhs_indices=places_N, sorted_indices=sort)
        y_N1A = y_N1A.astype(x_N1A.dtype)
    if "bias" in kinds:
        y_N1A = y_N1A + kinds["bias"][places_N][:, None].astype(y_N1A.dtype)
    return y_N1A


def tensors_of(raw: Raw, record: Record) -> dict[str, mx.array]:
    """The tensors of a record by name, or stacks of those of many; no copies. Raises
    ShapeMismatch."""
    views = {}
    for entry in record.tensors:
        if entry.dtype not in DTYPES:
            raise ShapeMismatch(f"experts of layer {record.key[0]}: {entry.name} is {entry.dtype}")
        dtype, shape = DTYPES[entry.dtype], entry.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        if raw.slots is not None:
            shape, strides = (raw.slots[0], *shape), (raw.slots[1] // dtype.size, *strides)
        first = (raw.start + entry.offset) // dtype.size
        views[entry.name] = mx.as_strided(raw.pages.view(dtype), shape, strides, first)
    return views


def silu(x: mx.array) -> mx.array:
    # nn.silu is compiled: on a CPU that starts a C++ compiler and gains nothing below 64k values.
    return nn.silu(x) if mx.default_device() == mx.gpu else x * mx.sigmoid(x)


def swiglu(gate_up_TF: mx.array) -> mx.array:
    gate_TF, up_TF = mx.split(gate_up_TF, 2, axis=-1)
    return silu(gate_TF) * up_TF


# By the pattern of their names.
CODECS: dict[str, Callable[[], Codec]] = {
    SWIGLU: Swiglu,
    rf"{SWIGLU}-affine[48]-g\d+": Affine,
    TRANSFORMERS: Transformers,
    rf"{TRANSFORMERS}-affine[48]-g\d+": TransformersAffine,
    MXFP4: TransformersMxfp4,
    rf"{MLX}(-[a-z]+\d+)*": MlxLm,
}


@cache
def codec_of(encoding: str) -> Any:
    """The codec of that name, one object for all layers. Raises ConfigError."""
    for pattern, make in CODECS.items():
        if re.fullmatch(pattern, encoding):
            return make()
    raise ConfigError(
        f"MLX does not compute experts encoded as {encoding[:80]}", "", "use --backend torch"
    )
