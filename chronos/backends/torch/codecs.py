"""What the torch backend makes of a routed expert's bytes: views of its tensors, and its output.

One codec an encoding (`chronos.common.layout.codecs` has the other half). `view` says what an
expert is where its record lies, without a copy; `forward` computes with it. Weights of fewer bits
are widened or dequantised in `forward` and nowhere else. Nothing above knows what tensors an expert
has; experts of Chronos' own models are tuples of tensors, which graphs copy one by one.

Shape legend: T tokens, D hidden, F expert hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chronos.backends.torch import kernels
from chronos.backends.torch.products import linear, linear_rows, onednn_linear, packed, packs
from chronos.backends.torch.quantised import dequantised
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.experts.together import jointly
from chronos.common.layout.codecs import (
    GGUF,
    MLX,
    QUANTISED,
    SWIGLU,
    TRANSFORMERS,
    encodings_of,
)
from chronos.common.layout.quantised import grouped, is_coded, shape_of, split

if TYPE_CHECKING:
    from chronos.common.layout import Record
    from chronos.kernels import Matrix

# safetensors' names of the dtypes a record may hold here; bits where torch computes with no such
# dtype.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.int32,
    "I64": torch.int64,
}
# What an experts module of Transformers may hold, one slice an expert: the names in a record too.
PARAMETERS = (
    "gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias",
)  # fmt: skip
Release = Callable[[], None] | None
# (matrix, its input) to what is added to the product; see `lora`.
Adapter = Callable[[str, Tensor], Tensor] | None
# (matrix, its input) to the product, with its bias.
Projector = Callable[[str, Tensor], Tensor]


class Codec(Protocol):
    """How one encoding is computed. It holds no state: a layer hands in its own."""

    adapts: bool  # whether `forward` takes adapters

    def view(self, raw: Tensor, record: Record, release: Release = None) -> Any:
        """The expert in the bytes of a slot (uint8), which will be those of `record`.

        The bytes are not there yet. release: where the slot is never given to another expert, gives
        its memory back; for a codec that makes a copy of its own at the first use.
        """

    def forward(self, x_TD: Tensor, expert: Any, block: Any, adapter: Adapter = None) -> Tensor:
        """The expert's output for its rows. block: the layer's module, for what all its experts
        share (activation, scales, norms). adapter: what it adds to its products."""


class Expert(NamedTuple):
    """One expert's weights: gate_up [2F, D] (gate rows first) and down [D, F]."""

    gate_up_FD: Tensor
    down_DF: Tensor


class Swiglu:
    """The experts of Chronos' own models, as they are trained."""

    adapts = True

    def view(self, raw: Tensor, record: Record, release: Release = None) -> Expert:
        return Expert(*tensors_of(raw, record).values())

    def forward(
        self, x_TD: Tensor, expert: Expert, block: Any = None, adapter: Adapter = None
    ) -> Tensor:
        """SwiGLU (2002.05202): down(silu(gate x) * up x), weights widened to the dtype of x."""
        matrices = {"gate_up_proj": expert.gate_up_FD, "down_proj": expert.down_DF}
        return _swiglu(x_TD, lambda name, x_TX: linear(x_TX, matrices[name]), adapter)


class AffineExpert(NamedTuple):
    """The same in groups of columns: codes, scales and biases of either matrix."""

    gate_up: Tensor
    gate_up_scales: Tensor
    gate_up_biases: Tensor
    down: Tensor
    down_scales: Tensor
    down_biases: Tensor


class Affine(Swiglu):
    """The same experts as Chronos quantises them: dequantised at each use, once for all sequences
    that come to it, so a slot has their few bits and their products the bits of the dequantised
    model."""

    def view(self, raw: Tensor, record: Record, release: Release = None) -> Any:
        return AffineExpert(*tensors_of(raw, record).values())

    def forward(
        self, x_TD: Tensor, expert: Any, block: Any = None, adapter: Adapter = None
    ) -> Tensor:
        matrices = {"gate_up_proj": expert[:3], "down_proj": expert[3:]}

        def project(name: str, x_TX: Tensor) -> Tensor:
            weight, scales, biases = matrices[name]

            def plain() -> Tensor:
                bits = 32 * weight.shape[1] // x_TX.shape[1]
                kinds = {"weight": weight, "scales": scales, "biases": biases}
                return dequantised(f"{SWIGLU}-affine{bits}", kinds, scales.dtype)  # as values are

            if len(x_TX) > 1:
                return linear(x_TX, plain())
            y_1X: Tensor = jointly(id(weight), x_TX, lambda rows: linear_rows(plain(), rows))
            return y_1X

        return _swiglu(x_TD, project, adapter)


