"""Tiny checkpoints quantised as they are published, and the plain ones they stand for.

Each writer takes a matrix [N, K] and gives the tensors of its format by kind, and the matrix in
float32 that they stand for, computed here by other code than Chronos': the libraries' own, where
they have some, else value by value. `save` replaces matrices of a model's checkpoint by theirs and
sets the model itself to what they stand for: it is then the library's run of the dequantised one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Coded = tuple[dict[str, Tensor], Tensor]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 16  # of FP8: widths of tiny models are no multiples of it


def mxfp4(weight_NK: Tensor) -> Coded:
    """As gpt-oss; dequantised by Transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    N, K = weight_NK.shape
    groups = weight_NK.float().view(N, K // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1) / 6)) + 1
    scaled = groups / torch.exp2(exponent)[..., None]
    nearest = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponent + 127).to(torch.uint8)
    plain_KN = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0]
    return {"blocks": blocks, "scales": scales}, plain_KN.T


def fp8(weight_NK: Tensor, scale_dtype: torch.dtype = torch.float32) -> Coded:
    """As DeepSeek-V3: a scale for each block that begins."""
    N, K = weight_NK.shape
    down, across = -(-N // BLOCK), -(-K // BLOCK)
    coded = torch.empty(N, K, dtype=torch.float8_e4m3fn)
    scales, plain = torch.empty(down, across), torch.empty(N, K)
    for i in range(down):
        for j in range(across):
            at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            block = weight_NK[at].float()
            scale = block.abs().max() / 448
            if scale_dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to(scale_dtype).float()
            coded[at] = (block / scale).to(torch.float8_e4m3fn)
            scales[i, j], plain[at] = scale, coded[at].float() * scale
    return {"weight": coded, "weight_scale_inv": scales.to(scale_dtype)}, plain


def fp4(weight_NK: Tensor, scale: str = "scale") -> Coded:
    """As DeepSeek-V4's experts: two values a byte, a power of two for each 32 columns; dequantised
    by Transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    coded, _ = mxfp4(weight_NK)
    weight = coded["blocks"].flatten(1).view(torch.int8)
    scales = coded["scales"].view(torch.float8_e8m0fnu)
    plain = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    return {"weight": weight, scale: scales}, plain


def mxfp8(weight_NK: Tensor) -> Coded:
    """As Transformers' `mxfp8`, and dequantised by it: a byte of exponent for each 32 columns."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    groups = weight_NK.float().unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1) / 448))
    coded = (groups / torch.exp2(exponent)[..., None]).flatten(1).to(torch.float8_e4m3fn)
    scales = (exponent + 127).to(torch.uint8)
    plain = Fp8Dequantize(None)._dequantize_one(coded, scales, torch.float32)
    return {"weight": coded, "weight_scale_inv": scales}, plain


def deepseek_v4(weight_NK: Tensor, routed: bool) -> Coded:
    """Experts in FP4, the rest in FP8 with powers of two, and both kinds of scales called so."""
    if routed:
        return fp4(weight_NK)
    coded, plain = fp8(weight_NK, torch.float8_e8m0fnu)
    return {"weight": coded["weight"], "scale": coded["weight_scale_inv"]}, plain


def compressed(
    weight_NK: Tensor, format_: str, bits: int = 4, kind: str = "int", **more: Any
) -> Coded:
    """As llm-compressor: coded and dequantised by compressed-tensors. more: of QuantizationArgs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(num_bits=bits, type=kind, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    by_group = weight_NK.to(torch.bfloat16).unflatten(
        1, (-1, args.group_size or weight_NK.shape[1])
    )
    low, high = by_group.amin(-1), by_group.amax(-1)
    tensors = {"weight": weight_NK.to(torch.bfloat16)}
    if args.strategy == "tensor_group":
        tensors["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scale, zero = calculate_qparams(low, high, args, tensors.get("weight_global_scale"))
    tensors["weight_scale"] = scale.to(torch.bfloat16)
    if not args.symmetric:
        tensors["weight_zero_point"] = zero
    coder = BaseCompressor.load_from_registry(format_)
    coded = coder.compress(tensors, scheme)
    return coded, coder.decompress(dict(coded), scheme)["weight"].float()


def _integers(weight_NK: Tensor, bits: int = 4, group: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales and zeros [N, G], with zeros from 1 on."""
    most = (1 << bits) - 1
    groups = weight_NK.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / most).to(torch.float16)
    zero = torch.round(-low / scale.float()).clamp(1, most)
    codes = torch.round(groups / scale.float()[..., None] + zero[..., None]).clamp(0, most)
    return codes.flatten(1).int(), scale, zero.int()


