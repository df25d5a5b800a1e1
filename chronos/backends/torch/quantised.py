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
from typing import Any

import torch
from torch import Tensor

from chronos.backends.torch import kernels
from chronos.common.layout.quantised import GGUF_BLOCKS, bits_of, block_of

# E2M1 of OCP MX 1.0, by its code: eight magnitudes, and the same with the sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# What llama.cpp's IQ4 types stand for, by code.
_UNEVEN = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
    1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
_INT4 = tuple(float(code) for code in range(16))
Kinds = Mapping[str, Tensor]


def dequantised(encoding: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that its tensors, by kind, stand for. encoding: of this one matrix.

    In bfloat16 by a compiled kernel, in a fifth of the time and less, if the first matrix of a kind
    comes out as it does here.
    """
    if dtype == torch.bfloat16 and (found := kernels.dequantised(encoding, kinds)) is not None:
        alike = (encoding, *((kind, t.dtype, t.shape) for kind, t in kinds.items()))
        if alike not in _compared:
            expected = by_torch(encoding, kinds, dtype)
            _compared[alike] = torch.equal(found.view(torch.int16), expected.view(torch.int16))
        if _compared[alike]:
            return found
    return by_torch(encoding, kinds, dtype)


_compared: dict[Any, bool] = {}


def by_torch(encoding: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """The same, by operations of torch: the formulas."""
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
    weight_NK, scale = kinds["weight"], _scale(kinds)
    down, across = block_of(setting)
    wide = _powers(scale, torch.float32) if scale.dtype == torch.uint8 else scale.float()
    N, K = weight_NK.shape
    scale_NK = wide.repeat_interleave(down, 0)[:N].repeat_interleave(across, 1)[:, :K]
    return (_eight_bits(weight_NK) * scale_NK).to(dtype)


def _fp4(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    values_NK = _four_bits(_bytes(kinds["weight"]), _FP4, torch.float32)
    scale_NG = _powers(_bytes(_scale(kinds)), torch.float32)
    return (values_NK.unflatten(1, (-1, 32)) * scale_NG[..., None]).flatten(1).to(dtype)


def _scale(kinds: Kinds) -> Tensor:
    """Under Transformers' name or DeepSeek-V4's."""
    return kinds["scale"] if "scale" in kinds else kinds["weight_scale_inv"]


def _compressed(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    scale = kinds["weight_scale"]
    if setting == "fp8":
        return (_eight_bits(kinds["weight"]) * scale.float()).to(scale.dtype).to(dtype)
    if setting in ("mxfp4", "mxfp8", "nvfp4"):
        return _compressed_mx(setting, kinds, _bytes(scale)).to(dtype)
    bits = bits_of(setting)
    codes_NK = _codes(kinds["weight_packed"], bits)
    zero = kinds.get("weight_zero_point")  # packed along the rows
    zero_NG = (
        torch.full_like(scale, float(1 << bits - 1))
        if zero is None
        else _codes(zero.t(), bits)[:, : len(scale)].t()
    )
    return _grouped(codes_NK, scale, zero_NG).to(dtype)


def _compressed_mx(setting: str, kinds: Kinds, scale: Tensor) -> Tensor:
    """In bfloat16, as the library makes them."""
    if setting == "mxfp8":
        values = _eight_bits(kinds["weight"])
    else:
        values = _four_bits(kinds["weight_packed"], _FP4, torch.float32)
    if setting == "nvfp4":
        scale_NG = _eight_bits(scale.view(torch.float8_e4m3fn)) / kinds["weight_global_scale"]
    else:
        scale_NG = _powers(scale, torch.float32)
    values_NGk = values.unflatten(1, (scale_NG.shape[1], -1))
    return (values_NGk * scale_NG[..., None]).flatten(1).to(torch.bfloat16)


def _gptq(setting: str, kinds: Kinds, dtype: torch.dtype, less: int = 1) -> Tensor:
    """less: what the first version of the format stores zeros less by. Columns may be of any group,
    where they were quantised in the order of their activations: rows of scales are spread then."""
    bits, group_K = bits_of(setting), kinds["g_idx"]
    codes_NK = _codes(kinds["qweight"].t(), bits)
    scales_NG, zeros_NG = kinds["scales"].t(), (_codes(kinds["qzeros"], bits) + less).t()
    K, G = len(group_K), scales_NG.shape[1]
    regular_K = torch.arange(K, device=group_K.device) // -(-K // G)
    if group_K.is_meta or K % G or not torch.equal(group_K.long(), regular_K):
        scales_NG, zeros_NG = (
            m.contiguous().index_select(1, group_K) for m in (scales_NG, zeros_NG)
        )
    return _grouped(codes_NK, scales_NG, zeros_NG).to(dtype)


def _gptq2(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    return _gptq(setting, kinds, dtype, less=0)


def _awq(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:

    def ordered(packed: Tensor) -> Tensor:
        """Words have the even ones of their eight values first."""
        return _codes(packed, 4).unflatten(1, (-1, 2, 4)).transpose(-1, -2).flatten(1)

    codes_NK = ordered(kinds["qweight"]).t().contiguous()
    return _grouped(codes_NK, kinds["scales"].t(), ordered(kinds["qzeros"]).t()).to(dtype)


def _mlx(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    weight, scales = kinds["weight"], kinds["scales"]
    if setting.startswith("affine"):
        codes_NGk = _codes(weight, bits_of(setting)).unflatten(1, (scales.shape[1], -1))
        scaled_NGk = (codes_NGk * scales.float()[..., None]).to(scales.dtype)
        return (scaled_NGk + kinds["biases"][..., None]).flatten(1).to(dtype)
    values_NK = (
        _eight_bits(_bytes(weight).view(torch.float8_e4m3fn))
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


def _gguf(setting: str, kinds: Kinds, dtype: torch.dtype) -> Tensor:
    """Blocks in rows of bytes [N, B], in float32 as the gguf package has them, rounded once."""
    ((kind, raw_NB),) = ((kind, raw) for kind, raw in kinds.items() if kind != "bias")
    blocks = raw_NB.reshape(-1, GGUF_BLOCKS[kind][1])  # [blocks, bytes]
    return _GGUF_TYPES[kind](blocks).view(len(raw_NB), -1).to(dtype)


def _q4_0(blocks: Tensor) -> Tensor:
    """A scale and 32 integers of four bits."""
    return _half(blocks, 0) * (_halves(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """The same with a minimum behind the scale."""
    return _half(blocks, 0) * _halves(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    """A scale, and of 32 integers the fifth bits before the lower four."""
    codes = _halves(blocks[:, 6:], 16) | _fields(blocks[:, 2:6, None], 1).flatten(1) << 4
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """The same with a minimum behind the scale."""
    codes = _halves(blocks[:, 8:], 16) | _fields(blocks[:, 4:8, None], 1).flatten(1) << 4
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    """A scale and 32 integers of eight bits."""
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q2_k(blocks: Tensor) -> Tensor:
    """Scales and minima of 16 groups, four bits each; 256 integers of two bits; their scales."""
    scales, minima = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
    codes = _fields(blocks[:, 16:80].unflatten(1, (2, 1, 32)), 2).view(-1, 16, 16).float()
    scaled = (_half(blocks, 80) * scales)[..., None] * codes
    return scaled - (_half(blocks, 82) * minima)[..., None]


def _q3_k(blocks: Tensor) -> Tensor:
    """Of 256 integers the third bits, then the lower two; scales of 16 groups, six bits each, their
    upper two behind the lower four; their scale."""
    scales = _halves(blocks[:, 96:104], 8) | _fields(blocks[:, None, 104:108], 2).flatten(1) << 4
    upper = _fields(blocks[:, None, :32], 1).flatten(1)
    lower = _fields(blocks[:, 32:96].unflatten(1, (2, 1, 32)), 2).flatten(1)
    codes = ((lower | upper << 2).float() - 4).unflatten(1, (16, 16))
    return (_half(blocks, 108) * (scales.float() - 32))[..., None] * codes


def _q4_k(blocks: Tensor) -> Tensor:
    """Scales and minima (`_six_bits`) and 256 integers of four bits, of each 32 bytes first the
    lower halves."""
    return _six_bits(blocks, _halves(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    """The same with the fifth bits before the lower four: in each of 32 bytes one of each group."""
    upper = _fields(blocks[:, None, 16:48], 1).flatten(1)
    return _six_bits(blocks, _halves(blocks[:, 48:], 32) | upper << 4)


def _six_bits(blocks: Tensor, codes: Tensor) -> Tensor:
    """Two scales of scales; scales and minima of eight groups of codes, six bits each."""
    low, high = blocks[:, 4:12], blocks[:, 12:16]
    scale, least = low[:, :4], low[:, 4:]
    scales = torch.cat([scale & 63, (high & 15) | (scale >> 2 & 48)], 1).float()
    minima = torch.cat([least & 63, (high >> 4) | (least >> 2 & 48)], 1).float()
    scaled = (_half(blocks, 0) * scales)[..., None] * codes.unflatten(1, (8, 32)).float()
    return scaled - (_half(blocks, 2) * minima)[..., None]


def _q6_k(blocks: Tensor) -> Tensor:
    """256 integers of six bits, the lower four and the upper two apart; scales of 16 groups; their
    scale."""
    lower = _halves(blocks[:, :128], 64)
    upper = _fields(blocks[:, 128:192].unflatten(1, (2, 1, 32)), 2).flatten(1)
    codes = (lower | upper << 4).float() - 32
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    return codes.unflatten(1, (16, 16)) * scales[..., None]


def _iq4_nl(blocks: Tensor) -> Tensor:
    """A scale and 32 codes of unevenly spaced numbers."""
    return _half(blocks, 0) * _uneven(_halves(blocks[:, 2:], 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """A scale of scales; scales of eight groups of such codes, six bits each, the upper two before
    the lower four."""
    upper = _fields(blocks[:, 2:4, None], 2).flatten(1)
    scales = (_fields(blocks[:, 4:8, None], 4).flatten(1) | upper << 4).float() - 32
    values = _uneven(_halves(blocks[:, 8:], 16)).unflatten(1, (8, 32))
    return (_half(blocks, 0) * scales)[..., None] * values


def _uneven(codes: Tensor) -> Tensor:
    return torch.tensor(_UNEVEN, device=codes.device)[codes.int()]


def _halves(packed: Tensor, each: int) -> Tensor:
    """Of each so many bytes the lower four bits of all, then the upper ones [blocks, codes]."""
    return _fields(packed.unflatten(1, (-1, 1, each)), 4).flatten(1)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Integers of so many bits in bytes [..., 1, n], the lowest bits of all bytes first; in bytes
    [..., 1] one byte's behind the other."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    shifts = shifts if packed.shape[-1] == 1 else shifts[:, None]
    return packed >> shifts & ((1 << bits) - 1)


def _gguf_mxfp4(blocks: Tensor) -> Tensor:
    """A power of two and 32 values of E2M1: the lower halves of all bytes, then the upper ones."""
    values = _four_bits(blocks[:, 1:], _FP4, torch.float32).unflatten(1, (16, 2))
    return _powers(blocks[:, :1], torch.float32) * values.transpose(1, 2).flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """A float16 of each block [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


_GGUF_TYPES = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k,
    "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs, "mxfp4": _gguf_mxfp4,
}  # fmt: skip
_METHODS: dict[str, Callable[[str, Kinds, torch.dtype], Tensor]] = {
    "gguf": _gguf,
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fp4": _fp4,
    "compressed": _compressed,
    "gptq": _gptq,
    "gptq2": _gptq2,
    "awq": _awq,
    "mlx": _mlx,
    "swiglu": _mlx,  # Chronos' own quantisation is in MLX's layout
    "transformers": _mlx,
}


def _grouped(codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor) -> Tensor:
    """(code - zero) * scale in the dtype of the scale, for groups of neighbouring columns."""
    codes_NGk = codes_NK.unflatten(1, (scales_NG.shape[1], -1))
    wide_NGk = (codes_NGk - zeros_NG[..., None]) * scales_NG.float()[..., None]
    return wide_NGk.to(scales_NG.dtype).flatten(1)


def _codes(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers, as float32, that lie one behind the other in rows of words, lowest bits
    first."""
    raw = _bytes(packed)
    if bits == 8:
        return raw.float()
    if bits == 4:
        return _four_bits(raw, _INT4, torch.float32)
    group = math.lcm(bits, 8)  # bits after which whole bytes begin again
    bytes_ = raw.unflatten(1, (-1, group // 8)).long()
    words = (bytes_ << torch.arange(0, group, 8, device=raw.device)).sum(-1, keepdim=True)
    shifts = torch.arange(0, group, bits, device=raw.device)
    return ((words >> shifts) & ((1 << bits) - 1)).flatten(1).float()


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


def _eight_bits(coded_NK: Tensor) -> Tensor:
    """E4M3 in float32. On a CPU by a table of pairs: torch's own conversion takes eight times as
    long."""
    if coded_NK.device.type != "cpu" or coded_NK.shape[-1] % 2:
        return coded_NK.float()
    pairs = _bytes(coded_NK).view(torch.int16).int() & 0xFFFF
    return _fp8_pairs().index_select(0, pairs.flatten()).view(torch.float32).view(coded_NK.shape)


@cache
def _fp8_pairs() -> Tensor:
    """For each two bytes their two values, as one integer: 512 KiB."""
    value = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    two = torch.arange(1 << 16)
    return torch.stack([value[two & 255], value[two >> 8]], 1).view(torch.int64).flatten()


def _powers(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(e - 127) of E8M0, of which 0 is below float32's normal numbers."""
    bits = exponents.int() << 23
    return torch.where(exponents == 0, 1 << 22, bits).view(torch.float32).to(dtype)


def _bytes(words: Tensor) -> Tensor:
    """The same rows as bytes."""
    return words.contiguous().view(torch.uint8)
