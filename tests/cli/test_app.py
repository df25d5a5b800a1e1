"""The shell of the command line: help, environment twins, errors, exit codes, generated docs."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from chronos.cli import docs, errors, output
from chronos.cli.main import app
from chronos.common.errors import BudgetError, ChronosError

HELLO = """
from typing import Annotated

import typer

from chronos.cli import docs, main
from chronos.cli.app import command
from chronos.cli.options import ModelArg, OutputOptions


@command("hello", panel="Start here")
def hello(
    model: ModelArg,
    out: OutputOptions,
    loud: Annotated[bool, typer.Option("--loud", help="In capitals.")] = False,
) -> None:
    \"\"\"Say hello to a model.\"\"\"
    print(f"hello, {model}")


assert main.run(["--help"]) == 0
assert main.run(["hello", "demo"]) == 0
print(docs.render())
"""
COMMANDS = dict(docs.commands(typer.main.get_command(app), "chronos"))


def test_the_commands_are_in_the_order_of_use() -> None:
    names = [path.split()[1] for path in COMMANDS]
    assert names[:5] == ["demo", "generate", "chat", "serve", "train"] and names[-1] == "doctor"
    assert len(COMMANDS) == len(set(COMMANDS)) > 12


def test_a_command_is_added_in_one_place(command: list[str], tmp_path: Path) -> None:
    """As docs/extending.md says: a function with the decorator, and nothing else."""
    (tmp_path / "hello.py").write_text(HELLO, "utf-8")
    done = subprocess.run(
        [command[0], str(tmp_path / "hello.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Say hello to a model" in done.stdout and "hello, demo" in done.stdout
    assert "CHRONOS_LOUD" in done.stdout  # its row of docs/cli.md


@pytest.mark.parametrize("path", COMMANDS)
def test_every_flag_has_help(path: str) -> None:
    assert not [p.name for p in COMMANDS[path].params if p.name != "help" and not p.help]


@pytest.mark.parametrize("path", ["chronos", *COMMANDS, "chronos bench", "chronos train"])
def test_help(chronos: Any, path: str) -> None:
    done = chronos(*path.split()[1:], "--help")
    assert done.code == 0 and done.err == ""
    assert "Usage: chronos" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.out  # a name that was cut cannot be typed


def test_help_is_folded_where_the_terminal_ends_and_not_where_the_source_does(
    chronos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = chronos("pack", "--help").out.splitlines()
    assert any("checkpoint in safetensors that Transformers or MLX-LM" in line for line in lines)


def test_no_arguments_is_the_help_page(chronos: Any) -> None:
    assert "generate" in chronos().out


def test_version(chronos: Any) -> None:
    assert re.fullmatch(r"chronos \d+\.\d+\.\d+\n", chronos("--version").out)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["genrate"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["generate"], "Missing argument 'MODEL'"),
        (["generate", "demo", "--buget", "1"], "No such option: --buget"),
        (["generate", "demo", "--top-p", "2"], "Invalid value for '--top-p'"),
        (["train", "pretrain"], "Missing option '--config' / '-c'"),
    ],
)
def test_usage_errors_are_short_and_exit_2(chronos: Any, args: list[str], what: str) -> None:
    done = chronos(*args)
    assert done.code == 2
    assert done.error[0].startswith(f"error: {what}")
    assert done.error[-1].startswith("fix: `chronos")


@pytest.mark.parametrize("name", docs.PAGES)
def test_generated_docs_are_up_to_date(name: str) -> None:
    folder = Path(__file__).parents[2] / "docs"
    assert (folder / name).read_text("utf-8") == docs.PAGES[name](), "run `make docs`"


def test_links_that_lead_nowhere_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# One: a `head`\n[b](deep/b.md#two) [x](https://x.example/y)\n")
    (tmp_path / "deep" / "b.md").write_text("## Two\n[a](../a.md#one-a-head) [self](#two)\n")
    assert docs.main(["--links", str(tmp_path)]) == 0
    (tmp_path / "deep" / "b.md").write_text("[a](../a.md#three) [gone](gone.md)\n")
    assert len(docs.broken_links(tmp_path)) == 3  # and #two is no heading any more
    assert docs.main(["--links", str(tmp_path)]) == 1


def test_docs_check_notices_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "modules.md"
    page.write_text("former row\n", "utf-8")
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert not (tmp_path / "cli.md").exists()
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main(["--check", str(tmp_path)]) == 0
    assert "| `cli/docs.py` | Writes the generated documents" in page.read_text("utf-8")
    (tmp_path / "cli.md").write_text("edited\n", "utf-8")
    capsys.readouterr()
    assert docs.main(["--check", str(tmp_path)]) == 1
    assert "make docs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (
            BudgetError("too small", "model", "give more"),
            4,
            ["error: too small", "where: model", "fix: give more"],
        ),
        (ChronosError("several\nlines"), 1, ["error: several lines"]),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
            1,
            ["error: no such file or directory", "where: a/b"],
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 4, ["error: no space left on device"]),
        (MemoryError(), 4, ["error: out of memory", "fix: lower --budget"]),
        (KeyboardInterrupt(), 130, []),
        (errors.Terminated(), 143, []),
    ],
)
def test_errors_become_lines_and_exit_codes(
    error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        errors.guard(fail)
    assert caught.value.exit_code == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_bug_says_how_to_see_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError("division by zero")

    for verbose in (False, True):
        with pytest.raises(typer.Exit) as caught:
            errors.guard(fail, verbose=verbose)
        assert caught.value.exit_code == 1
        shown = capsys.readouterr().err
        assert "error: ZeroDivisionError: division by zero" in shown
        assert ("Traceback" in shown) is verbose
        assert ("-v shows" in shown) is not verbose


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": float("nan"), "b": [float("inf"), 1.5], 3: ("x", None)})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "3": ["x", null]}\n'


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (2.5e9, "2.50 GB")],
)
def test_sizes(nbytes: float, shown: str) -> None:
    assert output.size(nbytes) == shown


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("working") as update:
        update(1, 2)
    assert capsys.readouterr().err == ""


def test_a_closed_pipe_is_no_traceback(command: list[str]) -> None:
    line = f"{' '.join(command)} --help | true"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_sigterm_is_143(command: list[str], packed: Path) -> None:
    process = subprocess.Popen(
        [*command, "generate", str(packed), "-n", "10"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # It waits for a prompt on stdin; the handler is in place once it has begun to read.
    wait_until_reading(process.pid)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 143, shown


def wait_until_reading(pid: int) -> None:
    """Until the process sleeps in a read of its standard input (Linux), or some time has passed."""
    import time

    wchan = Path(f"/proc/{pid}/wchan")
    for _ in range(200):
        try:
            if "pipe_read" in wchan.read_text():
                return
        except OSError:
            pass
        time.sleep(0.05)
