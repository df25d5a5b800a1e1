"""The torch training step where a torch is older, a model lacks its predictor, a GPU holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chronos.backends import torch as backend
from chronos.backends.torch.products import Linear
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.testing.train_tests import RECIPE, TINY, batch, objective

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")


def test_a_torch_without_fused_updates_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.AdamW

    def old(*args: Any, fused: bool = False, **options: Any) -> torch.optim.AdamW:
        if fused:
            raise NotImplementedError("Could not run 'aten::_fused_adamw_' on 'CPU'")
        return real(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", old)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.3.1"))
    step = backend.train_step(backend.build(TINY, seed=7), RECIPE)
    losses = [step.step([batch()], objective(step), 1e-2, i)["ce"] for i in range(6)]
    assert losses[-1] < losses[0]


def test_a_model_without_lookahead_can_be_evaluated(tmp_path: Path) -> None:
    backend.save(backend.build(TINY, seed=7), tmp_path)
    step = backend.train_step(backend.load(tmp_path), RECIPE)
    whole = step.evaluate([batch()], objective(step))
    (tmp_path / "lookahead.safetensors").unlink()
    step = backend.train_step(backend.load(tmp_path), RECIPE)
    terms = step.evaluate([batch()], objective(step))
    assert terms["ce"] == whole["ce"]
    assert "recall_0" in whole and "recall_0" not in terms


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("again", [False, True])
def test_products_in_bfloat16_of_weights_in_float32(device: str, again: bool) -> None:
    """Every matrix of the model multiplies in bfloat16; gradients, weights and moments do not."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        recipe = dataclasses.replace(RECIPE, compute_dtype=dtype, gradient_checkpointing=again)
        step = backend.train_step(backend.build(TINY, seed=7, device=device), recipe)
        seen = set()
        for module in step.model.modules():
            if isinstance(module, Linear):
                module.register_forward_hook(lambda m, x, y, seen=seen: seen.add(y.dtype))
        losses = [step.step([batch()], objective(step), 1e-2, i)["ce"] for i in range(12)]
        assert {p.dtype for p in step.model.parameters()} == {torch.float32}
        assert {kind for name, kind, *_ in step.state()} == {"F32"}
        assert seen == {getattr(torch, dtype)}
        found[dtype] = losses
        assert losses[-1] < 0.7 * losses[0]
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"][0] == pytest.approx(found["float32"][0], rel=2e-3)


@pytest.mark.cuda
@needs_cuda
def test_a_run_on_a_gpu_goes_on_where_it_was(tmp_path: Path) -> None:
    def start() -> Any:
        return backend.train_step(backend.build(TINY, seed=7, device="cuda"), RECIPE)

    straight, stopped, resumed = start(), start(), start()
    for i in range(4):
        straight.step([batch(i)], objective(straight), 1e-2, i)
    for i in range(2):
        stopped.step([batch(i)], objective(stopped), 1e-2, i)
    write_tensors(tmp_path / "state", stopped.state())
    resumed.load_state(read_tensors(tmp_path / "state"))
    for i in range(2, 4):
        resumed.step([batch(i)], objective(resumed), 1e-2, i)
    wanted, found = (dict(s.model.named_parameters()) for s in (straight, resumed))
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name].detach().cpu(), value.detach().cpu(), rtol=1e-3, atol=1e-4, err_msg=name
        )
