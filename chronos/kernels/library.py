"""The compiled library: finding it, describing matrices to it, and calling it.

Nothing is allocated or copied here. A description holds addresses, so whoever makes one keeps the
memory; `multiply` keeps what a thread that was left behind may still read (`c/pool.c`).

Shape legend: N rows out, K columns in.
"""

from __future__ import annotations

import atexit
import ctypes
import time
import warnings
from collections.abc import Mapping, Sequence
from ctypes import c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

from chronos.common.errors import ShapeMismatch, UsageError
from chronos.common.layout.quantised import bits_of, block_of, shape_of
from chronos.common.tuning import kernels_on

MOST_ROWS, MOST_PRODUCTS = 8, 64  # of x in one product; products in one call
ORDERS = ("pairs", "dots", "fours")  # in which terms are added, by number: c/kernels.h
_FP4, _FP8, _AFFINE, _INTEGER = 1, 2, 3, 4  # c/kernels.h
_BF16 = 0
_BY_GPTQ, _BY_AWQ = 1, 2
_SCALES = {"F32": 0, "BF16": 1, "F16": 2, "F8_E8M0": 3, "U8": 3, "F8_E4M3": 4}


class Array(NamedTuple):
    """A tensor: where it begins, its dtype by safetensors' name, its shape; rows without gaps."""

    address: int
    dtype: str
    shape: tuple[int, ...]


class Matrix(ctypes.Structure):
    """A matrix [N, K] where it lies."""

    _fields_ = [
        ("format", c_int32),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("down", c_int64),
        ("across", c_int64),
        ("groups", c_int64),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("divisor", c_void_p),
        ("order", c_int32),
        ("codes_lie", c_int32),
        ("scales_lie", c_int32),
        ("more", c_int32),
    ]
    rows: int
    columns: int
    order: int  # of its sums: one of `orders()`


class _Product(ctypes.Structure):
    _fields_ = [
        ("matrix", Matrix),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("count", c_int64),
        ("wide", c_int64),
    ]


