"""What all pages are built with: components that know their words, handlers, live parts, tables."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from pydantic import BaseModel

from chronos.common.errors import ChronosError, UsageError
from chronos.ui.jobs import Job, Jobs
from chronos.ui.recipes import Recipes
from chronos.ui.root import Root
from chronos.ui.talk import Talks
from chronos.ui.words import Words

EVERY_S = 0.5  # between two looks at what is live; only the page that is seen looks
_ASKED_S = 120.0  # for a command that is waited for
_KEPT = 32  # answers of commands
Handler = Callable[..., Any]
# What is live is drawn from its mark: while that is the same, nothing is drawn.
Live = tuple[object, Callable[[], Sequence[Any]]]


@dataclass
class Site:
    """What pages show and change."""

    root: Root
    jobs: Jobs
    recipes: Recipes
    words: Words = field(default_factory=Words)
    talks: Talks = field(default_factory=Talks)
    _answers: dict[object, Any] = field(default_factory=dict)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, *args: str) -> Any:
        """The JSON of a quick command, waited for. Raises UsageError with what it says."""
        try:
            done = subprocess.run(
                [sys.executable, "-m", "chronos", *args, "--json"],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_ASKED_S,
                cwd=self.root.folder,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"no answer within {_ASKED_S:g} seconds", args[0]) from None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise UsageError("; ".join(said[-3:]) or f"exit code {done.returncode}")
        return json.loads(done.stdout)

    def later(self, key: object, *args: str) -> Any:
        """What `ask` answers, once it has: None until then, and the UsageError that it raised. The
        command runs on a thread of its own, once for a key, and the newest answers are kept."""
        with self._mutex:
            if key not in self._answers:
                self._answers[key] = None
                threading.Thread(target=self._answer, args=(key, args), daemon=True).start()
                while len(self._answers) > _KEPT:
                    self._answers.pop(next(iter(self._answers)))
            return self._answers[key]

    def _answer(self, key: object, args: Sequence[str]) -> None:
        found: Any
        try:
            found = self.ask(*args)
        except UsageError as error:
            found = error
        with self._mutex:
            self._answers[key] = found


class Face:
    """The parts of the pages, while they are built. `language` is an input of every handler."""

    def __init__(self, site: Site, language: gr.Dropdown) -> None:
        self.site, self.language = site, language
        self.timers: dict[str, gr.Timer] = {}
        self._live: dict[str, tuple[Callable[..., Live], int, list[Any]]] = {}
        self.tabs: dict[str, gr.Tab] = {}
        self._spoken: list[tuple[gr.blocks.Block, dict[str, str]]] = []
        self._opened: list[tuple[Handler, list[Any], list[Any]]] = []

    def make(self, kind: Callable[..., Any], **props: Any) -> Any:
        """A component. A property that begins with @ is a key of the words, and follows the
        language."""
        keys = {n: v[1:] for n, v in props.items() if isinstance(v, str) and v.startswith("@")}
        made = kind(**props | {n: self.site.words.say("en", key) for n, key in keys.items()})
        if keys:
            self._spoken.append((made, keys))
        return made

    def beside(self, count: int = 2) -> list[Any]:
        """Places for HTML beside each other; below each other in a narrow window."""
        made = []
        with gr.Row():
            for _ in range(count):
                with gr.Column(min_width=300):
                    made.append(gr.HTML())
        return made

    def on(
        self, events: Any, handler: Handler, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> Any:
        """Call `handler(language, *inputs)` at one or several events. What Chronos refuses is shown
        as it says it, and changes nothing."""
        return gr.on(
            events if isinstance(events, list) else [events],
            _guarded(handler),
            [self.language, *inputs],
            list(outputs),
            show_progress="hidden",
        )

    def opened(self, handler: Handler, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Call it when the page is opened, and when its language changes. No two fill one place."""
        self._opened.append((handler, list(inputs), list(outputs)))

    def live(
        self, tab: str, handler: Callable[..., Live], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Ask `handler(language, *inputs)` while the tab is looked at, by `look`."""
        self._live[tab] = handler, 1 + len(inputs), list(outputs)
        timer = self.timers[tab] = gr.Timer(EVERY_S, active=False)
        timer.tick(
            None, [self.language, *inputs], list(outputs),
            js=f"(...given) => chronos.live({json.dumps(tab)}, given)",
        )  # fmt: skip

    def look(self, tab: str, given: Sequence[Any], seen: Sequence[str]) -> dict[str, Any] | None:
        """What has changed on a live tab; None where nothing has.

        given: the language and the values of the inputs, as a browser says them. seen: digests of
        the mark and of each part, as of the last look. Raises KeyError for a tab that is not live,
        ChronosError.
        """
        handler, count, outputs = self._live[tab]
        if len(given) != count:
            raise UsageError(f"{len(given)} values for a page that has {count}", tab)
        mark, draw = handler(*given)
        digests, parts = [_digest(mark)], list[Any]()
        if seen and seen[0] == digests[0]:
            return None
        before = list(seen[1:]) or [""] * len(outputs)
        for component, value, known in zip(outputs, draw(), before, strict=False):
            plain = value if _is_update(value) else _dumped(component.postprocess(value))
            digests.append(_digest(plain))
            parts.append(None if digests[-1] == known else {"value": plain})
        return {"seen": digests, "parts": parts}

    def finish(self, blocks: gr.Blocks, tabs: gr.Tabs, kept: gr.BrowserState) -> None:
        """Wire what concerns all pages: the language, the tab that is seen. kept: of a browser."""
        timers, names = list(self.timers.values()), json.dumps([*self.timers])

        def open_page(found: Any, request: gr.Request) -> str:
            language = (found or {}).get("language")
            if language not in self.site.words.texts:
                language = self.site.words.preferred(request.headers.get("accept-language", ""))
            return str(language)

        # Without asking the server: a click that came before its answer would be undone.
        blocks.load(
            None, [kept], [tabs, *timers],
            js=f"(kept) => chronos.open(kept, {json.dumps([*self.tabs])}, {names})",
        )  # fmt: skip
        for name, tab in self.tabs.items():
            tab.select(
                None, [kept], [kept, *timers],
                js=f"(kept) => chronos.look({json.dumps(name)}, kept, {names})",
            )  # fmt: skip
        loaded = blocks.load(
            open_page, [kept], [self.language], queue=False, show_progress="hidden"
        )
        self.language.input(
            None, [self.language, kept], [kept], js="(language, kept) => ({ ...kept, language })"
        )
        for event in (loaded.then, self.language.input):
            self._speak(event)
            self._fill(event)

    def _speak(self, event: Any) -> None:
        def speak(language: str) -> list[Any]:
            say = self.site.words.say
            return [
                gr.update(**{name: say(language, key) for name, key in keys.items()})
                for _, keys in self._spoken
            ]

        components = [component for component, _ in self._spoken]
        event(speak, [self.language], components, queue=False, show_progress="hidden")

    def _fill(self, event: Any) -> None:
        """All that is to be filled when the page is opened, in one go."""

        def fill(language: str, *values: Any) -> list[Any]:
            left = list(values)
            made: list[Any] = []
            for handler, inputs, outputs in self._opened:
                given, left = left[: len(inputs)], left[len(inputs) :]
                found = handler(language, *given)
                made += found if len(outputs) > 1 else [found]
            return made

        inputs = [each for _, wanted, _ in self._opened for each in wanted]
        outputs = [each for _, _, filled in self._opened for each in filled]
        asked = [self.language, *inputs]
        event(_guarded(fill), asked, outputs, queue=False, show_progress="hidden")

    def say(self, language: str, key: str, **values: object) -> str:
        return self.site.words.say(language, key, **values)

    def told(self, language: str, job: Job | None) -> str:
        """A job's state in a line of HTML."""
        if job is None:
            return f'<p class="quiet">{self.say(language, "job.none")}</p>'
        text = self.say(language, f"job.{job.state}")
        failed = job.state == "failed"
        code = f" ({job.code})" if failed else ""
        why = "".join(
            f'<p class="quiet">{html.escape(line)}</p>' for line in job.lines(1) if failed
        )
        name = html.escape(job.name)
        return f'<p class="state {job.state}"><b>{name}</b> {text}{code}</p>{why}'


def _guarded(handler: Handler) -> Handler:
    def call(*values: Any) -> Any:
        try:
            return handler(*values)
        except ChronosError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return call


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """An HTML table; everything in it is escaped."""

    def line(cells: Sequence[object], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(c))}</{kind}>" for c in cells) + "</tr>"

    top = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    head_row = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    body = "".join(line(row, "td") for row in rows)
    inside = f"{top}{head_row}<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="numbers">{inside}</table></div>'


