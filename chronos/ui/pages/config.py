"""Config and Designer: a recipe as text and as a form, and what its model would be."""

from __future__ import annotations

from typing import Any

import gradio as gr

from chronos.common.budget import parse_size, shown_size
from chronos.common.errors import ChronosError
from chronos.common.model.config import DTYPE_BYTES, ROUTING_SOURCES
from chronos.ui import recipes
from chronos.ui.face import Face, chosen, table

# (section, key, choices or None for a number). `stage` is the recipe's own section.
_GEOMETRY = (
    ("model", "hidden_size", None),
    ("model", "num_hidden_layers", None),
    ("model", "num_attention_heads", None),
    ("model", "num_key_value_heads", None),
    ("model", "head_dim", None),
    ("model", "num_experts", None),
    ("model", "num_experts_per_tok", None),
    ("model", "num_shared_experts", None),
    ("model", "moe_intermediate_size", None),
    ("model", "kv_latent_dim", None),
    ("model", "lookahead_steps", None),
    ("tokenizer", "vocab_size", None),
    ("model", "routing_source", ROUTING_SOURCES),
    ("model", "dtype", tuple(DTYPE_BYTES)),
)
_TRAINING = (
    ("stage", "batch_size", None),
    ("stage", "seq_len", None),
    ("cadence", "steps", None),
    ("cadence", "log_every", None),
    ("cadence", "eval_every", None),
    ("cadence", "save_every", None),
    ("optimizer", "learning_rate", None),
    ("optimizer", "min_learning_rate", None),
    ("optimizer", "warmup_steps", None),
    ("loss", "balance", None),
    ("loss", "temporal", None),
    ("loss", "lookahead", None),
)
_FIELDS = (*_GEOMETRY, *_TRAINING)


def build(face: Face) -> None:
    store = face.site.recipes
    with gr.Row():
        source = face.make(gr.Dropdown, label="@config.from", choices=store.names(), scale=2)
        name = face.make(gr.Textbox, label="@config.name", max_lines=1, scale=2)
    with gr.Row():
        load = face.make(gr.Button, value="@config.load", scale=1)
        save = face.make(gr.Button, value="@config.save", variant="primary", scale=1)
        undo = face.make(gr.Button, value="@config.undo", scale=1)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with face.make(gr.Accordion, label="@config.geometry", open=True) as geometry:
                fields = _inputs(face, _GEOMETRY)
            with face.make(gr.Accordion, label="@config.training", open=True):
                fields += _inputs(face, _TRAINING)
        with gr.Column(scale=4, min_width=320):
            disk = face.make(gr.Textbox, label="@config.disk", value="1GB", max_lines=1)
            estimate = gr.HTML(elem_id="estimate")
            text = face.make(
                gr.Code, label="@config.text", language=None, lines=18, max_lines=24,
                elem_id="recipe", interactive=True,
            )  # fmt: skip

    def estimated(language: str, recipe: str, rate: str) -> str:
        try:
            return _estimate(face, language, recipe, rate)
        except ChronosError as error:
            return table((), [[str(error)]])

    def shown(language: str, recipe: str, rate: str) -> list[Any]:
        """All that follows from the text."""
        values: list[Any] = [gr.skip() for _ in _FIELDS]
        starts = False
        try:
            stage = recipes.stage_of(recipe)
            starts = recipes.check(recipe).stage.STARTS
            values = [_value(recipe, stage, *field) for field in _FIELDS]
        except ChronosError:  # said where the estimate is
            pass
        return [estimated(language, recipe, rate), gr.update(visible=not starts), *values]

    def opened(language: str, rate: str) -> list[Any]:
        kept, recipe = store.draft()
        return [kept, recipe, chosen(store.names(), "demo"), *shown(language, recipe, rate)]

    def loaded(language: str, wanted: str | None, rate: str) -> list[Any]:
        wanted = wanted or ""
        recipe = store.text(wanted)
        stem = wanted.rpartition("/")[2].removesuffix(".toml")
        store.keep_draft(stem, recipe)
        return [stem, recipe, *shown(language, recipe, rate)]

    def saved(language: str, called: str, recipe: str) -> Any:
        path = store.save(called, recipe)
        store.keep_draft(called, recipe)
        gr.Info(face.say(language, "config.saved", path=path))
        return chosen(store.names(), path)

    def undone(language: str, called: str, rate: str) -> list[Any]:
        recipe = store.undo(called)
        store.keep_draft(called, recipe)
        return [recipe, *shown(language, recipe, rate)]

    def typed(language: str, called: str, recipe: str, rate: str) -> list[Any]:
        store.keep_draft(called, recipe)
        return shown(language, recipe, rate)

    results = [estimate, geometry, *fields]
    face.opened(opened, [disk], [name, text, source, *results])
    face.on(load.click, loaded, [source, disk], [name, text, *results])
    face.on(save.click, saved, [name, text], [source])
    face.on(undo.click, undone, [name, disk], [text, *results])
    face.on(text.input, typed, [name, text, disk], results)
    face.on(disk.change, estimated, [text, disk], [estimate])
    for (section, key, _), component in zip(_FIELDS, fields, strict=True):
        changer = _changer(face, section, key)
        face.on(component.input, changer, [name, text, component, disk], [text, estimate])


