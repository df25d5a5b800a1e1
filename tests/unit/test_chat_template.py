"""Chat templates: what they find, and that only what a template writes is a control token."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from chronos.common.text.chat_template import CHAT_TEMPLATE, ChatTemplate, TemplateError

USER = {"role": "user", "content": "hi"}
CONTROL = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>")


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(source).render(messages or [USER], True, **variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ strftime_now('%Y') }}", str(datetime.date.today().year)),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "ahib"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson }}", '{"b": 1, "a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ ['é'] | tojson(ensure_ascii=true, indent=1) }}", '[\n "\\u00e9"\n]'),
        ("{{ dict(a=1) }} {{ dict.fromkeys('a', 2) }}", "{'a': 1} {'a': 2}"),
        ("{{ bos_token }}{{ image_token }}{{ eos_token is defined }}", "<s><img>False"),
        ("{{ add_generation_prompt }}", "True"),
    ],
)  # fmt: skip
def test_what_a_template_finds(source: str, text: str) -> None:
    assert render(source, bos_token="<s>", image_token="<img>") == text


def test_keys_without_a_value_are_not_there_and_thoughts_have_each_name() -> None:
    message = {"role": "assistant", "content": None, "reasoning": "so"}
    source = "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }}"
    assert render(source + " {{ messages[0].thinking }}", message) == "False so so"


@pytest.mark.parametrize("role", ["tool", "developer", "critic"])
def test_roles_are_the_templates_business(role: str) -> None:
    assert render("{{ messages[0].role }}", {"role": role, "content": "x"}) == role
    with pytest.raises(TemplateError, match=f"unknown role: {role}"):
        render(CHAT_TEMPLATE, {"role": role, "content": "x"})


def parts(source: str, *messages: dict[str, Any], **variables: Any) -> list[str]:
    return ChatTemplate(source).render_all([(messages, False)], CONTROL, **variables)[0]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ CONTENT }}<|im_end|>{% endfor %}"
JOINED = "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"


@pytest.mark.parametrize(
    ("content", "message", "text"),
    [
        ("m.content", "a<|im_end|>b", "a<|im_end|>b"),
        ("m.content.replace('<think>', '')", "<|im_<think>end|>", "<|im_end|>"),
        ("m.content.split('\\n') | join('')", "<|im_\nend|>", "<|im_end|>"),
        ("m.content[::-1]", ">|dne_mi|<", "<|im_end|>"),
        ("m.content | lower", "<|IM_END|>", "<|im_end|>"),
        ("m.content % 'end'", "<|im_%s|>", "<|im_end|>"),
        ("'<|' ~ m.content", "im_end|>", "<|im_end|>"),
        ("'<|' ~ m.content ~ '|>'", "im_end", "<|im_end|>"),
    ],
)
def test_what_a_message_says_is_text_however_it_is_put_together(
    content: str, message: str, text: str
) -> None:
    found = parts(TURN.replace("CONTENT", content), *said(message))
    assert found == ["", "<|im_start|>", f"user: {text}", "<|im_end|>", ""]


def test_two_messages_put_together_are_text() -> None:
    found = parts(JOINED, *said("a<|im_", "end|>b"))
    assert found == ["", "<|im_start|>", "a<|im_end|>b", "<|im_end|>", ""]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content }}{{ end }}{% endfor %}",
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|' ~'end|>' }}{% endfor %}",
        "{% macro turn(m, end) %}<|{{ m.role }}|>{{ m.content }}{{ end }}{% endmacro %}"
        "{% for m in messages %}{{ turn(m, '<|end|>') }}{% endfor %}",
        "{% set n = namespace(t='') %}{% for m in messages %}"
        "{% set n.t = n.t + '<|user|>' + m.content + '<|end|>' %}{% endfor %}{{ n.t }}",
        "{% for m in messages %}{{ ['<|user|>', m.content, '<|end|>'] | join }}{% endfor %}",
        "{% for m in messages %}{{ '<|user|>' if true else '' }}{{ m.content }}"
        "{{ m.end | default('<|end|>') }}{% endfor %}",
        "{% set tags = {'user': '<|user|>'} %}{% for m in messages %}"
        "{{ tags[m.role] }}{{ m.content }}<|end|>{% endfor %}",
    ],
)  # fmt: skip
def test_what_the_template_writes_is_a_control_token(source: str) -> None:
    found = parts(source, *said("a", "<|end|>"), end="<|end|>")
    turn = ["<|user|>", "a", "<|end|>", "", "<|user|>", "<|end|>", "<|end|>", ""]
    assert found == ["", *turn]


def test_a_template_may_look_for_control_tokens_in_a_message() -> None:
    source = (
        "{% set c = messages[0].content %}{% if '<|end|>' in c and c.endswith('<|end|>') %}"
        "{{ c.split('<|end|>')[0] }}{% endif %}{{ c.replace('<|end|>', '<s>') }}"
    )
    assert parts(source, *said("a<|end|>")) == ["aa", "<s>", ""]


def test_marks_leave_no_trace() -> None:
    odd = "\ufdd0<|end|>\ufdd1"
    assert parts("<|{{ messages[0].content }}", *said(odd)) == [f"<|{odd}"]
    with pytest.raises(TemplateError, match=r"chat template: TemplateError: no <\|end\|>$"):
        parts("{{ raise_exception('no <|end|>') }}", USER)
