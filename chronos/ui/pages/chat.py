"""Chat: a conversation with one or two servers, side by side, with what their experts do."""

from __future__ import annotations

from typing import Any

import gradio as gr

from chronos.common.budget import parse_budget, shown_size
from chronos.common.errors import UsageError
from chronos.ui.face import Face, Live, chosen, newest, offered, relisted, table
from chronos.ui.jobs import Job
from chronos.ui.talk import EXPERTS, Talk, address

KIND = "serve"
_WINDOW_S = 3.0  # of the rates that are shown live


def build(face: Face) -> None:
    site = face.site
    with gr.Row():
        model = face.make(gr.Dropdown, label="@chat.model", allow_custom_value=True, scale=3)
        left_budget = face.make(gr.Textbox, label="@chat.budget", value="25%", max_lines=1)
        right_budget = face.make(gr.Textbox, label="@chat.beside", value="", max_lines=1)
        start = face.make(gr.Button, value="@chat.start", variant="primary")
    with gr.Row():
        sides = [_side(face, "left"), _side(face, "right")]
    text = face.make(
        gr.Textbox, label="@chat.say", lines=1, max_lines=6, elem_id="say", autofocus=False
    )
    with gr.Row():
        send = face.make(gr.Button, value="@chat.send", variant="primary")
        halt = face.make(gr.Button, value="@chat.stop")
        clear = face.make(gr.Button, value="@chat.clear")
        most = face.make(gr.Number, label="@chat.most", value=128, precision=0, minimum=1)
        heat = face.make(gr.Number, label="@chat.heat", value=0.7, minimum=0, maximum=2, step=0.1)

    servers = [side[0] for side in sides]

    def listed(language: str, mine: Any) -> Any:
        return relisted(["demo", *site.root.models()], mine, free=True)

    def begun(language: str, mine: str, first: str, second: str) -> list[Any]:
        where = mine if mine == "demo" else str(site.root.existing(mine or ""))
        names = []
        wanted = [size.strip() for size in (second, first) if size.strip()]
        if not wanted:
            raise UsageError(face.say(language, "chat.no_budget"))
        for size in wanted:
            parse_budget(size, 1 << 50)
        for budget in wanted:  # the newest is shown left
            name = site.jobs.free_name("chat")
            stats = str(site.root.run(name) / EXPERTS)
            args = ["serve", where, "--budget", budget, "--port", "0", "--stats", stats]
            names.append(site.jobs.start(name, KIND, args).name)
        running = servers_of(face)
        return [chosen(running, names[-1]), chosen(running, names[0] if names[1:] else None, False)]

    def said(language: str, words: str, tokens: float, temperature: float, *called: Any) -> str:
        if not words.strip():
            return words
        jobs = [job for name in dict.fromkeys(called) if (job := newest(site.jobs, name, KIND))]
        places = [(job, address(job)) for job in jobs if job.alive]
        if not places or any(place is None for _, place in places):
            raise UsageError(face.say(language, "chat.no_server"))
        for job, place in places:
            assert place is not None
            talk = site.talks.of(job)
            talk.ask(place, words, max_tokens=int(tokens or 1), temperature=temperature or 0.0)
        return ""

    def each(act: Any) -> Any:
        def call(language: str, *called: Any) -> None:
            for name in called:
                if (job := newest(site.jobs, name, KIND)) is not None:
                    act(job)

        return call

    def live(language: str, first: Any, second: Any) -> Live:
        running = servers_of(face)
        names = [name for _, name in running]
        asked = (first, second)
        left = first if first in names else names[0] if names else None
        pair = (left, second if second in names else None)
        shown = [_shown(face, language, name) for name in pair]
        mark = (language, running, pair, [part[0] for part in shown])

        def draw() -> list[Any]:
            outputs: list[Any] = []
            for said, side, (_, chat, told) in zip(asked, pair, shown, strict=True):
                outputs += [offered(running, said, side), chat, told]
            return outputs

        return mark, draw

    face.opened(listed, [model], [model])
    face.on(model.focus, listed, [model], [model])
    face.on(start.click, begun, [model, left_budget, right_budget], servers)
    face.on([send.click, text.submit], said, [text, most, heat, *servers], [text])
    face.on(halt.click, each(lambda job: site.talks.of(job).stop()), servers, [])
    face.on(clear.click, each(lambda job: site.talks.of(job).clear()), servers, [])
    for server, stop, chat, _ in sides:
        face.on(stop.click, each(lambda job: site.jobs.stop(job.name)), [server], [])
        face.on(chat.clear, each(lambda job: site.talks.of(job).clear()), [server], [])
    shown = [part for server, _, chat, told in sides for part in (server, chat, told)]
    face.live("chat", live, servers, shown)


