"""Writing checkpoints of gpt-oss-20b's widths, quantised as they are published, of random weights.

MXFP4 as gpt-oss, FP8 in blocks and int4 of compressed-tensors as Qwen3-MoE. Fewer layers and a
byte-level vocabulary; the widths, heads and experts are gpt-oss-20b's. Gates of gpt-oss are skewed
by their biases: of the needs of a layer an LRU cache of 12.5, 25 and 50 % of the experts then meets
37, 61 and 89 %, beside 41, 63 and 88 % of gpt-oss-20b's recorded routing. Not covered: text that
says anything.

Shape legend: E experts, N rows out, K columns in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, PretrainedConfig, Qwen3MoeConfig

from bench.lib import checkpoint

CODINGS = ("mxfp4", "fp8", "int4")
_WIDTH, _EXPERTS, _TOP_K, _HEADS, _KEYS, _HEAD = 2880, 32, 4, 64, 8, 64
_BLOCK, _GROUP = 128, 32  # of FP8, of int4
_GATE_STD, _GATE_BIAS_STD = 0.02, 1.0
_DENSE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
_INT4 = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP,
}  # fmt: skip
_SAID: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": _DENSE},
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [_BLOCK, _BLOCK],
        "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"],
    },
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    },
}


def config(coding: str, layers: int) -> PretrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": checkpoint.VOCABULARY,
        "num_hidden_layers": layers,
        "hidden_size": _WIDTH,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEYS,
        "head_dim": _HEAD,
        "num_experts_per_tok": _TOP_K,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": checkpoint.EOS,
        "pad_token_id": checkpoint.PAD,
        "dtype": "bfloat16",
    }
    if coding == "mxfp4":
        own = {"num_local_experts": _EXPERTS, "intermediate_size": _WIDTH, "sliding_window": 128}
        return GptOssConfig(**shared, **own)
    own = {"num_experts": _EXPERTS, "moe_intermediate_size": _WIDTH, "norm_topk_prob": True}
    return Qwen3MoeConfig(**shared, **own, intermediate_size=_WIDTH)


def write(folder: Path, coding: str, layers: int) -> None:
    """The checkpoint, a file a layer."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for number in range(-1, layers):
        file = f"model-{number + 2:05}-of-{layers + 1:05}.safetensors"
        found = dict(_ends(random) if number < 0 else _layer(coding, number, random))
        save_file(found, folder / file, {"format": "pt"})
        where |= dict.fromkeys(found, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config(coding, layers).save_pretrained(folder)
    checkpoint.save_sides(folder)
    path = folder / "config.json"
    said = json.loads(path.read_text()) | {"quantization_config": _SAID[coding]}
    path.write_text(json.dumps(said, indent=2))


def _normal(random: torch.Generator, *shape: int, std: float = 0.02) -> Tensor:
    return (torch.randn(shape, generator=random) * std).bfloat16()


def _bytes(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=random)


def _ends(random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", _normal(random, checkpoint.VOCABULARY, _WIDTH, std=1.0)
    yield "lm_head.weight", _normal(random, checkpoint.VOCABULARY, _WIDTH)
    yield "model.norm.weight", torch.ones(_WIDTH, dtype=torch.bfloat16)


def _layer(coding: str, layer: int, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    at, published = f"model.layers.{layer}", coding == "mxfp4"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{norm}.weight", torch.ones(_WIDTH, dtype=torch.bfloat16)
    attention = f"{at}.self_attn"
    for name, heads in {"q": _HEADS, "k": _KEYS, "v": _KEYS}.items():
        yield f"{attention}.{name}_proj.weight", _normal(random, heads * _HEAD, _WIDTH)
        if published:
            yield f"{attention}.{name}_proj.bias", _normal(random, heads * _HEAD)
    yield f"{attention}.o_proj.weight", _normal(random, _WIDTH, _HEADS * _HEAD)
    if published:
        yield f"{attention}.o_proj.bias", _normal(random, _WIDTH)
        yield f"{attention}.sinks", _normal(random, _HEADS)
        yield f"{at}.mlp.router.bias", _normal(random, _EXPERTS, std=_GATE_BIAS_STD)
    else:
        for name in ("q_norm", "k_norm"):
            yield f"{attention}.{name}.weight", torch.ones(_HEAD, dtype=torch.bfloat16)
    gate = "router" if published else "gate"
    yield f"{at}.mlp.{gate}.weight", _normal(random, _EXPERTS, _WIDTH, std=_GATE_STD)
    yield from (_stacks if published else partial(_one_by_one, coding))(f"{at}.mlp.experts", random)


def _stacks(at: str, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, rows in (("gate_up_proj", 2 * _WIDTH), ("down_proj", _WIDTH)):
        groups = (_EXPERTS, rows, _WIDTH // 32)
        yield f"{at}.{name}_blocks", _bytes(random, 0, 256, *groups, 16)
        yield f"{at}.{name}_scales", _bytes(random, 119, 122, *groups)
        yield f"{at}.{name}_bias", _normal(random, _EXPERTS, rows)


def _one_by_one(coding: str, at: str, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for expert in range(_EXPERTS):
        for part in ("gate", "up", "down"):
            for kind, tensor in (_fp8 if coding == "fp8" else _int4)(random).items():
                yield f"{at}.{expert}.{part}_proj.{kind}", tensor


def _fp8(random: torch.Generator) -> dict[str, Tensor]:
    codes_NK = _bytes(random, 0, 256, _WIDTH, _WIDTH) & 0xF7  # no code that is no number
    blocks = -(-_WIDTH // _BLOCK)
    scale = torch.rand((blocks, blocks), generator=random) * 2e-4 + 1e-5
    return {"weight": codes_NK.view(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _int4(random: torch.Generator) -> dict[str, Tensor]:
    codes = _bytes(random, 0, 256, _WIDTH, _WIDTH // 2)
    scale_NG = torch.rand((_WIDTH, _WIDTH // _GROUP), generator=random) * 0.008 + 1e-3
    return {
        "weight_packed": codes.view(torch.int32),
        "weight_scale": scale_NG.bfloat16(),
        "weight_shape": torch.tensor([_WIDTH, _WIDTH]),
    }
