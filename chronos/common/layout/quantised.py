"""What a quantised matrix looks like in a checkpoint: its tensors, their dtypes and shapes.

A matrix [N, K] (rows out, columns in) is several tensors, `X.weight_packed` and `X.weight_scale`
for instance: here they are kinds of the matrix X. `shape_of` says how large the matrix is that they
make, and refuses tensors that do not fit each other before anything is computed from them. Formats:
OCP Microscaling (MX) 1.0; Transformers' FineGrainedFP8; compressed-tensors; GPTQ and AWQ as
AutoGPTQ and AutoAWQ pack them; MLX; GGUF. Not here: values (a backend's `quantised.py`), and which
tensor is whose (`naming`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from chronos.common.errors import ShapeMismatch

# Kinds that hold values, and those that say what the values mean. A matrix that is not quantised
# has the kind "weight" alone.
# What GGUF calls its types: values and bytes of a block.
GGUF_BLOCKS = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176),
    "q6_k": (256, 210), "iq4_nl": (32, 18), "iq4_xs": (256, 136), "mxfp4": (32, 17),
}  # fmt: skip
VALUES = ("blocks", "weight_packed", "qweight", "weight", *GGUF_BLOCKS)
SCALES = ("scales", "weight_scale_inv", "weight_scale", "scale")
KINDS = (
    *VALUES, *SCALES, "biases", "weight_zero_point", "weight_global_scale", "qzeros", "g_idx",
    "weight_shape", "input_scale", "input_global_scale", "bias",
)  # fmt: skip
# Of activations, which a run of the dequantised checkpoint does not round.
_UNUSED = frozenset({"input_scale", "input_global_scale"})
# gpt-oss writes its kinds behind an underscore.
_SUFFIX = re.compile(rf"(.+?)(?:\.({'|'.join(KINDS)})|_(blocks|scales|bias))")
_FLOATS = ("F32", "BF16", "F16")
_E8M0 = ("U8", "F8_E8M0")
Kinds = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by kind


class Named(NamedTuple):
    """A tensor's name, taken apart."""

    matrix: str
    kind: str


def split(name: str) -> Named:
    """Which matrix a tensor is of, and which of its kinds; "weight" where the name says none."""
    found = _SUFFIX.fullmatch(name)
    return Named(found[1], found[2] or found[3]) if found else Named(name, "weight")


def grouped(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Kinds]:
    """Tensors given by name, dtype and shape: matrix by matrix, in the order given."""
    found: dict[str, Kinds] = {}
    for name, dtype, shape in tensors:
        matrix, kind = split(name)
        found.setdefault(matrix, {})[kind] = (dtype, shape)
    # Modules have scales of their own, too (DeepSeek-V4's `attn_hc.scale`).
    for matrix in [matrix for matrix, kinds in found.items() if kinds.keys() == {"scale"}]:
        found[f"{matrix}.scale"] = {"weight": found.pop(matrix)["scale"]}
    return found


def coding_of_experts(coding: str, dtypes: Iterable[str]) -> str:
    """The encoding of experts with tensors of these dtypes: DeepSeek-V4's are FP4 in a checkpoint
    whose other matrices are FP8 in blocks."""
    return "fp4" if coding.startswith("fp8-") and "I8" in dtypes else coding


def is_coded(kinds: Iterable[str]) -> bool:
    """Whether a matrix with these kinds is quantised."""
    return not {"weight", "bias"}.issuperset(kinds)