@cache
def _library() -> Any:
    """None where there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                library: Any = ctypes.CDLL(str(path))
            except OSError:  # made for another system
                return None
            try:
                library.chronos_multiply.argtypes = [c_void_p, c_int, c_int]
                library.chronos_multiply_wide.argtypes = [
                    c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int, c_int,
                ]  # fmt: skip
                library.chronos_dequantise.argtypes = [c_void_p, c_void_p]
                found = library.chronos_open(ctypes.sizeof(_Product))
            except AttributeError:
                found = -1
            if found < 0:
                warnings.warn(
                    "the compiled kernels are of another version of Chronos, and none is used: "
                    "install Chronos again (`pip install -e .` in a clone)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            library.orders = tuple(n for n in range(len(ORDERS)) if found >> n & 1)
            library.multiplies_wide = bool(found >> len(ORDERS))
            atexit.register(_wait, library)
            return library
    return None


def available() -> bool:
    """Whether there are products for this CPU, and the environment has not turned them off."""
    return bool(orders())


def orders() -> tuple[int, ...]:
    """The orders of summation that this CPU has products in, numbers of `ORDERS`: which of them a
    framework has is for the caller to try."""
    return _library().orders if loaded() else ()


def wide() -> bool:
    """The same of products in float32."""
    return loaded() and _library().multiplies_wide


def loaded() -> bool:
    """Whether `dequantise` is there, which every CPU has where it was compiled."""
    return kernels_on() and _library() is not None


def describe(encoding: str, kinds: Mapping[str, Array]) -> Matrix | None:
    """A matrix for `multiply`; None for one that no kernel is for.

    encoding: as `common.layout.quantised` names it, "bf16" for plain numbers; kinds: its tensors,
    whose sizes are checked before an address is taken. Raises ShapeMismatch.
    """
    found = _plain(kinds) if encoding == "bf16" else _packed(encoding, kinds)
    if found is not None:
        found.order = next(iter(orders()), 0)
    return found


def _packed(encoding: str, kinds: Mapping[str, Array]) -> Matrix | None:
    method, _, setting = encoding.partition("-")
    if method not in _METHODS:
        return None
    shapes = {kind: (array.dtype, array.shape) for kind, array in kinds.items() if kind != "bias"}
    rows, columns = shape_of(encoding, shapes, "matrix")
    found = _METHODS[method](setting, kinds, columns)
    if found is None or columns % 32 or (found.across % 16 and found.across < columns):
        return None
    found.rows, found.columns = rows, columns
    found.groups = -(-columns // found.across)
    return found


def _plain(kinds: Mapping[str, Array]) -> Matrix | None:
    weight = kinds["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ShapeMismatch(f"a matrix of shape {list(weight.shape)}", "", "it has two sizes")
    rows, columns = weight.shape
    if weight.dtype != "BF16" or columns % 32:
        return None
    return Matrix(_BF16, 16, 0, rows, columns, 1, columns, 1, weight.address)


def _scaled(
    format_: int, bits: int, values: Array, scales: Array, across: int, down: int = 1
) -> Matrix:
    kind = _SCALES[scales.dtype]
    return Matrix(format_, bits, kind, 0, 0, down, across, 0, values.address, scales.address)


def _mxfp4(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix:
    return _scaled(_FP4, 4, kinds["blocks"], kinds["scales"], 32)


def _fp8(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix:
    down, across = block_of(setting)
    return _scaled(_FP8, 8, kinds["weight"], _scale(kinds), across, down)


def _fp4(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix:
    return _scaled(_FP4, 4, kinds["weight"], _scale(kinds), 32)


def _scale(kinds: Mapping[str, Array]) -> Array:
    """Under Transformers' name or DeepSeek-V4's."""
    return kinds["scale"] if "scale" in kinds else kinds["weight_scale_inv"]


def _compressed(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix | None:
    scale = kinds["weight_scale"]
    if setting == "fp8":
        if scale.dtype == "F16":  # rounded twice
            return None
        rows = kinds["weight"].shape[0]
        down = 1 if scale.shape == (rows, 1) else rows
        return _scaled(_FP8, 8, kinds["weight"], scale, columns, down)
    if setting == "mxfp8":
        return _scaled(_FP8, 8, kinds["weight"], scale, 32)
    if setting == "mxfp4":
        return _scaled(_FP4, 4, kinds["weight_packed"], scale, 32)
    if setting == "nvfp4":
        found = _scaled(_FP4, 4, kinds["weight_packed"], scale, 16)
        found.divisor = kinds["weight_global_scale"].address
        return found
    across = columns // scale.shape[1]
    found = _scaled(_INTEGER, bits_of(setting), kinds["weight_packed"], scale, across)
    if "weight_zero_point" in kinds:
        found.zeros = kinds["weight_zero_point"].address
    return found


def _mlx(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix | None:
    weight, scales = kinds["weight"], kinds["scales"]
    across = columns // scales.shape[1]
    if setting.startswith("affine") and bits_of(setting) in (4, 8):
        found = _scaled(_AFFINE, bits_of(setting), weight, scales, across)
        found.zeros = kinds["biases"].address
        return found
    if setting == "mxfp8":
        return _scaled(_FP8, 8, weight, scales, across)
    if setting in ("mxfp4", "nvfp4"):
        dtype = "F8_E4M3" if setting == "nvfp4" else "F8_E8M0"
        return _scaled(_FP4, 4, weight, scales._replace(dtype=dtype), across)
    return None  # codes that lie across words


def _gptq(setting: str, kinds: Mapping[str, Array], columns: int, more: int = 1) -> Matrix | None:
    """Of columns in groups of neighbours, which `g_idx` has to say: nothing is read here."""
    scales = kinds["scales"]
    across, rest = divmod(columns, scales.shape[0])
    if rest:
        return None
    found = _scaled(_INTEGER, bits_of(setting), kinds["qweight"], scales, across)
    found.zeros, found.more = kinds["qzeros"].address, more
    found.codes_lie = found.scales_lie = _BY_GPTQ
    return found


def _gptq2(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix | None:
    return _gptq(setting, kinds, columns, more=0)


def _awq(setting: str, kinds: Mapping[str, Array], columns: int) -> Matrix | None:
    found = _gptq(setting, kinds, columns, more=0)
    if found is not None:
        found.codes_lie = found.scales_lie = _BY_AWQ
    return found


_METHODS = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fp4": _fp4,
    "compressed": _compressed,
    "gptq": _gptq,
    "gptq2": _gptq2,
    "awq": _awq,
    "mlx": _mlx,
    "transformers": _mlx,  # Chronos' own quantisation, of guests
    "swiglu": _mlx,  # and of its own models
}


def multiply(
    products: Sequence[tuple[Matrix, int, int]], count: int, threads: int, owners: Any
) -> None:
    """Products of `count` rows with several matrices, in one call.

    products: a matrix [N, K] with the addresses of x [count, K] and of y [count, N], in bfloat16.
    threads: how many may take part. owners: what keeps all of that memory. Raises UsageError.
    """
    library = _library()
    if library is None or not library.orders:
        raise UsageError("there are no kernels on this machine", "", "ask `available` first")
    if not 1 <= count <= MOST_ROWS or not 1 <= len(products) <= MOST_PRODUCTS:
        raise UsageError(
            f"{len(products)} products of {count} rows in one call",
            "",
            f"up to {MOST_PRODUCTS} of up to {MOST_ROWS} are computed",
        )
    if any(matrix.order not in library.orders for matrix, _, _ in products):
        raise UsageError("an order of sums without kernels here", "", "take one of `orders`")
    calls = (_Product * len(products))(*(_Product(m, x, None, y, count, 0) for m, x, y in products))
    _keep(owners, library.chronos_multiply(calls, len(products), threads))


def multiply_wide(weight: Array, x: int, y: int, count: int, threads: int, owners: Any) -> None:
    """`count` rows [count, K] at the address x times a matrix [N, K] of F32 or BF16 to [count, N]
    at y, both in float32; else as `multiply`. Ask `wide` first."""
    call = _library().chronos_multiply_wide
    (rows, columns), bits = weight.shape, 16 if weight.dtype == "BF16" else 32
    _keep(owners, call(weight.address, bits, rows, columns, x, y, count, threads))


def _keep(owners: Any, behind: int) -> None:
    """While threads are behind, what they may read is kept."""
    if behind == 0:
        _behind.clear()
    else:
        _behind.append(owners)


def dequantise(matrix: Matrix, out: int) -> None:
    """Write a matrix as bfloat16 [N, K] to an address. Ask `loaded` first."""
    _library().chronos_dequantise(ctypes.byref(matrix), out)


# What threads that were left behind may still read.
_behind: list[Any] = []


def _wait(library: Any) -> None:
    """Until no thread reads memory that the end of the process frees."""
    until = time.monotonic() + 1
    while library.chronos_behind() and time.monotonic() < until:
        time.sleep(0.001)
