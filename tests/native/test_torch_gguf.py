"""GGUF files on torch: the bits of Transformers' run of the checkpoint that a file stands for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

import chronos
from chronos.cli import main
from chronos.common.errors import ConfigError
from chronos.common.layout import inspect, open_layout, pack, read_records, verify
from chronos.common.model.guest import read_config
from chronos.run.models import resolve_model
from tests.native.test_torch_quantised import PROMPT, build, by_pieces, contents
from tests.native.test_transformers_guests import by_engine, by_library
from tests.support import gguf

K_QUANTS = {"hidden_size": 256, "moe_intermediate_size": 256}


class Case(NamedTuple):
    model_type: str
    types: tuple[str, ...]  # of gate and up, and of down, in turn by layer
    dense: str = "Q8_0"
    changes: dict[str, Any] = {}
    options: dict[str, Any] = {}


CASES = {
    "mixtral-q8_0": Case("mixtral", ("Q8_0",)),  # rows of queries and keys in pairs
    "granitemoe-f16": Case("granitemoe", ("F16",)),
    "qwen2_moe-mxfp4": Case("qwen2_moe", ("MXFP4",)),
    "qwen3_moe-q4_k": Case("qwen3_moe", ("Q4_K", "Q6_K"), "Q6_K", K_QUANTS),  # mixed, as Q4_K_M
    "qwen3_moe-q5_k": Case("qwen3_moe", ("Q5_K", "Q3_K"), "Q5_K", K_QUANTS),
    "qwen3_moe-q2_k": Case("qwen3_moe", ("Q2_K", "IQ4_XS"), "Q4_K", K_QUANTS),
    "mixtral-q4_0": Case("mixtral", ("Q4_0", "Q4_1"), "Q4_0"),
    "olmoe-q5_0": Case("olmoe", ("Q5_0", "Q5_1", "IQ4_NL"), "Q5_0"),
    "olmoe-bf16": Case("olmoe", ("BF16",), "BF16"),
    "phimoe-f32": Case("phimoe", ("F32",), "F32"),
    "deepseek_v3-q8_0": Case("deepseek_v3", ("Q8_0",)),
    "deepseek_v2-kv_b": Case("deepseek_v2", ("Q8_0", "F16"), options={"split_kv_b": False}),
    "gpt_oss-mxfp4": Case("gpt_oss", ("MXFP4",)),  # biases, gate and up apart
    "glm4_moe-q8_0": Case("glm4_moe", ("Q8_0",)),
    "dots1-mxfp4": Case("dots1", ("MXFP4", "Q8_0")),
}


class Guest(NamedTuple):
    model: Any
    file: Path
    packed: Path


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Guest]]:
    made: dict[Any, Guest] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Guest:
        if (name, dtype) not in made:
            folder, case = tmp_path_factory.mktemp(name), CASES[name]
            model = build(case.model_type, dtype, wide=True, **case.changes)
            kind = partial(type_of, case.types)
            file = gguf.save(model, folder, kind, case.dense, **case.options)
            pack(file, folder / "packed", config=folder / "source")
            made[name, dtype] = Guest(model, file, folder / "packed")
        return made[name, dtype]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield make


def type_of(types: tuple[str, ...], layer: int, projection: str) -> str:
    return types[(layer + (projection == "down")) % len(types)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_has_the_bits_of_the_checkpoint_it_stands_for(
    name: str, dtype: torch.dtype, guest: Callable[..., Guest]
) -> None:
    tiny = guest(name, dtype)
    layout = open_layout(tiny.packed)
    assert set(layout.encodings.values()) == {"gguf"}
    expected = by_library(tiny.model, PROMPT)
    least = 2 * max(record.nbytes for record in layout.records.values())
    quarter = max(least, layout.total_bytes // 4)  # layers of larger blocks count as such
    for budget in (least, quarter) if dtype == torch.float32 else ("50%", "all", "resident"):
        with chronos.load(tiny.packed, backend="torch", budget=budget) as engine:
            np.testing.assert_array_equal(by_engine(engine, PROMPT), expected)
            if engine.feed is not None:
                assert engine.feed.stats().peak_expert_bytes <= engine.budget_bytes


@pytest.mark.parametrize("name", CASES)
def test_a_record_has_the_bytes_of_the_file(name: str, guest: Callable[..., Guest]) -> None:
    from gguf import GGUFReader

    tiny, compared = guest(name), 0
    stacks = {tensor.name: tensor.data for tensor in GGUFReader(tiny.file).tensors}
    layout = open_layout(tiny.packed)
    for record, data in read_records([(layout.path(k), r) for k, r in layout.records.items()]):
        layer, expert = record.key
        for tensor, view in record.views(data).items():
            projection, _, kind = tensor.partition("_proj.")
            end = "bias" if kind == "bias" else "weight"
            stack = stacks[f"blk.{layer}.ffn_{projection}_exps.{end}"]
            assert bytes(view) == stack[expert].tobytes()
            compared += 1
    assert compared == sum(len(r.tensors) for r in layout.records.values()) > 0


def test_prompts_of_many_tokens_have_the_same_bits(tmp_path: Path) -> None:
    model = build("qwen3_moe", torch.bfloat16, True, max_position_embeddings=2048)
    file = gguf.save(model, tmp_path, lambda *_: "Q8_0")
    pack(file, tmp_path / "packed", config=tmp_path / "source")
    prompt = (PROMPT * 28)[:1100]
    budget = 2 * open_layout(tmp_path / "packed").record_nbytes
    with chronos.load(tmp_path / "packed", backend="torch", budget=budget) as engine:
        np.testing.assert_array_equal(by_engine(engine, prompt, 1), by_pieces(model, prompt))


def test_from_the_command_line_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    model = build("mixtral", torch.bfloat16, True)
    gguf.save(model, tmp_path, lambda *_: "Q8_0", split_max_tensors=9)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 2 and not (tmp_path / "model.gguf").exists()
    flags = ["--config", str(tmp_path / "source"), "-o", str(tmp_path / "packed")]
    assert main.run(["pack", str(parts[0]), *flags]) == 0
    assert main.run(["pack", str(parts[0]), *flags]) == 0  # nothing to do
    assert verify(tmp_path / "packed").problems == []
    assert inspect(tmp_path / "packed")["encoding"] == "gguf"
    with chronos.load(tmp_path / "packed", backend="torch", budget="50%") as engine:
        np.testing.assert_array_equal(by_engine(engine, PROMPT), by_library(model, PROMPT))
    parts[1].unlink()
    capsys.readouterr()
    assert main.run(["pack", str(parts[0]), *flags]) == 3
    assert f"parts are missing: {parts[1].name}" in capsys.readouterr().err


def test_what_export_writes_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral: rows of queries and keys are paired on the way out and unpaired on the way in."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    demo = resolve_model("demo")
    model = build("mixtral", torch.float32, True, vocab_size=read_config(demo).vocab_size)
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "first")
    flags = ["--to", "gguf", "--type", "f32", "-o", str(tmp_path / "out")]
    assert main.run(["export", str(tmp_path / "first"), *flags]) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    pack(file, tmp_path / "second", config=tmp_path / "source")
    with chronos.load(tmp_path / "second", backend="torch", budget="50%") as engine:
        np.testing.assert_array_equal(by_engine(engine, PROMPT), by_library(model, PROMPT))


@pytest.mark.parametrize("name", ["mixtral-q8_0", "qwen3_moe-q4_k", "deepseek_v3-q8_0"])
def test_dequantised_it_is_the_plain_checkpoint(
    name: str, guest: Callable[..., Guest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = guest(name), tmp_path / "plain"
    assert main.run(["unpack", str(tiny.packed), "-o", str(out)]) == 2
    assert "--dequantize writes the plain checkpoint" in capsys.readouterr().err
    assert main.run(["unpack", str(tiny.packed), "-o", str(out), "--dequantize"]) == 0
    assert contents(out) == contents(tiny.file.with_name("plain"))


def test_mlx_says_that_it_does_not_compute_with_it(guest: Callable[..., Guest]) -> None:
    pytest.importorskip("mlx_lm")
    with pytest.raises(ConfigError, match="encoded as gguf(.|\n)*--backend torch"):
        chronos.load(guest("qwen2_moe-mxfp4").packed, backend="mlx", budget="50%")
