"""Finding NaN and infinity in the bytes of a tensor, for every floating dtype, at memory speed.

Works on bit patterns: a value is not finite when all its exponent bits are set, or, in the dtypes
without infinity, when it equals one of their NaN patterns. Integers are always finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chronos.common.errors import CorruptFileError

# dtype: unsigned integer of its size, bits to look at, what they are in a value that is not finite
_PATTERNS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
}
_BLOCK = 256 << 10  # elements at a time: the scratch stays in the cache


def first_nonfinite(data: Any, dtype: str) -> int | None:
    """The index of the first element that is NaN or infinite, or None."""
    if dtype not in _PATTERNS:
        return None
    kind, mask, pattern = _PATTERNS[dtype]
    bits = np.frombuffer(data, kind, data.nbytes // np.dtype(kind).itemsize)  # whole ones
    for start in range(0, bits.size, _BLOCK):
        hits = bits[start : start + _BLOCK] & bits.dtype.type(mask) == bits.dtype.type(pattern)
        if hits.any():
            return start + int(hits.argmax())
    return None


def check_below(data: Any, limit: int, name: str, where: str = "") -> None:
    """Of I32 indices. Raises CorruptFileError naming the tensor and the first that is not one."""
    values = np.frombuffer(data, "<i4", data.nbytes // 4)
    wrong = (values < 0) | (values >= limit)
    if wrong.any():
        found = values[wrong.argmax()]
        raise CorruptFileError(
            f"{name}: {found} is no index below {limit}", where, "download the checkpoint again"
        )


def check_finite(data: Any, dtype: str, name: str, where: str = "", skipped: int = 0) -> None:
    """Raises CorruptFileError naming the tensor and the element.

    skipped: bytes of the tensor before `data`, where it comes in pieces.
    """
    if dtype == "U8" and name.endswith(
        ("scales", "weight_scale", "scale_inv", ".scale")
    ):  # of MX formats: exponents, 255 is NaN
        dtype = "F8_E8M0"
    if data.nbytes and (index := first_nonfinite(data, dtype)) is not None:
        index += skipped // np.dtype(_PATTERNS[dtype][0]).itemsize
        raise CorruptFileError(f"{name}: element {index} is NaN or infinite", where)
