"""How a checkpoint that another library quantised is coded: its config.json, as an encoding's name.

Methods are told by `quantization_config` (Transformers' key) or `quantization` (MLX-LM's). One that
Chronos computes with becomes the name that records bear, settings included ("fp8-128x128"); of any
other only the method is known, by which it is refused. What the tensors of an encoding look like is
`common.layout.quantised`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# compressed-tensors' formats of floating values: their bits, and the encoding.
_FLOAT_FORMATS = {
    "float-quantized": (8, "compressed-fp8"),
    "mxfp8-quantized": (8, "compressed-mxfp8"),
    "mxfp4-pack-quantized": (4, "compressed-mxfp4"),
    "nvfp4-pack-quantized": (4, "compressed-nvfp4"),
}
_LIMIT = 1 << 16  # rows or columns that share a scale


def coding_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """The method a quantization_config names, and the encoding of what it quantised; "" for the
    second where Chronos does not compute with that: the first then says what it was."""
    method = str(settings.get("quant_method") or "unknown")[:40]
    if method == "mxfp4":
        return method, "mxfp4"
    if method == "fp8":
        block = settings.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2 and all(map(_is_size, block)):
            return method, f"fp8-{block[0]}x{block[1]}"
        return f"{method} without weight_block_size", ""
    if method == "mxfp8":  # FP8 with a power of two for each 32 columns of a row
        return method, "fp8-1x32"
    if method == "compressed-tensors":
        return _compressed(settings)
    if method == "gptq" and settings.get("bits") in (4, 8):
        version = "2" if settings.get("checkpoint_format") == "gptq_v2" else ""
        odd = settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2")
        return method, "" if odd else f"gptq{version}-int{settings['bits']}"
    if method == "awq" and settings.get("bits") == 4 and settings.get("version", "gemm") == "gemm":
        return method, "awq-int4"
    return method, ""


def _compressed(settings: Mapping[str, Any]) -> tuple[str, str]:
    """compressed-tensors: what its format and the weights of its groups say."""
    method, format_ = "compressed-tensors", str(settings.get("format"))[:40]
    groups = settings.get("config_groups")
    weights = [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    kinds = {(w.get("type"), w.get("num_bits")) for w in weights}
    ordered = any(w.get("actorder") not in (None, False, "static", "weight") for w in weights)
    if format_ == "pack-quantized" and kinds in ({("int", 4)}, {("int", 8)}) and not ordered:
        return method, f"compressed-int{kinds.pop()[1]}"
    if format_ in _FLOAT_FORMATS:
        bits, word = _FLOAT_FORMATS[format_]
        return (method, word) if kinds == {("float", bits)} else (f"{method} {format_}", "")
    return f"{method} {format_}", ""


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LIMIT