def _side(face: Face, name: str) -> tuple[Any, Any, Any, Any]:
    """(server, stop, conversation, numbers)"""
    with gr.Column(min_width=300):
        with gr.Row():
            server = face.make(gr.Dropdown, label=f"@chat.{name}", elem_id=f"server-{name}")
            stop = face.make(gr.Button, value="@chat.end", variant="stop", size="sm")
        chat = gr.Chatbot(
            height=320, elem_id=f"chat-{name}", show_label=False, sanitize_html=True,
            render_markdown=False, buttons=["copy", "copy_all"],  # the third one uploads
        )  # fmt: skip
        told = gr.HTML(elem_id=f"numbers-{name}")
    return server, stop, chat, told


def servers_of(face: Face) -> list[tuple[str, str]]:
    """(what is shown, name) of those that run and of ended ones, whose conversations stay."""
    found = []
    for job in face.site.jobs.of(KIND):
        model = job.args[1].rpartition("/")[2]
        budget = job.args[job.args.index("--budget") + 1]
        state = "" if job.alive else f", {job.state}"
        found.append((f"{model} {budget} ({job.name}{state})", job.name))
    return found


def _shown(face: Face, language: str, name: str | None) -> tuple[Any, Any, str]:
    """(what it is drawn from, messages, numbers)"""
    job = newest(face.site.jobs, name, KIND)
    if job is None:
        return None, [], ""
    talk = face.site.talks.of(job)
    rows = talk.experts.read()
    messages, numbers = talk.messages(), _numbers(face, language, job, talk, rows)
    return (job.state, len(messages), messages[-1:], numbers), messages, numbers


def _numbers(face: Face, language: str, job: Job, talk: Talk, rows: list[dict[str, Any]]) -> str:
    told = face.told(language, job)
    if job.alive and address(job) is None:
        return told + f"<p>{face.say(language, 'chat.loading')}</p>"
    cells = []
    turn = talk.turn
    if turn is not None:
        if turn.error:
            told += table((), [[turn.error]])
        if turn.state and not turn.text:
            cells.append((face.say(language, "chat.state"), turn.state))
        cells += _speed(face, language, turn)
    cells += rates(face, language, rows)
    return told + (table((), cells) if cells else "")


def _speed(face: Face, language: str, turn: Any) -> list[tuple[str, str]]:
    usage = turn.usage
    numbers = usage.get("chronos", {})
    if numbers.get("decode_ms"):
        speed = 1e3 * (usage["completion_tokens"] - 1) / numbers["decode_ms"]
        return [(face.say(language, "chat.reply_speed"), f"{speed:.1f}")]
    return []


def rates(face: Face, language: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Tokens a second, hits and bytes read of the last seconds in which something happened."""
    if len(rows) < 2:
        return []
    last = rows[-1]
    first = next((r for r in rows if r["time"] >= last["time"] - _WINDOW_S), last)
    if first is last:
        first = rows[-2]
    made, seconds = last["generated"] - first["generated"], last["time"] - first["time"]
    if made <= 0 or seconds <= 0:
        return []
    found = [(face.say(language, "chat.speed"), f"{made / seconds:.1f}")]
    if "hits" in last and last["model"] == first["model"]:
        needs = last["routed"] - first["routed"]
        if needs > 0:
            hits = (last["hits"] - first["hits"]) / needs
            found.append((face.say(language, "chat.hits"), f"{100 * hits:.1f} %"))
        read = (last["bytes_read"] - first["bytes_read"]) / made
        found.append((face.say(language, "chat.read"), shown_size(max(0.0, read))))
    return found
