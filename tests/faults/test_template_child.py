"""The process that renders templates: it stays, is replaced after a failure, and leaves with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chronos.common.text import chat_template
from chronos.common.text.chat_template import ChatTemplate, TemplateError

USER = {"role": "user", "content": "hi"}
GOOD = ChatTemplate("{{ messages[0].content }}!")
LOOPS = "{% for i in range(99999) %}{% for j in range(COUNT) %}{% endfor %}{% endfor %}"


def pid() -> int:
    assert GOOD.render([USER], True) == "hi!"
    process = chat_template._CHILD._process
    assert process is not None
    return process.pid


def gone(number: int) -> bool:
    """Whether the process ends within a while; one that nobody has waited for is a zombie."""
    for _ in range(200):
        try:
            stat = Path(f"/proc/{number}/stat").read_text()
        except FileNotFoundError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_one_process_renders_all_templates() -> None:
    first = pid()
    with pytest.raises(TemplateError, match="no hi"):
        ChatTemplate("{{ raise_exception('no ' ~ messages[0].content) }}").render([USER], True)
    assert pid() == first


def test_a_process_that_was_ended_is_replaced() -> None:
    first = pid()
    with pytest.raises(TemplateError, match="too much time or memory"):
        ChatTemplate(LOOPS.replace("COUNT", "99999")).render([USER], True)
    second = pid()
    assert second != first
    os.kill(second, signal.SIGKILL)
    assert gone(second)
    assert pid() not in (first, second)


def test_the_clock_starts_anew_with_each_request() -> None:
    busy = ChatTemplate(LOOPS.replace("COUNT", "8"))
    first = pid()
    for _ in range(40):  # together more than one request may take
        busy.render([USER], True)
    assert pid() == first


def test_an_interrupt_leaves_no_answer_for_the_next_request(monkeypatch) -> None:
    pid()
    with monkeypatch.context() as patch:

        def interrupted(line: bytes) -> bytes:
            process = chat_template._CHILD._running()
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            raise KeyboardInterrupt

        patch.setattr(chat_template._CHILD, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate("another").render([USER], True)
    pid()


def test_threads_get_their_own_answers() -> None:
    failed = []

    def work(number: int) -> None:
        for turn in range(20):
            text = f"{number} {turn}"
            if GOOD.render([{"role": "user", "content": text}], True) != text + "!":
                failed.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


SCRIPT = """
import os, signal, sys
from chronos.common.text import chat_template
GOOD = chat_template.ChatTemplate("x")
GOOD.render([], True)
pid = chat_template._CHILD._process.pid
if sys.argv[1] == "forked":
    if not (forked := os.fork()):
        GOOD.render([], True)
        assert chat_template._CHILD._process.pid != pid
        sys.exit(0)
    assert os.waitpid(forked, 0)[1] == 0
    GOOD.render([], True)
    assert chat_template._CHILD._process.pid == pid
print(pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("end", ["done", "killed", "forked"])
def test_it_ends_with_its_parent(end: str) -> None:
    """Of a fork each side has its own, and the one's end is not the other's."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, end], capture_output=True, text=True)
    assert not run.stderr
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 0)
    assert gone(int(run.stdout))
