"""Penalties and rules against the logits processors of Transformers, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chronos.common.text.generation_config import read_defaults
from chronos.common.text.sampling import SamplingParams, adjust_logits

torch = pytest.importorskip("torch", reason="the reference runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference itself")

VOCABULARY, PROMPT = 40, 9
SETTINGS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
    {"min_new_tokens": 4},
    {"min_length": 12},
    {"suppress_tokens": [3, 17]},
    {"begin_suppress_tokens": [2, 5]},
    {"bad_words_ids": [[4], [2, 6], [1, 2, 3], [7]]},
    {"repetition_penalty": 1.2, "bad_words_ids": [[5, 5]], "min_new_tokens": 2,
     "suppress_tokens": [0], "begin_suppress_tokens": [1]},
]  # fmt: skip


def processors(settings: dict[str, object]) -> object:
    config = transformers.GenerationConfig(**settings, eos_token_id=[7, 8])
    tiny = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, head_dim=4,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(tiny)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    return model._get_logits_processor(config, input_ids_seq_length=PROMPT, device="cpu")


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_logits_are_those_of_transformers(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": [7, 8]})
    )
    params = read_defaults(tmp_path).fill(SamplingParams())
    process, random = processors(settings), np.random.default_rng(3)
    changed = 0
    for length in [PROMPT] * 20 + [PROMPT + 1, PROMPT + 3, PROMPT + 5, PROMPT + 30] * 10:
        ids = random.integers(0, 10, length).tolist()  # few kinds, so that words and runs repeat
        logits = random.standard_normal(VOCABULARY).astype(np.float32)
        expected = process(torch.tensor([ids]), torch.from_numpy(logits[None].copy()))[0].numpy()
        np.testing.assert_array_equal(adjust_logits(logits, ids, PROMPT, params), expected)
        changed += not np.array_equal(logits, expected)
    assert changed
