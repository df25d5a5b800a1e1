"""The standard library's documented functions as rows to fine-tune on: every machine with Python
has some thousands. A name and the first paragraph of a docstring ask, the code answers.

chats: question and answer. pairs: the code preferred to the same code damaged, which does not
parse. prompts: the question, with the code in the column `code`.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Iterator
from typing import Any

from chronos.common.data.documents import ReadReport, stdlib_documents
from chronos.common.data.rows import Document
from chronos.common.errors import UsageError

_LINES = range(3, 15)  # of the code: shorter says nothing, longer does not fit a small model
_CHARACTERS = 600
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_functions(kind: str, report: ReadReport | None = None) -> list[Document]:
    """Rows of a kind: `chats`, `pairs` or `prompts`, in the order of files and lines."""
    make = {"chats": _chat, "pairs": _pair, "prompts": _prompt}.get(kind)
    if make is None:
        raise UsageError(f"no rows of the kind {kind!r}", "", "chats, pairs or prompts")
    report = report if report is not None else ReadReport()
    rows, seen = [], set()
    for file in stdlib_documents(report):
        for where, question, code in _functions(file):
            if question not in seen:
                seen.add(question)
                rows.append(make(where, question, code))
    report.documents = len(rows)
    return rows


def _functions(file: Document) -> Iterator[tuple[str, str, str]]:
    """(place, question, code without its docstring) of a file's functions that will do."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = file.text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, _Function) or not (doc := ast.get_docstring(node)):
            continue
        body = node.body[1:]
        if not body or body[0].lineno <= node.body[0].lineno or node.decorator_list:
            continue
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        code = textwrap.dedent("\n".join(head + lines[body[0].lineno - 1 : node.end_lineno]))
        if code.count("\n") + 1 not in _LINES or len(code) > _CHARACTERS or not _parses(code):
            continue
        summary = " ".join(doc.split("\n\n")[0].split())[:200]
        yield f"{file.where}:{node.lineno}", f"Write `{node.name}`. {summary}", code


def _chat(where: str, question: str, code: str) -> Document:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": code})
    return Document(where, "messages", messages=turns, key=question)


def _pair(where: str, question: str, code: str) -> Document:
    prompt, bad = ({"role": "user", "content": question},), damaged(code)
    answers = [({"role": "assistant", "content": text},) for text in (code, bad)]
    return Document(
        where, "preference", prompt=prompt, chosen=answers[0], rejected=answers[1], key=question
    )


def _prompt(where: str, question: str, code: str) -> Document:
    prompt = ({"role": "user", "content": question},)
    return Document(where, "prompt", prompt=prompt, key=question, columns={"code": code})


def damaged(code: str) -> str:
    """The code with one fault that keeps it from parsing, the same for the same code: a closing
    bracket or a colon is gone, or a line's indentation."""
    digest = hashlib.sha256(code.encode("utf-8", "surrogatepass")).digest()
    for turn in range(3):
        bad = _FAULTS[(digest[0] + turn) % 3](code, digest[1])
        if bad != code and not _parses(bad):
            return bad
    return code.replace(":", "", 1) + "\n    ("


def _without(mark: str) -> Any:
    def fault(code: str, draw: int) -> str:
        places = [i for i, character in enumerate(code) if character in mark]
        if not places:
            return code
        at = places[draw % len(places)]
        return code[:at] + code[at + 1 :]

    return fault


def _unindented(code: str, draw: int) -> str:
    lines = code.split("\n")
    at = 1 + draw % max(1, len(lines) - 1)
    if at < len(lines):
        lines[at] = lines[at].lstrip()
    return "\n".join(lines)


_FAULTS = (_without(")]}"), _without(":"), _unindented)


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True
