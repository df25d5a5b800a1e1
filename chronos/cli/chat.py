"""`chronos chat`: talk to a model. Lines in, replies out; a line that begins with / is a command.

What the model reads of a long conversation is `run.conversation`'s business. On a terminal lines
are edited and remembered until the end; a pipe is read line by line, as UTF-8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronos.cli import errors, footer, output
from chronos.cli.app import command
from chronos.cli.generate import PANEL, show, stop_on_sigint, tokenizer_of
from chronos.cli.options import ModelArg, OutputOptions, RunOptions, SamplingOptions
from chronos.common.errors import ChronosError, UsageError
from chronos.run.conversation import Conversation, Message
from chronos.run.models import DEMO

if TYPE_CHECKING:
    from chronos.run.engine import Engine, GenerationResult

_HELP = '''\
/help           this list
/stats          speed, hits and reads of the last reply; how full the context is
/reset          forget the conversation
/save FILE      keep the conversation, as a row of JSON that training takes
/load FILE      go on with one that was kept
/exit, /quit    leave, as Ctrl-D does
Ctrl-C stops a reply. """ begins and ends a message of several lines.
A message that begins with / is written with two: //like this'''
_QUOTE = '"""'
_MAX_BYTES = 16 << 20


@command("chat", panel=PANEL)
def chat(
    model: ModelArg,
    run: RunOptions,
    sampling: SamplingOptions,
    out: OutputOptions,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instructions before the conversation.")
    ] = None,
) -> None:
    """Talk to a model. Ctrl-C stops a reply, /help lists the commands, Ctrl-D leaves.

    Once a conversation outgrows the context, its oldest messages are no longer read.
    """
    start = [{"role": "system", "content": system}] if system else []
    with run.open(model) as engine:
        if not tokenizer_of(engine, model).can_chat:
            raise UsageError(
                f"model {model!r} comes without a chat template, so it cannot chat",
                "",
                f"let it continue a text: chronos generate {model} -p TEXT",
            )
        talk = Chat(engine, sampling, start)
        output.note(f"{model}, {engine.backend} on {engine.device}. /help lists the commands.")
        if model == DEMO:
            output.note("demo continues Python code; it was never taught to converse.")
        for text in messages():
            if not text.startswith("/") or "\n" in text:
                talk.say(text)
            elif text.startswith("//"):
                talk.say(text[1:])
            elif not talk.command(text):
                return


