"""Clients and tools that nobody here wrote, as processes of their own: what they see of a server.

`make clients` installs them and runs all of this. Each is skipped by name where it is absent; those
that take minutes run there only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chronos.testing.tiny import tiny_packed
from tests.support.serving import HELLO, Running, serving

HERE = Path(__file__).parent
ASKED = os.environ.get("CHRONOS_TEST_CLIENTS")  # the folder of their commands
LONG = pytest.mark.skipif(not ASKED, reason="takes minutes: make clients")


def tool(name: str) -> str:
    found = shutil.which(name, path=ASKED) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: make clients")
    return found


def run(*command: object, seconds: float = 60, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; its own words where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | variables,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_javascript_clients(server: Running) -> None:
    node = tool("node")
    if not (HERE / "js" / "node_modules" / "openai").exists():
        pytest.skip("openai and @anthropic-ai/sdk of npm are not installed: make clients")
    seen = json.loads(run(node, HERE / "js" / "clients.mjs", server.url, server.model))
    answer = server.chat(max_tokens=12, temperature=0)
    text = answer["choices"][0]["message"]["content"]
    assert [seen[name] for name in ("chat", "streamed", "response", "message")] == [text] * 4
    assert seen["models"] == [server.model]
    assert seen["last"] == seen["total"] == answer["usage"]["total_tokens"]
    assert seen["output_tokens"] == 12
    assert seen["counted"] == answer["usage"]["prompt_tokens"]
    assert seen["refused"] == [404, "model_not_found"]
    assert seen["left"] == [404, "not_found_error"]


def test_llm(server: Running, tmp_path: Path) -> None:
    """Simon Willison's command line, which reads its models from a file."""
    llm = tool("llm")
    api = f"{server.url}/v1"
    model = {"model_id": "tiny", "model_name": server.model, "api_base": api}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    asked = [llm, "-m", "tiny", "--no-log", "-o", "max_tokens", 12, "-o", "temperature", 0]
    text = server.chat(max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
    named = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for how in ((), ("--no-stream",)):
        told = run(*asked, *how, HELLO[0]["content"], **named)
        assert told.rstrip("\n") == text.rstrip("\n")


@pytest.fixture(scope="module")
def demo(one_backend: str) -> Iterator[Running]:
    from chronos.run.models import resolve_model

    with serving(resolve_model("demo"), backend=one_backend, stop_ids=None, queue=64) as running:
        yield running


@pytest.fixture
def short(one_backend: str, tmp_path: Path) -> Iterator[Running]:
    """Under any name, with replies that are over soon: most requests ask for as much as fits."""
    folder = tiny_packed(tmp_path / "short", max_position_embeddings=96)
    with serving(folder, backend=one_backend, aliases=("*",), queue=64) as running:
        yield running


@LONG
@pytest.mark.timeout(400)
def test_schemathesis_finds_no_server_error(short: Running, tmp_path: Path) -> None:
    """Two minutes of requests that fit our OpenAPI page and of some that do not."""
    (tmp_path / "schemathesis.toml").write_text("")
    run(
        *(tool("schemathesis"), "--config-file", tmp_path / "schemathesis.toml", "run"),
        f"{short.url}/openapi.json",
        *("--checks", "not_a_server_error,content_type_conformance,negative_data_rejection"),
        *("--max-time", os.environ.get("CHRONOS_TEST_SCHEMATHESIS_S", "120")),
        *("--generation-deterministic", "--request-timeout", "60"),
        seconds=390,
        cwd=tmp_path,  # it leaves a folder there
    )
    assert short.worker.running == short.worker.waiting == 0
    assert short.chat()["usage"]["completion_tokens"] == 8


TASK = """
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{follow}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@LONG
@pytest.mark.timeout(400)
def test_lm_eval_scores_as_the_resident_model(demo: Running, tmp_path: Path) -> None:
    """`local-completions` without an adapter, its log-probabilities beside one forward each."""
    import numpy as np

    from chronos import backends

    rows = [
        {"context": "def read_lines(path):\n", "follow": '    """Read all lines."""\n'},
        {"context": "import os\nimport ", "follow": "sys\n"},
        {"context": "for index, value in ", "follow": "enumerate(values):\n    print(value)\n"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    arguments = f"model={demo.model},base_url={demo.url}/v1/completions,tokenizer_backend=remote"
    run(
        *(tool("lm_eval"), "run", "--model", "local-completions", "--tasks", "lines"),
        *("--model_args", f"{arguments},num_concurrent=2,tokenized_requests=True"),
        *("--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"),
        seconds=390,
        HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    [log] = (tmp_path / "out").rglob("samples_lines_*.jsonl")
    samples = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    tokenizer = demo.service.catalogue.first.tokenizer
    module = backends.load(demo.engine.backend)
    model = module.load(demo.service.catalogue.first.folder, device="cpu", resident=True)
    assert len(samples) == len(rows)
    for sample in samples:
        row = sample["doc"]
        context = tokenizer.encode(row["context"].rstrip())  # where lm-eval parts them
        ids = [*context, *tokenizer.encode(row["context"] + row["follow"])[len(context) :]]
        logits_TV = module.forward(model, np.array([ids])).logits_BTV[0].astype(np.float64)
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1))[:, None]
        at = np.arange(len(context), len(ids))
        expected = log_p_TV[at - 1, np.array(ids)[at]].sum()
        told: Any = sample["resps"][0][0][0]
        assert abs(float(told) - expected) < 1e-4
