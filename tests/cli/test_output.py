"""What is printed: commands to copy, words, numbers, charts, progress, narrow terminals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chronos.cli import bench, charts, output
from chronos.testing.tiny import tiny_packed
from tests.support.tiny_guest import tiny_guest


@pytest.mark.needs_backend
def test_the_next_command_stands_alone_and_can_be_run(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the table, in one line however narrow the terminal; pasted, it works."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a long name of a folder with blanks in it"
    shutil.copytree(packed, folder)
    last = chronos("inspect", folder).out.splitlines()[-1]
    assert last.startswith("next: chronos generate ")
    name, *args = shlex.split(last.removeprefix("next: "))
    assert name == "chronos" and chronos(*args, "-n", 1).code == 0


def test_inspect_and_generate_name_the_same_folder_to_pack_into(
    chronos: Any, tmp_path: Path
) -> None:
    source = tiny_guest(tmp_path / "src")
    told = chronos("inspect", source, "--json").json["next"]
    assert told == f"chronos pack {source} -o {source}-packed"
    assert told in chronos("generate", source, "-p", "x", "--budget", "25%").err


def test_labels_are_words_and_json_has_numbers_under_stable_keys(
    chronos: Any, packed: Path
) -> None:
    shown, data = chronos("inspect", packed).out, chronos("inspect", packed, "--json").json
    assert "size of one expert" in shown and "least memory to run it" in shown
    assert "_" not in shown.partition("next:")[0].replace(str(packed), "")
    assert not [key for key in data if " " in key or "%" in key]
    for held in data["budgets"]:
        assert {key for key, value in held.items() if isinstance(value, str)} == {"budget"}
        assert held["bytes"] == held["experts"] * data["expert_bytes"]


def test_forty_series_get_forty_looks() -> None:
    looks = [json.dumps(charts.look(number)) for number in range(40)]
    assert len(set(looks)) == 40
    without = [{k: v for k, v in charts.look(n).items() if k != "color"} for n in range(8)]
    assert len({json.dumps(look) for look in without}) == 8  # in black and white too


def test_a_name_looks_alike_in_every_chart(
    chronos: Any, long_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a forecaster or without one; every line has a look of its own."""
    drawn: list[dict[str, int]] = []
    monkeypatch.setattr(charts, "lines", lambda *args, looks, **rest: drawn.append(dict(looks)))
    for flag in ("--fit", "--no-fit"):
        args = ("simulate", long_trace, "--budget", "50%,75%", "--png", tmp_path / "x.png", flag)
        assert chronos(*args).code == 0
    full, fewer = drawn
    assert len(full) == 10 and len(set(full.values())) == 10  # the trace has no token ids
    assert len(fewer) == 9 and fewer.items() <= full.items()


def test_a_chart_of_one_budget_has_bars(
    chronos: Any, long_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(charts, "bars", lambda *args, **rest: drawn.append((args, rest)))
    args = ("simulate", long_trace, "--budget", "50%", "--no-fit", "--png", tmp_path / "x.png")
    assert chronos(*args).code == 0
    [((_, groups), rest)] = drawn
    assert "min-w2 (knows 2 ahead)" in groups and "50% of the experts" in rest["title"]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    output.configure(quiet=quiet)
    with output.progress("recording") as update:
        for done in range(31):
            update(done, 60)
            now[0] += 1
    output.configure()
    shown = [] if quiet else [f"recording: {10 * n / 0.6:.0f} %, {10 * n} s" for n in (1, 2, 3)]
    assert capsys.readouterr().err.splitlines() == shown


@pytest.mark.needs_backend
@pytest.mark.parametrize("new_tokens", [0, 6])
def test_progress_of_one_sequence_goes_piece_by_piece_to_its_end(
    chronos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_tokens: int
) -> None:
    """Of what there is to record, not of the most that was asked for."""
    seen: list[tuple[int, int]] = []

    @contextmanager
    def progress(label: str, **options: Any) -> Iterator[Any]:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(output, "progress", progress)
    packed = tiny_packed(tmp_path / "tiny", max_position_embeddings=2048)
    (tmp_path / "one.txt").write_text("left and right are words. " * 400)
    to, flags = tmp_path / "t.npz", ("--seq-len", 1100, "--new-tokens", new_tokens, "-n", 1000)
    if new_tokens:
        flags = ("--seq-len", 2000, "--new-tokens", new_tokens, "-n", 2 * new_tokens)
    done = chronos("trace", packed, "--data", tmp_path / "one.txt", "-o", to, *flags, "--json")
    assert seen[-1] == (done.json["tokens"], done.json["tokens"])
    if new_tokens:
        assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    else:
        assert seen == [(512, 1000), (1000, 1000)] and done.json["sequences"] == 1


def test_a_table_too_wide_for_the_terminal_becomes_a_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, row = ("budget", "tok/s", "of resident", "hits"), ("12.5%", "10.0", "50.0 %", "-")
    monkeypatch.setenv("COLUMNS", "80")
    output.table(columns, [row], title="model")
    assert "budget  tok/s  of resident  hits" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "30")
    output.table(columns, [row], title="model")
    assert capsys.readouterr().out.split("\n")[1:] == [
        "model", "budget 12.5%", "  tok/s: 10.0", "  of resident: 50.0 %", "  hits: -", ""
    ]  # fmt: skip


