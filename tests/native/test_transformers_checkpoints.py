"""Checkpoints as people have them, against what Transformers' own `from_pretrained` makes of them.

Text models inside multimodal configs, tables of integers and other dtypes in the dense part, files
that name no dtype, vocabularies of another size, shards without an index.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chronos
from chronos.common.errors import ConfigError, ShapeMismatch
from chronos.common.layout import pack
from tests.support.guests import ARCHITECTURES, BASE, LINEAR, NAMED

PROMPT = np.random.default_rng(5).integers(3, 64, 24).tolist()


pytestmark = pytest.mark.usefixtures("no_flushing")


def save(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> Path:
    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES["qwen3_moe"] | keys
    config = transformers.AutoConfig.for_model("qwen3_moe", **settings)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def change(folder: Path, edit: Any, **config: Any) -> None:
    """Edit the tensors, a dict, and keys of config.json; None removes a key."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    data = json.loads((folder / "config.json").read_text()) | config
    data = {key: value for key, value in data.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))


def by_library(folder: Path, count: int = 6) -> list[int]:
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


def written(folder: Path, budget: str, count: int = 6) -> tuple[list[int], str]:
    with chronos.load(folder, backend="torch", budget=budget) as engine:
        engine.stop_ids = frozenset()
        tokens = engine.generate(PROMPT, max_tokens=count).result.tokens
        return tokens, str(engine.session.model.core.dtype)


def test_the_text_model_of_a_multimodal_file(tmp_path: Path) -> None:
    text = BASE | NAMED | LINEAR | {"initializer_range": 0.3, "num_hidden_layers": 2}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2}
    config = transformers.AutoConfig.for_model(
        "qwen3_5_moe", text_config=text, vision_config=vision | {"out_hidden_size": 32}
    )
    torch.manual_seed(1)
    kind = transformers.Qwen3_5MoeForConditionalGeneration
    kind._from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    want = by_library(tmp_path / "source")
    for name, budget in (("packed", "50%"), ("packed", "resident"), ("source", "all")):
        assert written(tmp_path / name, budget)[0] == want


def test_tensors_that_are_no_weights_are_read_or_left_as_the_library_does(tmp_path: Path) -> None:
    odd = {
        "ids": torch.arange(7), "mask": torch.ones(3, 3, dtype=torch.bool), "none": torch.zeros(0),
        "wide": torch.ones(3, dtype=torch.float64), "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "short": torch.ones(5, dtype=torch.int16), "phase": torch.ones(2, dtype=torch.complex64),
    }  # fmt: skip
    save(tmp_path / "source")
    change(tmp_path / "source", lambda tensors: tensors | {f"model.{n}": t for n, t in odd.items()})
    pack(tmp_path / "source", tmp_path / "packed")
    assert written(tmp_path / "packed", "50%")[0] == by_library(tmp_path / "source")


@pytest.mark.parametrize("wide", ["mlp.gate.weight", "lm_head.weight"])
def test_the_dtype_where_the_file_names_none(tmp_path: Path, wide: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.float() if k.endswith(wide) else v for k, v in tensors.items()}

    save(tmp_path / "source", torch.bfloat16)
    change(tmp_path / "source", edit, dtype=None, torch_dtype=None)
    pack(tmp_path / "source", tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    assert written(tmp_path / "packed", "50%") == (
        by_library(tmp_path / "source"),
        str(model.dtype),
    )
    assert (model.dtype == torch.float32) == (wide == "lm_head.weight")


def test_a_table_of_another_size_is_named_with_both_shapes(tmp_path: Path) -> None:
    """One that packing does not know: the library's own report is in no user's hands."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"model.norm.weight": torch.ones(40)}

    save(tmp_path / "source")
    change(tmp_path / "source", edit)
    pack(tmp_path / "source", tmp_path / "packed")
    for name, budget in (("packed", "50%"), ("source", "all")):
        with pytest.raises(ShapeMismatch, match=r"model.norm.weight is \[40\], .*implies \[32\]"):
            written(tmp_path / name, budget)


def test_shards_without_an_index_run_packed(tmp_path: Path) -> None:
    save(tmp_path / "source")
    want = by_library(tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    path.rename(path.with_name("model-00001-of-00001.safetensors"))
    with pytest.raises(ConfigError, match="does not find shards") as caught:
        written(tmp_path / "source", "all")
    assert "chronos pack" in caught.value.fix
    pack(tmp_path / "source", tmp_path / "packed")
    assert written(tmp_path / "packed", "50%")[0] == want


def test_keys_that_a_file_leaves_out_are_the_librarys_defaults(tmp_path: Path) -> None:
    save(tmp_path / "source", num_experts=8, num_experts_per_tok=8, mlp_only_layers=[])
    keys = {"num_experts_per_tok": None, "max_position_embeddings": None}
    change(tmp_path / "source", lambda tensors: tensors, **keys)
    pack(tmp_path / "source", tmp_path / "packed")
    with chronos.load(tmp_path / "packed", backend="torch", budget="all") as engine:
        assert (engine.context, engine.config.num_experts_per_tok) == (32_768, 8)
    assert written(tmp_path / "packed", "all")[0] == by_library(tmp_path / "source")
