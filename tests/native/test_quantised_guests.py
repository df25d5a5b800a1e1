"""`pack --quantize` of another library's checkpoint: one folder that both backends run.

On torch the reference is Transformers' own run of the model with the values that the codes stand
for, bit for bit; on MLX, MLX-LM's quantised switches over the same bytes, and the library's run of
the same values, which MLX does not round, within another order of summation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import chronos
from chronos.cli import main
from chronos.common.errors import UsageError
from chronos.common.layout import open_layout, pack
from chronos.common.layout.affine import quantise
from chronos.testing.tolerances import assert_close
from tests.conformance.test_affine import stands_for
from tests.native.test_torch_quantised import PROMPT, build
from tests.native.test_transformers_guests import by_engine, by_library
from tests.support import quantised

# Experts one by one and stacked; gpt-oss': matrices transposed, gate and up interleaved, biases.
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")
# The libraries scale the positions of so short a gpt-oss otherwise.
PLAIN_ROPE = {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}


class Guest(NamedTuple):
    model: Any  # the library's, with the values that the codes stand for
    source: Path
    packed: Path


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Guest]]:
    made: dict[Any, Guest] = {}

    def make(
        model_type: str, bits: int, dtype: torch.dtype = torch.float32, rounded: bool = True
    ) -> Guest:
        if (key := (model_type, bits, dtype, rounded)) not in made:
            folder = tmp_path_factory.mktemp(model_type)
            changes = PLAIN_ROPE if model_type == "gpt_oss" else {}
            model = build(model_type, dtype, wide=True, **changes)
            model.save_pretrained(folder / "source")
            pack(folder / "source", folder / "packed", encoding=f"transformers-affine{bits}-g32")
            for name, parameter in model.named_parameters():
                if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                    for one in parameter.data:
                        one_NK = one if model_type != "gpt_oss" else one.T
                        plain = dequantised(one_NK, bits, rounded)
                        one.copy_(plain if model_type != "gpt_oss" else plain.T)
            made[key] = Guest(model, folder / "source", folder / "packed")
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield make


def dequantised(weight_NK: torch.Tensor, bits: int, rounded: bool) -> torch.Tensor:
    kinds = quantise(np.ascontiguousarray(weight_NK.float().numpy()), bits, 32)
    return torch.from_numpy(stands_for(kinds, bits, rounded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "bits"), [(m, 4) for m in MODELS] + [("qwen3_moe", 8)])
def test_torch_has_the_librarys_bits_of_the_dequantised_model(
    model_type: str, bits: int, dtype: torch.dtype, guest: Callable[..., Guest]
) -> None:
    tiny = guest(model_type, bits, dtype)
    expected = by_library(tiny.model, PROMPT)
    least = str(2 * open_layout(tiny.packed).record_nbytes)
    for budget in (least, "25%", "50%", "all", "resident"):
        with chronos.load(tiny.packed, backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)


@pytest.mark.parametrize(("model_type", "bits"), [(m, 4) for m in MODELS] + [("qwen3_moe", 8)])
def test_mlx_runs_the_same_folder(model_type: str, bits: int, guest: Callable[..., Guest]) -> None:
    pytest.importorskip("mlx_lm.utils")
    tiny = guest(model_type, bits, rounded=False)
    with chronos.load(tiny.packed, backend="mlx", budget="resident") as engine:
        resident = np.stack(by_engine(engine, PROMPT))
    for budget in (str(2 * open_layout(tiny.packed).record_nbytes), "50%", "all"):
        with chronos.load(tiny.packed, backend="mlx", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), resident)
    assert_close(resident, by_library(tiny.model, PROMPT), "logits")


def test_mlx_runs_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm.utils")
    model = build("gpt_oss", torch.float32, wide=True, **PLAIN_ROPE)
    quantised.save(model, tmp_path / "source", "mxfp4", lambda key: ".experts." in key)
    pack(tmp_path / "source", tmp_path / "packed")
    layout = open_layout(tmp_path / "packed")
    assert set(layout.encodings.values()) == {"mxfp4"}
    with chronos.load(tmp_path / "packed", backend="mlx", budget="resident") as engine:
        resident = np.stack(by_engine(engine, PROMPT))
    for budget in (str(2 * layout.record_nbytes), "25%", "50%", "all"):
        with chronos.load(tmp_path / "packed", backend="mlx", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), resident)
    assert_close(resident, by_library(model, PROMPT), "logits")


def test_an_unpacked_guest_of_the_command_line(
    guest: Callable[..., Guest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = guest("qwen3_moe", 4)
    flags = ["--quantize", "int4", "-o", str(tmp_path / "packed")]
    assert main.run(["pack", str(tiny.source), *flags]) == 0
    found, made = open_layout(tmp_path / "packed"), open_layout(tiny.packed)
    assert set(found.encodings.values()) == {"transformers-affine4-g32"}
    assert {k: r.digest for k, r in found.records.items()} == {
        k: r.digest for k, r in made.records.items()
    }
    capsys.readouterr()
    assert main.run(["inspect", str(tmp_path / "packed")]) == 0
    assert "Transformers on torch" in (shown := capsys.readouterr().out) and "MLX-LM" in shown


def test_experts_without_a_gate_are_refused(tmp_path: Path) -> None:
    """Their matrices [F, D] and [D, F] do not say which of their sides is in."""
    from chronos.common.layout.codecs import Affine
    from chronos.common.model.weights import TensorSpec

    codec = Affine("transformers-affine4-g32")
    plain = [TensorSpec("up_proj", (64, 32), "BF16"), TensorSpec("down_proj", (32, 64), "BF16")]
    with pytest.raises(UsageError, match="experts of up_proj, down_proj are not converted"):
        codec.tensors_from(plain)
