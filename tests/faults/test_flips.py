"""One flipped byte, in every file and every region of a packed folder: verify finds each."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from chronos.common.errors import ChronosError
from chronos.common.layout import open_layout, pack, verify
from chronos.common.layout.digests import DIGESTS, renew
from chronos.common.layout.verify import VerifyReport
from chronos.testing.tiny import tiny_packed
from tests.support.tiny_guest import tiny_guest

SIDE = {"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE": "MIT"}


@pytest.fixture(scope="module", params=["native", "guest", "linked"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder with side files of many kinds."""
    folder = tmp_path_factory.mktemp("flips")
    if request.param == "native":
        tiny_packed(folder / "tiny")
        source = folder / "tiny-unpacked"
    else:
        source = tiny_guest(folder / "src", "mixtral")
    for name, text in SIDE.items():
        (source / name).write_text(text)
    pack(source, folder / "packed", link=request.param == "linked")
    return folder / "packed"


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "packed")
    return tmp_path / "packed"


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def positions(path: Path, folder: Path) -> list[int]:
    """Both ends and the middle of a file; of a cluster, of its header and each record too."""
    size = path.stat().st_size
    found = {0, 9, size // 2, size - 1}
    if path.suffix == ".ctsr":
        for record in open_layout(folder).by_file[path.name]:
            found |= {record.offset - 1, record.offset, record.offset + record.nbytes // 2}
    chance = random.Random(path.name)
    return sorted(p for p in found | {chance.randrange(size) for _ in range(4)} if p < size)


def problems(path: Path) -> list[dict[str, str]]:
    """Of a folder or file; what is raised at once is a problem too."""
    try:
        return verify(path, collect=True).problems
    except ChronosError as error:
        assert error.exit_code == 3
        return [{"what": error.what, "where": error.where, "fix": error.fix}]


def test_a_whole_folder_has_no_problem_and_nothing_unchecked_but_a_link(whole: Path) -> None:
    report = verify(whole, collect=True)
    assert report.problems == []
    linked = (whole / "dense.json").exists()
    assert [("leaves in another folder" in text) for text in report.unchecked] == [True] * linked


def test_every_flip_is_found_once_in_the_folder_and_in_the_file_alone(packed: Path) -> None:
    files = [path for path in sorted(packed.rglob("*")) if path.is_file()]
    assert len(files) > 6
    for path in files:
        for position in positions(path, packed):
            flip(path, position)
            found = problems(packed)
            assert len(found) == 1, (path.name, position, found)
            assert path.name in found[0]["where"], (path.name, position, found)
            assert problems(path), (path.name, position)
            flip(path, position)
    assert problems(packed) == []
    assert all(problems(path) == [] for path in files)
    side = verify(packed / "LICENSE")
    assert (side.files, side.bytes) == (1, 3)


def test_every_file_that_is_cut_short_or_gone_is_listed(packed: Path) -> None:
    clusters = sorted((packed / "experts").glob("*.ctsr"))
    for path in clusters:
        path.write_bytes(path.read_bytes()[:-4096])
    clusters[-1].unlink()
    (packed / "tokenizer_config.json").unlink()
    found = problems(packed)
    assert [Path(p["where"]).name for p in found] == [
        *(path.name for path in clusters), "tokenizer_config.json"
    ]  # fmt: skip


def test_damage_of_several_kinds_is_listed_each_once(packed: Path) -> None:
    layout = open_layout(packed)
    record = layout.records[layout.moe_layers[0], 0]
    flip(layout.path(record.key), record.offset)
    flip(packed / "LICENSE", 1)
    flip(packed / "config.json", 0)  # not JSON any more
    found = problems(packed)
    assert len(found) == len({tuple(p.values()) for p in found})
    assert {"LICENSE", "config.json"} <= {Path(p["where"]).name for p in found}


def test_every_problem_of_a_packed_folder_says_what_to_do(packed: Path) -> None:
    first, second, *_ = open_layout(packed).files
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    flip(packed / "config.json", 0)  # not JSON any more
    found = problems(packed)
    assert {first.name, second.name} <= {Path(problem["where"]).name for problem in found}
    assert all(problem["fix"] for problem in found)


def test_a_folder_of_before_says_what_cannot_be_checked(packed: Path) -> None:
    (packed / "experts" / DIGESTS).unlink()
    report = verify(packed, collect=True)
    assert report.problems == [] and "pack again" in report.unchecked[0]


def test_unpacked_folders_and_lone_files_say_so_too(tmp_path: Path) -> None:
    tiny_packed(tmp_path / "tiny")
    source = tmp_path / "tiny-unpacked"
    for report in (verify(source), verify(source / "model.safetensors")):
        assert report.problems == [] and len(report.unchecked) == 1
    assert verify(source).records == 24  # its experts, as inspect counts them


def test_what_is_put_back_or_written_later_has_its_digest(packed: Path) -> None:
    """A forecaster that `fit` leaves in the folder; a file packing again puts back."""
    (packed / "forecast.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    named = verify(packed, collect=True).unchecked[-1]
    assert named == "files that packing did not write: forecast.safetensors"
    renew(packed, ["forecast.safetensors"])
    assert not [text for text in verify(packed, collect=True).unchecked if "forecast" in text]
    flip(packed / "forecast.safetensors", 9)
    assert Path(problems(packed)[0]["where"]).name == "forecast.safetensors"


def test_digests_are_strictly_read(packed: Path) -> None:
    path = packed / "experts" / DIGESTS
    raw = path.read_text()
    for wrong in ("", "{}", "[]", raw + "\n", json.dumps({"files": {"a": 1}}), "[" * 10_000):
        path.write_text(wrong)
        assert ["digests" in p["what"] for p in problems(packed)] == [True], wrong[:20]


def test_not_a_number_is_named_by_tensor_and_not_told_again_as_a_digest(packed: Path) -> None:
    path = packed / "model.safetensors"
    if not path.exists():
        pytest.skip("the dense part is linked")
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes() if data[-4:] else b""
    path.write_bytes(data)
    found = problems(packed)
    assert len(found) == 1 and path.name in found[0]["where"]


def test_the_report_is_plain(whole: Path) -> None:
    assert set(VerifyReport(str(whole)).to_json()) >= {"problems", "unchecked", "records"}
