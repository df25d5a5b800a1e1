"""What makes no sense is refused, and what has no effect is said, before any work is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from chronos.testing.tiny import tiny_packed
from tests.cli.test_train import RECIPE
from tests.support.tiny_guest import tiny_guest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("path", [["pack", "demo"], ["train", "pretrain", "-c", "r.toml"]])
def test_an_empty_name_is_not_the_current_folder(
    chronos: Any, packed: Path, here: Path, path: list[str]
) -> None:
    (here / "r.toml").write_text(RECIPE.format(data=".", steps=1))
    before = sorted(here.iterdir())
    done = chronos(*path, "-o", "")
    assert done.code == 2 and done.error[:2] == [
        "error: the folder to write has no name", "where: --out"
    ]  # fmt: skip
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_another_packed_model_is_never_packed_over(chronos: Any, tmp_path: Path, kind: str) -> None:
    """Of another geometry or of the same: the same words."""
    target = tiny_packed(tmp_path / "dst")
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    done = chronos("pack", tiny_guest(tmp_path / "src", kind), "-o", target)
    assert done.code == 2 and "already holds another packed model" in done.error[0]
    assert done.error[1] == f"where: {target}" and "choose another folder" in done.error[2]
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before


@pytest.mark.needs_backend
def test_rows_longer_than_the_context_are_refused_before_training(
    chronos: Any, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    written = RECIPE.format(data=text.as_posix(), steps=8).replace("seq_len = 16", "seq_len = 129")
    recipe.write_text(written)
    done = chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / "run")
    assert done.code == 3 and "129 tokens do not fit the model's context of 128" in done.err
    assert "max_position_embeddings" in done.err


@pytest.mark.needs_backend
def test_a_split_that_holds_nothing_out_is_told(chronos: Any, tmp_path: Path) -> None:
    """A text file is one document, whatever its length; its name decides where it goes."""
    runs = {}
    for name in ("one.txt", "three.txt"):
        (tmp_path / name).write_text("one word after another\n" * 200)
        recipe = tmp_path / "r.toml"
        recipe.write_text(RECIPE.format(data=(tmp_path / name).as_posix(), steps=1))
        runs[name] = chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / name[:3])
    assert runs["three.txt"].code == 0
    told = "no evaluation: of 1 document a validation_share of 0.3 holds out none"
    assert told in runs["three.txt"].err
    assert runs["one.txt"].code == 3
    assert "nothing to train on: 1 document, all held out" in runs["one.txt"].err


def test_a_share_that_keeps_nothing_from_training_cannot_be_measured(
    chronos: Any, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("one word after another\n")
    done = chronos("eval", packed, "--data", tmp_path / "one.txt", "--held-out", 0.01)
    assert done.code == 3 and "keeps no part of 1 document from training" in done.error[0]
    assert "--held-out 0" in done.error[2]


@pytest.mark.needs_backend
def test_sampling_flags_without_effect_are_named(chronos: Any, packed: Path) -> None:
    flags = ("-p", "x", "-n", 1)
    told = chronos("generate", packed, *flags, "--top-k", 4, "--seed", 3).err
    assert "--top-k, --seed: no effect at --temp 0" in told
    assert "no effect" not in chronos("generate", packed, *flags, "--temp", 1, "--top-k", 4).err
    assert "no effect" not in chronos("generate", packed, *flags).err


@pytest.mark.parametrize("command", [["simulate"], ["bench", "replay"]])
def test_a_chart_is_checked_before_it_is_earned(
    chronos: Any,
    trace: Path,
    tmp_path: Path,
    command: list[str],
) -> None:
    done = chronos(*command, trace, "--png", tmp_path / "x.jpg")
    assert done.code == 2 and "a chart is a PNG file, not 'x.jpg'" in done.error[0]
    done = chronos(*command, trace, "--png", tmp_path / "absent/x.png")
    assert done.code == 2 and "the folder does not exist" in done.error[0]
    assert done.error[1] == "where: --png"


def test_targets_are_checked_before_anything_is_recorded_or_trained(
    chronos: Any,
    packed: Path,
    text: Path,
    long_trace: Path,
    tmp_path: Path,
) -> None:
    for target in (tmp_path, tmp_path / "absent/file"):
        for args in (["trace", packed, "--data", text], ["fit", long_trace]):
            done = chronos(*args, "-o", target)
            assert done.code == 2 and done.error[1] == "where: --out", done.err


def test_fit_touches_its_own_file_alone(
    chronos: Any,
    long_trace: Path,
    tmp_path: Path,
) -> None:
    bystander = tmp_path / "intent.safetensors"
    bystander.write_bytes(b"of someone else")
    before = set(tmp_path.iterdir())
    done = chronos("fit", long_trace, "-o", tmp_path / "f.safetensors", "--epochs", 1)
    assert done.code == 0 and bystander.read_bytes() == b"of someone else"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "f.safetensors"}


def test_budgets_are_read_before_the_first_is_measured(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chronos.measure import benchmark

    monkeypatch.setattr(benchmark, "run", lambda *args, **kwargs: pytest.fail("it measured"))
    done = chronos("bench", packed, "--budgets", "25%,foo")
    assert done.code == 2 and "a budget cannot be 'foo'" in done.error[0]


@pytest.mark.needs_backend
def test_eval_takes_no_rows_beyond_the_context(chronos: Any, packed: Path, text: Path) -> None:
    done = chronos("eval", packed, "--data", text, "--seq-len", 100_000)
    assert done.code == 2 and "longer than the context of 256" in done.error[0]
    assert done.error[1] == "where: --seq-len"


def test_demo_checks_both_runs_before_the_first(chronos: Any, packed: Path) -> None:
    done = chronos("demo", packed, "--budget", "1%")
    assert done.code == 4 and "too small" in done.error[0]
    done = chronos("demo", packed.with_name(packed.name + "-unpacked"))
    assert done.code == 3 and "not a packed model" in done.error[0]


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", b""), ("b.txt", b"caf\xe9"), ("c.jsonl", b"")]
)
def test_the_fix_of_a_bad_file_names_no_row(
    chronos: Any, packed: Path, tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    done = chronos("eval", packed, "--data", tmp_path / name)
    assert done.code == 3 and "row" not in done.error[-1] and "remove it" in done.error[-1]
    assert "--skip-bad 1" in done.error[-1]


@pytest.mark.needs_backend
def test_trace_and_fit_pass_over_bad_files_too(
    chronos: Any, packed: Path, text: Path, tmp_path: Path
) -> None:
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    flags = ("--data", tmp_path, "-n", 20, "-o", tmp_path / "t.npz")
    assert chronos("trace", packed, *flags).code == 3
    assert chronos("trace", packed, *flags, "--skip-bad", 1).code == 0
    assert chronos("fit", packed, *flags[:2], "-n", 20, "--skip-bad", 0).code == 3


@pytest.mark.needs_backend
def test_a_text_of_one_token_says_what_is_missing(
    chronos: Any, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    done = chronos("trace", packed, "--data", tmp_path / "a.txt", "-o", tmp_path / "t.npz")
    assert done.code == 3 and "give longer texts" in done.err


@pytest.mark.parametrize("name", ["other", "file", "source"])
def test_pack_looks_at_its_target_before_it_records(
    chronos: Any, packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    from chronos.cli import routing

    monkeypatch.setattr(routing, "record", lambda *args: pytest.fail("it recorded"))
    source = packed.with_name(packed.name + "-unpacked")
    (tmp_path / "file").write_text("")
    tiny_guest(tmp_path / "other")
    target = source if name == "source" else tmp_path / name
    done = chronos("pack", source, "-o", target, "--calibrate", text)
    assert done.code == 2 and done.error[1] == f"where: {target}"


def test_flags_that_would_be_ignored_are_refused(
    chronos: Any, long_trace: Path, text: Path, tmp_path: Path
) -> None:
    done = chronos("fit", long_trace, "--data", text, "-o", tmp_path / "f.safetensors")
    assert done.code == 2 and done.error[1] == "where: --data"
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(data=text.as_posix(), steps=1))
    done = chronos("train", "pretrain", "-c", recipe, "-o", tmp_path / "run", "--force")
    assert done.code == 2 and done.error[1] == "where: --force"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "experts/cluster-00000.ctsr"])
def test_files_that_are_broken_or_absent_say_what_to_do(
    chronos: Any, packed: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(packed, tmp_path / "copy")
    if name == "config.json":
        (folder / name).write_text("{")
    else:
        (folder / name).unlink()
    what, where, fix = chronos("inspect", folder).error
    assert "cannot be" in what and where == f"where: {folder / name}"
    assert fix.startswith("fix: restore the ")


def test_an_empty_budget_names_its_flag(chronos: Any, packed: Path) -> None:
    done = chronos("generate", packed, "-p", "x", "--budget", "")
    assert done.code == 2 and done.error[1] == "where: --budget"
