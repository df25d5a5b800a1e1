"""Renders chat templates; run as a script, a process with limits that answers until stdin ends.

A template is code from a model folder. Jinja's sandbox keeps it away from Python's internals but
not from `'a' * 10**10` or a nest of loops; the limits of a process of its own do: 0.9 s of CPU a
request and 256 MiB. What a template finds there is what Transformers 5 gives it. Standard library
and Jinja only: the script runs by its path, outside the package.

A request is a line {"source", "control", "marks", "jobs": [variables, ...]}, the answer a line
{"texts": [...]} or {"error": "..."}. The control tokens that the template itself writes come back
between marks (see `_Marker`), so that none can be taken for one that a message spells.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.optimizer import optimize
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 0.9
DATA_BYTES = 256 << 20


def render_all(
    source: str, control: Iterable[str], marks: str, jobs: list[dict[str, Any]]
) -> list[str]:
    """Render one template with each job's variables, its own control tokens between marks."""
    template = _compile(source, tuple(control), marks)
    return [template.render(job) for job in jobs]


@lru_cache(maxsize=8)
def _compile(source: str, control: tuple[str, ...], marks: str) -> jinja2.Template:
    environment = _environment()
    tree = environment.parse(source)
    if control:
        optimize(tree, environment)  # constants that are joined become one: '<|' ~ 'end' ~ '|>'
        _Marker(control, marks).visit(tree)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


class _Marker:
    """Puts marks into a template's own text, so that they say of the result what wrote it.

    OPEN and CLOSE come around a control token that stands whole in the template. `'<|' + role +
    '|>'` is written in parts: OPEN before and BORDER after a beginning, BORDER before and CLOSE
    after an end. The marks are three characters that no message has. What a message says lies
    outside OPEN ... CLOSE, or between two borders, and no replacing or joining changes that.
    Constants that are only compared or searched for stay as they are.
    """

    def __init__(self, control: tuple[str, ...], marks: str) -> None:
        self._open, self._border, self._close = list(marks)
        longest = sorted(filter(None, control), key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, longest)))
        self._starts = {name[:size] for name in longest for size in range(1, len(name))}
        self._ends = {name[size:] for name in longest for size in range(1, len(name))}
        self._longest = max(map(len, longest))

    def visit(self, node: nodes.Node, joined: bool = False) -> None:
        """joined: what `node` gives is joined to other text, so parts of tokens matter."""
        if isinstance(node, nodes.TemplateData):
            node.data = self._mark(node.data, parts=True)
        elif isinstance(node, nodes.Const):
            node.value = self._mark_value(node.value, joined)
        elif isinstance(node, nodes.Getitem):
            self.visit(node.node, joined)
        elif isinstance(node, nodes.Pair):
            self.visit(node.value)
        elif isinstance(node, nodes.Filter | nodes.Call):
            self._visit_call(node, joined)
        elif isinstance(node, nodes.CondExpr):
            self.visit(node.test)
            for branch in filter(None, (node.expr1, node.expr2)):
                self.visit(branch, joined)
        elif not isinstance(node, nodes.Compare | nodes.Test):
            joins = isinstance(node, nodes.Output | nodes.Add | nodes.Concat | nodes.Mod)
            for child in node.iter_child_nodes():
                self.visit(child, joins)

    def _visit_call(self, node: nodes.Filter | nodes.Call, joined: bool) -> None:
        """Arguments are text to show for a macro, and for a method mostly text to search for."""
        if isinstance(node, nodes.Filter):
            name, subject = node.name, node.node
        elif isinstance(node.node, nodes.Getattr):
            name, subject = node.node.attr, node.node.node
        else:
            name, subject = "", None
        if subject is not None:
            self.visit(subject, joined)
        shown = {"replace": node.args[1:]}.get(name, node.args)
        if name in ("", "replace", "join", "default", "d", "format"):
            for child in [*shown, *node.kwargs]:
                self.visit(child.value if isinstance(child, nodes.Keyword) else child)

    def _mark_value(self, value: Any, joined: bool) -> Any:
        """A constant, which may be a list or an object of texts."""
        if isinstance(value, str):
            return self._mark(value, parts=joined)
        if isinstance(value, dict):
            return {key: self._mark_value(item, joined) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._mark_value(item, joined) for item in value)
        return value

    def _mark(self, text: str, *, parts: bool) -> str:
        if not parts:
            return self._whole.sub(lambda m: self._open + m[0] + self._close, text)
        marked, end = [], 0
        for match in self._whole.finditer(text):
            marked += [self._parts(text[end : match.start()], first=end == 0, last=False)]
            marked += [self._open, match[0], self._close]
            end = match.end()
        return "".join([*marked, self._parts(text[end:], first=end == 0, last=True)])

    def _parts(self, text: str, *, first: bool, last: bool) -> str:
        """Mark the end of a token that `text` begins with, and the beginning that it ends with."""
        sizes = range(min(self._longest, len(text)), 0, -1)
        if last and (size := next((n for n in sizes if text[-n:] in self._starts), 0)):
            text = f"{text[:-size]}{self._open}{text[-size:]}{self._border}"
        if first and (size := next((n for n in sizes if text[:n] in self._ends), 0)):
            text = f"{self._border}{text[:size]}{self._close}{text[size:]}"
        return text


class _Generation(Extension):
    """`{% generation %}` marks what training learns from; to read, it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` with no way to the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> jinja2.Environment:
    """The options, filters and globals of `apply_chat_template` in Transformers 5."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict()}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _limit() -> Callable[[float], Any]:
    """Set the limits; returns what starts the clock of a request, 0 stops it."""
    try:
        import resource
        import signal
    except ImportError:  # not a Unix: the caller's time limit is what is left
        return lambda seconds: None
    # Anonymous memory only; RLIMIT_AS would count the libraries Python maps as well.
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A Ctrl-C is for the parent, which closes stdin when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # CPU time, so a busy machine fails no honest template; the signal's default action ends it.
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"texts": render_all(**request)}
    except Exception as error:  # whatever a template raises is the template's error
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        return {"error": lines[-1][:500] if lines else "failed"}


def main() -> int:
    """Answers line by line; 0 once stdin has ended."""
    clock = _limit()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        clock(CPU_SECONDS)
        answer = json.dumps(_answer(request))
        clock(0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