def _words(values: list[list[int]], bits: int = 4, order: Sequence[int] = range(8)) -> Tensor:
    """Rows of values in words of 32 bits; value number order[i] lies at bit i * bits."""
    each, rows = 32 // bits, []
    for row in values:
        words = []
        for start in range(0, len(row), each):
            word = sum(row[start + order[place]] << bits * place for place in range(each))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def gptq(weight_NK: Tensor, version: int = 1, shuffled: bool = False, bits: int = 4) -> Coded:
    """As AutoGPTQ packs, columns in groups by their index, or in any order."""
    N, K = weight_NK.shape
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    order = order if shuffled else torch.arange(K)
    codes, scale, zero = _integers(weight_NK[:, order], bits)
    groups = torch.empty(K, dtype=torch.int32)
    groups[order] = (torch.arange(K) // 16).int()
    back = torch.argsort(order)
    codes = codes[:, back]
    less = 1 if version == 1 else 0
    tensors = {
        "qweight": _words(codes.tolist(), bits).T.contiguous(),
        "qzeros": _words((zero.T - less).tolist(), bits),
        "scales": scale.T.contiguous(),
        "g_idx": groups,
    }
    spread = groups.long()
    return tensors, ((codes - zero[:, spread]).half() * scale[:, spread]).float()


def awq(weight_NK: Tensor) -> Coded:
    """As AutoAWQ packs, version gemm."""
    codes, scale, zero = _integers(weight_NK)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": _words(codes.T.tolist(), order=order),
        "qzeros": _words(zero.T.tolist(), order=order),
        "scales": scale.T.contiguous(),
    }
    difference = codes - zero.repeat_interleave(16, 1)
    return tensors, (difference.half() * scale.repeat_interleave(16, 1)).float()


def mlx(weight_NK: Tensor, mode: str = "affine", bits: int = 4, group: int = 32) -> Coded:
    """As MLX-LM: coded and dequantised by MLX, in bfloat16."""
    import mlx.core as mx

    weight = mx.array(weight_NK.float().numpy()).astype(mx.bfloat16)
    options = {"mode": mode, "bits": bits, "group_size": group}
    coded = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **options), strict=False))
    plain = mx.dequantize(coded["weight"], coded["scales"], coded.get("biases"), **options)
    return {kind: _torch(array) for kind, array in coded.items()}, _torch(plain).float()


def _torch(array: Any) -> Tensor:
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _as_mlx_names_them(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts one by one become stacks; gpt-oss' gate and up are matrices of their own there."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for key in sorted(
        tensors, key=lambda key: [int(p) if p.isdigit() else 0 for p in key.split(".")]
    ):
        one = re.fullmatch(r"(.+\.)experts\.\d+\.(.+)", key)
        if one:
            names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
            projection, kind = one[2].split(".")
            name = f"{one[1]}switch_mlp.{names.get(projection, projection)}.{kind}"
            stacks.setdefault(name, []).append(tensors[key])
        elif stacked := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj_(.+)", key):
            at, projection, kind = stacked.groups()
            if projection == "down":
                found[f"{at}.down_proj.{kind}"] = tensors[key]
            else:
                found[f"{at}.gate_proj.{kind}"] = tensors[key][:, ::2]
                found[f"{at}.up_proj.{kind}"] = tensors[key][:, 1::2]
        else:
            found[key] = tensors[key]
    return found | {name: torch.stack(parts) for name, parts in stacks.items()}


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def _compressed(
    format_: str, word: str, bits: int, kind: str = "int", **more: Any
) -> tuple[dict[str, Any], str, Any]:
    weights = {"num_bits": bits, "type": kind}
    settings = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }
    write = partial(compressed, format_=format_, bits=bits, kind=kind, **more)
    return settings, f"compressed-{word}", write


