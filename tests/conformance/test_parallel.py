"""Two processes that share an update, against one that has all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.tensors import read_tensors
from chronos.common.errors import UsageError
from chronos.common.training.objectives import own_share
from chronos.testing.tiny import tiny_packed
from chronos.testing.train_tests import batch, difference
from tests.support.recipes import TINY_MODEL

# Dropout and masks, an uneven number of micro-batches, an expert that one process never uses.
_CHILD = """
import dataclasses, importlib, json, sys
from chronos.common.disk.tensors import write_tensors
from chronos.testing.train_tests import RECIPE, objective, batch, with_losses
name, out = sys.argv[1:]
backend = importlib.import_module(f"chronos.backends.{name}")
config = dataclasses.replace(
    with_losses(balance=0.3, temporal=0.2, lookahead=0.5), dropout=0.2, fallback_mask_prob=0.2
)
step = backend.train_step(backend.build(config, seed=7, device="cpu"), RECIPE)
data = [batch(1), batch(2, pads=5), batch(3)]
terms = [step.step(data, objective(step), 1e-3, i) for i in range(2)]
step.evaluate(data, objective(step))
write_tensors(out, step.state(), {"terms": json.dumps(terms)})
"""

# The same of an adapter beside experts that each process reads by itself.
_ADAPTER = """
import importlib, json, sys
from pathlib import Path
from chronos.common.disk.tensors import write_tensors
from chronos.common.training.objectives import NextToken
from chronos.testing.train_tests import RECIPE, batch
from tests.conformance.test_lora import ALL, EXPERTS, opened
name, out, model = sys.argv[1:]
backend = importlib.import_module(f"chronos.backends.{name}")
with opened(backend, Path(model), 0.25) as (streamed, feed):
    adapter = backend.attach(streamed, ALL, experts=EXPERTS)
    step = backend.train_step(streamed, RECIPE, adapter)
    data = [batch(1), batch(2, pads=5), batch(3)]
    terms = [step.step(data, NextToken(), 1e-3, i) for i in range(2)]
    assert feed.stats().bytes_read
    write_tensors(out, step.state(), {"terms": json.dumps(terms)})
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def launched(backend: str, count: int, folder: Path) -> list[dict[str, str]]:
    """What `torchrun` and `mlx.launch` put into the environment of each process."""
    ports = free_ports(count)
    if backend == "torch":
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
        return [
            shared | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count)}
            for i in range(count)
        ]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]), "utf-8")
    return [{"MLX_RANK": str(i), "MLX_HOSTFILE": str(hosts)} for i in range(count)]


def together(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """What each of these processes prints; all must end well."""
    children = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own in zip(commands, environments, strict=True)
    ]
    printed = []
    for child in children:
        out, shown = child.communicate(timeout=100)
        assert child.returncode == 0, shown
        printed.append(out)
    return printed


def run(
    backend: str, environments: list[dict[str, str]], folder: Path, code: str, *more: str
) -> list[Any]:
    """(terms, state) of each process."""
    outs = [folder / f"{len(environments)}-{i}" for i in range(len(environments))]
    together([["-c", code, backend, str(out), *more] for out in outs], environments)
    return [found(out) for out in outs]


def found(path: Path) -> Any:
    from chronos.common.disk.header import read_header

    terms = json.loads(read_header(path).metadata["terms"])
    state = {
        entry.name: np.frombuffer(bytes(data), np.float32) for entry, data in read_tensors(path)
    }
    return terms, state


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["model", "adapter"])
def test_two_processes_give_the_gradients_of_one(
    backend: Any, tmp_path: Path, trained: str
) -> None:
    name, code, more = backend.name, _CHILD, list[str]()
    if trained == "adapter":
        model = tiny_packed(tmp_path / "packed", num_shared_experts=1)
        code, more = _ADAPTER, [str(model)]
    [(terms, alone)] = run(name, [{}], tmp_path, code, *more)
    both = run(name, launched(name, 2, tmp_path), tmp_path, code, *more)
    for own_terms, state in both:
        for one, other in zip(terms, own_terms, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
        gradients = {n: x for n, x in alone.items() if n.startswith("exp_avg.")}
        assert difference(state, gradients) < 1e-6
    for key, value in both[0][1].items():  # to the bit: else they drift apart
        assert np.array_equal(value, both[1][1][key]), key


RECIPE = (
    TINY_MODEL
    + """lookahead_hidden_size = 16

[tokenizer]
vocab_size = 270

[data]
path = "{data}"
validation_share = 0.3

[pretrain]
batch_size = 2
seq_len = 16
accumulate = 2

[cadence]
steps = {steps}
log_every = 1
eval_every = 4
save_every = 4

[optimizer]
warmup_steps = 2
"""
)


@pytest.mark.slow
def test_a_run_of_two_processes_is_written_once(backend: Any, tmp_path: Path) -> None:
    """The log is that of one process; resumed, it goes on; the second process says nothing."""
    rows = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    recipe, name = tmp_path / "tiny.toml", backend.name

    def train(out: Path, environments: list[dict[str, str]], steps: int, *flags: str) -> list[str]:
        data = (tmp_path / "rows.jsonl").as_posix()
        recipe.write_text(RECIPE.format(data=data, steps=steps), "utf-8")
        command = ["-m", "chronos", "train", "pretrain", "-c", str(recipe), "-o", str(out)]
        command += ["--backend", name, "--device", "cpu", *flags]
        return together([command] * len(environments), environments)

    alone, both = tmp_path / "alone", tmp_path / "both"
    train(alone, [{}], 4)  # the rate follows the number of steps
    train(alone, [{}], 6, "--resume")
    train(both, launched(name, 2, tmp_path), 4)
    printed = train(both, launched(name, 2, tmp_path), 6, "--resume")
    assert printed == [f"{both / 'model'}\n", ""]
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        for out in (alone, both)
    ]
    trained = [[line for line in log if "loss" in line] for log in logs]
    assert [line["step"] for line in trained[1]] == [1, 2, 3, 4, 5, 6]
    assert trained[1][-1]["loss"] == pytest.approx(trained[0][-1]["loss"], rel=1e-4)


def test_an_update_that_is_too_small_to_share() -> None:
    data = [batch(i) for i in range(3)]
    assert [n for n, _ in own_share(data, 1, 2)] == [1]
    assert [n for n, _ in own_share(data, 0, 2)] == [0, 2]
    with pytest.raises(UsageError, match="3 micro-batches cannot be shared by 4"):
        own_share(data, 0, 4)