@dataclass(slots=True)
class Named:
    """An expert's tensors by their names in a record."""

    tensors: dict[str, Tensor]
    release: Release = None


class Transformers:
    """The experts of a model that Transformers builds: biases or not, transposed or not, gated or
    not, with the activation and the norm of the library's own module."""

    adapts = True

    def view(self, raw: Tensor, record: Record, release: Release = None) -> Named:
        tensors = tensors_of(raw, record)
        for entry in record.tensors:
            if not tensors[entry.name].is_floating_point():  # quantised, and nothing says how
                raise ShapeMismatch(f"expert {record.key}: {entry.name} is {entry.dtype}")
        return Named(tensors, release)

    def forward(self, x_TD: Tensor, expert: Named, block: Any, adapter: Adapter = None) -> Tensor:
        """One expert on its rows: up (with the gate, where there is one), activation, down."""
        # A gradient has no product with packed matrices, and recordings may follow.
        if expert.release is not None and not torch.is_grad_enabled():
            self._rearrange(expert, block)
        project = self.projector(expert, block, x_TD)
        first = "gate_up_proj" if block.has_gate else "up_proj"
        up_TF = _adapted(project(first, x_TD), adapter, first, x_TD)
        h_TF = block._apply_gate(up_TF) if block.has_gate else block.act_fn(up_TF)
        y_TD = _adapted(project("down_proj", h_TF), adapter, "down_proj", h_TF)
        normed = getattr(block, "has_post_expert_norm", False)  # Transformers 5.20 brought it
        return block.post_expert_norm(y_TD) if normed else y_TD

    def shapes(self, record: Record, block: Any) -> dict[str, tuple[int, ...]]:
        """Of what `parameters` gives of such a record."""
        return {tensor.name: tuple(tensor.shape) for tensor in record.tensors}

    def parameters(self, expert: Named, block: Any, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """One slice of each parameter of the library's module; dtype: what it computes in."""
        return expert.tensors

    def projector(self, expert: Named, block: Any, x_TD: Tensor) -> Projector:
        """The products of an expert with rows such as x."""
        return partial(_project, block, self.parameters(expert, block, x_TD.dtype))

    def _rearrange(self, expert: Named, block: Any) -> None:
        """Lay the matrices out as oneDNN's products read them, where the expert stays in memory: a
        product then takes 0.25 to 0.7 of its time, for one of 10 to 30 products' time once."""
        assert expert.release is not None
        release, expert.release = expert.release, None
        transposed = block.is_transposed
        matrices = [w for w in expert.tensors.values() if w.dim() > 1]
        if not all(packs(w, transposed=transposed) for w in matrices):
            return
        expert.tensors = {  # all of them: their memory is given back
            name: w.clone() if w.dim() < 2 else packed(w.t() if transposed else w)
            for name, w in expert.tensors.items()
        }
        release()


@dataclass(slots=True)
class Coded(Named):
    """The same of a quantised expert; encodings: of each matrix."""

    encodings: Mapping[str, str] = field(default_factory=dict)
    # Of each product, what kernels take; none where they are not used, None before that is known.
    matrices: Mapping[str, Sequence[Matrix]] | None = None


class Quantised(Transformers):
    """The experts of a checkpoint that another library quantised, in its layout, or that Chronos
    did: a slot has their bytes. A row is multiplied by kernels where those have the library's bits,
    with those of other sequences that come to the expert; else, and for the rows of a prompt, they
    are dequantised at each use."""

    def __init__(self) -> None:
        self._tried: dict[Any, Mapping[str, int]] = {}

    def view(self, raw: Tensor, record: Record, release: Release = None) -> Coded:
        tensors = tensors_of(raw, record)
        matrices = dict.fromkeys(split(name).matrix for name in tensors)
        return Coded(tensors, None, encodings_of(record.encoding, matrices))

    def shapes(self, record: Record, block: Any) -> dict[str, tuple[int, ...]]:
        """By arithmetic: dequantising without values takes what only compilers import."""
        found: dict[str, tuple[int, ...]] = {}
        by_matrix = grouped((t.name, t.dtype, t.shape) for t in record.tensors)
        encodings = encodings_of(record.encoding, by_matrix)
        for matrix, kinds in by_matrix.items():
            if (bias := kinds.pop("bias", None)) is not None:
                found[f"{matrix}_bias"] = bias[1]
            encoding = encodings.get(matrix, record.encoding)  # those of MLX-LM may have none
            found[matrix] = shape_of(encoding, kinds, f"{record.label}: {matrix}")
        for end in ("", "_bias"):
            if (gate := found.pop(f"gate_proj{end}", None)) is not None:
                rows, *columns = found.pop(f"up_proj{end}")
                found[f"gate_up_proj{end}"] = (gate[0] + rows, *columns)
        shapes = {name: found[name] for name in PARAMETERS if name in found}
        return {n: s[::-1] for n, s in shapes.items()} if block.is_transposed else shapes

    def parameters(self, expert: Named, block: Any, dtype: torch.dtype) -> Mapping[str, Tensor]:
        assert isinstance(expert, Coded)
        weights: dict[str, Tensor] = {}
        for matrix, found in _by_matrix(expert).items():
            coded = is_coded(found)
            weights[matrix] = (
                dequantised(expert.encodings[matrix], found, dtype) if coded else found["weight"]
            )
            if "bias" in found:
                weights[f"{matrix}_bias"] = found["bias"]
        weights = _merged(block, weights)
        if block.is_transposed:
            weights = {n: w.t().contiguous() if w.dim() > 1 else w for n, w in weights.items()}
        return {name: weights[name] for name in PARAMETERS if name in weights}

    def projector(self, expert: Named, block: Any, x_TD: Tensor) -> Projector:
        assert isinstance(expert, Coded)
        if kernels.usable(x_TD):
            if expert.matrices is None:
                expert.matrices = self._matrices(expert, block)
            if expert.matrices:
                return partial(self._by_kernel, expert, block)
        return super().projector(expert, block, x_TD)

    def _by_kernel(self, expert: Coded, block: Any, name: str, x_1D: Tensor) -> Tensor:
        product = partial(kernels.in_company, partial(_multiplied, expert, block, name))
        y_1F: Tensor = jointly((id(expert), name), x_1D, product)
        if not block.has_bias:
            return y_1F
        found = {f"{m}_bias": k["bias"] for m, k in _by_matrix(expert).items() if "bias" in k}
        return y_1F + _merged(block, found)[f"{name}_bias"].to(x_1D.dtype)

    def _matrices(self, expert: Coded, block: Any) -> Mapping[str, Sequence[Matrix]]:
        """For kernels, if those have the library's bits: tried once for each shape."""
        if not (found := _described(expert)):
            return found
        tensors = tuple((n, t.dtype, t.shape) for n, t in expert.tensors.items())
        key = (tensors, *expert.encodings.items(), block.is_transposed, block.is_concatenated)
        if key not in self._tried:
            self._tried[key] = _orders(self, expert, block)
        orders = self._tried[key]
        return {name: kernels.in_order(order, found[name]) for name, order in orders.items()}


def _by_matrix(expert: Coded) -> dict[str, dict[str, Tensor]]:
    """Its tensors by kind, matrix by matrix."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in expert.tensors.items():
        matrix, kind = split(name)
        found.setdefault(matrix, {})[kind] = tensor
    return found


def _merged(block: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With gate and up in one, where they are two."""
    for end in ("", "_bias"):
        if (gate := tensors.pop(f"gate_proj{end}", None)) is not None:
            up = tensors.pop(f"up_proj{end}")
            wider = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(wider), up.to(wider)
            tensors[f"gate_up_proj{end}"] = (
                torch.cat([gate, up])
                if block.is_concatenated
                else torch.stack([gate, up], 1).flatten(0, 1)
            )
    return tensors


def _described(expert: Coded) -> dict[str, list[Matrix]]:
    """What kernels take for each product, gate before up; none where one of them has no kernel."""
    named = _by_matrix(expert)
    found: dict[str, list[Matrix]] = {}
    for name, kinds in sorted(named.items()):
        matrix = kernels.describe(expert.encodings[name], kinds) if is_coded(kinds) else None
        if matrix is None:
            return {}
        split_up = "gate_proj" in named and name != "down_proj"
        found.setdefault("gate_up_proj" if split_up else name, []).append(matrix)
    return found


def _multiplied(expert: Coded, block: Any, name: str, x_RD: Tensor) -> Tensor:
    """A product by kernels of a few rows, each with the bits it has alone, as the library has
    them."""
    assert expert.matrices is not None
    matrices = expert.matrices[name]
    y_RF = kernels.multiply(x_RD, matrices, expert.tensors)
    if len(matrices) == 1 or block.is_concatenated:
        return y_RF
    return y_RF.view(len(y_RF), 2, -1).transpose(1, 2).reshape(len(y_RF), -1)


def _ordered(expert: Coded, block: Any, name: str, order: int, x_RD: Tensor) -> Tensor:
    assert expert.matrices is not None
    kernels.in_order(order, expert.matrices[name])
    return _multiplied(expert, block, name, x_RD)


def _orders(codec: Quantised, like: Coded, block: Any) -> dict[str, int]:
    """For each product of such an expert the order in which kernels have the library's bits, tried
    with random ones; none where one of them has none."""
    drawn = Coded(kernels.random_like(like.tensors), None, like.encodings)
    drawn.matrices = _described(drawn)
    weights = codec.parameters(drawn, block, torch.bfloat16)
    found: dict[str, int] = {}
    for name in drawn.matrices:
        weight = weights[name].t() if block.is_transposed else weights[name]
        order = kernels.same_order(
            weight, partial(_product, block, weights[name]), partial(_ordered, drawn, block, name)
        )
        if order is None:
            return {}
        found[name] = order
    return found


def _swiglu(x_TD: Tensor, project: Projector, adapter: Adapter) -> Tensor:
    gate_up_TF = _adapted(project("gate_up_proj", x_TD), adapter, "gate_up_proj", x_TD)
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    h_TF = F.silu(gate_TF) * up_TF
    return _adapted(project("down_proj", h_TF), adapter, "down_proj", h_TF)


def _adapted(y_TD: Tensor, adapter: Adapter, name: str, x_TD: Tensor) -> Tensor:
    return y_TD if adapter is None else y_TD + adapter(name, x_TD).to(y_TD.dtype)


def _project(block: Any, weights: Mapping[str, Tensor], name: str, x_TD: Tensor) -> Tensor:
    """The bias is added after the product is rounded, as Transformers does."""
    out = _product(block, weights[name], x_TD)
    return out + weights[f"{name}_bias"].to(x_TD.dtype) if block.has_bias else out


def _product(block: Any, matrix: Tensor, x_TD: Tensor) -> Tensor:
    if matrix.is_mkldnn and torch.is_grad_enabled():
        return F.linear(x_TD, matrix.to_dense())
    if matrix.is_mkldnn:
        return onednn_linear(x_TD, matrix)
    if block.is_transposed:
        return x_TD @ matrix.to(x_TD.dtype)
    return F.linear(x_TD, matrix.to(x_TD.dtype))


def tensors_of(raw: Tensor, record: Record) -> dict[str, Tensor]:
    """The tensors of a record by name, as views of its bytes. Raises ShapeMismatch."""
    tensors: dict[str, Tensor] = {}
    for entry in record.tensors:
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ShapeMismatch(f"expert {record.key}: {entry.name} is {entry.dtype}")
        flat = raw[entry.offset : entry.offset + entry.nbytes]
        tensors[entry.name] = flat.view(dtype).view(entry.shape)
    return tensors


# By the pattern of their names.
CODECS: dict[str, Callable[[], Codec]] = {
    SWIGLU: Swiglu,
    rf"{SWIGLU}-affine[48]-g\d+": Affine,
    TRANSFORMERS: Transformers,
    rf"{TRANSFORMERS}-affine[48]-g\d+": Quantised,
    rf"{MLX}(-(affine[234568]|mxfp[48]|nvfp4|bf16|f16|f32))*": Quantised,
    QUANTISED: Quantised,
    GGUF: Quantised,
}


@cache
def codec_of(encoding: str) -> Any:
    """The codec of that name, one object for all layers. Raises ConfigError."""
    for pattern, make in CODECS.items():
        if re.fullmatch(pattern, encoding):
            return make()
    raise ConfigError(
        f"PyTorch does not compute experts encoded as {encoding[:80]}",
        "",
        "use --backend mlx" if encoding.startswith(MLX) else "use another backend",
    )
