"""Environment twins of flags: one name means one thing, errors name it, typos are told."""

from __future__ import annotations

from typing import Any

import pytest
import typer.main

from chronos.cli import docs
from chronos.cli.main import app

COMMANDS = dict(docs.commands(typer.main.get_command(app), "chronos"))


def options() -> list[tuple[str, Any]]:
    """(command, option) of every flag but --help."""
    return [
        (path.removeprefix("chronos "), p)
        for path, command in COMMANDS.items()
        for p in command.params
        if p.param_type_name == "option" and p.name != "help"
    ]


def test_a_twin_is_named_after_its_flag_and_where_meanings_differ_after_its_command() -> None:
    for command, option in options():
        flag = max(option.opts, key=len).removeprefix("--")
        plain, own = (
            "CHRONOS_" + name.upper().replace("-", "_").replace(" ", "_")
            for name in (flag, f"{command} {flag}")
        )
        assert option.envvar in (plain, own)


def test_twins_of_one_name_mean_one_thing() -> None:
    """The same kind of value in the same bounds: CHRONOS_BUDGET set for one command is not
    nonsense to the next."""
    kinds: dict[str, set[Any]] = {}
    for _, p in options():
        kinds.setdefault(p.envvar, set()).add((p.is_flag, p.metavar, p.min, p.max, p.multiple))
    assert not {name: kind for name, kind in kinds.items() if len(kind) > 1}


def test_help_and_documents_name_the_twins(chronos: Any) -> None:
    assert "CHRONOS_SIMULATE_BUDGET" in chronos("simulate", "--help").out
    assert "CHRONOS_BUDGET" in chronos("generate", "--help").out
    assert "`CHRONOS_BENCH_REPLAY_WARMUP`" in docs.render()


def test_a_variable_of_one_command_is_nothing_to_another(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget in bytes for generate is no share of a trace; a chat's length is none of a fit."""
    monkeypatch.setenv("CHRONOS_BUDGET", "2GiB")
    monkeypatch.setenv("CHRONOS_MAX_TOKENS", "64")
    for command, flag, also in (("simulate", "budget", ()), ("fit", "max-tokens", ("-o", "f.st"))):
        done = chronos(command, "absent.npz", *also)
        name = flag.replace("-", "_").upper()
        told = f"--{flag} of this command has CHRONOS_{command.upper()}_{name}"
        assert done.err.splitlines()[:2] == [
            f"CHRONOS_{name} is not read here: {told}",
            "error: no such trace",
        ]


@pytest.mark.parametrize(
    ("variable", "value", "command", "what"),
    [
        ("CHRONOS_BUDGET", "banana", "generate", "a budget cannot be 'banana'"),
        ("CHRONOS_BUDGET", "25", "generate", "a budget of 25 bytes holds nothing"),
        ("CHRONOS_WARM", "foo", "generate", "a warm tier cannot be 'foo'"),
        ("CHRONOS_BACKEND", "jax", "generate", "unknown backend 'jax'"),
        ("CHRONOS_MISS", "often", "generate", "miss cannot be 'often'"),
        ("CHRONOS_PREDICTOR", "stars", "generate", "predictor cannot be 'stars'"),
        ("CHRONOS_TOP_P", "7", "generate", "Invalid value for '--top-p':"),
        ("CHRONOS_BUDGETS", "25%,foo", "bench", "a budget cannot be 'foo'"),
        ("CHRONOS_SIMULATE_BUDGET", "2GiB", "simulate", "a budget for a trace cannot be '2GiB'"),
        ("CHRONOS_DEMO_BUDGET", "foo", "demo", "a budget cannot be 'foo'"),
    ],
)
def test_errors_name_the_variable_or_the_flag(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str, command: str, what: str,
) -> None:  # fmt: skip
    rest = ["-p", "x"] if command == "generate" else []
    flag = variable.removeprefix("CHRONOS_").removeprefix(f"{command.upper()}_").lower()
    given = chronos(command, packed, *rest, f"--{flag.replace('_', '-')}", value)
    monkeypatch.setenv(variable, value)
    exported = chronos(command, packed, *rest)
    for done in (given, exported):
        assert done.code == 2 and done.error[0].startswith(f"error: {what}")
    assert exported.error[1] == f"where: {variable}"
    assert f"--{flag.replace('_', '-')}" in given.err and variable not in given.err


def test_a_small_number_is_taken_for_a_percentage_that_lacks_its_sign(
    chronos: Any, packed: Any
) -> None:
    assert chronos("generate", packed, "--budget", "25").error[2] == "fix: did you mean 25%?"
    assert chronos("generate", packed, "--warm", "5").error[2] == "fix: did you mean 5%?"


def test_bench_takes_no_budget_that_it_would_not_measure(chronos: Any, packed: Any) -> None:
    for path in (["bench", packed], ["bench", "replay", "t.npz"]):
        done = chronos(*path, "--budget", "25%")
        assert done.code == 2 and "--budgets" in done.error[0]


@pytest.mark.needs_backend
@pytest.mark.parametrize(
    ("value", "stops"), [("a b", ["a b"]), ("\n", ["\n"]), ('["a b", "\\n"]', ["a b", "\n"])]
)
def test_stops_of_the_environment_are_one_text_or_a_list(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch, value: str, stops: list[str]
) -> None:
    from chronos.run.engine import Engine

    seen: list[Any] = []
    generate = Engine.generate

    def watched(self: Engine, *args: Any, **options: Any) -> Any:
        seen.append(options["stop"])
        return generate(self, *args, **options)

    monkeypatch.setattr(Engine, "generate", watched)
    monkeypatch.setenv("CHRONOS_STOP", value)
    assert chronos("generate", packed, "-p", "x", "-n", 2).code == 0
    assert chronos("generate", packed, "-p", "x", "-n", 2, "--stop", "c").code == 0
    assert seen == [stops, ["c"]]


def test_a_list_of_stops_holds_texts(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHRONOS_STOP", "[1]")
    done = chronos("generate", packed, "-p", "x")
    assert done.code == 2 and done.error[1] == "where: CHRONOS_STOP"


def test_a_variable_that_nothing_reads_is_told_once_with_what_was_meant(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHRONOS_BUGDET", "25%")
    monkeypatch.setenv("CHRONOS_TEST_GPU", "")
    monkeypatch.setenv("CHRONOS_PLAIN", "1")
    done = chronos("verify", packed)
    assert done.code == 0
    told = [line for line in done.err.splitlines() if "CHRONOS_" in line]
    assert told == ["no command reads CHRONOS_BUGDET; did you mean CHRONOS_BUDGET?"]
    assert chronos("verify", packed, "-q").err == ""


def test_a_former_name_is_told_with_what_it_is_called_now(
    chronos: Any, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHRONOS_WARMUP", "1")
    told = chronos("verify", packed).err
    assert "CHRONOS_SIMULATE_WARMUP" in told and "CHRONOS_BENCH_DECODE_WARMUP" in told
