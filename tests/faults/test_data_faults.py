"""T1, T2, X2: bad rows are named and counted, bad templates end in time, and no batch is empty."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronos.common.data import (
    Document,
    ReadReport,
    encode_documents,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.data.lines import MAX_LINE_BYTES, numbered_lines
from chronos.common.data.rows import RowError, parse_row
from chronos.common.errors import DataError, UsageError
from chronos.common.text.chat_template import ChatTemplate, TemplateError
from chronos.common.text.tokenizer import Tokenizer

GOOD = b'{"text": "fine"}'
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}


def row(**fields) -> bytes:
    return json.dumps(fields).encode()


BAD_ROWS = {
    b"{": "not JSON",
    b"[1]": "a row is a JSON object, not a list",
    b"null": "not null",
    b'"text"': "not text",
    b"{}": "found none",
    b'{"text": "\xff"}': r"byte 11 \(0xff\) is not UTF-8",
    b'{"text": null}': "text is null",
    b'{"text": NaN}': "NaN is not a JSON value",
    b'{"text": -Infinity}': "-Infinity is not",
    b'{"text": 3}': "text is a number",
    b'{"text": true}': "text is a truth value",
    b'{"text": " "}': "text is empty",
    b'{"text": "a\\ud800b"}': "text has a lone surrogate at character 2",
    b'{"txt": "a"}': r"the fields must be .*; found txt",
    b'{"text": "a"} {"text": "b"}': "Extra data",
    b"[" * 100_000: "nested too deeply",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
    row(messages=[]): "messages is empty",
    row(messages="hi"): "messages is text, not a list",
    row(messages=["hi"]): r"messages\[0\] is text, not an object",
    row(messages=[USER, {"content": "x"}]): r"messages\[1\].role is null",
    row(messages=[USER, {"role": "", "content": "x"}]): r"messages\[1\].role is text, not",
    row(messages=[{"role": ["user"], "content": "x"}]): "role is",
    row(messages=[USER, {"role": "assistant"}]): r"messages\[1\].content is null",
    row(messages=[USER, {"role": "assistant", "content": ""}]): "content is empty",
    row(messages=[USER]): "no assistant turn",
    row(prompt="a", completion=[REPLY]): "must all be text, or all lists",
    row(prompt="a", completion=None): "completion is null",
    row(prompt="a", chosen="b"): None,
    row(prompt=[USER], chosen=[REPLY], rejected=[USER]): "rejected has no assistant turn",
    row(completion="a"): "the fields must be",
}


@pytest.mark.parametrize("line", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_is_named(tmp_path, line: bytes) -> None:
    reason = BAD_ROWS[line]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n" if reason is None else b"\n\n" + line)
    if reason is None:  # an incomplete pair reads as a bare prompt; TRL does the same
        assert [d.kind for d in read_documents(path)] == ["prompt", "prompt"]
        return
    with pytest.raises(DataError, match=rf"^d\.jsonl:3: .*{reason}"):
        list(read_documents(path))


def test_skip_budget_is_exact_and_counted(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"{", GOOD, b'{"text": ""}', GOOD]))
    report = ReadReport()
    assert [d.where for d in read_documents(path, 2, report)] == [f"d.jsonl:{n}" for n in (1, 3, 5)]
    assert [bad.split(": ")[0] for bad in report.bad] == ["d.jsonl:2", "d.jsonl:4"]
    assert "2 bad rows skipped" in str(report)
    with pytest.raises(DataError, match=r"d\.jsonl:4: .*1 bad rows were skipped before it"):
        list(read_documents(path, 1))


def test_mixed_schema_is_named(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD + b"\n" + row(messages=[USER, REPLY]))
    with pytest.raises(DataError, match=r"d\.jsonl:2: a 'messages' row in a file .* 'text' rows"):
        list(read_documents(tmp_path / "d.jsonl"))


def test_bom_and_crlf_are_accepted(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD + b"\r\n")
    report = ReadReport()
    texts = [d.text for d in read_documents(tmp_path / "d.jsonl", report=report)]
    assert (texts, report.blank) == (["fine", "fine"], 1)


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.jsonl.gz"])
def test_empty_file_is_named(tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(DataError, match=f"{name}: the file is empty"):
        list(read_documents(tmp_path))
    with pytest.raises(DataError, match="no documents: 0 documents from 1 file, 1 bad row skipped"):
        list(read_documents(tmp_path, skip_bad=5))


def test_long_line_is_refused_without_being_held(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_LINE_BYTES + (1 << 20))
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    report = ReadReport()
    assert [d.where for d in read_documents(path, 1, report)] == ["d.jsonl:2"]
    assert report.bad == ["d.jsonl:1: a line of 17 MiB; the limit is 16 MiB"]


def test_gzip_bomb_is_stopped(tmp_path) -> None:
    """Whether it is one endless line or many."""
    for name, data in (("a", b"\0" * (4 << 20)), ("b", (GOOD + b"\n") * 200_000)):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress(data))
        seen = 0
        with pytest.raises(DataError, match=rf"^{name}:\d+: the file expands beyond"):
            for _, line in numbered_lines(path, name, floor=1 << 20):
                seen += len(line) if isinstance(line, bytes) else 0
        assert seen <= 2 << 20


def test_honest_gzip_may_expand_a_lot(tmp_path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + b"\n") * 10_000))
    assert sum(1 for _ in read_documents(path)) == 10_000


@pytest.mark.parametrize("cut", [1, 9, 20, -5])
def test_damaged_gzip_is_named(tmp_path, cut: int) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + GOOD)[:cut])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz:\d: damaged gzip data"):
        list(read_documents(path, skip_bad=10))


def test_text_that_is_not_utf8_is_named(tmp_path) -> None:
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"d\.txt: byte 4 \(0xe9\) is not UTF-8"):
        list(read_documents(tmp_path / "d.txt"))


def test_pipes_and_links_are_not_opened(tmp_path) -> None:
    """A pipe would block for ever."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert [d.where for d in read_documents(tmp_path)] == ["a.jsonl:1"]
    with pytest.raises(DataError, match="neither a file nor a folder"):
        list(read_documents(tmp_path / "pipe.jsonl"))


