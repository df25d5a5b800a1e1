"""chat: replies, commands, long conversations, what is pasted, piped and typed on a terminal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from chronos.cli.chat import messages
from chronos.testing.tiny import tiny_model
from tests.cli.conftest import Done, Stdin


@pytest.fixture
def say(chronos: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`say(model, "hello", "/stats")`: a chat of these lines, in a pipe."""

    def run(model: Path, *lines: str | bytes, flags: tuple[Any, ...] = ("-n", 4)) -> Done:
        data = [line.encode() if isinstance(line, str) else line for line in lines]
        monkeypatch.setattr(sys, "stdin", Stdin(b"".join(line + b"\n" for line in data)))
        return chronos("chat", model, *flags)

    return run


@pytest.mark.needs_backend
def test_help_lists_every_command(say: Any, packed: Path) -> None:
    done = say(packed, "/help")
    assert done.code == 0 and done.out == ""
    for name in ("/help", "/stats", "/reset", "/save FILE", "/load FILE", "/exit", "/quit"):
        assert f"\n{name}" in "\n" + done.err.replace(", ", "\n")
    assert '"""' in done.err and "Ctrl-C" in done.err and "//" in done.err
    assert max(map(len, done.err.splitlines()[1:])) <= 80


@pytest.mark.needs_backend
def test_what_is_no_command_is_not_sent(say: Any, packed: Path) -> None:
    done = say(packed, "/foo bar", "/helpme", "/save", "/load", "/stats")
    assert done.code == 0 and done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: there is no command /foo",
        "error: there is no command /helpme",
        *["error: no file was named"] * 2,
        "error: there is no reply yet",
    ]
    assert "/help lists them" in done.err


