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
from chronos.testing.train_tests import batch, difference

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


def run(backend: str, environments: list[dict[str, str]], folder: Path) -> list[Any]:
    """(terms, state) of each process."""
    outs = [folder / f"{len(environments)}-{i}" for i in range(len(environments))]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, backend, str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out, own in zip(outs, environments, strict=True)
    ]
    for child in children:
        _, shown = child.communicate(timeout=100)
        assert child.returncode == 0, shown
    return [found(out) for out in outs]


def found(path: Path) -> Any:
    from chronos.common.disk.header import read_header

    terms = json.loads(read_header(path).metadata["terms"])
    state = {
        entry.name: np.frombuffer(bytes(data), np.float32) for entry, data in read_tensors(path)
    }
    return terms, state


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(backend: Any, tmp_path: Path) -> None:
    name = backend.name
    [(terms, alone)] = run(name, [{}], tmp_path)
    both = run(name, launched(name, 2, tmp_path), tmp_path)
    for own_terms, state in both:
        for one, other in zip(terms, own_terms, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
        gradients = {n: x for n, x in alone.items() if n.startswith("exp_avg.")}
        assert difference(state, gradients) < 1e-6
    for key, value in both[0][1].items():  # to the bit: else they drift apart
        assert np.array_equal(value, both[1][1][key]), key


def test_an_update_that_is_too_small_to_share() -> None:
    data = [batch(i) for i in range(3)]
    assert [n for n, _ in own_share(data, 1, 2)] == [1]
    assert [n for n, _ in own_share(data, 0, 2)] == [0, 2]
    with pytest.raises(UsageError, match="3 micro-batches cannot be shared by 4"):
        own_share(data, 0, 4)