@pytest.mark.parametrize(("name", "error"), [("nowhere", UsageError), ("d.csv", DataError)])
def test_unusable_paths_are_named(tmp_path, name: str, error: type[Exception]) -> None:
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(error, match=name):
        list(read_documents(tmp_path / name))


@settings(max_examples=200, deadline=None)
@given(line=st.binary(max_size=40) | st.builds(lambda b: b'{"text": "' + b + b'"}', st.binary()))
def test_any_line_is_a_document_or_a_reason(line: bytes) -> None:
    try:
        assert parse_row(line, "f:1").text.strip()
    except RowError as error:
        assert str(error)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.sampled_from([GOOD, b"", b"{", b"\xff", b" \r", GOOD + b"\r"])))
def test_every_line_is_accounted_for(tmp_path_factory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [GOOD, *lines]))
    report = ReadReport()
    found = list(read_documents(path, 99, report))
    assert len(found) == report.documents
    assert report.documents + len(report.bad) + report.blank == len(lines) + 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text to learn from"], 270)


@pytest.mark.parametrize("seq_len", [2, 3, 8, 64])
def test_no_batch_is_without_labels(tokenizer: Tokenizer, seq_len: int) -> None:
    """Prompts longer than a row leave rows with nothing to learn; those are not used."""
    chats = [
        Document(f"d:{i}", "messages", messages=({"role": "user", "content": "x" * n}, REPLY))
        for i, n in enumerate((1, 200, 3, 150))
    ]
    encoded = encode_documents(tokenizer, chats)
    dataset = pack_documents(
        encoded.ids, seq_len=seq_len, eos_id=tokenizer.eos_id, trained=encoded.trained
    )
    assert all(dataset.batch(step, 1).tokens for step in range(2 * len(dataset)))
    labels = sum(batch.tokens for batch in dataset.sweep(2))
    assert labels == 4 * 3  # the reply, the end of the turn, the end of the text


def test_row_the_template_refuses_is_named(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no ' ~ messages[0].role) }}")
    strict = Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="d:9: chat template: TemplateError: no user"):
        encode_documents(strict, [Document("d:9", "messages", messages=(USER, REPLY))])


def test_template_that_rewrites_the_past_is_refused(tokenizer: Tokenizer, tmp_path) -> None:
    """Masks are found by prefixes; a template that drops old turns has none."""
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    rewriting = Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="d:1: the chat template rewrites earlier turns"):
        encode_documents(rewriting, [Document("d:1", "messages", messages=(USER, REPLY))])


HOSTILE = {
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'].modules }}",
    "import": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 'a' * 10**10 }}",
    "integer": "{{ 10**(10**9) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "graph": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for %}",
    "digits": "{{ " + "9" * 9999 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_in_an_error(name: str) -> None:
    with pytest.raises(TemplateError, match="chat template"):
        ChatTemplate(HOSTILE[name]).render([USER], True)


def test_foreign_template_is_rendered_as_written() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.first %}[{{ m['role'] | upper }}]\n{% endif %}\n"
        "{{ m.content | trim | tojson }}{% break %}\n{%- endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}>{% endif %}"
    )
    messages = [{"role": "user", "content": " <é> "}, REPLY]
    assert ChatTemplate(source).render(messages, True, bos_token="B") == '[USER]\n"<é>"B>'


def test_foreign_template_runs_from_any_folder(tmp_path, monkeypatch) -> None:
    """A file of the current folder must not become a module of the child."""
    (tmp_path / "json.py").write_text("open('canary', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert ChatTemplate("{{ messages[0].content }}!").render([USER], False) == "a!"
    assert not (tmp_path / "canary").exists()


def test_the_standard_library_is_enough_to_train_on() -> None:
    report = ReadReport()
    documents = stdlib_documents(report)
    assert report.documents == len(documents) > 300
    assert sum(len(d.text) for d in documents) > 5_000_000
    train, validation = split_documents(documents)
    assert len(train) > 20 * len(validation) > 0
    assert {"argparse.py", "asyncio/base_events.py"} <= {d.where for d in documents}
    assert not [d.where for d in documents if "_sysconfigdata" in d.where or "/tests/" in d.where]


def test_batches_are_arrays_of_int32(tokenizer: Tokenizer) -> None:
    batch = pack_documents([[5, 6, 7]], seq_len=2, eos_id=1).batch(0, 3)
    for array in (batch.ids_BT, batch.labels_BT, batch.segments_BT):
        assert (array.dtype, array.shape) == (np.int32, (3, 2))
