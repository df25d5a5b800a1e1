"""pack, inspect, verify: folders as a user makes, looks at and distrusts them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_guest import tiny_guest


@pytest.fixture
def source(packed: Path) -> Path:
    """The unpacked folder that `packed` was made from."""
    return packed.with_name(packed.name + "-unpacked")


@pytest.mark.needs_backend
def test_pack_then_generate(chronos: Any, source: Path, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    data = chronos("pack", source, "-o", folder, "--json").json
    assert data["records"] == 24 and data["order"] == {"method": "layer"}
    flags = ("-p", "x", "-n", 6, "--budget", "50%", "--json")
    tokens = chronos("generate", folder, *flags).json["tokens"]
    assert tokens == chronos("generate", packed, *flags).json["tokens"]


def test_pack_says_what_it_wrote(chronos: Any, source: Path, tmp_path: Path) -> None:
    done = chronos("pack", source, "-o", tmp_path / "packed")
    assert done.out.startswith(f"{tmp_path / 'packed'}: 24 experts, ")


@pytest.mark.needs_backend
def test_pack_by_a_trace_gives_its_reason_and_the_same_tokens(
    chronos: Any, source: Path, text: Path, tmp_path: Path
) -> None:
    folder, flags = tmp_path / "packed", ("-p", "x", "-n", 6, "--json")
    done = chronos("pack", source, "-o", folder, "--calibrate", text)
    assert done.code == 0 and "of read time, and saving 2% is the least that counts" in done.err
    tokens = chronos("generate", folder, "--budget", "25%", *flags).json["tokens"]
    assert tokens == chronos("generate", source, *flags).json["tokens"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--trace", "t.npz", "--calibrate", "stdlib"], 2, "exclude each other"),
        (["--trace", "absent.npz"], 2, "no such trace"),
        (["--calibrate", "absent"], 2, "no such data"),
    ],
)
def test_pack_refuses(
    chronos: Any, source: Path, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    done = chronos("pack", source, "-o", tmp_path / "packed", *args)
    assert done.code == code and words in done.error[0]
    assert not (tmp_path / "packed").exists()


def test_data_that_is_not_there_is_told_before_a_guest_is_packed(
    chronos: Any, tmp_path: Path
) -> None:
    source = tiny_guest(tmp_path / "src")
    done = chronos("pack", source, "-o", tmp_path / "dst", "--calibrate", tmp_path / "absent")
    assert done.code == 2 and "no such data" in done.error[0]
    assert not (tmp_path / "dst").exists()


def test_a_trace_of_another_model_is_refused(chronos: Any, source: Path, tmp_path: Path) -> None:
    import numpy as np

    from chronos.common.traces.trace import TraceRecorder

    recorder = TraceRecorder(16, 1)
    recorder.append(np.zeros((4, 2, 1), np.int64))
    recorder.trace().save(tmp_path / "t.npz")
    done = chronos("pack", source, "-o", tmp_path / "packed", "--trace", tmp_path / "t.npz")
    assert done.code == 2 and "2 layers of 16 experts" in done.error[0]


def test_inspect_tells_what_a_budget_holds(chronos: Any, packed: Path, source: Path) -> None:
    data = chronos("inspect", packed, "--json").json
    assert (data["kind"], data["experts_per_layer"], data["layers"]) == ("packed", 8, 3)
    held = {each["budget"]: each for each in data["budgets"]}
    assert held["25.0%"]["experts"] == 6 and held["25.0%"]["experts_per_layer"] == 2.0
    assert "budget 25.0%" in chronos("inspect", packed).out
    assert chronos("inspect", source, "--json").json["kind"] == "unpacked"
    assert chronos("inspect", packed / "experts/cluster-00000.ctsr").code == 0


def test_verify_reads_everything(chronos: Any, packed: Path) -> None:
    data = chronos("verify", packed, "--json").json
    assert data["problems"] == [] and data["records"] == 24
    assert "no problems" in chronos("verify", packed).out


def test_verify_lists_every_problem(chronos: Any, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    for name in ("cluster-00000.ctsr", "cluster-00002.ctsr"):
        path = copy / "experts" / name
        data = bytearray(path.read_bytes())
        data[5000] ^= 0x10
        path.write_bytes(data)
    done = chronos("verify", copy)
    assert done.code == 3 and "2 problems" in done.out
    assert [line.split(":")[0] for line in done.err.splitlines()].count("error") == 2
    assert "cluster-00002.ctsr" in done.err


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_a_path_that_is_not_there(chronos: Any, tmp_path: Path, name: str) -> None:
    done = chronos(name, tmp_path / "absent")
    assert done.code == 2 and "no such file or folder" in done.error[0]


def test_a_guest_is_explained_then_packed_then_explained_again(
    chronos: Any, tmp_path: Path
) -> None:
    source, target = tiny_guest(tmp_path / "src", "mixtral", shards=2), tmp_path / "dst"
    before = chronos("inspect", source, "--budget", "50%", "--json").json
    assert (before["kind"], before["model_type"]) == ("unpacked", "mixtral")
    assert before["fits_disk"] is True and before["budgets"][0]["experts"] == 4
    assert before["next"] == f"chronos pack {source} -o {source}-packed"
    assert any(library.startswith("Transformers on torch") for library in before["runs_with"])
    done = chronos("pack", source, "-o", target)
    assert done.out.startswith(f"{target}: 8 experts, ")
    after = chronos("inspect", target, "--json").json
    assert after["kind"] == "packed" and after["bytes"] == before["bytes"]
    assert after["next"].startswith(f"chronos generate {target} --budget 25%")
    assert "12.5%" in chronos("inspect", target).out
    assert chronos("verify", target, "--json").json["problems"] == []


def test_what_no_library_runs_is_not_sent_on(
    chronos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chronos.backends import libraries

    monkeypatch.setattr(libraries, "_verdict", lambda *_: libraries.Verdict("not here", False))
    source = tiny_guest(tmp_path / "src", config={"model_type": "unheard_of"})
    data = chronos("inspect", source, "--json").json
    assert data["runs_with"] == ["not here", "not here"] and "next" not in data
    assert "not here" in chronos("inspect", source).out


def test_packing_again_is_told_as_done_and_linking_saves_the_dense_part(
    chronos: Any, tmp_path: Path
) -> None:
    source = tiny_guest(tmp_path / "src")
    first, again = (chronos("pack", source, "-o", tmp_path / "a", "--json").json for _ in "12")
    assert (first["reused_clusters"], again["reused_clusters"]) == (0, 2)
    linked = chronos("pack", source, "-o", tmp_path / "b", "--link", "--json").json
    assert linked["bytes"] < first["bytes"] and linked["fingerprint"] == first["fingerprint"]
    assert not (tmp_path / "b/model.safetensors").exists()


def test_what_was_left_out_is_said(chronos: Any, tmp_path: Path) -> None:
    source = tiny_guest(tmp_path / "src", config={"num_hidden_layers": 2})
    done = chronos("pack", source, "-o", tmp_path / "dst")
    assert done.code == 0 and "left out" in done.err and "model.layers.2." in done.err


def test_a_guest_that_is_not_packed_says_what_to_do(chronos: Any, tmp_path: Path) -> None:
    source = tiny_guest(tmp_path / "src")
    done = chronos("generate", source, "-p", "x", "--budget", "25%")
    assert done.code == 2 and f"fix: pack it: chronos pack {source}" in done.err


@pytest.mark.parametrize("name", ["inspect", "verify", "generate"])
def test_an_id_of_the_hub_that_is_not_cached(
    chronos: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    extra = ("-p", "x") if name == "generate" else ()
    done = chronos(name, "some-org/some-model", *extra)
    assert done.code == 5 and "there is no folder 'some-org/some-model'" in done.error[0]


def test_verify_gives_what_where_and_fix_a_line_each(
    chronos: Any, packed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    dense = copy / "model.safetensors"
    data = bytearray(dense.read_bytes())
    data[len(data) // 2] ^= 1  # a weight of the embedding, still a number
    dense.write_bytes(data)
    for path in (copy, dense):
        done = chronos("verify", path)
        assert done.code == 3 and done.out.endswith("tensors: 1 problem\n")
        assert done.err.splitlines() == [
            "error: model.safetensors is not what was packed",
            f"where: {dense}",
            "fix: restore it, or pack the model again into a new folder",
        ]


def test_verify_of_an_unpacked_folder_counts_its_experts_and_says_what_it_cannot_know(
    chronos: Any, source: Path
) -> None:
    done = chronos("verify", source)
    assert done.code == 0 and ", 24 experts, " in done.out and "no problems" in done.out
    assert done.err.startswith("not checked: whether bytes are the ones that were written")