class Chat:
    """A conversation, the engine that answers in it, and the commands."""

    def __init__(self, engine: Engine, sampling: SamplingOptions, start: list[Message]) -> None:
        self.engine, self.sampling, self.params = engine, sampling, sampling.params()
        self.start = start
        self.conversation = Conversation(start)
        self.last: GenerationResult | None = None
        self._kept: set[Path] = set()  # files of this conversation, which may be written again
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _tell(_HELP),
            "/stats": lambda _: self.stats(),
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/load": self.load,
        }

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; False to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        try:
            if name not in self._commands:
                fix = f"/help lists them; /{name} is sent as {name}"
                raise UsageError(f"there is no command {name}", "", fix)
            self._commands[name](rest.strip())
        except (ChronosError, OSError) as error:
            errors.report(*errors.describe(error, verbose=False))
        return True

    def say(self, text: str) -> None:
        """Send a message and print the reply. One that cannot be answered is taken back."""
        said = self.conversation
        said.messages.append({"role": "user", "content": text})
        try:
            result = self._reply()
        except ChronosError as error:
            errors.report(error.what, error.where, error.fix or "/reset forgets what was said")
            said.messages.pop()
            return
        said.messages.append({"role": "assistant", "content": result.text})
        self.last = result
        if end := self._end(result):
            output.note(f"[{end}]")

    def _reply(self) -> GenerationResult:
        engine, said, before = self.engine, self.conversation, self.conversation.first
        tokenizer, most = engine.tokenizer, self.sampling.max_tokens
        assert tokenizer is not None
        ids = said.prompt(tokenizer, engine.context, most)
        if said.first > before:
            output.note(
                f"[the context of {engine.context} tokens is full: the first {said.first} messages "
                "are no longer read; /reset begins anew]"
            )
        stop = self.sampling.stop or ()
        with stop_on_sigint() as cancel:
            steps = engine.generate(
                ids, self.params, max_tokens=most, stop=stop, cancel=cancel, record=True
            )
            if tokenizer.leading_space:
                steps.drop_leading_space()
            show(steps)
            return steps.result

    def _end(self, result: GenerationResult) -> str:
        """Why a reply ended, where the model did not end it itself."""
        reasons = {
            "cancelled": "stopped",
            "context": f"the context of {self.engine.context} tokens is full: the reply ends here. "
            "What is oldest makes way for the next message; --context N allows more",
            "length": f"{len(result.tokens)} tokens, more with -n",
            "error": result.error,
        }
        return reasons.get(result.finish_reason, "")

    def stats(self) -> None:
        if self.last is None:
            raise UsageError("there is no reply yet", "", "say something first")
        result, peak = footer.with_limit(self.engine, self.last)
        for line in footer.lines(self.engine, result, peak):
            _tell(line)
        said, used = self.conversation, result.prompt_tokens + len(result.tokens)
        read = len(said.messages) - said.first
        _tell(
            f"context: {used} of {self.engine.context} tokens, "
            f"{read} of {len(said.messages)} messages read"
        )

    def reset(self) -> None:
        self.conversation, self.last = Conversation(self.start), None
        self._kept.clear()
        output.note("[the conversation is forgotten]")

    def save(self, name: str) -> None:
        from chronos.common.disk.atomic import atomic_write

        path = _file(name, "/save chat.json")
        if path.exists() and path not in self._kept:
            raise UsageError("a file is there already", str(path), "name another one")
        atomic_write(path, [self.conversation.dumps().encode()])
        self._kept.add(path)
        _tell(f"{len(self.conversation.messages)} messages kept in {path}")

    def load(self, name: str) -> None:
        path = _file(name, "/load chat.json")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"byte {error.start} is not UTF-8", str(path)) from None
        self.conversation, self.last = Conversation.loads(text, str(path)), None
        self._kept = {path}
        _tell(f"{len(self.conversation.messages)} messages of {path}")


def _tell(text: str) -> None:
    """What a command was asked for, also with -q."""
    print(text, file=sys.stderr, flush=True)


def _file(name: str, example: str) -> Path:
    if not name:
        raise UsageError("no file was named", "", f"for example: {example}")
    return Path(name).expanduser()


def messages() -> Iterator[str]:
    """What the user says, without what is empty, until Ctrl-D or the end of a pipe."""
    tty = sys.stdin.isatty()
    read = _terminal() if tty else _pipe()
    while True:
        try:
            text = _message(read)
        except EOFError:
            if tty:
                print()
            return
        except errors.Terminated:
            raise
        except KeyboardInterrupt:
            if not tty:
                raise
            output.note("\n(Ctrl-D or /exit leaves)")
            continue
        if text:
            yield text


def _message(read: Callable[[str], str]) -> str:
    """A line, or what stands between two quotes of three; read: asks for a line."""
    text = read("> ").strip()
    if not text.startswith(_QUOTE):
        return text
    text = text.removeprefix(_QUOTE)
    while not text.rstrip().endswith(_QUOTE):
        try:
            text += "\n" + read("... ")
        except EOFError:
            return text.strip()
    return text.rstrip().removesuffix(_QUOTE).strip()


def _terminal() -> Callable[[str], str]:
    """Lines with editing and history, where Python was built with readline; what is pasted comes as
    one, line breaks and all."""
    try:
        import readline
    except ImportError:
        pass
    else:
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")

    def read(prompt: str) -> str:
        # In the C locale bytes that are not ASCII come as surrogates.
        try:
            return input(prompt).encode("utf-8", "surrogateescape").decode()
        except UnicodeError:
            errors.report("that is not UTF-8", "", "set the terminal's encoding to UTF-8")
            return ""

    return read


def _pipe() -> Callable[[str], str]:
    number = 0

    def read(prompt: str) -> str:
        nonlocal number
        line, number = sys.stdin.buffer.readline(), number + 1
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"byte {error.start} of line {number} is not UTF-8",
                "stdin",
                "convert the text to UTF-8 first",
            ) from None

    return read