def _mlx(mode: str, bits: int, group: int = 32) -> tuple[dict[str, Any], str, Any]:
    settings = {"mode": mode, "bits": bits, "group_size": group}
    word = mode if mode[-1].isdigit() else f"{mode}{bits}"
    return {"mlx": settings}, f"mlx-{word}", partial(mlx, mode=mode, bits=bits, group=group)


# By a name for tests: the quantization_config, the encoding Chronos gives it, and the writer.
FORMATS: dict[str, tuple[dict[str, Any], str, Callable[[Tensor], Coded]]] = {
    "mxfp4": ({"quant_method": "mxfp4"}, "mxfp4", mxfp4),
    "fp8": (FP8, f"fp8-{BLOCK}x{BLOCK}", fp8),
    "fp8-e8m0": (
        FP8 | {"scale_fmt": "ue8m0"},
        f"fp8-{BLOCK}x{BLOCK}",
        partial(fp8, scale_dtype=torch.float8_e8m0fnu),
    ),
    "mxfp8": ({"quant_method": "mxfp8", "scale_fmt": "ue8m0"}, "fp8-1x32", mxfp8),
    "fp4": (FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}, "fp4", deepseek_v4),
    "int4": _compressed("pack-quantized", "int4", 4, group_size=32),
    "int4-asym": _compressed("pack-quantized", "int4", 4, group_size=32, symmetric=False),
    "int8": _compressed("pack-quantized", "int8", 8, strategy="channel"),
    "float": _compressed("float-quantized", "fp8", 8, "float", strategy="channel"),
    "ct-mxfp4": _compressed("mxfp4-pack-quantized", "mxfp4", 4, "float", group_size=32),
    "ct-mxfp8": _compressed(
        "mxfp8-quantized", "mxfp8", 8, "float", group_size=32, scale_dtype=torch.uint8
    ),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized", "nvfp4", 4, "float", strategy="tensor_group", group_size=16
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "gptq-int4", gptq),
    "gptq2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": True},
        "gptq2-int4",
        partial(gptq, version=2, shuffled=True),
    ),
    "mlx-affine4": _mlx("affine", 4),
    "mlx-affine3": _mlx("affine", 3),
    "mlx-affine6": _mlx("affine", 6),
    "mlx-affine8": _mlx("affine", 8),
    "mlx-mxfp4": _mlx("mxfp4", 4),
    "mlx-mxfp8": _mlx("mxfp8", 8),
    "mlx-nvfp4": _mlx("nvfp4", 4, 16),
    "gptq8": (
        {"quant_method": "gptq", "bits": 8, "group_size": 16},
        "gptq-int8",
        partial(gptq, bits=8),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq-int4", awq),
}


def save(model: Any, folder: Path, name: str, wanted: Callable[[str], bool]) -> None:
    """Write the model's checkpoint with the matrices that are `wanted`, by their names, quantised;
    the model has what they stand for afterwards."""
    settings, _, write = FORMATS[name]
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        stacked = weight.dim() == 3 and ".experts." in key  # gpt-oss, [E, K, N]
        if not wanted(key) or weight.dim() == 1 or ".experts." in key and "bias" in key:
            tensors[key] = plain[key] = weight
        elif stacked:
            coded = [write(one.T) for one in weight]
            for kind in coded[0][0]:
                tensors[f"{key}_{kind}"] = torch.stack([parts[kind] for parts, _ in coded])
            plain[key] = torch.stack([value.T for _, value in coded]).to(weight.dtype)
        else:
            routed = {"routed": ".experts." in key} if write is deepseek_v4 else {}
            parts, value = write(weight, **routed)
            base = key.removesuffix(".weight")
            tensors |= {f"{base}.{kind}": part for kind, part in parts.items()}
            plain[key] = value.to(weight.dtype)
    twin = folder.with_name(folder.name + "-plain")
    model.save_pretrained(twin)
    _write(twin, plain)
    loaded = type(model).from_pretrained(twin, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    if "mlx" in settings:
        tensors = _as_mlx_names_them(tensors)
        settings = settings["mlx"]
        keys = {"quantization": settings, "quantization_config": settings}
    else:
        keys = {"quantization_config": settings}
    _write(folder, tensors)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | keys))


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
