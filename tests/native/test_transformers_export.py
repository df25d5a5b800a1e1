"""`chronos export --to hf`: Transformers computes what Chronos does, with and without code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mistral4ForCausalLM

import chronos
from chronos.backends.torch.checkpoint import load_model
from chronos.common.disk.tensors import read_checkpoint, write_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.layout import pack
from chronos.common.model.config import load_config
from chronos.interop.export import export
from chronos.testing.tiny import tiny_model, tiny_packed
from tests.support.guests import tiny_guest

IDS = np.random.default_rng(7).integers(6, 300, (2, 60))  # longer than the window of 32
HISTORY = {
    "routing_source": ("gate", "informed", "history"),
    "num_resident_experts": 2,
    "num_resident_experts_per_tok": 1,
    "history_decay": (0.9, 0.5),
    "history_norm": "unit",
}
# In a process that cannot import Chronos: whole, token by token, and in a batch with padding.
FRESH = """
import sys
sys.modules["chronos"] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(sys.argv[1]))
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size
    with torch.no_grad():
        name = folder.rpartition("/")[2]
        found[name] = model(ids).logits
        out = model(ids[:, :20])
        steps, cache = [out.logits], out.past_key_values
        for t in range(20, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache)
            steps.append(out.logits)
        found[name + "-steps"] = torch.cat(steps, 1)
        greedy = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        found[name + "-alone"] = model.generate(ids[:1, :9], **greedy)[0, 9:]
        padded = torch.cat((torch.zeros(1, 11, dtype=torch.long), ids[:1, :9]), 1)
        both = torch.cat((padded, ids[1:, :20]))
        mask = (torch.arange(20) >= torch.tensor([[11], [0]])).long()
        found[name + "-padded"] = model.generate(both, attention_mask=mask, **greedy)[0, 20:]
        loss = model(ids, labels=ids).loss
        found[name + "-loss"] = loss
np.savez(sys.argv[2], **{k: v.numpy() for k, v in found.items()})
"""


@torch.no_grad()
def native_logits(folder: Path) -> Any:
    return load_model(folder, torch.device("cpu"), True)(torch.from_numpy(IDS)).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: bytes(data) for entry, data in read_checkpoint(folder)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("library", "changes"),
    [
        (AutoModelForCausalLM, {"hybrid_pattern": ("mla",), "norm_topk_prob": False}),
        (Mistral4ForCausalLM, {"hybrid_pattern": ("mla",)}),
        (AutoModelForCausalLM, {"hybrid_pattern": ("sliding",), "num_shared_experts": 0}),
    ],
    ids=["deepseek_v2", "mistral4", "qwen3_moe"],
)
def test_an_architecture_of_transformers_computes_the_same(
    library: Any, changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = tiny_model(tmp_path / "src", **({"num_shared_experts": 2} | changes))
    pack(source, tmp_path / "packed")
    done = export(tmp_path / "packed", tmp_path / "out")
    assert done.architecture in request.node.callspec.id
    model, report = library.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    found = model.eval()(torch.from_numpy(IDS)).logits
    wanted = native_logits(source)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert float(wanted.std()) > 0.3  # logits that tell tokens apart
    export(source, tmp_path / "again")  # not packed: the same files
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process that imports both libraries, beside others
def test_with_code_every_model_runs_where_chronos_is_not(tmp_path: Path) -> None:
    wanted, tokens = {}, {}
    for name, changes in {"hybrid": {"num_shared_experts": 2}, "history": HISTORY}.items():
        packed = tiny_packed(tmp_path / f"{name}-packed", **changes)
        done = export(packed, tmp_path / name, with_code=True)
        assert done.architecture == "chronos" and "lookahead" in done.notes[0]
        assert not (tmp_path / name / "lookahead.safetensors").exists()
        with pytest.raises(ConfigError, match="Chronos runs none"):
            load_config(tmp_path / name)
        wanted[name] = native_logits(packed.with_name(f"{name}-packed-unpacked"))
        with chronos.load(packed, backend="torch", budget="resident") as engine:
            engine.stop_ids = frozenset()
            steps = engine.generate(IDS[0, :9].tolist(), max_tokens=40)
            tokens[name] = [step.token for step in steps]
    np.save(tmp_path / "ids.npy", IDS)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "ids.npy"), str(tmp_path / "out.npz")]
    command += [str(tmp_path / name) for name in wanted]
    place = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    for name, logits in wanted.items():
        scale = float(logits.abs().max())
        for kind in ("", "-steps"):
            np.testing.assert_allclose(found[name + kind], logits, rtol=0, atol=1e-5 * scale)
        assert found[f"{name}-alone"].tolist() == tokens[name] == found[f"{name}-padded"].tolist()
        assert len(set(tokens[name])) > 8
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), torch.from_numpy(IDS)[:, 1:].flatten()
        )
        assert float(found[f"{name}-loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_what_has_no_architecture_is_refused_by_name(tmp_path: Path) -> None:
    for number, (changes, why) in enumerate(
        [
            ({}, r"layers 1 attend to a window"),
            ({"hybrid_pattern": ("sliding",)}, "windows and shared experts"),
            ({"hybrid_pattern": ("mla",), "num_shared_experts": 0}, "no shared expert"),
            ({"hybrid_pattern": ("mla",), "rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
            ({"hybrid_pattern": ("mla",), **HISTORY}, "layer 1 chooses its experts by 'informed'"),
        ]
    ):
        source = tiny_model(tmp_path / str(number), **changes)
        with pytest.raises(ConfigError, match=f"{why}(.|\n)*--with-code"):
            export(source, tmp_path / "out")
    source = tiny_model(tmp_path / "ahead", routing_source=("gate", "lookahead", "lookahead"))
    with pytest.raises(ConfigError, match="predictors are not exported"):
        export(source, tmp_path / "out", with_code=True)
    assert not (tmp_path / "out").exists()


def test_weights_in_another_type(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", hybrid_pattern=("mla",), dtype="bfloat16")
    export(source, tmp_path / "wide", dtype="float32")
    export(source, tmp_path / "same")
    wide, same = (
        Mistral4ForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("wide", "same")
    )
    assert {value.dtype for value in same.values()} == {torch.bfloat16}
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name], same[name].float()) for name in wide)
    config = json.loads((tmp_path / "wide/config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["pad_token_id"]) == (
        "float32",
        [1, 5],
        0,
    )


def test_numbers_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", hybrid_pattern=("mla",), initializer_range=1e5)
    with pytest.raises(UsageError, match="F16 does not hold"):
        export(source, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_guest_is_the_checkpoint_it_was_packed_from(tmp_path: Path) -> None:
    packed = tiny_guest(tmp_path / "guest")
    write_tensors(packed / "forecast.safetensors", [("some", "F32", (1,), bytes(4))])
    done = export(packed, tmp_path / "out")
    assert done.architecture == "mixtral" and "forecast" in done.notes[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "guest-unpacked")
    assert not (tmp_path / "out/forecast.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
    for options in ({"dtype": "float16"}, {"with_code": True}):
        with pytest.raises(UsageError, match="for Chronos' own models"):
            export(packed, tmp_path / "other", **options)
    with pytest.raises(UsageError, match="not empty"):
        export(packed, tmp_path / "out")