@pytest.mark.needs_backend
def test_a_message_may_begin_with_a_slash(say: Any, packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    say(packed, "//etc is a folder", "/save " + str(file))
    assert json.loads(file.read_text())["messages"][0]["content"] == "/etc is a folder"


@pytest.mark.needs_backend
def test_stats_of_the_last_reply_on_request(say: Any, packed: Path) -> None:
    quiet = say(packed, "hello", flags=("-n", 6, "-q", "--budget", "50%"))
    assert quiet.err == ""
    done = say(packed, "hello", "/stats", flags=("-n", 6, "-q", "--budget", "50%"))
    starts = [line.partition(":")[0] for line in done.err.splitlines()]
    assert starts == ["prompt", "generation", "peak memory", "experts", "context"]
    assert "tokens/s" in done.err and "% hits" in done.err and "of the limit" in done.err
    assert "2 of 2 messages read" in done.err


@pytest.mark.needs_backend
def test_a_conversation_is_kept_and_gone_on_with(say: Any, packed: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    flags = ("-n", 4, "--system", "be brief")
    whole = say(packed, "one", "two", flags=flags).out.splitlines()
    kept = say(packed, "one", f"/save {file}", f"/save {file}", flags=flags)
    assert kept.code == 0 and f"2 messages kept in {file}" in kept.err
    roles = [message["role"] for message in json.loads(file.read_text())["messages"]]
    assert roles == ["system", "user", "assistant"]
    again = say(packed, f"/load {file}", "two", f"/save {file}")
    assert again.out.splitlines() == whole[len(kept.out.splitlines()) :]
    assert len(json.loads(file.read_text())["messages"]) == 5
    refused = say(packed, f"/save {file}", "/load " + str(tmp_path / "none"), "/load " + __file__)
    assert refused.err.count("a file is there already") == 1
    assert "no such file" in refused.err and "not JSON" in refused.err
    assert len(json.loads(file.read_text())["messages"]) == 5


@pytest.mark.needs_backend
def test_a_conversation_that_outgrows_the_context_goes_on(say: Any, tmp_path: Path) -> None:
    """What is oldest is no longer read, which is said with what to do; every line is answered."""
    model = tiny_model(tmp_path / "short", max_position_embeddings=48)
    done = say(model, *["tell me more"] * 8, "/stats", flags=("-n", 3, "--temp", 0))
    assert done.code == 0 and "error" not in done.err
    assert "[the context of 48 tokens is full: the first 2 messages are no longer read" in done.err
    assert "/reset begins anew" in done.err and "of 16 messages read" in done.err
    fresh = say(model, *["tell me more"] * 8, "/reset", "tell me more", flags=("-n", 3))
    first = say(model, "tell me more", flags=("-n", 3)).out
    assert fresh.out.endswith(first)


@pytest.mark.needs_backend
def test_how_a_reply_ended_is_said_where_the_model_did_not_end_it(say: Any, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "short", max_position_embeddings=32)
    assert "[3 tokens, more with -n]" in say(model, "hi", flags=("-n", 3)).err
    full = say(model, "a" * 24, flags=("-n", 100)).err
    assert "[the context of 32 tokens is full: the reply ends here." in full
    assert "--context N allows more" in full


@pytest.mark.needs_backend
def test_a_model_without_a_chat_template_is_refused_at_the_start(
    say: Any, packed: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(packed, tmp_path / "plain")
    core = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    core.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    done = say(model, "hello", "hello")
    assert done.code == 2 and len(done.error) == 2
    assert "comes without a chat template" in done.error[0]
    assert f"chronos generate {model} -p TEXT" in done.error[1]


@pytest.mark.needs_backend
@pytest.mark.parametrize("lines", [(b"ab\xff",), (b"hello", b"ab\xff")])
def test_a_pipe_that_is_not_utf_8_is_a_clear_error(
    say: Any, packed: Path, lines: tuple[bytes, ...]
) -> None:
    done = say(packed, *lines, b"hello", flags=("-n", 2, "-q"))
    assert done.code == 2
    assert done.err.splitlines()[0] == f"error: byte 2 of line {len(lines)} is not UTF-8"
    assert len(done.out.splitlines()) <= 2 * (len(lines) - 1)


def test_a_message_may_have_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", Stdin(text.encode()))
        return list(messages())

    assert of('a\n"""b\n\n  c\n"""\nd\n') == ["a", "b\n\n  c", "d"]
    assert of('"""\nb\nc"""\n') == ["b\nc"]
    assert of('"""one"""\n"""\nnever ended\n') == ["one", "never ended"]
    assert of("\ufeffa\r\n\n  \nb") == ["a", "b"]


PROMPT = b"\x1b[?2004h> "  # pastes are marked from here on


class Screen:
    """What a program wrote to a pseudo terminal."""

    def __init__(self, fd: int) -> None:
        self.fd, self.seen = fd, b""

    def until(self, mark: bytes, more: int = 0) -> None:
        """Read until `mark` and `more` bytes behind it have come; forget what was read."""
        while mark not in self.seen or len(self.seen.partition(mark)[2]) < more:
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen.partition(mark)[2][more:]


@pytest.mark.needs_backend
def test_chat_answers_every_line_and_forgets_on_request(
    chronos: Any, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"hello\n\nagain\n/reset\nhello\n/exit\nnever\n"))
    done = chronos("chat", packed, "-n", 4, "-q", "--temp", 0)
    assert done.code == 0 and done.err == ""
    replies = done.out
    monkeypatch.setattr(sys, "stdin", Stdin(b"hello\n"))
    first = chronos("chat", packed, "-n", 4, "-q").out
    assert replies.startswith(first) and replies.endswith(first)


@pytest.mark.needs_backend
def test_a_chat_answer_begins_without_the_space_of_its_first_piece(
    chronos: Any, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SentencePiece's style, with a space in every token: only the answer's first one goes."""
    model = shutil.copytree(packed, tmp_path / "spaced")
    words = {f"\u2581w{number}": number for number in range(300)}
    core = tokenizers.Tokenizer(models.WordLevel(words, unk_token="\u2581w0"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text(
        "{{ messages | map(attribute='content') | join(' ') }}"
    )
    monkeypatch.setattr(sys, "stdin", Stdin(b"w1 w2\n"))
    chat = chronos("chat", model, "-n", 4, "-q").out
    continued = chronos("generate", model, "-p", "w1 w2", "-n", 4, "-q").out
    assert chat.startswith("w") and chat.split() == continued.split()
    assert continued == " " + chat


@pytest.mark.needs_backend
def test_chat_goes_on_after_a_conversation_that_is_too_long(
    chronos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "short", max_position_embeddings=32)
    monkeypatch.setattr(sys, "stdin", Stdin(b"x" * 64 + b"\nhi\n"))
    done = chronos("chat", model, "-n", 2, "-q")
    assert done.code == 0
    assert "the context holds 32" in done.err and "/reset" not in done.out
    assert done.out.strip()


@pytest.mark.needs_backend
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(
    command: list[str], packed: Path
) -> None:
    """C5, on a real terminal: a long reply is interrupted, the next line is answered."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*command, "chat", str(packed), "-n", "100000", "--budget", "25%"],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    screen = Screen(parent)
    screen.until(b"> ")
    os.write(parent, b"hello\n")
    screen.until(b"hello\r\n", more=40)  # the echo, then some of the reply
    process.send_signal(signal.SIGINT)
    screen.until(b"> ")
    os.write(parent, b"/exit\n")
    assert process.wait(timeout=60) == 0
    os.close(parent)


@pytest.mark.needs_backend
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_on_a_terminal_a_pasted_text_is_one_message_and_lines_come_back(
    command: list[str], packed: Path, tmp_path: Path
) -> None:
    """As a terminal sends it: between the marks of a bracketed paste. Then the line before."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    import pty

    file = tmp_path / "chat.json"
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*command, "chat", str(packed), "-n", "2"], stdin=child, stdout=child, stderr=child,
        start_new_session=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    screen = Screen(parent)
    screen.until(PROMPT)
    os.write(parent, b"\x1b[200~one\ntwo\x1b[201~\n")
    screen.until(PROMPT)
    os.write(parent, b"\x1b[A!\n")  # up: the message again
    screen.until(PROMPT)
    os.write(parent, f"/save {file}\n".encode())
    screen.until(PROMPT)
    os.write(parent, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(parent)
    said = [m["content"] for m in json.loads(file.read_text())["messages"] if m["role"] == "user"]
    assert said == ["one\ntwo", "one\ntwo!"]
