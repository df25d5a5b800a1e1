"""Quantised matrices as the numbers they stand for: one function an encoding, in torch.

What the tensors look like is `common.layout.quantised`'s; here they become a matrix [N, K] (rows
out, columns in) in the dtype the model is computed in. Each formula is that of the library whose
format it is, rounding included, so a run has the bits of a run of the dequantised checkpoint: FP8
and MX in float32, rounded once; integers in the dtype of their scales (compressed-tensors, GPTQ,
AWQ), MLX's as `mx.dequantize` rounds on a CPU.

Shape legend: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from chronos.common.layout.quantised import bits_of, block_of

# E2M1 of OCP MX 1.0, by its code: eight magnitudes, and the same with the sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_INT4 = tuple(float(code) for code in range(16))
# Where a word of AWQ has its values 0 to 7.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
Kinds = Mapping[str, Tensor]


def dequantised(encoding: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that its tensors, by kind, stand for. encoding: of this one matrix."""
    method, _, setting = encoding.partition("-")
    # Rows lie one behind the other, as in the plain checkpoint: products of others have other bits.
    return _METHODS[method](setting, kinds, dtype).contiguous()


def _mxfp4(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """Values and powers of two: their products are exact in every dtype of a model."""
    blocks, scales_NG = kinds["blocks"], kinds["scales"]
    values_NG32 = _four_bits(blocks, _FP4, dtype)
    return (values_NG32 * _powers(scales_NG, dtype)[..., None]).flatten(1)


def _fp8(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """The last block of a row or column may be cut."""
    weight_NK, scale = kinds["weight"], kinds["weight_scale_inv"]
    down, across = block_of(setting)
    wide = _powers(scale, torch.float32) if scale.dtype == torch.uint8 else scale.float()
    N, K = weight_NK.shape
    scale_NK = wide.repeat_interleave(down, 0)[:N].repeat_interleave(across, 1)[:, :K]
    return (weight_NK.float() * scale_NK).to(dtype)


def _compressed(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    scale = kinds["weight_scale"]
    if setting == "fp8":
        return (kinds["weight"].to(scale.dtype) * scale).to(dtype)
    bits = bits_of(setting)
    codes_NK = _codes(kinds["weight_packed"], bits, scale.dtype)
    zero = kinds.get("weight_zero_point")  # packed along the rows
    zero_NG = (
        torch.full_like(scale, float(1 << bits - 1))
        if zero is None
        else _codes(zero.t(), bits, scale.dtype)[:, : len(scale)].t()
    )
    return _grouped(codes_NK, scale, zero_NG).to(dtype)


def _gptq(setting: str, kinds: Kinds, dtype: torch.dtype, less: int = 1) -> Tensor:
    """less: what the first version of the format stores zeros less by. Columns may be of any group,
    where they were quantised in the order of their activations."""
    bits, scales_GN = bits_of(setting), kinds["scales"]
    codes_NK = _codes(kinds["qweight"].t(), bits, scales_GN.dtype)
    zeros_GN = _codes(kinds["qzeros"], bits, scales_GN.dtype) + less
    group_K = kinds["g_idx"].long()
    return ((codes_NK - zeros_GN[group_K].t()) * scales_GN[group_K].t()).to(dtype)


def _gptq2(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    return _gptq(setting, kinds, dtype, less=0)


def _awq(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    scales_GN = kinds["scales"]

    def ordered(packed: Tensor) -> Tensor:
        codes = _codes(packed, 4, scales_GN.dtype)
        return codes.unflatten(1, (-1, 8))[..., list(_AWQ)].flatten(1)

    codes_NK, zeros_GN = ordered(kinds["qweight"]).t(), ordered(kinds["qzeros"])
    return _grouped(codes_NK, scales_GN.t(), zeros_GN.t()).to(dtype)


def _mlx(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    weight, scales = kinds["weight"], kinds["scales"]
    if setting.startswith("affine"):
        codes_NK = _codes(weight, bits_of(setting), scales.dtype)
        values_NGk = codes_NK.unflatten(1, (scales.shape[1], -1))
        return (values_NGk * scales[..., None] + kinds["biases"][..., None]).flatten(1).to(dtype)
    values_NK = (
        _bytes(weight).view(torch.float8_e4m3fn).float()
        if setting == "mxfp8"
        else _four_bits(_bytes(weight), _FP4, torch.float32)
    )
    scale_NG = (
        scales.view(torch.float8_e4m3fn).float()
        if setting == "nvfp4"
        else _powers(scales, torch.float32)
    )
    values_NGk = values_NK.unflatten(1, (scales.shape[1], -1))
    return (values_NGk * scale_NG[..., None]).flatten(1).to(torch.bfloat16).to(dtype)


_METHODS: dict[str, Callable[[str, Kinds, torch.dtype], Tensor]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "compressed": _compressed,
    "gptq": _gptq,
    "gptq2": _gptq2,
    "awq": _awq,
    "mlx": _mlx,
}


def _grouped(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor) -> Tensor:
    """(code - zero) * scale, for groups of neighbouring columns."""
    codes_NGk = codes_NK.unflatten(1, (scales_NG.shape[1], -1))
    return ((codes_NGk - zeros_NG[..., None]) * scales_NG[..., None]).flatten(1)


def _codes(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Unsigned integers that lie one behind the other in rows of words, lowest bits first."""
    raw = _bytes(packed)
    if bits == 4:
        return _four_bits(raw, _INT4, dtype)
    group = math.lcm(bits, 8)  # bits after which whole bytes begin again
    bytes_ = raw.unflatten(1, (-1, group // 8)).long()
    words = (bytes_ << torch.arange(0, group, 8, device=raw.device)).sum(-1, keepdim=True)
    shifts = torch.arange(0, group, bits, device=raw.device)
    return ((words >> shifts) & ((1 << bits) - 1)).flatten(1).to(dtype)


def _four_bits(raw: Tensor, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Two values a byte, the lower half first, by one look into a table of pairs."""
    pairs = _pairs(values, dtype, raw.device)
    found = pairs.index_select(0, raw.reshape(-1).int()).view(dtype)
    return found.view(*raw.shape[:-1], 2 * raw.shape[-1])


@cache
def _pairs(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each byte its two values, as one integer."""
    value = torch.tensor(values, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    both = torch.stack([value[byte & 15], value[byte >> 4]], 1)
    return both.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def _powers(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(e - 127) of E8M0, of which 0 is below float32's normal numbers."""
    bits = exponents.int() << 23
    return torch.where(exponents == 0, 1 << 22, bits).view(torch.float32).to(dtype)


def _bytes(words: Tensor) -> Tensor:
    """The same rows as bytes."""
    return words.contiguous().view(torch.uint8)
