"""Models on an NVIDIA GPU: streamed through host memory against everything on the device.

The same kernels run on the same values, so the logits of every budget are compared bit for bit.
`make gpu` runs these; the order of copies and computation is tested without a GPU in
test_torch_store_cuda.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chronos
from chronos.backends.torch.sampling import draw
from chronos.common.layout import open_layout, pack
from chronos.common.text import sampling
from chronos.common.text.sampling import SamplingParams
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_model
from tests.support import company

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
GREEDY = SamplingParams()
PROMPT = [7 * i % CONFIG.vocab_size for i in range(3 * CONFIG.sliding_window)]
STEPS = 24


def load(folder: Path | str, **options: Any) -> chronos.Engine:
    return chronos.load(folder, backend="torch", device="cuda", **options)


def rollout(engine: chronos.Engine, prompt: list[int], steps: int = STEPS) -> np.ndarray:
    """Logits after the prompt and after each greedy token."""
    runner = OneSequence(engine.session)
    token = runner.prefill(prompt, GREEDY)
    found = [runner.logits()]
    for _ in range(steps):
        token = runner.decode(token, GREEDY)
        found.append(runner.logits())
    return np.stack(found)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    pack(tiny_model(folder / "model", dtype=request.param), folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("warm", [0, "50%", "all"])
@pytest.mark.parametrize("budget", ["25%", "50%", "all"])
def test_streamed_is_resident_bit_for_bit(packed: Path, budget: str, warm: str | int) -> None:
    with load(packed, budget="resident") as engine:
        assert engine.device.startswith("cuda")
        expected = rollout(engine, PROMPT)
    with load(packed, budget=budget, warm=warm, prefetch="off") as engine:
        np.testing.assert_array_equal(rollout(engine, PROMPT), expected)
    with load(packed, budget=budget, warm=warm) as engine:
        for _ in range(2):
            np.testing.assert_array_equal(rollout(engine, PROMPT), expected)
        stats = engine.feed.stats()  # type: ignore[union-attr]
        assert stats.hits + stats.late + stats.misses == stats.routed > 0
        assert stats.peak_expert_bytes <= engine.budget_bytes
        assert stats.bytes_copied > 0
        if warm == "all":  # each record once
            assert stats.bytes_read <= open_layout(packed).total_bytes


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guest_gives_the_same_bits_at_every_budget(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    """And what the library computes up to rounding, whose kernels differ on a GPU."""
    transformers = pytest.importorskip("transformers")
    from tests.support.guests import ARCHITECTURES, BASE

    torch.manual_seed(1)
    settings = BASE | {"initializer_range": 0.3} | ARCHITECTURES[model_type]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "packed")
    prompt = [(5 * i + 3) % 60 for i in range(12)]
    with torch.inference_mode():
        own = model.cuda()(torch.tensor([prompt], device="cuda")).logits[0, -1].float().cpu()
    with load(tmp_path / "packed", budget="all") as engine:
        expected = rollout(engine, prompt)
    scale = float(own.abs().max())
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    assert np.abs(expected[0] - own.numpy()).max() <= bound * scale
    for budget in (2 * open_layout(tmp_path / "packed").record_nbytes, "50%"):
        with load(tmp_path / "packed", budget=budget) as engine:
            np.testing.assert_array_equal(rollout(engine, prompt), expected)


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "int4"])
def test_a_quantised_guest_is_dequantised_on_the_device(tmp_path: Path, name: str) -> None:
    """Its slots hold the checkpoint's bytes; at every budget the bits of the dequantised experts,
    which `resident` holds."""
    pytest.importorskip("transformers")
    from tests.native.test_torch_quantised import CASES, build, chosen
    from tests.support import quantised

    model = build(CASES[name], torch.bfloat16, not name.startswith("fp8"))
    quantised.save(model, tmp_path / "source", name, partial(chosen, name))
    pack(tmp_path / "source", tmp_path / "packed")
    prompt, packed = [(5 * i + 3) % 60 for i in range(12)], tmp_path / "packed"
    with load(packed, budget="resident") as engine:
        expected = rollout(engine, prompt)
    record = open_layout(packed).record_nbytes
    for budget in (2 * record, "50%", "all"):
        with load(packed, budget=budget) as engine:
            np.testing.assert_array_equal(rollout(engine, prompt), expected)
            assert engine.feed is not None
            copied = engine.feed.stats().bytes_copied
            assert copied and copied % record == 0


@pytest.mark.parametrize("budget", ["resident", "50%"])
def test_graphs_give_the_bits_of_single_launches(packed: Path, budget: str) -> None:
    with load(packed, budget=budget) as engine:
        assert engine.session.steps is not None
        captured = rollout(engine, PROMPT)
        stages = engine.session.steps._blocks[-1]
        for stage in (stages._front, stages._middle, stages._experts):
            assert stage._graph is not None
        engine.session.steps = None
        np.testing.assert_array_equal(captured, rollout(engine, PROMPT))


@pytest.mark.parametrize("warm", [0, "all"])
@pytest.mark.parametrize("budget", ["resident", "25%", "50%", "all"])
def test_sequences_together_have_the_bits_of_each_alone(
    packed: Path, budget: str, warm: str | int
) -> None:
    """Those alone run in graphs, those in company do not."""
    prompts, tokens = [PROMPT, PROMPT[:1], PROMPT[3:9]], [5, 6, 7, 8]
    with load(packed, budget="resident") as engine:
        expected = [company.alone(engine.session, prompt, tokens) for prompt in prompts]
    with load(packed, budget=budget, warm=0 if budget == "resident" else warm) as engine:
        found = company.together(engine.session, prompts, tokens)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_fallback_runs_without_a_read_in_the_way(tmp_path: Path) -> None:
    pack(tiny_model(tmp_path / "model"), tmp_path / "packed")
    with load(tmp_path / "packed", budget="25%", miss="fallback") as engine:
        logits = rollout(engine, PROMPT)
        stats = engine.feed.stats()  # type: ignore[union-attr]
    assert np.isfinite(logits).all()
    assert stats.fallbacks > 0


def test_the_device_holds_the_dense_part_and_the_budget(tmp_path: Path) -> None:
    geometry = {"hidden_size": 256, "num_experts": 16, "moe_intermediate_size": 320}
    pack(tiny_model(tmp_path / "model", **geometry), tmp_path / "packed")
    total = open_layout(tmp_path / "packed").total_bytes
    assert total > 40e6

    def peak(budget: str) -> int:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with load(tmp_path / "packed", budget=budget, warm="all") as engine:
            rollout(engine, PROMPT)
        return torch.cuda.max_memory_allocated() - before

    peak("25%")  # what the library allocates once is not ours
    assert peak("all") - peak("25%") >= 0.7 * total


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.2, top_k=40, min_p=0.05),
    ],
)
def test_a_uniform_number_means_the_same_token_as_on_a_cpu(params: SamplingParams) -> None:
    random = np.random.default_rng(0)
    for uniform in random.random(50):
        logits = random.normal(0, 3, 500).astype(np.float32)
        token = int(draw(torch.from_numpy(logits).cuda(), params, float(uniform)))
        assert token == sampling.draw(logits, params, float(uniform))


def test_the_command_line_gives_the_same_text_at_a_quarter(tmp_path: Path) -> None:
    def run(*options: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "chronos", "generate", "demo", "-p", "def add(", "-n", "24",
             "--backend", "torch", "--device", "cuda", "--json", *options],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    whole, quarter = run(), run("--budget", "25%", "--warm", "50%")
    assert quarter["text"] == whole["text"]
    assert quarter["stats"]["bytes_copied"] > 0
