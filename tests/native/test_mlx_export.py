"""`chronos export --to mlx`: MLX-LM computes what Chronos and Transformers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import torch
from mlx_lm.sample_utils import make_sampler
from transformers import AutoModelForCausalLM

import chronos
from chronos.backends.torch.checkpoint import load_model
from chronos.common.errors import ConfigError
from chronos.common.layout import pack
from chronos.interop.export import export
from chronos.testing.tiny import tiny_model
from tests.support.guests import tiny_guest

IDS = np.random.default_rng(7).integers(6, 300, (1, 40))
OURS: dict[str, dict[str, Any]] = {
    "latents": {"hybrid_pattern": ("mla",), "norm_topk_prob": False, "num_shared_experts": 2},
    "normed": {"hybrid_pattern": ("mla",)},
    "windows": {"hybrid_pattern": ("sliding",), "num_shared_experts": 0, "sliding_window": 256},
}


def check(folder: Path, wanted_BTV: Any) -> None:
    model, _ = mlx_lm.utils.load_model(folder)
    found_BTV = np.array(model(mx.array(IDS)).astype(mx.float32))
    scale = float(np.abs(wanted_BTV).max())
    np.testing.assert_allclose(found_BTV, wanted_BTV, rtol=0, atol=2e-5 * scale)
    assert np.array_equal(found_BTV.argmax(-1), wanted_BTV.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_a_native_model(name: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", **OURS[name])
    done = export(source, tmp_path / "out", to="mlx")
    assert done.architecture == ("qwen3_moe" if name == "windows" else "mistral4")
    model = load_model(source, torch.device("cpu"), True)
    check(tmp_path / "out", model(torch.from_numpy(IDS)).logits.numpy())


def test_mlx_lm_writes_our_tokens_and_reads_our_tokenizer(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", **OURS["normed"])
    export(source, tmp_path / "out", to="mlx")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    prompt = tokenizer.encode("def add(left")
    steps = mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=30, sampler=make_sampler(temp=0.0)
    )
    with chronos.load(source, backend="mlx") as engine:
        assert engine.tokenizer is not None
        assert engine.tokenizer.encode_prompt("def add(left") == prompt
        ours = [step.token for step in engine.generate(prompt, max_tokens=30)]
    assert [step.token for step in steps] == ours and len(ours) > 8


@torch.no_grad()
def test_a_guest_as_transformers_saves_it(tmp_path: Path) -> None:
    tiny_guest(tmp_path / "guest")
    source = tmp_path / "guest-unpacked"
    config = json.loads((source / "config.json").read_text())
    theta = config.pop("rope_theta") / 2  # in the new spelling alone, which MLX-LM does not read
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (source / "config.json").write_text(json.dumps(config))
    pack(source, tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out", to="mlx")
    model = AutoModelForCausalLM.from_pretrained(source)
    check(tmp_path / "out", model(torch.from_numpy(IDS)).logits.numpy())


def test_what_mlx_lm_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MLX-LM has no such(.|\n)*layers 1 attend to a window"):
        export(tiny_model(tmp_path / "hybrid"), tmp_path / "out", to="mlx")
    changes = OURS["windows"] | {"sliding_window": 32}
    with pytest.raises(ConfigError, match="window of 32"):
        export(tiny_model(tmp_path / "windows", **changes), tmp_path / "out", to="mlx")
    with pytest.raises(ConfigError, match="has no model nobody"):
        export(tiny_guest(tmp_path / "odd", model_type="nobody"), tmp_path / "out", to="mlx")
    with pytest.raises(ConfigError, match="MXFP4 it was released in alone"):
        export(tiny_guest(tmp_path / "oss", model_type="gpt_oss"), tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()
