"""`export` writes a folder whole or not at all. What libraries compute with it: tests/native."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronos.common.disk import io as disk
from chronos.common.disk.tensors import read_checkpoint
from chronos.common.errors import ConfigError, CorruptFileError, DiskFullError, UsageError
from chronos.common.layout import open_layout, pack
from chronos.common.model.config import RopeScaling
from chronos.interop.export import export
from chronos.testing.tiny import tiny_packed
from tests.support.tiny_guest import tiny_guest

MLA = ("mla",)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return tiny_packed(tmp_path / "packed", hybrid_pattern=MLA)


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: bytes(data) for entry, data in read_checkpoint(folder)}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("packed"))


@pytest.mark.parametrize("with_code", [False, True])
def test_a_lengthened_context_is_refused(tmp_path: Path, with_code: bool) -> None:
    scaled = RopeScaling(4.0, 16)
    model = tiny_packed(
        tmp_path / "packed", hybrid_pattern=MLA, rope_scaling=scaled, max_position_embeddings=64
    )
    with pytest.raises(ConfigError, match="was lengthened"):
        export(model, tmp_path / "out", with_code=with_code)
    assert left(tmp_path) == []


def test_an_interrupted_one_leaves_nothing(packed: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(packed, tmp_path / "out", progress=stop)
    assert left(tmp_path) == []
    (tmp_path / ".out.chronos-new").mkdir()  # of a process that was killed
    (tmp_path / ".out.chronos-new/part").write_text("half")
    (tmp_path / "out").mkdir()
    seen: list[tuple[int, int]] = []
    done = export(packed, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert left(tmp_path) == ["out"] and not (tmp_path / "out/part").exists()
    assert seen[-1] == (done.bytes, done.bytes)


def test_a_flipped_bit_is_found_before_anything_is_written(packed: Path, tmp_path: Path) -> None:
    record = open_layout(packed).records[2, 1]
    with (packed / "experts" / record.file).open("r+b") as file:
        file.seek(record.offset + 3)
        file.write(b"\x7f")
    with pytest.raises(CorruptFileError):
        export(packed, tmp_path / "out")
    assert left(tmp_path) == []


def test_a_disk_that_is_full_is_known_before(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.FileIO, "free_bytes", lambda self, folder: 1000)
    with pytest.raises(DiskFullError, match="1000 bytes free"):
        export(packed, tmp_path / "out")
    assert left(tmp_path) == []


def test_what_is_no_model_for_it_says_why(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not quantised"):
        export(packed, tmp_path / "out", dequantise=lambda *_: b"")
    guest = tiny_guest(tmp_path / "packed-guest")
    with pytest.raises(UsageError, match="no packed model"):
        export(guest, tmp_path / "out")
    switch = tiny_guest(tmp_path / "packed-mlx", "mlx-4bit")
    pack(switch, tmp_path / "packed-switch")
    with pytest.raises(UsageError, match="names Transformers does not know"):
        export(tmp_path / "packed-switch", tmp_path / "out")
    assert left(tmp_path) == []


def test_what_mlx_lm_quantised_goes_back_to_it(tmp_path: Path) -> None:
    source = tiny_guest(tmp_path / "src", "mlx-4bit", config={"model_type": "qwen3_moe"})
    pack(source, tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out", to="mlx")
    assert contents(tmp_path / "out") == contents(source)
