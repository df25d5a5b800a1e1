"""`pack --quantize`: experts that Chronos quantises itself, one folder for every backend.

The reference is the twin: the same model with the values that its coded experts stand for, made
here value by value. torch rounds these to bfloat16, as `mlx.core.dequantize` does, and has the
twin's bits; MLX multiplies with the codes.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.cli import main
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ShapeMismatch
from chronos.common.layout import inspect, open_layout, pack, read_records, verify
from chronos.common.layout.affine import quantise
from chronos.common.model.guest import read_config
from chronos.testing.tiny import tiny_model
from chronos.testing.tolerances import assert_close
from tests.conformance.test_codecs import logits

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32}
CASES = {"int4": "swiglu-affine4-g32", "int8": "swiglu-affine8-g32"}


pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("affine") / "model", **WIDE)


def float32(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """By the definition: the nearer neighbour, the even one of two as near."""
    below = float32(values.view(np.uint32) >> 16)
    above = float32((values.view(np.uint32) >> 16) + 1)
    lower, upper = np.abs(values - below), np.abs(above - values)
    odd = (values.view(np.uint32) >> 16 & 1).astype(bool)
    return np.where((upper < lower) | ((upper == lower) & odd), above, below)


def stands_for(kinds: dict[str, np.ndarray], bits: int, rounded: bool) -> np.ndarray:
    """Value by value; rounded: product and sum in bfloat16."""
    word_NW, (N, G) = kinds["weight"], kinds["scales"].shape
    codes = [(word_NW >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    codes_NGk = np.stack(codes, -1).reshape(N, G, -1).astype(np.float32)
    to = bfloat16 if rounded else np.asarray
    scaled_NGk = to(codes_NGk * float32(kinds["scales"])[..., None])
    return to(scaled_NGk + float32(kinds["biases"])[..., None]).reshape(N, -1)


def twin(source: Path, folder: Path, bits: int, group: int, rounded: bool) -> Path:
    shutil.copytree(source, folder)
    tensors = []
    with closing(read_tensors(source / "model.safetensors")) as found:
        for entry, data in found:
            value = np.frombuffer(bytes(data), np.float32).reshape(entry.shape)
            if ".mlp.experts." in entry.name:
                value = stands_for(quantise(value, bits, group), bits, rounded)
            tensors.append((entry.name, entry.dtype, entry.shape, value.tobytes()))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


@pytest.mark.parametrize("word", CASES)
def test_it_computes_what_its_codes_stand_for(
    backend: Any, source: Path, tmp_path: Path, word: str
) -> None:
    packed = tmp_path / "packed"
    flags = ["--quantize", word, "-g", "32", "-o", str(packed)]
    assert main.run(["pack", str(source), *flags]) == 0
    layout = open_layout(packed, config=read_config(source))
    assert set(layout.encodings.values()) == {CASES[word]}
    on_torch = backend.name == "torch"
    plain = twin(source, tmp_path / "twin", int(word[-1]), 32, rounded=on_torch)
    expected = logits(backend, plain, "resident")
    resident = logits(backend, packed, "resident")
    for budget in ("all", "25%", str(2 * layout.record_nbytes)):
        np.testing.assert_array_equal(logits(backend, packed, budget), resident)
    if on_torch:
        np.testing.assert_array_equal(resident, expected)
    else:
        assert_close(resident, expected, "logits")
    assert not np.array_equal(logits(backend, source, "resident"), resident)


def test_a_code_is_the_nearest_and_ends_are_met(source: Path) -> None:
    rng = np.random.default_rng(3)
    weight_NK = bfloat16(rng.standard_normal((8, 128)).astype(np.float32))
    weight_NK[0], weight_NK[1, :32], weight_NK[2] = 0, 5, -np.abs(weight_NK[2])
    for bits, group in ((4, 32), (4, 128), (8, 64)):
        kinds = quantise(weight_NK, bits, group)
        found = stands_for(kinds, bits, rounded=False)
        w_NGk = weight_NK.reshape(8, -1, group)
        away = np.abs(found.reshape(w_NGk.shape) - w_NGk)
        bias_NG1, step_NG1 = (float32(kinds[k])[..., None] for k in ("biases", "scales"))
        others = [np.abs(code * step_NG1 + bias_NG1 - w_NGk) for code in range(1 << bits)]
        assert (away <= np.min(others, 0) + 1e-6).all()
        far = np.abs(w_NGk).argmax(-1, keepdims=True)
        np.testing.assert_array_equal(np.take_along_axis(away, far, -1), 0)
        assert (found[0] == 0).all() and (found[1, :32] == 5).all()


def test_the_rest_is_untouched_and_the_folder_whole(source: Path, tmp_path: Path) -> None:
    encoding = "swiglu-affine4-g32"
    pack(source, tmp_path / "plain")
    pack(source, tmp_path / "coded", encoding=encoding)
    dense = "model.safetensors"
    assert (tmp_path / "coded" / dense).read_bytes() == (tmp_path / "plain" / dense).read_bytes()
    found, report = inspect(tmp_path / "coded"), verify(tmp_path / "coded")
    assert (found["encoding"], report.encodings) == (encoding, [encoding])
    layout = open_layout(tmp_path / "coded")
    (record, data) = next(read_records([(layout.path((1, 2)), layout.records[1, 2])]))
    assert [(t.name, t.dtype, t.shape) for t in record.tensors] == [
        ("gate_up_proj.weight", "U32", (64, 8)),
        ("gate_up_proj.scales", "BF16", (64, 2)),
        ("gate_up_proj.biases", "BF16", (64, 2)),
        ("down_proj.weight", "U32", (64, 4)),
        ("down_proj.scales", "BF16", (64, 1)),
        ("down_proj.biases", "BF16", (64, 1)),
    ]
    assert pack(source, tmp_path / "coded", encoding=encoding).reused_clusters == 3
    with closing(read_tensors(source / "model.safetensors")) as stream:
        raw = {e.name: bytes(data) for e, data in stream}
    down = np.frombuffer(raw["model.layers.1.mlp.experts.2.down_proj.weight"], np.float32)
    kinds = quantise(down.reshape(64, 32), 4, 32)
    for kind, array in kinds.items():
        assert bytes(record.views(data)[f"down_proj.{kind}"]) == array.tobytes()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--quantize", "int4", "-g", "48"], 2, "48 is no group"),
        (["-g", "32"], 2, "32 is no group of --quantize"),
        (["--quantize", "int8"], 2, "down_proj of an expert has 32 columns, no multiple"),
        (["--quantize", "int3"], 2, "int3"),
    ],
)
def test_what_cannot_be_is_refused_before_a_byte(
    flags: list[str],
    code: int,
    said: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(["pack", str(source), "-o", str(tmp_path / "packed"), *flags]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_what_is_quantised_is_not_quantised_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(source, tmp_path / "coded", encoding="swiglu-affine4-g32")
    flags = ["--quantize", "int8", "-g", "32", "-o", str(tmp_path / "again")]
    assert main.run(["pack", str(tmp_path / "coded"), *flags]) == 2
    assert "encoded as swiglu-affine4-g32 are not converted" in capsys.readouterr().err


def test_a_guests_name_on_a_native_model_is_refused(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "coded", encoding="swiglu-affine4-g32")
    path = tmp_path / "coded/experts/cluster_manifest.json"
    data = json.loads(path.read_text()) | {"encoding": "transformers-affine4-g32"}
    path.write_text(json.dumps(data))
    with pytest.raises(ShapeMismatch, match="the model is Chronos' own"):
        open_layout(tmp_path / "coded", config=read_config(source))


@pytest.mark.parametrize(("word", "bound"), [("int8", 1.003), ("int4", 1.02)])
def test_the_demo_loses_next_to_nothing(
    word: str, bound: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 2,048 tokens, whose factor lies off that of a long text by more than it is;
    bench/results/quantise.md has the latter, within 1.001 and 1.006."""
    pytest.importorskip("torch")
    packed = str(tmp_path / "packed")
    assert main.run(["pack", "demo", "--quantize", word, "-o", packed]) == 0
    capsys.readouterr()
    data = ["--data", "stdlib", "--backend", "torch", "-n", "2048", "--json"]
    assert main.run(["eval", packed, "--against", "demo", *data]) == 0
    found = json.loads(capsys.readouterr().out)
    other = found["against"]
    assert other["loss_factor"] == pytest.approx(np.exp(found["loss"] - other["loss"]))
    assert found["tokens"] > 2000 and found["loss"] != other["loss"]
    assert other["loss_factor"] < bound
