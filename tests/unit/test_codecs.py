"""Encodings: what the manifest names, what checkpoints and folders of version 2 imply."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chronos.common.errors import ConfigError, CorruptClusterError, ShapeMismatch
from chronos.common.layout import inspect, open_layout, pack, read_records, verify
from chronos.common.layout.codecs import codec_of
from chronos.common.model.guest import read_config
from chronos.testing.tiny import tiny_model
from tests.support.tiny_guest import STYLES, tiny_guest

VERSION_2 = Path(__file__).parent.parent / "support/version2"  # written by the version before
MIXED = {  # MLX-LM's settings, with one projection that has its own
    "bits": 4, "group_size": 64,
    "model.layers.2.mlp.switch_mlp.down_proj": {"bits": 8, "group_size": 64},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_flushing")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    small = {"num_hidden_layers": 2, "num_experts": 2, "lookahead_steps": 0}
    pack(tiny_model(tmp_path / "model", **small), tmp_path / "packed")
    return tmp_path / "packed"


def manifest(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "experts/cluster_manifest.json").read_text())
    return data


def change(folder: Path, **fields: Any) -> None:
    (folder / "experts/cluster_manifest.json").write_text(json.dumps(manifest(folder) | fields))


def test_our_own_models_are_swiglu(packed: Path) -> None:
    data = manifest(packed)
    assert (data["version"], data["encoding"], data["layers"]) == (3, "swiglu", {})
    assert open_layout(packed).encodings == {0: "swiglu", 1: "swiglu"}
    assert verify(packed).encodings == ["swiglu"]
    assert inspect(packed)["encoding"] == "swiglu"
    assert inspect(packed / "experts/cluster-00000.ctsr")["metadata.encoding"] == "swiglu"


@pytest.mark.parametrize("style", STYLES)
def test_checkpoints_say_theirs_by_their_tensors(style: str, tmp_path: Path) -> None:
    expected = {"mlx": "mlx", "mlx-4bit": "mlx-affine4"}.get(style, "transformers")
    source = tiny_guest(tmp_path / "src", style)
    assert inspect(source)["encoding"] == expected
    pack(source, tmp_path / "dst")
    assert open_layout(tmp_path / "dst").encodings == {1: expected, 2: expected}


@pytest.mark.parametrize(
    ("settings", "encodings"),
    [
        ({"bits": 8, "mode": "affine"}, ("mlx-affine8", "mlx-affine8")),
        ({"bits": 4, "mode": "mxfp4"}, ("mlx-mxfp4", "mlx-mxfp4")),
        (MIXED, ("mlx-affine4", "mlx-affine4-affine4-affine8")),
    ],
)
def test_mlx_lm_quantises_by_projection(
    settings: dict[str, Any], encodings: tuple[str, str], tmp_path: Path
) -> None:
    source = tiny_guest(tmp_path / "src", "mlx-4bit", config={"quantization": settings})
    pack(source, tmp_path / "dst")
    assert tuple(open_layout(tmp_path / "dst").encodings.values()) == encodings
    data = manifest(tmp_path / "dst")
    assert data["encoding"] == encodings[0]
    assert data["layers"] == ({} if len(set(encodings)) == 1 else {"2": encodings[1]})


@pytest.mark.parametrize(
    ("name", "encodings"),
    [
        ("native", {0: "swiglu", 1: "swiglu"}),
        ("guest", {1: "mlx-affine4", 2: "mlx-affine4-affine4-affine8"}),
    ],
)
def test_folders_of_version_2_are_read_and_packed_anew(
    name: str, encodings: dict[int, str], tmp_path: Path
) -> None:
    old = VERSION_2 / name
    assert manifest(old)["version"] == 2
    layout = open_layout(old, config=read_config(old))
    assert layout.encodings == encodings
    assert verify(old).problems == []
    pack(old, tmp_path / "new")
    new = open_layout(tmp_path / "new", config=read_config(old))
    assert (manifest(new.folder)["version"], new.encodings) == (3, encodings)
    assert new.fingerprint == layout.fingerprint
    for a, b in ((layout, new), (new, layout)):
        assert {key: record.digest for key, record in a.records.items()} == {
            record.key: record.digest
            for record, _ in read_records([(b.path(k), r) for k, r in b.records.items()])
        }


def test_a_pair_of_another_library_in_version_2_is_no_swiglu(tmp_path: Path) -> None:
    pack(tiny_guest(tmp_path / "src", "mixtral"), tmp_path / "dst")
    data = manifest(tmp_path / "dst") | {"version": 2}
    del data["encoding"], data["layers"]
    (tmp_path / "dst/experts/cluster_manifest.json").write_text(json.dumps(data))
    assert set(open_layout(tmp_path / "dst").encodings.values()) == {"transformers"}


@pytest.mark.parametrize("fields", [{"encoding": "int2-magic"}, {"layers": {"1": "int2-magic"}}])
def test_an_encoding_that_is_not_known_is_refused_by_name(
    packed: Path, fields: dict[str, Any]
) -> None:
    change(packed, **fields)
    for use in (open_layout, inspect, verify):
        with pytest.raises(ConfigError, match="'int2-magic'.*\n?.*upgrade Chronos, or pack") as e:
            use(packed)
        assert not isinstance(e.value, CorruptClusterError)


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.update(encoding=3),
        lambda data: data.update(layers=[]),
        lambda data: data.update(layers={"0": None}),
        lambda data: data.update(layers={"7": "swiglu"}),
        lambda data: data.update(layers={"00": "swiglu"}),
        lambda data: data.pop("encoding"),
        lambda data: data.update(version=2),
        lambda data: data.update(version=1),
    ],
)
def test_a_manifest_that_says_it_wrongly_is_unusable(
    packed: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    data = manifest(packed)
    edit(data)
    (packed / "experts/cluster_manifest.json").write_text(json.dumps(data))
    with pytest.raises(CorruptClusterError, match="unusable"):
        open_layout(packed)


def test_another_librarys_encoding_does_not_fit_our_model_nor_ours_theirs(
    packed: Path, tmp_path: Path
) -> None:
    change(packed, encoding="transformers")
    with pytest.raises(ShapeMismatch, match="are transformers, the model is Chronos' own"):
        open_layout(packed, config=read_config(packed))
    guest = tmp_path / "guest"
    pack(tiny_guest(tmp_path / "src", "mixtral"), guest)
    change(guest, encoding="swiglu")
    with pytest.raises(ShapeMismatch, match="are swiglu, the model is another library's"):
        open_layout(guest, config=read_config(guest))


def test_the_settings_of_a_name_are_checked() -> None:
    for name in ("swiglu", "transformers", "mlx", "mlx-affine4", "mlx-affine4-bf16-affine6"):
        assert codec_of(name).name == name
    for name in ("swiglu-x", "Swiglu", "mlx-", "mlx-affine", "", "mlx affine4"):
        with pytest.raises(ConfigError, match="does not know"):
            codec_of(name)


def test_an_unfinished_folder_of_other_encodings_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its records have the same tensors; what they mean differs."""
    for bits in (4, 8):
        tiny_guest(tmp_path / f"src{bits}", "mlx-4bit", config={"quantization": {"bits": bits}})
    pack(tmp_path / "src4", tmp_path / "dst")
    (tmp_path / "dst/experts/cluster_manifest.json").unlink()
    shutil.copy(tmp_path / "src8/config.json", tmp_path / "dst/config.json")
    assert pack(tmp_path / "src8", tmp_path / "dst").reused_clusters == 0
