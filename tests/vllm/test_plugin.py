"""vLLM runs a packed guest with Chronos' experts: the library's tokens, within the budget.

`make vllm` runs this in an environment of its own (requirements.txt); elsewhere it is skipped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make vllm")

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 90)), [3]]
NEW = 24
OVERRIDES = {"architectures": ["ChronosGuestForCausalLM"]}
_PLAIN = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2,
    "max_position_embeddings": 512, "dtype": "float32", "tie_word_embeddings": False,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
KINDS = {
    "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 8},
    # Two shared experts beside the routed ones.
    "qwen2_moe": {
        "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A packed model and what Transformers writes with the unpacked one, alone with each prompt."""
    import torch
    import transformers

    from chronos.common.layout import pack

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **(_PLAIN | KINDS[request.param]))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "plain")
    pack(folder / "plain", folder / "packed")
    want = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
            want.append(out[0, len(prompt) :].tolist())
    return folder / "packed", want


RUN = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.loads(sys.argv[1])
llm = LLM(skip_tokenizer_init=True, max_model_len=256, max_num_seqs=8, seed=0, **asked["options"])
outs = llm.generate([{"prompt_token_ids": each} for each in asked["prompts"]],
                    SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True,
                                   detokenize=False))
stats, = llm.apply_model(lambda model: model.feed.stats())
print(json.dumps({"tokens": [list(each.outputs[0].token_ids) for each in outs],
                  "bytes_read": stats.bytes_read, "peak": stats.peak_expert_bytes,
                  "capacity": stats.capacity_bytes, "misses": stats.misses}))
"""


def run(folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """One engine in a process of its own: vLLM keeps its distributed state for a process."""
    given: dict[str, Any] = {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "hf_overrides": OVERRIDES,
    }  # fmt: skip
    asked = {"options": given | options, "prompts": PROMPTS, "new": NEW}
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


def test_a_batch_writes_what_transformers_writes_within_the_budget(guest: Any) -> None:
    folder, want = guest
    done = run(folder, additional_config={"budget": "25%"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == want
    assert found["misses"] > 0 and found["bytes_read"] > found["capacity"]
    assert 0 < found["peak"] <= found["capacity"]


@pytest.mark.parametrize("guest", ["mixtral"], indirect=True)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"additional_config": {"buget": "25%"}}, "no option 'buget'"),
        ({"additional_config": {"budget": "1B"}}, "budget"),
        ({"dtype": "bfloat16"}, "--dtype float32"),
        ({"enforce_eager": False}, "--enforce-eager"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    guest: Any, options: dict[str, Any], words: str
) -> None:
    folder, _ = guest
    done = run(folder, **options)
    assert done.returncode != 0
    assert words in done.stderr + done.stdout


@pytest.fixture
def served(guest: Any) -> Iterator[tuple[str, Path, list[list[int]]]]:
    """The server of `vllm serve`, the plugin found by its entry point. By its module: the command
    asks for the version of a package `vllm`, and the one for CPUs is called vllm-cpu."""
    folder, want = guest
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
         "--port", str(port),
         "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
         "--skip-tokenizer-init", "--served-model-name", "guest",
         "--hf-overrides", json.dumps(OVERRIDES), "--additional-config", '{"budget": "25%"}'],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}", folder, want
    finally:
        with suppress(ProcessLookupError):  # it ended by itself, which the test says
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(240):
        assert process.poll() is None, process.stdout and process.stdout.read()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError("vllm serve did not answer")


@pytest.mark.parametrize("guest", ["mixtral"], indirect=True)
def test_vllm_serve_answers_two_at_once(served: Any) -> None:
    base, _, want = served

    def ask(number: int) -> list[int]:
        body = {"model": "guest", "prompt": PROMPTS[number], "max_tokens": NEW, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        request = urllib.request.Request(
            f"{base}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
            return ids

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, (0, 2))) == [want[0], want[2]]
