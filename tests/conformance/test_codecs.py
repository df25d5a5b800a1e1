"""An encoding that Chronos does not ship, from packing to the answer, on every backend.

tests/support/toy_codec.py is all that it takes. The reference is its dequantised twin: the same
model with the values its coded experts stand for, in float32; logits are compared bit for bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.disk.io import FileIO
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ConfigError, CorruptFileError, ShapeMismatch, UsageError
from chronos.common.layout import inspect, open_layout, pack, reorder, verify, write_experts
from chronos.common.layout.codecs import SWIGLU
from chronos.common.layout.manifest import Record, RecordTensor
from chronos.common.layout.source import encoded, open_source
from chronos.common.model.guest import read_config
from chronos.common.text.sampling import SamplingParams
from chronos.run.engine import load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import tiny_model
from tests.support.toy_codec import NAME, decoded, register

GREEDY = SamplingParams()
PROMPT = [5, 80, 41, 7, 7, 123, 9, 250, 31]


@pytest.fixture(scope="module", autouse=True)
def registered(backend: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        register(patch, backend.name)
        yield


@pytest.fixture(scope="module")
def source(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("codecs") / "model")


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    pack(source, source.with_name("coded"), encoding=NAME)
    return source.with_name("coded")


def twin(source: Path, folder: Path, layers: set[int]) -> Path:
    """The model with the experts of some layers coded and decoded."""
    shutil.copytree(source, folder)
    tensors = []
    with closing(read_tensors(source / "model.safetensors")) as found:
        for entry, data in found:
            value = np.frombuffer(bytes(data), np.float32).reshape(entry.shape)
            if ".mlp.experts." in entry.name and int(entry.name.split(".")[2]) in layers:
                value = decoded(value)
            tensors.append((entry.name, entry.dtype, entry.shape, value.tobytes()))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def logits(backend: Any, folder: Path, budget: str) -> np.ndarray:
    """Of a prompt and of each of eight tokens after it."""
    with load(folder, backend=backend.name, budget=budget) as engine:
        runner = OneSequence(engine.session)
        token, found = runner.prefill(PROMPT, GREEDY), [runner.logits()]
        for _ in range(8):
            token = runner.decode(token, GREEDY)
            found.append(runner.logits())
    return np.stack(found)


@pytest.fixture(scope="module")
def expected(backend: Any, source: Path) -> np.ndarray:
    return logits(backend, twin(source, source.with_name("twin"), {0, 1, 2}), "resident")


@pytest.mark.parametrize("budget", ["resident", "all", "50%", "25%"])
def test_it_computes_what_its_dequantised_twin_computes(
    backend: Any, coded: Path, source: Path, expected: np.ndarray, budget: str
) -> None:
    np.testing.assert_array_equal(logits(backend, coded, budget), expected)
    assert not np.array_equal(logits(backend, source, "resident"), expected)


def test_layers_may_be_coded_differently(backend: Any, source: Path, tmp_path: Path) -> None:
    """Slots are handed from experts of one kind to those of another."""
    plain = open_source(source, FileIO())
    model = encoded(plain, NAME)
    templates = {0: model.templates[0], 1: plain.templates[1], 2: model.templates[2]}

    def experts(keys: Any) -> Iterator[Any]:
        for key in keys:
            yield from (plain if key[0] == 1 else model).experts([key])

    pack(source, tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed/experts")
    fingerprint = plain.fingerprint
    write_experts(tmp_path / "packed", plain.layers, templates, experts, fingerprint=fingerprint)
    layout = open_layout(tmp_path / "packed", config=read_config(source))
    assert layout.encodings == {0: NAME, 1: SWIGLU, 2: NAME}
    assert inspect(layout.folder)["encoding"] == f"{NAME} (layers 0 2), {SWIGLU} (layers 1)"
    with pytest.raises(UsageError, match=f"encoded as {NAME} are not converted"):
        pack(layout.folder, tmp_path / "more", encoding=NAME)
    expected = logits(backend, twin(source, tmp_path / "twin", {0, 2}), "resident")
    for budget in ("resident", "all", "25%"):
        np.testing.assert_array_equal(logits(backend, layout.folder, budget), expected)


def test_its_records_are_those_it_implies(coded: Path, source: Path) -> None:
    config = read_config(source)
    record = open_layout(coded, config=config).records[1, 3]
    assert [(t.name, t.dtype, t.shape) for t in record.tensors] == [
        ("gate_up_proj", "I8", (48, 32)),
        ("gate_up_proj_scale", "F32", (48,)),
        ("down_proj", "I8", (32, 24)),
        ("down_proj_scale", "F32", (32,)),
    ]
    report = verify(coded)
    assert (report.records, report.encodings) == (24, [NAME])
    found = inspect(coded)
    assert (found["encoding"], found["expert_bytes"]) == (NAME, record.nbytes)
    assert found["expert_bytes_total"] == 24 * record.nbytes


def test_it_stays_when_a_folder_is_packed_again(coded: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(coded, tmp_path / "folder")
    keys = sorted(open_layout(coded).records, key=lambda key: key[1])
    reorder(tmp_path / "folder", [keys], {"method": "test"})
    layout = open_layout(tmp_path / "folder", config=read_config(source))
    assert set(layout.encodings.values()) == {NAME}
    assert pack(coded, tmp_path / "again").records == 24
    assert pack(source, coded, encoding=NAME).reused_clusters == 3
    with pytest.raises(UsageError, match="holds another packed model"):
        pack(source, coded)
    with pytest.raises(ConfigError, match="cannot be converted to 'swiglu'"):
        pack(coded, tmp_path / "more", encoding=SWIGLU)


def test_a_scale_that_is_wrong_is_found(coded: Path, source: Path, tmp_path: Path) -> None:
    def spoiled(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> Any:
        if name.endswith("experts.3.down_proj.weight"):
            data = np.full(shape, np.nan, np.float32).tobytes()
        return name, dtype, shape, data

    shutil.copytree(source, tmp_path / "model")
    with closing(read_tensors(source / "model.safetensors")) as found:
        tensors = [spoiled(e.name, e.dtype, e.shape, bytes(data)) for e, data in found]
    write_tensors(tmp_path / "model/model.safetensors", tensors, {"format": "pt"})
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(CorruptFileError, match="expert 3: down_proj_scale: element 0 is NaN"),
    ):
        pack(tmp_path / "model", tmp_path / "packed", encoding=NAME)


def test_a_config_of_other_shapes_is_refused(coded: Path, tmp_path: Path) -> None:
    shutil.copytree(coded, tmp_path / "folder")
    path = tmp_path / "folder/config.json"
    text = path.read_text().replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 16')
    path.write_text(text)
    with pytest.raises(ShapeMismatch, match=r"gate_up_proj I8 \[48, 32\].*implies.*I8 \[32, 32\]"):
        open_layout(tmp_path / "folder", config=read_config(tmp_path / "folder"))


def test_a_backend_without_it_names_it(
    backend: Any, coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"chronos.backends.{backend.name}.codecs")
    monkeypatch.delitem(module.CODECS, NAME)
    module.codec_of.cache_clear()
    with pytest.raises(ConfigError, match=f"encoded as {NAME}"):
        load(coded, backend=backend.name, budget="50%")


def test_coded_experts_are_not_trained(backend: Any, coded: Path) -> None:
    model = backend.load(coded, resident=True)
    model.train()
    with pytest.raises(UsageError, match="for running only"):
        ids_BT = np.array([PROMPT])
        if backend.name == "torch":
            import torch

            model(torch.from_numpy(ids_BT).to(model.device))
        else:
            import mlx.core as mx

            model(mx.array(ids_BT))


@pytest.mark.parametrize("dtype", ["U8", "I8", "U32", "F8_E8M0"])
def test_plain_experts_hold_no_integers(backend: Any, dtype: str) -> None:
    """A checkpoint that is quantised and does not say so would be computed as its bits."""
    tensor = RecordTensor("down_proj", dtype, (2, 4), 0)
    record = Record((3, 1), "x.ctsr", 0, 4096, b"", (tensor,), "transformers")
    codec = import_module(f"chronos.backends.{backend.name}.codecs").codec_of("transformers")
    with pytest.raises(ShapeMismatch, match=rf"expert \(3, 1\): down_proj is {dtype}"):
        codec.view(zeros(backend, 4096), record)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "C64", "BOOL"])
def test_what_no_framework_holds_is_refused_by_its_name(backend: Any, dtype: str) -> None:
    record = Record((3, 1), "x.ctsr", 0, 4096, b"", (RecordTensor("w", dtype, (8, 8), 0),), NAME)
    codec = import_module(f"chronos.backends.{backend.name}.codecs").codec_of(NAME)
    with pytest.raises(ShapeMismatch, match=f"w is {dtype}"):
        codec.view(zeros(backend, 4096), record)


def zeros(backend: Any, nbytes: int) -> Any:
    """A record's bytes, as the codecs of a backend take them."""
    if backend.name == "torch":
        import torch

        return torch.zeros(nbytes, dtype=torch.uint8)
    import mlx.core as mx

    from chronos.backends.mlx.codecs import Raw

    return Raw(mx.zeros((nbytes,), mx.uint8), 0)
