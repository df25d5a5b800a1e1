"""Positions scaled by a sequence's length: prompts in pieces, borders, sequences one after another.

Oracle: Transformers' own `generate`, which gets a prompt in one pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import chronos
from chronos.common.layout import pack
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence
from tests.support.guests import ARCHITECTURES, BASE

IDS = np.random.default_rng(3).integers(3, 64, 700).tolist()
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0]}
MSCALE = {"short_mscale": 1.0, "long_mscale": 1.2}


pytestmark = pytest.mark.usefixtures("no_flushing")


def build(model_type: str, folder: Path, context: int = 2048, **rope: Any) -> Any:
    """The library's model, saved and packed in `folder`."""
    torch.manual_seed(1)
    rope = {"rope_theta": 10_000.0} | rope
    settings = BASE | {"initializer_range": 0.4, "max_position_embeddings": context}
    if "original_max_position_embeddings" in rope and model_type == "phimoe":
        border = rope["original_max_position_embeddings"]
        settings |= {"original_max_position_embeddings": border}
    settings |= ARCHITECTURES[model_type] | {"rope_parameters": rope}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder / "source")
    pack(folder / "source", folder / "packed")
    return model


def by_library(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Of a freshly loaded model: a module keeps what longer sequences left in it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def streamed(folder: Path, budget: str = "50%", **options: Any) -> chronos.Engine:
    engine = chronos.load(folder / "packed", backend="torch", budget=budget, **options)
    engine.stop_ids = frozenset()
    return engine


def written(engine: chronos.Engine, prompt: list[int], count: int) -> list[int]:
    return engine.generate(prompt, max_tokens=count).result.tokens


@pytest.mark.parametrize("model_type", ["phimoe", "qwen3_moe"])
@pytest.mark.parametrize(("border", "prompt", "count"), [(24, 18, 12), (540, 600, 4)])
def test_longrope_before_at_and_beyond_its_border(
    tmp_path: Path, model_type: str, border: int, prompt: int, count: int
) -> None:
    more = MSCALE if model_type == "phimoe" else {}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": border}
    build(model_type, tmp_path, **rope, **FACTORS, **more)
    want = by_library(tmp_path, IDS[:prompt], count)
    with streamed(tmp_path) as engine:
        assert written(engine, IDS[:prompt], count) == want
        assert written(engine, IDS[:5], 3) == by_library(tmp_path, IDS[:5], 3)
        assert written(engine, IDS[:prompt], count) == want
    with streamed(tmp_path, "resident") as engine:
        assert written(engine, IDS[:prompt], count) == want


def test_dynamic_scaling_follows_the_prompt_and_forgets_the_sequence_before(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path, context=64, rope_type="dynamic", factor=16.0)
    lengths = (600, 70, 64, 30)
    want = [by_library(tmp_path, IDS[:length], 6) for length in lengths]
    with streamed(tmp_path) as engine:
        assert engine.context == 1024
        assert [written(engine, IDS[:length], 6) for length in lengths] == want


def test_a_prompt_behind_kept_keys_is_what_it_is_alone(tmp_path: Path) -> None:
    """The keys of the first piece were rotated for another length: they are computed anew."""
    build("qwen3_moe", tmp_path, context=64, rope_type="dynamic", factor=16.0)
    greedy = SamplingParams()
    with streamed(tmp_path) as engine:
        runner = OneSequence(engine.session, record=True)
        runner.prefill(IDS[:100], greedy)
        alone = runner.logits()
        runner.reset()
        runner.prefill(IDS[:80], greedy)
        runner.routing()
        runner.prefill(IDS[80:100], greedy)
        assert np.array_equal(runner.logits(), alone) and runner.position == 100
        assert sum(len(ids_TLK) for ids_TLK, _ in runner.routing()) == 20


def test_yarn_reaches_as_far_as_its_factor(tmp_path: Path) -> None:
    build(
        "qwen3_moe", tmp_path, 64, rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    )
    with streamed(tmp_path) as engine:
        assert engine.context == 256
        assert written(engine, IDS[:100], 6) == by_library(tmp_path, IDS[:100], 6)
