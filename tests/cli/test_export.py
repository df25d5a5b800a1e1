"""`chronos export` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chronos.testing.tiny import tiny_model


def test_a_model_that_fits_is_written_and_named(chronos: Any, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", hybrid_pattern=("mla",), norm_topk_prob=False)
    done = chronos("export", source, "-o", tmp_path / "out", "--to", "hf")
    assert done.code == 0 and done.out.startswith(f"{tmp_path / 'out'}: deepseek_v2, ")
    assert "lookahead.safetensors stay" in done.err
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "deepseek_v2"
    again = ("--type", "bf16", "--json")
    found = chronos("export", source, "-o", tmp_path / "half", "--to", "hf", *again).json
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    assert found["tensors"] == len(index["weight_map"])
    assert found["bytes"] == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("model", "flags", "code", "words"),
    [
        ("demo", ["--to", "hf"], 3, "layer 0 chooses its experts by 'history'"),
        ("demo", ["--to", "onnx"], 2, "not exported to 'onnx'"),
        ("demo", ["--to", "hf", "--type", "q8_0"], 2, "'q8_0' is no type of --to hf"),
        ("demo", ["--to", "mlx"], 3, "MLX-LM has no such architecture: layer 0 chooses"),
        ("demo", ["--to", "gguf", "--dequantize"], 2, "--dequantize is for --to hf and --to mlx"),
        ("demo", ["--to", "gguf"], 3, "layer 0 chooses its experts by 'history'"),
        ("demo", ["--to", "gguf", "--with-code"], 2, "--with-code is for --to hf"),
        ("absent", ["--to", "hf"], 2, "no such file or folder"),
    ],
)
def test_what_is_refused(
    chronos: Any, tmp_path: Path, model: str, flags: list[str], code: int, words: str
) -> None:
    done = chronos("export", model, "-o", tmp_path / "out", *flags)
    assert done.code == code and words in done.error[0]
    assert not (tmp_path / "out").exists()


def test_the_demo_with_code(chronos: Any, tmp_path: Path) -> None:
    flags = ("--to", "hf", "--with-code")
    done = chronos("export", "demo", "-o", tmp_path / "out", *flags)
    assert done.code == 0 and "trust_remote_code=True" in done.err
    assert (tmp_path / "out/modeling_chronos.py").exists()
    refused = chronos("generate", tmp_path / "out", "-p", "x")
    assert refused.code == 3 and "asks for code" in refused.error[0]


def test_a_gguf(chronos: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tiny_model(tmp_path / "src", hybrid_pattern=("mla",), moe_intermediate_size=32)
    flags = ("--to", "gguf", "--type", "q8_0", "--json")
    found = chronos("export", source, "-o", tmp_path / "out", *flags).json
    assert found["architecture"] == "deepseek2"
    file = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert len(file.tensors) == found["tensors"]
