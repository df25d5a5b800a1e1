"""`chronos generate`: continue a text, or many side by side."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronos.backends.probe import peak_memory
from chronos.cli import errors, footer, output
from chronos.cli.app import command
from chronos.cli.options import JsonOptions, ModelArg, RunOptions, SamplingOptions
from chronos.common.errors import UsageError

if TYPE_CHECKING:
    from chronos.common.text.sampling import SamplingParams
    from chronos.common.text.tokenizer import Tokenizer
    from chronos.run.engine import Engine, GenerationResult, Step

PANEL = "Run a model"
# Far above any context; a larger prompt is refused before it is tokenized.
_MAX_PROMPT_BYTES = 16 << 20


@command("generate", panel=PANEL)
def generate(
    model: ModelArg,
    run: RunOptions,
    sampling: SamplingOptions,
    out: JsonOptions,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="`-` or none: read it from stdin."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="PATH", help="Read the prompt from here.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Many: one a line; .jsonl: `prompt` of each."),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Of --prompts, answered at a time: each expert is read once.")
    ] = 8,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Cut the start of a prompt that leaves no room for -n tokens."
        ),
    ] = False,
) -> None:
    """Continue a text. The text goes to stdout, the numbers to stderr."""
    if prompts is not None and (prompt is not None or file is not None):
        raise UsageError("--prompts excludes --prompt and --file")
    texts = [_prompt(prompt, file)] if prompts is None else _prompts(prompts)
    params = sampling.params()
    with run.open(model) as engine:
        most = sampling.max_tokens if truncate else 0
        many = [_encoded(engine, model, text, most) for text in texts]
        if prompts is not None:
            results = engine.generate_many(
                many,
                params,
                max_tokens=sampling.max_tokens,
                stop=sampling.stop or (),
                max_sequences=max_sequences,
            )
            return finish_many(engine, results, out)
        [ids] = many
        with stop_on_sigint() as cancel:
            steps = engine.generate(
                ids,
                params,
                max_tokens=sampling.max_tokens,
                stop=sampling.stop or (),
                cancel=cancel,
                record=True,
            )
            if not out.json:
                show(steps)
            result = steps.result
        finish(engine, result, out, _asked(model, run, params))
        if cancel.is_set():
            raise KeyboardInterrupt


def _encoded(engine: Engine, model: str, text: str, most: int) -> list[int]:
    """most: tokens of the reply to make room for, by cutting; 0: nothing is cut."""
    ids, context = tokenizer_of(engine, model).encode_prompt(text), engine.context
    if not most and len(ids) > context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens and the context holds {context}",
            "",
            "shorten it, cut its start with --truncate, or allow more: --context N",
        )
    # The last token of a reply needs no place. A reply that would fill the context gets half of it.
    room = context - min(most - 1, context // 2)
    if most and len(ids) > room:
        output.note(
            f"the first {len(ids) - room} of the prompt's {len(ids)} tokens are cut off: "
            f"{room} fit before a reply of {context - room + 1} in the context of {context}: "
            "the reply's last token takes no place"
        )
        return ids[-room:]
    return ids


def tokenizer_of(engine: Engine, model: str) -> Tokenizer:
    """The model's tokenizer; UsageError where its folder has none."""
    if engine.tokenizer is None:
        raise UsageError(f"model {model!r} has no tokenizer.json, so it takes no text")
    return engine.tokenizer


def show(steps: Iterable[Step]) -> None:
    """Print text as it becomes final."""
    for step in steps:
        if step.text:
            sys.stdout.write(step.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _asked(model: str, run: RunOptions, params: SamplingParams) -> dict[str, Any]:
    """What makes a run repeatable, as it was given."""
    named = {"model": model, "budget": run.budget, "predictor": run.predictor}
    return named | {"sampling": {k: v for k, v in vars(params).items() if k != "rules"}}


def finish(
    engine: Engine, result: GenerationResult, out: JsonOptions, asked: dict[str, Any]
) -> None:
    """JSON or footer; exit code 1 where the generation ended in an error."""
    result, peak = footer.with_limit(engine, result)
    if out.json:
        output.print_json(footer.to_json(engine, result, peak, asked))
    else:
        for line in footer.lines(engine, result, peak):
            output.note(line)
    if result.finish_reason == "error":
        errors.report(result.error, "", "`chronos verify` finds damaged weights")
        raise typer.Exit(1)


def finish_many(engine: Engine, results: Sequence[GenerationResult], out: JsonOptions) -> None:
    """A JSON list or the texts, each behind its number; exit code 1 where one ended in an error."""
    if out.json:
        peak = peak_memory()
        output.print_json([footer.to_json(engine, result, peak) for result in results])
    else:
        for number, result in enumerate(results, start=1):
            output.note(
                f"[{number}] {output.count(len(result.tokens), 'token')}, {result.finish_reason}"
            )
            print(result.text, flush=True)
    for number, result in enumerate(results, start=1):
        if result.error:
            errors.report(f"prompt {number}: {result.error}", "", "`chronos verify`")
    if any(result.error for result in results):
        raise typer.Exit(1)


@contextmanager
def stop_on_sigint() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one interrupts as usual."""
    event = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _prompts(path: Path) -> list[str]:
    """One prompt a line, without empty lines; of a .jsonl file the `prompt` of each object."""
    lines = _decoded(_read(path), str(path)).splitlines()
    if path.suffix != ".jsonl":
        return [line for line in lines if line]
    return [
        _prompt_of(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"the line is not JSON: {error}", where) from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UsageError("the line has no `prompt`", where, 'write {"prompt": "..."}')
    return text


def _prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise UsageError("--prompt and --file exclude each other")
        data, where = _read(file), str(file)
    elif prompt is not None and prompt != "-":
        return _as_typed(prompt)
    elif sys.stdin.isatty():
        raise UsageError("no prompt", "", "give one with -p TEXT, --file PATH or on stdin")
    else:
        data, where = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1), "stdin"
    return _decoded(data, where)


def _decoded(data: bytes, where: str) -> str:
    if len(data) > _MAX_PROMPT_BYTES:
        raise UsageError(f"the prompt is larger than {_MAX_PROMPT_BYTES >> 20} MiB", where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8: byte {error.start}", where) from None


def _as_typed(text: str) -> str:
    """An argument as UTF-8: where the locale is C, Python has kept its bytes as surrogates."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8", "--prompt", "use a UTF-8 terminal") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_PROMPT_BYTES + 1)
    except OSError as error:
        what = f"the prompt cannot be read: {error.strerror}"
        raise UsageError(what, str(path), "name a file of text") from None
