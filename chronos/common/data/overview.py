"""What a file of rows holds, before anything trains on it: kinds, lengths, and what is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chronos.common.data.answers import (
    Example,
    Pair,
    Prompt,
    encode_examples,
    encode_pairs,
    encode_prompts,
)
from chronos.common.data.documents import BadRows, ReadReport, read_documents
from chronos.common.data.functions import stdlib_functions
from chronos.common.data.rows import Document
from chronos.common.text.tokenizer import Tokenizer

_ALL = 1 << 60  # bad rows that may be passed over, tokens of a row: everything is looked at
_SHOWN_BAD = 20


def overview(
    path: str | Path, tokenizer: Tokenizer | None, built_in: bool = False
) -> dict[str, Any]:
    """Rows by kind, bad ones with their reasons, the stages that take them; with a tokenizer the
    lengths in tokens, how many are trained, and the first row in parts: (text, whether it is
    trained). built_in: `path` is a kind of `stdlib_functions`. Raises DataError where nothing can
    be read."""
    report = ReadReport()
    documents = (
        stdlib_functions(str(path), report)
        if built_in
        else list(read_documents(path, _ALL, report))
    )
    kinds = Counter(document.kind for document in documents)
    found: dict[str, Any] = {
        "rows": len(documents),
        "kinds": dict(kinds),
        "files": report.files,
        "blank_lines": report.blank,
        "stages": sorted({stage for kind in kinds for stage in _STAGES[kind]}),
        "columns": sorted({name for document in documents for name in document.columns}),
    }
    if tokenizer is not None and documents:
        found |= _encoded(tokenizer, documents, BadRows(_ALL, report))
    return found | {"bad": len(report.bad), "bad_rows": report.bad[:_SHOWN_BAD]}


_STAGES = {
    "text": ("pretrain", "sft"),
    "messages": ("pretrain", "sft", "distill", "grpo"),
    "completion": ("pretrain", "sft", "distill", "grpo"),
    "preference": ("dpo", "orpo", "grpo"),
    "prompt": ("grpo",),
}


def _encoded(tokenizer: Tokenizer, documents: Sequence[Document], bad: BadRows) -> dict[str, Any]:
    kind = documents[0].kind
    same = [document for document in documents if document.kind == kind]
    if kind == "preference":
        pairs: list[Pair] = encode_pairs(tokenizer, same, _ALL, bad)
        examples = [example for pair in pairs for example in pair]
        first = {
            "chosen": _parts(tokenizer, pairs[0].chosen),
            "rejected": _parts(tokenizer, pairs[0].rejected),
        }
    elif kind == "prompt":
        prompts: list[Prompt] = encode_prompts(tokenizer, same, _ALL, bad)
        none = [Example(np.array(p.ids, np.int32), np.zeros(len(p.ids), bool)) for p in prompts]
        examples, first = none, {"prompt": _parts(tokenizer, none[0])}
    else:
        examples = encode_examples(tokenizer, same, _ALL, bad)
        first = {"row": _parts(tokenizer, examples[0])}
    sizes = np.array([len(example.ids) for example in examples])
    trained = sum(int(example.trained[1:].sum()) for example in examples)
    return {
        "tokens": int(sizes.sum()),
        "trained_tokens": trained,
        "length": {
            "shortest": int(sizes.min()),
            "median": int(np.median(sizes)),
            "p95": int(np.percentile(sizes, 95)),
            "longest": int(sizes.max()),
        },
        "first": first,
    }


def _parts(tokenizer: Tokenizer, example: Example) -> list[tuple[str, bool]]:
    """The row's text, cut where training begins and ends; control tokens by their names."""
    names = {number: name for name, number in tokenizer.control_ids.items()}
    parts: list[tuple[str, bool]] = []
    for start, end in _runs(example.trained):
        data = b"".join(
            names[i].encode() if i in names else tokenizer.token_bytes(i)
            for i in example.ids[start:end].tolist()
        )
        parts.append((data.decode("utf-8", "replace"), bool(example.trained[start])))
    return parts


def _runs(marks: Any) -> list[tuple[int, int]]:
    borders = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1).tolist(), len(marks)]
    return list(zip(borders, borders[1:], strict=False))
