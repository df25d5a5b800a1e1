"""generate and demo on a tiny model: streams, JSON, budgets, prompts, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chronos.testing.tiny import tiny_model
from tests.cli.conftest import Stdin

SPEC_STATS = (
    "ttft_s decode_tps hits late misses bytes_read bytes_wasted stall_s peak_expert_bytes "
    "fallback_weight limit"
).split()
SPEC_LIMIT = "t_res_s t_limit_s eta_limit eta_res eta_bytes".split()


@pytest.mark.needs_backend
def test_text_goes_to_stdout_and_numbers_to_stderr(chronos: Any, packed: Path) -> None:
    done = chronos("generate", packed, "-p", "def add", "-n", 12, "--budget", "50%")
    data = chronos("generate", packed, "-p", "def add", "-n", 12, "--json").json
    assert done.out == data["text"] + "\n"
    starts = [line.partition(":")[0] for line in done.err.splitlines()]
    assert starts == ["prompt", "generation", "peak memory", "experts"]
    assert all(
        word in done.err for word in ("budget", "hits", "MB/token", "ms/token", "of the limit")
    )


@pytest.mark.needs_backend
def test_json_has_what_the_specification_names(chronos: Any, packed: Path, chosen: str) -> None:
    flags = ("-p", "x", "-n", 5, "--budget", "25%", "--device", "cpu")
    data = chronos("generate", packed, *flags, "--json").json
    assert len(data["tokens"]) == 5 and data["finish_reason"] == "length"
    assert data["prompt_tokens"] == 1 and data["backend"] == chosen and data["device"] == "cpu"
    assert data["budget_bytes"] * 4 == data["expert_bytes_total"]
    assert all(name in data["stats"] for name in SPEC_STATS)
    assert all(name in data["stats"]["limit"] for name in SPEC_LIMIT)
    assert data["stats"]["peak_expert_bytes"] <= data["budget_bytes"]
    needs = data["stats"]["hits"] + data["stats"]["late"] + data["stats"]["misses"]
    assert needs == data["stats"]["routed"] > 0


@pytest.mark.needs_backend
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_many_prompts_are_answered_as_each_is_alone(
    chronos: Any, packed: Path, tmp_path: Path, name: str
) -> None:
    file, prompts = tmp_path / name, ["def add", "x", "for line in file:"]
    lines = [json.dumps({"prompt": text, "id": 1}) if "json" in name else text for text in prompts]
    file.write_text("\n\n".join(lines) + "\n", "utf-8")
    flags = ("-n", 8, "--budget", "25%", "--temp", 1.0, "--seed", 7)
    alone = [chronos("generate", packed, "-p", text, *flags, "--json").json for text in prompts]
    done = chronos("generate", packed, "--prompts", file, *flags, "--json", "--max-sequences", 2)
    assert [row["tokens"] for row in done.json] == [row["tokens"] for row in alone]
    assert [row["prompt_tokens"] for row in done.json] == [row["prompt_tokens"] for row in alone]
    plain = chronos("generate", packed, "--prompts", file, *flags)
    assert plain.out == "".join(row["text"] + "\n" for row in alone)
    assert [line[:3] for line in plain.err.splitlines()] == ["[1]", "[2]", "[3]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"text": "x"}', "no `prompt`"), ('{"prompt": 3}', "no `prompt`")],
)
def test_a_file_of_prompts_that_is_none_is_refused(
    chronos: Any, packed: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' + text, "utf-8")
    done = chronos("generate", packed, "--prompts", tmp_path / "p.jsonl")
    assert done.code == 2 and message in done.err and "p.jsonl:2" in done.err
    done = chronos("generate", packed, "--prompts", tmp_path / "p.jsonl", "-p", "x")
    assert done.code == 2 and "--prompts excludes" in done.err
    done = chronos("generate", packed, "--prompts", tmp_path / "absent")
    assert done.code == 2 and "absent" in done.err


@pytest.mark.needs_backend
@pytest.mark.parametrize("budget", ["25%", "50%", "100kB", "all"])
def test_tokens_are_the_resident_models_at_every_budget(
    chronos: Any, packed: Path, budget: str
) -> None:
    flags = ("-p", "for line in", "-n", 24, "--json")
    resident = chronos("generate", packed, "--budget", "resident", *flags).json
    streamed = chronos("generate", packed, "--budget", budget, *flags).json
    assert streamed["tokens"] == resident["tokens"]


@pytest.mark.needs_backend
def test_an_unpacked_folder_runs_resident_and_refuses_a_budget(chronos: Any, packed: Path) -> None:
    source = packed.with_name(packed.name + "-unpacked")
    assert chronos("generate", source, "-p", "x", "-n", 2).code == 0
    done = chronos("generate", source, "-p", "x", "--budget", "50%")
    assert done.code == 2 and "chronos pack" in done.error[-1]


@pytest.mark.needs_backend
def test_sampling_repeats_with_its_seed(chronos: Any, packed: Path) -> None:
    flags = ("-p", "x", "-n", 16, "--temp", 1.5, "--top-k", 50, "--json")
    runs = [chronos("generate", packed, *flags, "--seed", seed).json for seed in (1, 1, 2)]
    assert runs[0]["tokens"] == runs[1]["tokens"] != runs[2]["tokens"]


@pytest.mark.needs_backend
def test_flags_have_environment_twins(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHRONOS_PROMPT", "x")
    monkeypatch.setenv("CHRONOS_MAX_TOKENS", "3")
    monkeypatch.setenv("CHRONOS_BUDGET", "25%")
    monkeypatch.setenv("CHRONOS_JSON", "1")
    data = chronos("generate", packed).json
    assert len(data["tokens"]) == 3 and data["budget_bytes"] * 4 == data["expert_bytes_total"]
    assert len(chronos("generate", packed, "-n", 2).json["tokens"]) == 2


@pytest.mark.needs_backend
def test_a_stop_string_ends_the_text(chronos: Any, packed: Path) -> None:
    whole = chronos("generate", packed, "-p", "x", "-n", 30, "--json").json["text"]
    part = whole[4:7]
    data = chronos("generate", packed, "-p", "x", "-n", 30, "--stop", part, "--json").json
    assert data["finish_reason"] == "stop"
    assert data["text"] == whole[: whole.index(part)]


@pytest.mark.needs_backend
def test_prompts_come_from_a_flag_a_file_or_stdin(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfdef add")  # with a byte order mark
    flags = ("-n", 4, "--json")
    tokens = chronos("generate", packed, "-p", "def add", *flags).json["tokens"]
    assert chronos("generate", packed, "-f", file, *flags).json["tokens"] == tokens
    for args in ((), ("-p", "-")):
        monkeypatch.setattr(sys, "stdin", Stdin(b"def add"))
        assert chronos("generate", packed, *args, *flags).json["tokens"] == tokens


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["-f", "absent.txt"], 2, "cannot be read"),
        (["-p", "x", "-f", "y"], 2, "exclude each other"),
        pytest.param(["-p", ""], 2, "the prompt is empty", marks=pytest.mark.needs_backend),
        (["-p", "x", "--budget", "1kB"], 4, "give at least"),
        (["-p", "x", "--budget", "lots"], 2, "a budget cannot be 'lots'"),
        (["-p", "x", "--miss", "maybe"], 2, "miss cannot be 'maybe'"),
        (["-p", "x", "--backend", "jax"], 2, "use one of: auto, torch, mlx"),
        pytest.param(
            ["-p", "x", "--device", "abacus"], 2, "unknown device", marks=pytest.mark.needs_backend
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    chronos: Any, packed: Path, args: list[str], code: int, words: str
) -> None:
    done = chronos("generate", packed, *args)
    assert done.code == code
    assert words in "\n".join(done.error)


def test_a_prompt_that_is_not_utf_8(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"ab\xff"))
    done = chronos("generate", packed)
    assert (done.code, done.error[0]) == (2, "error: the prompt is not UTF-8: byte 2")


def test_a_model_that_is_not_there(chronos: Any, tmp_path: Path) -> None:
    assert "does not exist" in chronos("generate", tmp_path / "no", "-p", "x").error[0]
    assert "has no config.json" in chronos("generate", tmp_path, "-p", "x").error[1]
    assert chronos("generate", tmp_path, "-p", "x").code == 2


@pytest.mark.needs_backend
def test_the_context_is_a_limit_that_is_not_cut_in_silence(chronos: Any, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "short", max_position_embeddings=16)
    ids = len(chronos("generate", model, "-p", "x" * 16, "-n", 9, "--json").json["tokens"])
    assert ids == 1  # the last token needs no place of its own
    done = chronos("generate", model, "-p", "x" * 17)
    assert done.code == 2 and "17 tokens and the context holds 16" in done.error[0]
    assert "--truncate" in done.error[1] and "--context" in done.error[1]


@pytest.mark.needs_backend
@pytest.mark.parametrize(("length", "most", "kept"), [(18, 5, 12), (18, 1, 16), (14, 5, 12),
                                                      (18, 256, 8), (9, 5, 9)])  # fmt: skip
def test_a_cut_prompt_leaves_room_for_the_reply_and_says_so(
    chronos: Any, tmp_path: Path, length: int, most: int, kept: int
) -> None:
    """The last token of a reply needs no place; one as long as the context gets half of it."""
    model = tiny_model(tmp_path / "short", max_position_embeddings=16)
    prompt = "ab" + "x" * (length - 2)
    flags = ("generate", model, "-p", prompt, "-n", most, "--truncate")
    done = chronos(*flags, "--json")
    assert done.json["prompt_tokens"] == kept
    said = f"the first {length - kept} of the prompt's {length} tokens are cut off: {kept} fit"
    assert (said in done.err) == (kept < length)
    data = chronos("generate", model, "-p", prompt[length - kept :], "-n", most, "--json").json
    assert data["tokens"] == done.json["tokens"]
    if done.json["finish_reason"] == "length":
        assert len(done.json["tokens"]) == most


@pytest.mark.needs_backend
def test_a_reply_that_the_context_ended_says_so(chronos: Any, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "short", max_position_embeddings=16)
    done = chronos("generate", model, "-p", "x" * 15, "-n", 9)
    assert "ended by the context of 16 tokens, --context N allows more" in done.err
    assert "ended by" not in chronos("generate", model, "-p", "x" * 15, "-n", 1).err


@pytest.mark.needs_backend
def test_damaged_experts_are_named(chronos: Any, packed: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(packed, copy)
    for cluster in (copy / "experts").glob("*.ctsr"):
        data = bytearray(cluster.read_bytes())
        data[-100] ^= 1
        cluster.write_bytes(data)
    done = chronos("generate", copy, "-p", "def add(left)", "-n", 40, "-q")
    assert done.code == 3
    assert "error: " in done.err and "cluster-" in done.err and "Traceback" not in done.err
    assert chronos("verify", copy).code == 3


@pytest.mark.needs_backend
def test_ctrl_c_ends_generate_with_130(command: list[str], packed: Path) -> None:
    process = subprocess.Popen(
        [*command, "generate", str(packed), "-p", "x", "-n", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    # The tiny model may have come to its own end just before.
    assert process.returncode in (130, 0) and b"Traceback" not in shown


@pytest.mark.needs_backend
def test_demo_tells_the_story(chronos: Any, packed: Path) -> None:
    done = chronos("demo", packed, "-n", 20)
    assert done.code == 0, done.err
    rows = [line.split("  ")[0].strip() for line in done.out.splitlines()]
    for name in (
        "The very same tokens?",
        "Tokens per second",
        "Hit rate: needs met from memory",
        "Read from disk per token",
        "Most memory the experts took",
        "Share of the limit",
    ):
        assert name in rows
    (same,) = [line for line in done.out.splitlines() if "The very same tokens?" in line]
    assert same.split()[-1] == "yes"
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.needs_backend
def test_demo_json(chronos: Any, packed: Path) -> None:
    data = chronos("demo", packed, "-n", 8, "--json").json
    assert data["tokens_identical"] is True
    whole, part = data["runs"]
    assert whole["tokens"] == part["tokens"]
    assert part["budget_bytes"] * 4 == part["expert_bytes_total"]
