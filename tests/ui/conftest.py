"""A UI on a folder with a tiny recipe and a few rows, and a browser that looks at it.

Pages are looked at where CHRONOS_TEST_BROWSER is set (`make ui-test`), and skipped by name where
Gradio, Playwright or a Chromium is absent; CHRONOS_TEST_CHROMIUM names one that is elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    os.environ.get("CHRONOS_TEST_CHROMIUM")
    or shutil.which("chromium-headless-shell")
    or shutil.which("chromium")
    or shutil.which("google-chrome")
)
RECIPE = """\
# A model that trains within seconds.
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 512
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 24
kv_latent_dim = 16
rope_dim = 8
sliding_window = 32
lookahead_steps = 1
lookahead_hidden_size = 16

[tokenizer]
vocab_size = 300

[data]
path = "stdlib"
validation_share = 0.2

[pretrain]
batch_size = 2
seq_len = 32

[cadence]
steps = 400
log_every = 5
eval_every = 100
eval_batches = 2
save_every = 50

[optimizer]
learning_rate = 3e-3
warmup_steps = 10
threads = 1
"""
TUNE = """
[tune]
search = ["optimizer.learning_rate", "loss.balance"]
repeats = 0
min_effective = 0.05
max_use = 1.0
"""


def rows() -> Iterator[str]:
    for number in range(60):
        said = [
            {"role": "user", "content": f"What follows {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
        yield json.dumps({"messages": said}) + "\n"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "tiny.toml").write_text(RECIPE)
    quick = RECIPE.replace("steps = 400", "steps = 30").replace('"stdlib"', '"rows.jsonl"')
    (folder / "recipes" / "quick.toml").write_text(quick.replace('"rows', '"../rows') + TUNE)
    (folder / "rows.jsonl").write_text("".join(rows()))
    return folder


@pytest.fixture(scope="session")
def address(root: Path) -> Iterator[str]:
    """Where the UI answers."""
    pytest.importorskip("gradio", reason="pages need the extra [ui]")
    with showing(root) as found:
        yield found


@contextmanager
def showing(root: Path, *flags: str) -> Iterator[str]:
    """The UI as a user starts it: a process of its own, and so are Gradio's warnings."""
    command = [sys.executable, "-m", "chronos", "ui", "--port", "0", "--root", str(root), *flags]
    environ = {n: v for n, v in os.environ.items() if not n.startswith("CHRONOS_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
    ) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
            assert found is not None
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            _end_jobs(root)


def _end_jobs(root: Path) -> None:
    """Jobs outlive the UI; those of the tests must not outlive them."""
    from chronos.ui.jobs import Jobs
    from chronos.ui.root import Root

    for job in Jobs(Root(root)).jobs():
        if job.alive:
            os.killpg(job.group, signal.SIGKILL)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not os.environ.get("CHRONOS_TEST_BROWSER"):
        pytest.skip("a walk through all pages takes a minute: make ui-test")
    playwright = pytest.importorskip("playwright.sync_api", reason="pages need Playwright")
    if CHROMIUM is None:
        pytest.skip("pages need a Chromium: apt-get install chromium-headless-shell")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
