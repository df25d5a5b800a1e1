"""Checkpoints as they are published, quantised, on torch: the bits of the dequantised checkpoint.

The reference is Transformers' resident run of the plain model that the quantised one stands for
(`tests/support/quantised.py` says how it is made, by other code than Chronos').
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import chronos
from chronos.common.layout import open_layout, pack, verify
from tests.native.test_transformers_guests import by_engine, by_library
from tests.support import quantised
from tests.support.guests import ARCHITECTURES, BASE
from tests.support.quantised import FORMATS

PROMPT = np.random.default_rng(1).integers(3, 64, 40).tolist()
# Where a format needs groups of 32 or 16 columns; FP8's widths are no multiples of its blocks.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "shared_expert_intermediate_size": 32,
}
CASES = {
    "mxfp4": "gpt_oss", "fp8": "deepseek_v3", "fp8-e8m0": "qwen3_moe", "int4": "qwen3_moe",
    "int4-asym": "deepseek_v3", "int8": "qwen3_moe", "float": "glm4_moe", "ct-mxfp4": "mixtral",
    "ct-mxfp8": "qwen3_moe", "ct-nvfp4": "qwen3_moe", "gptq": "qwen3_moe",
    "gptq2": "qwen2_moe", "awq": "mixtral", "mlx-affine4": "qwen3_moe", "mlx-affine3": "olmoe",
    "mlx-affine6": "dots1", "mlx-affine8": "glm4_moe", "mlx-mxfp4": "gpt_oss",
    "mlx-mxfp8": "mixtral", "mlx-nvfp4": "phimoe",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_flushing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@dataclass
class Guest:
    model: Any  # the library's, with the values that the quantised one stands for
    source: Path
    packed: Path


def wanted(name: str) -> bool:
    """Experts and attention; routers, embeddings and the head stay plain, as everywhere."""
    return ".experts." in name or "_proj.weight" in name or "kv_a_proj" in name


def experts_only(name: str) -> bool:
    return ".experts." in name


def everything(name: str) -> bool:
    return "norm" not in name and name.endswith(("weight", "_proj"))


def build(model_type: str, dtype: torch.dtype, wide: bool) -> Any:
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES[model_type]
    if wide:
        settings |= {k: v for k, v in WIDE.items() if k in settings}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Guest]:
    made: dict[Any, Guest] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Guest:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            model = build(CASES[name], dtype, not name.startswith("fp8"))
            chosen = wanted
            if name == "mxfp4":
                chosen = experts_only
            elif name.startswith("mlx"):
                chosen = everything
            quantised.save(model, folder / "source", name, chosen)
            pack(folder / "source", folder / "packed")
            made[name, dtype] = Guest(model, folder / "source", folder / "packed")
        return made[name, dtype]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_dequantised_checkpoint(
    name: str, dtype: torch.dtype, guest: Callable[..., Guest]
) -> None:
    tiny = guest(name, dtype)
    layout = open_layout(tiny.packed)
    assert set(layout.encodings.values()) == {FORMATS[name][1]}
    expected = by_library(tiny.model, PROMPT)
    for budget in (2 * layout.record_nbytes, "50%", "all", "resident"):
        with chronos.load(tiny.packed, backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            if engine.feed is not None:
                assert engine.feed.stats().peak_expert_bytes <= engine.budget_bytes


@pytest.mark.parametrize("name", CASES)
def test_a_record_has_the_bytes_of_the_source(name: str, guest: Callable[..., Guest]) -> None:
    tiny = guest(name)
    assert verify(tiny.packed).encodings == [FORMATS[name][1]]
