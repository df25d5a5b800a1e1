"""docs/recipes.md: every key of a recipe, from the dataclasses that check it.

A key's meaning is the string below its field. `chronos.cli.docs` writes the page; a stage's section
is found by its class in `chronos.train`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import Any

import chronos.train
from chronos.common.model.config import LossWeights, ModelConfig
from chronos.common.training import recipe
from chronos.common.training.lora import LoraRecipe
from chronos.tune.settings import TuneSettings

_HEAD = """# Recipes

Generated from the sections' dataclasses by `make docs`; do not edit.

A recipe is a TOML file that says what `chronos train` does. Every key has a default, so a recipe
names what it wants otherwise; a name that is not here is refused, with the nearest that is.
`-c demo` is the recipe of the shipped model, `chronos/assets/recipes/demo.toml`; beside it lie one
for each other stage, by its name, `longer` ([training.md](training.md)), and `plain`, the shipped
model with ordinary routing ([demo-model.md](demo-model.md)).

```toml
[model]
num_hidden_layers = 4
hidden_size = 256

[tokenizer]
vocab_size = 4096

[data]
path = "books"  # beside this file, or where you stand

[pretrain]
batch_size = 16

[cadence]
steps = 5000
```

A relative path is looked for beside the recipe first, then where you stand; `--data` names one from
where you stand. On `--resume` `[cadence]`, `optimizer.threads` and paths may be others (the data
itself is compared), all else must be as it was, or `--force` is given. Recipes of old keep
`[cadence]`, `[optimizer]` and the stage's keys in one section, `[train]`.

A stage that goes on with a model has `path` in `[model]`, no `[tokenizer]`, `[anchor]`, and
`[lora]` where it trains adapters; `pretrain` takes such a `path` too. Beside it there may be
`max_position_embeddings`, a longer context, and `original_max_position_embeddings`, what the model
was trained for where its config names more ([training.md](training.md#a-longer-context)):

```toml
[model]
path = "demo"  # a folder, or what --model names

[data]
path = "chats.jsonl"

[sft]
seq_len = 512

[lora]  # adapters in place of the model's weights; --lora 16 is the same with these alone
rank = 16
```

The loss of a pretraining log line is `ce` and each term of `[loss]` times its weight.
"""


def render() -> str:
    """The whole page. Raises ValueError for a key without a meaning."""
    return _HEAD + "".join(_section(name, kind) for name, kind in sections())


def sections() -> Iterator[tuple[str, type[Any]]]:
    """(name, dataclass) of every section, those of stages and of the tuner last."""
    yield "model", ModelConfig
    yield "loss", LossWeights
    yield "data", recipe.DataRecipe
    yield "tokenizer", recipe.TokenizerRecipe
    yield "cadence", recipe.CadenceRecipe
    yield "optimizer", recipe.OptimizerRecipe
    yield "anchor", recipe.AnchorRecipe
    yield "lora", LoraRecipe
    for module in sorted(info.name for info in pkgutil.iter_modules(chronos.train.__path__)):
        for kind in vars(importlib.import_module(f"chronos.train.{module}")).values():
            if inspect.isclass(kind) and kind.__module__.endswith(f".{module}"):
                if hasattr(kind, "SECTION"):
                    yield kind.SECTION, kind
    yield "tune", TuneSettings


def meanings(kind: type[Any]) -> dict[str, str]:
    """Field -> the string below it in the source."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _section(name: str, kind: type[Any]) -> str:
    about, known = " ".join((kind.__doc__ or "").split()), meanings(kind)
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name not in known:
            raise ValueError(f"{kind.__name__}.{field.name} has no text below it")
        if dataclasses.is_dataclass(field.default):  # a section of its own
            continue
        rows.append(
            f"| `{field.name}` | {_type(field)} | {_default(name, field)} | {known[field.name]} |"
        )
    others = [
        f"`{section}.{key}` {json.dumps(value)}"
        for section, values in getattr(kind, "DEFAULTS", {}).items()
        for key, value in values.items()
    ]
    rest = f"\nUnless its recipe says otherwise: {', '.join(others)}.\n" if others else ""
    return f"\n## [{name}]\n\n{about}\n\n" + "\n".join(rows) + "\n" + rest


def _type(field: dataclasses.Field[Any]) -> str:
    return " or ".join(map(_kind, str(field.type).split(" | ")))


def _kind(text: str) -> str:
    if text.startswith(("tuple[", "list[")):
        return "list of " + text.partition("[")[2].partition("]")[0].partition(",")[0]
    if text.startswith("dict["):
        return "table"
    return text


def _default(section: str, field: dataclasses.Field[Any]) -> str:
    """As a recipe would say it."""
    if (section, field.name) == ("model", "vocab_size"):
        return "the tokenizer's"
    make = field.default_factory
    value = field.default if make is dataclasses.MISSING else make()
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"