def test_the_table_of_bench_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = ("resident", "999.9", "12.5 %", "100.0 %", "yes", "99.9 %", "12.345", "12.34", "99.9 %")
    output.table(bench._COLUMNS, [row])
    header = capsys.readouterr().out.splitlines()[1].split()
    assert header == " ".join(bench._COLUMNS).split()


@pytest.mark.needs_backend
def test_quiet_demo_is_its_table(chronos: Any, packed: Path) -> None:
    flags = ("demo", packed, "-n", 4, "-p", "x", "--budget", "50%")
    full, quiet = chronos(*flags).out, chronos(*flags, "-q").out
    assert "What this shows" in full and "What this shows" not in quiet
    assert quiet.split()[:4] == ["all", "experts", "room", "for"] and "yes" in quiet


@pytest.mark.needs_backend
def test_ctrl_c_in_generate_shows_what_was_reached(command: list[str]) -> None:
    flags = [
        "generate",
        "demo",
        "-p",
        "def f(",
        "-n",
        "100000",
        "--temp",
        "1",
        "--context",
        "200000",
    ]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(20)  # it writes
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"generation: " in shown and b"experts: " in shown


@pytest.mark.needs_backend
def test_a_prompt_beyond_ascii_in_the_c_locale(command: list[str]) -> None:
    """Its bytes are UTF-8 whatever the locale says, and mean the same tokens."""
    flags = ["generate", "demo", "-p", "h\N{LATIN SMALL LETTER E WITH ACUTE} \N{OK HAND SIGN}"]
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF"))}
    found = []
    for extra in (
        {"LANG": "C.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = subprocess.run(
            [*command, *flags, "-n", "2", "--json"],
            env=plain | extra,
            capture_output=True,
            check=True,
        )
        found.append(json.loads(done.stdout)["tokens"])
        assert json.loads(done.stdout)["prompt_tokens"] > 4
    assert found[0] == found[1]


def test_version_and_help_in_short(chronos: Any) -> None:
    assert chronos("-V").out == chronos("--version").out
    assert chronos("help").out == chronos("--help").out
    for path in (["pack"], ["bench", "replay"]):
        assert chronos("help", *path).out == chronos(*path, "--help").out


def test_doctor_lists_optional_packages_and_what_to_type(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    gone = {"matplotlib", "transformers"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in gone else find(n, *a)
    )
    monkeypatch.setenv("COLUMNS", "40")
    done, data = chronos("doctor", packed), chronos("doctor", packed, "--json").json
    assert "missing: pip install 'chronos-moe[plot]'" in done.out.splitlines()
    assert "missing: pip install 'chronos-moe[guests]'" in done.out.splitlines()
    found = {package["name"]: package for package in data["packages"]}
    assert found["matplotlib"]["version"] is None and found["matplotlib"]["for"] == "charts"


def test_doctor_says_how_much_it_read(chronos: Any, packed: Path) -> None:
    data = chronos("doctor", packed, "--json").json
    assert data["disk"]["bytes"] == max(p.stat().st_size for p in packed.rglob("*") if p.is_file())
    shown = " ".join(chronos("doctor", packed).out.split())
    assert "a small sample" in shown and f"{output.size(data['disk']['bytes'])} of" in shown


@pytest.mark.parametrize("name", ["generate", "inspect", "verify"])
def test_an_empty_folder_is_the_same_mistake_everywhere(
    chronos: Any, tmp_path: Path, name: str
) -> None:
    done = chronos(name, tmp_path, *(["-p", "x"] if name == "generate" else []))
    assert done.code == 2 and "is not a model folder" in done.error[0]


@pytest.mark.parametrize("name", ["generate", "inspect", "verify"])
def test_the_folder_of_a_run_leads_to_its_model(
    chronos: Any, packed: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(packed, tmp_path / "run/model")
    done = chronos(name, tmp_path / "run", *(["-p", "x"] if name == "generate" else []))
    assert done.code == 2 and done.error[-1] == f"fix: did you mean {tmp_path / 'run/model'}?"


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_a_file_of_another_kind_is_named_for_what_it_is_not(
    chronos: Any, tmp_path: Path, name: str
) -> None:
    (tmp_path / "notes.txt").write_text("abc")
    done = chronos(name, tmp_path / "notes.txt")
    assert done.code == 3 and done.error[0] == "error: notes.txt is not a safetensors file"


def test_packing_again_says_that_there_is_nothing_to_do(
    chronos: Any, packed: Path, tmp_path: Path
) -> None:
    source = packed.with_name(packed.name + "-unpacked")
    assert "B/s" in chronos("pack", source, "-o", tmp_path / "p").err
    assert chronos("pack", source, "-o", tmp_path / "p").err == (
        "nothing to do: it was packed already\n"
    )
    (tmp_path / "p/experts/cluster_manifest.json").unlink()
    (tmp_path / "p/experts/cluster-00002.ctsr").unlink()
    again = chronos("pack", source, "-o", tmp_path / "p").err
    assert "2 of 3 cluster files were there already" in again


def test_an_interrupted_packing_says_how_it_goes_on(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chronos.common import layout

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layout, "pack", stop)
    source = packed.with_name(packed.name + "-unpacked")
    done = chronos("pack", source, "-o", tmp_path / "p")
    assert done.code == 130
    assert done.err == f"interrupted; the same command goes on in {tmp_path / 'p'}\n"


@pytest.mark.needs_backend
def test_json_of_generate_says_what_was_asked(chronos: Any, packed: Path) -> None:
    """Enough to run it again, and the very same tokens then."""
    flags = ("-p", "x", "-n", 3, "--budget", "50%", "--predictor", "lru", "--temp", 0.5)
    data = chronos("generate", packed, *flags, "--seed", 3, "--json").json
    assert (data["model"], data["budget"], data["predictor"]) == (str(packed), "50%", "lru")
    assert data["chronos"] and data["sampling"]["temperature"] == 0.5
    assert data["sampling"]["seed"] == 3
    again = chronos(
        "generate", data["model"], "-p", "x", "-n", 3, "--budget", data["budget"], "--json",
        "--temp", data["sampling"]["temperature"], "--seed", data["sampling"]["seed"],
    ).json  # fmt: skip
    assert again["tokens"] == data["tokens"]
    assert (data["predictor_used"], again["predictor"]) == ("lru", "auto")
    assert again["predictor_used"] == "token-table"  # the model has no forecaster


@pytest.mark.needs_backend
def test_where_all_experts_are_in_memory_no_predictor_runs(chronos: Any, packed: Path) -> None:
    """And one that was asked for is told to have no effect."""
    for budget in ("all", "resident"):
        flags = ("-p", "x", "-n", 1, "--budget", budget, "--predictor", "lfu")
        done = chronos("generate", packed, *flags, "--json")
        assert done.json["predictor_used"] is None
        assert done.err == "--predictor lfu: no effect where every expert is in memory\n"


@pytest.mark.needs_backend
def test_one_is_no_plural_and_one_token_has_no_speed(chronos: Any, packed: Path) -> None:
    shown = chronos("generate", packed, "-p", "x", "-n", 1).err.splitlines()
    assert "generation: 1 token" in shown
    shown = chronos("generate", packed, "-p", "x", "-n", 2).err.splitlines()
    assert any(line.startswith("generation: 2 tokens, ") for line in shown)


def test_a_failed_packing_leaves_no_folder_that_it_made(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chronos.common.errors import DiskFullError
    from chronos.common.layout import pack

    def full(*args: Any) -> None:
        raise DiskFullError("no room")

    module = sys.modules[pack.__module__]
    monkeypatch.setattr(module, "check_free_space", full)
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "new", tmp_path / "there"):
        done = chronos("pack", packed.with_name(packed.name + "-unpacked"), "-o", target)
        assert done.code == 4 and done.error == ["error: no room"]
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())


def test_a_replay_takes_no_flag_that_its_runs_set(chronos: Any, trace: Path) -> None:
    for flag in ("--budget", "--prefetch", "--predictor"):
        done = chronos("bench", "replay", trace, flag, "auto")
        assert done.code == 2 and f"No such option: {flag}" in done.error[0]