def index_limits(tensors: Iterable[Any]) -> dict[str, int]:
    """Of tensors with a name and a shape, those that are indices, and how many things they count
    into: groups of GPTQ."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {
        name: shapes[f"{matrix}.qzeros"][0]
        for name in shapes
        if (matrix := split(name).matrix) and name == f"{matrix}.g_idx"
    }


def shape_of(encoding: str, kinds: Kinds, name: str) -> tuple[int, int]:
    """Rows and columns of the matrix `name`. Raises ShapeMismatch."""
    method, _, setting = encoding.partition("-")
    try:
        if not is_coded(kinds):
            return _plain(kinds)
        return _METHODS[method](setting, kinds)
    except (KeyError, ValueError, ZeroDivisionError):
        spelled = ", ".join(f"{kind} {d} {list(shape)}" for kind, (d, shape) in kinds.items())
        raise ShapeMismatch(
            f"{name} is no matrix as {encoding} stores them: {spelled}",
            "",
            "is quantization_config in config.json that of these weights?",
        ) from None


def _plain(kinds: Kinds) -> tuple[int, int]:
    return _matrix(kinds, "weight", ("F64", *_FLOATS))


def _mxfp4(setting: str, kinds: Kinds) -> tuple[int, int]:
    """blocks U8 [N, K/32, 16], two values a byte; scales U8 [N, K/32]."""
    _only(kinds, "blocks", "scales")
    (dtype, (rows, blocks, width)), scales = kinds["blocks"], kinds["scales"]
    _check(dtype == "U8" and width == 16 and scales == ("U8", (rows, blocks)))
    return rows, 32 * blocks


def _fp8(setting: str, kinds: Kinds) -> tuple[int, int]:
    """weight F8_E4M3 [N, K]; weight_scale_inv (or DeepSeek-V4's scale), one for each block that
    begins."""
    scale = "scale" if "scale" in kinds else "weight_scale_inv"
    _only(kinds, "weight", scale)
    rows, columns = _matrix(kinds, "weight", ("F8_E4M3",))
    down, across = block_of(setting)
    wanted = (-(-rows // down), -(-columns // across))
    _check(_matrix(kinds, scale, (*_FLOATS, *_E8M0)) == wanted)
    return rows, columns


def _fp4(setting: str, kinds: Kinds) -> tuple[int, int]:
    """weight I8 [N, K/2], two values a byte; scale E8M0 [N, K/32]."""
    scale = "scale" if "scale" in kinds else "weight_scale_inv"
    _only(kinds, "weight", scale)
    rows, packed = _matrix(kinds, "weight", ("I8",))
    _check(2 * packed == 32 * _groups(kinds, scale, rows, 2 * packed, _E8M0))
    return rows, 2 * packed


def block_of(setting: str) -> tuple[int, int]:
    """Rows and columns that share a scale, of "128x128"."""
    down, across = setting.split("x")
    return int(down), int(across)


def _compressed(setting: str, kinds: Kinds) -> tuple[int, int]:
    """weight_packed I32 [N, K/8] of four bits, weight_scale [N, groups], weight_zero_point I32
    [N/8, groups]; or weight F8_E4M3 [N, K] and a scale for all of it or for each row."""
    if setting in ("mxfp4", "nvfp4"):
        return _compressed_fp4(setting, kinds)
    if setting == "mxfp8":
        _only(kinds, "weight", "weight_scale")
        rows, columns = _matrix(kinds, "weight", ("F8_E4M3",))
        _check(columns == 32 * _groups(kinds, "weight_scale", rows, columns, _E8M0))
        return rows, columns
    if setting == "fp8":
        _only(kinds, "weight", "weight_scale")
        rows, columns = _matrix(kinds, "weight", ("F8_E4M3",))
        dtype, shape = kinds["weight_scale"]
        _check(dtype in _FLOATS and shape in ((), (1,), (1, 1), (rows, 1)))
        return rows, columns
    _only(kinds, "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    each = 32 // bits_of(setting)
    rows, packed = _matrix(kinds, "weight_packed", ("I32",))
    columns = packed * each
    groups = _groups(kinds, "weight_scale", rows, columns)
    _check(kinds["weight_shape"] in (("I64", (2,)), ("I32", (2,))))
    if "weight_zero_point" in kinds:
        _check(kinds["weight_zero_point"] == ("I32", (-(-rows // each), groups)))
    return rows, columns


def _compressed_fp4(setting: str, kinds: Kinds) -> tuple[int, int]:
    """weight_packed U8 [N, K/2]; weight_scale E8M0 [N, K/32], or E4M3 [N, K/16] that is to be
    divided by weight_global_scale F32 [1]."""
    mx = setting == "mxfp4"
    _only(kinds, "weight_packed", "weight_scale", *([] if mx else ["weight_global_scale"]))
    rows, packed = _matrix(kinds, "weight_packed", ("U8",))
    scales = _E8M0 if mx else ("F8_E4M3",)
    groups = _groups(kinds, "weight_scale", rows, 2 * packed, scales)
    _check(2 * packed == groups * (32 if mx else 16))
    _check(mx or kinds["weight_global_scale"] == ("F32", (1,)))
    return rows, 2 * packed


def bits_of(setting: str) -> int:
    """The first number of "int4", "affine4-g32"."""
    return int(re.findall(r"\d+", setting)[0])


def _gptq(setting: str, kinds: Kinds) -> tuple[int, int]:
    """qweight I32 [K/8, N] of four bits, scales [groups, N], qzeros I32 [groups, N/8], g_idx I32
    [K]: the group of each column."""
    _only(kinds, "qweight", "scales", "qzeros", "g_idx")
    each = 32 // bits_of(setting)
    packed, rows = _matrix(kinds, "qweight", ("I32",))
    columns = packed * each
    groups, _ = scales = _matrix(kinds, "scales", _FLOATS)
    _check(scales == (groups, rows) and not rows % each and groups > 0)
    _check(kinds["qzeros"] == ("I32", (groups, rows // each)))
    _check(kinds["g_idx"] == ("I32", (columns,)))
    return rows, columns


def _awq(setting: str, kinds: Kinds) -> tuple[int, int]:
    """qweight I32 [K, N/8], scales [groups, N], qzeros I32 [groups, N/8]."""
    _only(kinds, "qweight", "scales", "qzeros")
    each = 32 // bits_of(setting)
    columns, packed = _matrix(kinds, "qweight", ("I32",))
    groups, rows = _matrix(kinds, "scales", _FLOATS)
    _check(rows == packed * each and not columns % groups)
    _check(kinds["qzeros"] == ("I32", (groups, packed)))
    return rows, columns


def _mlx(setting: str, kinds: Kinds) -> tuple[int, int]:
    """weight U32 [N, K * bits / 32]; scales and biases [N, groups], or scales U8."""
    affine = setting.startswith("affine")
    _only(kinds, "weight", "scales", *(["biases"] if affine else []))
    rows, packed = _matrix(kinds, "weight", ("U32",))
    columns, rest = divmod(32 * packed, bits_of(setting.removeprefix("mxfp").removeprefix("nvfp")))
    groups = _groups(kinds, "scales", rows, columns, _FLOATS if affine else ("U8",))
    _check(not rest and (not affine or kinds["biases"] == kinds["scales"]))
    _check(affine or columns == groups * (16 if setting.startswith("nvfp") else 32))
    return rows, columns


def _gguf(setting: str, kinds: Kinds) -> tuple[int, int]:
    """One kind, by its type: U8 [N, bytes of a row]."""
    (kind,) = kinds.keys() - {"bias"}
    rows, width = _matrix(kinds, kind, ("U8",))
    values, size = GGUF_BLOCKS[kind]
    _check(not width % size)
    return rows, width // size * values


_METHODS = {
    "gguf": _gguf,
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fp4": _fp4,
    "compressed": _compressed,
    "gptq": _gptq,
    "gptq2": _gptq,
    "awq": _awq,
    "mlx": _mlx,
    "swiglu": _mlx,  # Chronos' own quantisation is in MLX's layout
    "transformers": _mlx,
}


def _matrix(kinds: Kinds, kind: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
    dtype, (rows, columns) = kinds[kind]
    _check(dtype in dtypes and rows > 0 and columns > 0)
    return rows, columns


def _groups(
    kinds: Kinds, kind: str, rows: int, columns: int, dtypes: tuple[str, ...] = _FLOATS
) -> int:
    """How many groups of columns have scales of their own."""
    rows_, groups = _matrix(kinds, kind, dtypes)
    _check(rows_ == rows and not columns % groups)
    return groups


def _only(kinds: Kinds, *known: str) -> None:
    _check(_UNUSED.union(known, ("bias",)).issuperset(kinds))


def _check(holds: bool) -> None:
    """Said in words by `shape_of`."""
    if not holds:
        raise ValueError