def chosen(choices: Sequence[Any], value: Any, first: bool = True) -> Any:
    """An update of a dropdown: new choices, and the value kept where it is still one of them."""
    values = [each[1] if isinstance(each, tuple) else each for each in choices]
    if value not in values:
        value = values[0] if values and first else None
    return gr.update(choices=list(choices), value=value)


def offered(choices: Sequence[Any], value: Any, shown: Any, **more: Any) -> Any:
    """The same for a page that said `value` when it asked: somebody may have changed that since, so
    it is left alone where it is what is `shown`."""
    same = {} if value == shown else {"value": shown}
    pairs = [each if isinstance(each, tuple) else (each, each) for each in choices]
    return gr.update(choices=pairs, **same, **more)


def relisted(choices: Sequence[Any], value: Any, *, free: bool = False, **more: Any) -> Any:
    """The same where a list is read anew: the first one is shown in place of what is not on it.
    free: any text may be in the field."""
    values = [each[1] if isinstance(each, tuple) else each for each in choices]
    first = values[0] if values else None
    return offered(choices, value, value if value in values or (free and value) else first, **more)


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _is_update(value: object) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update"


def _dumped(value: Any) -> Any:
    """What a component made of a value, as JSON has it."""
    return value.model_dump() if isinstance(value, BaseModel) else value


def newest(jobs: Jobs, name: str | None, *kinds: str) -> Job | None:
    """The job of a name where there is one of these kinds, else None."""
    if not name:
        return None
    with contextlib.suppress(UsageError):
        job = jobs.job(name)
        return job if job.kind in kinds else None
    return None
