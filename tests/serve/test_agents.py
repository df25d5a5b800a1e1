"""Coding agents that nobody here wrote, from their first request to the text that they print.

`make agents` installs those whose licence allows it (a gigabyte of npm packages) and runs all of
this; Claude Code, qwen and aider take part where they are on the PATH. What is absent is skipped by
name. Open WebUI is not among them: its licence is not an open one, and its wheel is 100 MB;
docs/serve.md says how it is connected.

The model has random weights, and each of its replies is forced, token by token, to the words of
REPLY: the prompt is read as it is, whatever an agent sends, and what comes back can be told from
an error. CHRONOS_TEST_AGENT_MODEL names a folder to be asked freely instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from chronos.run.models import resolve_model
from chronos.serve.worker import Job, Worker
from chronos.testing.tiny import tiny_packed
from tests.support.serving import Running, serving

ASKED = os.environ.get("CHRONOS_TEST_AGENTS")  # the folder of their commands
pytestmark = [
    pytest.mark.skipif(not ASKED, reason="takes minutes: make agents"),
    pytest.mark.timeout(900),
]
REPLY = "The answer is forty two."


@dataclass(frozen=True)
class Agent:
    """A command line that asks once and prints the reply. config: files below its home."""

    command: Sequence[str]
    config: Callable[[str, str], dict[str, str]] = lambda url, model: {}
    variables: Callable[[str], dict[str, str]] = lambda url: {}


def _codex(url: str, model: str) -> dict[str, str]:
    lines = [
        f'model = "{model}"',
        'model_provider = "chronos"',
        "[model_providers.chronos]",
        'name = "Chronos"',
        f'base_url = "{url}/v1"',
        'wire_api = "responses"',
    ]
    return {".codex/config.toml": "\n".join(lines)}


def _opencode(url: str, model: str) -> dict[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Chronos",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {model: {"name": model}},
    }
    config = {"provider": {"chronos": provider}, "model": f"chronos/{model}"}
    return {"work/opencode.json": json.dumps(config)}


def _pi(url: str, model: str) -> dict[str, str]:
    card = {
        "id": model, "name": model, "reasoning": False, "input": ["text"],
        "contextWindow": 32768, "maxTokens": 512,
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
    }  # fmt: skip
    provider = {
        "baseUrl": f"{url}/v1", "apiKey": "none", "api": "openai-completions", "models": [card]
    }  # fmt: skip
    return {".pi/agent/models.json": json.dumps({"providers": {"chronos": provider}})}


AGENTS = {
    "codex": Agent(("exec", "--skip-git-repo-check", "say hi"), _codex),
    "opencode": Agent(
        ("run", "say hi", "--model", "chronos/MODEL"),
        _opencode,
        lambda url: {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
    ),
    "pi": Agent(
        ("-p", "say hi", "--provider", "chronos", "--model", "MODEL"),
        _pi,
        lambda url: {"PI_OFFLINE": "1"},
    ),
    "qwen": Agent(
        ("-p", "say hi", "--auth-type", "openai", "--model", "MODEL"),
        variables=lambda url: {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"},
    ),
    "aider": Agent(
        ("--model", "openai/MODEL", "--message", "say hi", "--no-git", "--yes-always",
         "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-pretty"),
        variables=lambda url: {
            "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
    ),
    "claude": Agent(
        ("-p", "say hi", "--model", "MODEL"),
        variables=lambda url: {
            "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
        },
    ),
}  # fmt: skip


class Scripted:
    """A `Guide` that allows one text and the end behind it."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._left, self._vocab = list(tokens), vocab_size

    def mask(self) -> npt.NDArray[np.bool_]:
        mask = np.zeros(self._vocab, bool)
        mask[self._left[0]] = True
        return mask

    def take(self, token: int) -> None:
        self._left.pop(0)


@pytest.fixture(scope="module")
def server(one_backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    given = os.environ.get("CHRONOS_TEST_AGENT_MODEL")
    options = {"backend": one_backend, "aliases": ("*",), "prefix_bytes": 1 << 28, "queue": 64}
    if given:
        with serving(Path(given), stop_ids=None, **options) as running:  # type: ignore[arg-type]
            yield running
        return
    demo = resolve_model("demo")
    folder = tiny_packed(
        tmp_path_factory.mktemp("agents") / "guest",
        max_position_embeddings=1 << 18,  # Claude Code sends 76 kB
        num_hidden_layers=2,
        vocab_size=json.loads((demo / "config.json").read_text("utf-8"))["vocab_size"],
    )
    for path in (*demo.glob("tokenizer*"), demo / "chat_template.jinja"):
        shutil.copyfile(path, folder / path.name)
    with serving(folder, stop_ids=None, **options) as running:  # type: ignore[arg-type]
        served = running.service.catalogue.first
        script = [*served.tokenizer.encode(REPLY), min(served.stop_ids)]
        submit = Worker.submit

        def scripted(self: Worker, jobs: Sequence[Job]) -> None:
            for job in jobs:
                job.guide = Scripted(script, served.vocab_size)
            submit(self, jobs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "submit", scripted)
            yield running


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_asks_and_prints_the_reply(name: str, server: Running, tmp_path: Path) -> None:
    command = shutil.which(name, path=ASKED) or shutil.which(name)
    if command is None:
        pytest.skip(f"{name} is not installed: make agents")
    agent, work = AGENTS[name], tmp_path / "work"
    work.mkdir()
    for path, text in agent.config(server.url, server.model).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, "utf-8")
    subprocess.run(["git", "init", "-q", "."], cwd=work, check=True)
    before = server.worker.generated
    done = subprocess.run(
        [command, *(part.replace("MODEL", server.model) for part in agent.command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=840,
        cwd=work,
        env=os.environ | {"HOME": str(tmp_path), "PWD": str(work)} | agent.variables(server.url),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert server.worker.generated > before
    if "CHRONOS_TEST_AGENT_MODEL" in os.environ:
        assert done.stdout.strip()
    else:
        assert REPLY in done.stdout
