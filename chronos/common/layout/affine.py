"""Chronos' own quantisation: round to nearest in groups of columns, in the layout of MLX.

A matrix [N, K] becomes codes of 4 or 8 bits, and for each group of neighbouring columns of a row a
scale and a bias in bfloat16: value = code * scale + bias. Layout and choice of the scale are those
of `mlx.core.quantize`, mode affine: the end of a group's range that is farther from zero is met
exactly, and zero is a code. Codes are chosen for the scales as they are stored. Not here: which
tensors of a record they are (`codecs`), and how to compute with them (backends).

Shape legend: N rows, K columns, G groups of k columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUPS = (32, 64, 128)  # columns that share a scale: those MLX multiplies with
DEFAULT_GROUPS = {4: 32, 8: 64}  # by bits
_SMALLEST = np.float32(1e-7)


def quantise(weight_NK: NDArray[np.float32], bits: int, group: int) -> dict[str, NDArray[np.uint]]:
    """weight: codes in words of 32 bits [N, K * bits / 32], lowest bits first; scales and biases
    [N, G], bfloat16 as uint16. bits: 4 or 8; group: a divisor of K. NaN in a group becomes a scale
    that is NaN."""
    N, K = weight_NK.shape
    w_NGk = weight_NK.reshape(N, K // group, group)
    low_NG1, high_NG1 = w_NGk.min(-1, keepdims=True), w_NGk.max(-1, keepdims=True)
    most = np.float32((1 << bits) - 1)
    falls_NG1 = np.abs(low_NG1) > np.abs(high_NG1)
    edge_NG1 = np.where(falls_NG1, low_NG1, high_NG1)
    with np.errstate(all="ignore"):  # NaN and infinity are refused by name where they are written
        scale_NG1 = np.maximum((high_NG1 - low_NG1) / most, _SMALLEST)
        scale_NG1 = np.where(falls_NG1, scale_NG1, -scale_NG1)
        steps_NG1 = np.rint(edge_NG1 / scale_NG1)
        scale_NG1 = np.where(steps_NG1 == 0, scale_NG1, edge_NG1 / steps_NG1)
        scales_NG = bfloat16(scale_NG1[..., 0])
        biases_NG = bfloat16(np.where(steps_NG1 == 0, np.float32(0), edge_NG1)[..., 0])
        away_NGk = (w_NGk - _float32(biases_NG)[..., None]) / _float32(scales_NG)[..., None]
        codes_NK = np.rint(np.clip(away_NGk, 0, most)).astype(np.uint8).reshape(N, K)
    if bits == 4:
        codes_NK = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4
    words_NW = np.ascontiguousarray(codes_NK).view("<u4")
    return {"weight": words_NW, "scales": scales_NG, "biases": biases_NG}


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _float32(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)