def _inputs(face: Face, fields: tuple[Any, ...]) -> list[Any]:
    made: list[Any] = []
    with gr.Row(elem_classes="fields"):
        for _, key, choices in fields:
            if choices is None:
                made.append(gr.Number(label=key, min_width=190, elem_id=f"field-{key}"))
            else:
                made.append(gr.Dropdown(list(choices), label=key, min_width=190))
    return made


def _value(recipe: str, stage: str, section: str, key: str, choices: Any) -> Any:
    value = recipes.value_of(recipe, stage if section == "stage" else section, key)
    if choices is not None and isinstance(value, tuple):
        value = None  # one for each layer: the text has them
    return gr.update(value=value, visible=value is not None or choices is not None)


def _changer(face: Face, section: str, key: str) -> Any:
    def changed(language: str, called: str, recipe: str, value: Any, rate: str) -> list[Any]:
        if value is None:  # a field that is being emptied
            return [gr.skip(), gr.skip()]
        home = recipes.stage_of(recipe) if section == "stage" else section
        if isinstance(value, float) and value.is_integer() and abs(value) >= 1:
            value = int(value)
        recipe = recipes.with_value(recipe, home, key, value)
        face.site.recipes.keep_draft(called, recipe)
        try:
            return [recipe, _estimate(face, language, recipe, rate)]
        except ChronosError as error:
            return [recipe, table((), [[str(error)]])]

    return changed


def _estimate(face: Face, language: str, recipe: str, rate: str) -> str:
    """What `chronos inspect RECIPE.toml --disk RATE` prints, as tables."""
    disk = parse_size(rate, "a rate") if rate.strip() else None
    found = recipes.designed(recipe, disk)

    def say(key: str) -> str:
        return face.say(language, f"config.{key}")

    if found is None:
        return table((), [[say("goes_on")]])
    sizes = [
        (say("parameters"), f"{found['parameters']:,}"),
        (say("active"), f"{found['active_parameters']:,}"),
        (say("bytes"), shown_size(found["bytes"])),
        (say("dense"), shown_size(found["dense_bytes"])),
        (say("expert"), shown_size(found["expert_bytes"])),
        (say("of_token"), shown_size(found["expert_bytes_per_token"])),
    ]
    if update := found.get("update"):
        what = f"{say('update')} ({update['rows']} x {update['seq_len']})"
        sizes.append((what, shown_size(update["total"])))
    rooms = [
        (
            room["budget"],
            shown_size(room["bytes"]),
            f"{room['experts_per_layer']:.1f}" if room["enough"] else say("too_small"),
            shown_size(room["read_bytes_per_token"]),
            f"{room['tokens_per_s_at_most']:,.0f}" if room["tokens_per_s_at_most"] else "-",
        )
        for room in found["budgets"]
    ]
    head = [say(k) for k in ("budget", "memory", "a_layer", "reads", "at_most")]
    return table((), sizes) + table(head, rooms, say("if_uniform"))
