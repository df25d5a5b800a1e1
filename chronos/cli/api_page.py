"""docs/api.md: what a notebook needs, from signatures and docstrings.

Read as source, so that annotations stand as they were written; no framework is imported.
`chronos.cli.docs` writes the page, and `tests/cli/test_snippets.py` runs the examples of its head.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from chronos.common.errors import ChronosError

# Heading, module, names. A name's own page is its docstring, then its public methods.
_PARTS = (
    ("Running a model", "chronos", "load Engine Generation Step GenerationResult SamplingParams"),
    ("Text and ids", "chronos.common.text.tokenizer", "Tokenizer"),
    ("Traces", "chronos.common.traces.trace", "RoutingTrace"),
    ("", "chronos.measure.evaluate", "record documents_of cut"),
    ("", "chronos.common.traces.simulate", "slots_for compare Comparison CacheRun"),
    ("Training", "chronos.train", "pretrain Report"),
    ("", "chronos.common.training.recipe", "load_recipe Recipe"),
    ("Errors", "chronos.common.errors", ""),
)
_HEAD = """# From Python

Generated from signatures and docstrings by `make docs`; do not edit. Names of `chronos` itself are
the public face; of other modules those below are meant for use from outside. Importing any of them
imports no framework, which happens when a model is loaded.

## Examples

A model is opened once and answers as often as it is asked. Iterating gives text as it becomes
final; `result` has everything at the end.

```python
import chronos

with chronos.load("demo", budget="25%") as engine:
    prompt = "def read_lines(path):\\n"  # or its ids: engine.tokenizer.encode(prompt)
    for step in engine.generate(prompt, max_tokens=32):
        print(step.text, end="")
    sampling = chronos.SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    sampled = engine.generate(prompt, sampling, max_tokens=32, stop=["\\n\\n"]).result
    print(sampled.text, sampled.finish_reason, sampled.stats["decode_tps"], "tokens a second")
    together = engine.generate_many(["import os", "class Stack:"], sampling, max_tokens=16)
    print([result.text for result in together])
    measured = engine.generate(prompt, max_tokens=32, record=True).result
    print(engine.limit(measured)["eta_limit"], "of the speed nothing could beat")
```

A trace is which experts each token used; caches of any size can then be compared without the model.

```python
import chronos
from chronos.common.traces.simulate import compare, slots_for
from chronos.measure.evaluate import record

with chronos.load("demo") as engine:
    texts = ["import os\\nimport sys\\n", "def main():\\n    return 0\\n"]
    ids = [engine.tokenizer.encode(text) for text in texts]
    trace = record(engine.session, engine.config, ids, max_tokens=1000, model="demo")
trace.save("own.npz")
print(trace.ids_TLK.shape, "tokens, layers, experts each")
for run in compare(trace, slots_for(trace, 0.25)).runs:
    print(run.policy, run.hit_rate)
```

Training takes a recipe ([recipes.md](recipes.md)), by path or as a value that is changed first.

<!-- not run: trains the demo model, which takes hours -->
```python
import dataclasses

from chronos import train
from chronos.common.training.recipe import load_recipe
from chronos.train.pretrain import PretrainRecipe

recipe = load_recipe("demo", PretrainRecipe)
recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path="books"))
report = train.pretrain(recipe, "runs/books", on_event=print)
print(report.model)
```
"""
_STATS_HEAD = """
## stats

`GenerationResult.stats` by name. Seconds, bytes and counts of needs: a need is one expert wanted by
one token in one layer (in a prompt, by one piece of it). Of several sequences side by side, what
experts cost is counted for all of them together. Where the model holds all, there are no needs.

| name | |
|---|---|
"""
STATS = {
    "ttft_s": "seconds until the first token: the prompt",
    "prefill_tps": "tokens of the prompt a second",
    "decode_tps": "tokens a second after it",
    "decode_s": "seconds of that",
    "decode_tokens": "tokens of that; the first of a reply comes of the prompt",
    "decode_<name>": "`routed` and what follows it, of the tokens after the prompt alone",
    "routed": "needs: hits + late + misses",
    "hits": "needs whose expert was in memory",
    "late": "needs whose expert was being read already",
    "misses": "needs that began a read",
    "prefetch_hits": "hits on what was read ahead, the first time each",
    "warm_hits": "misses served from host memory behind a device",
    "fallbacks": "needs for which the shared expert stood in (miss=fallback)",
    "fallback_weight": "routing weight of those",
    "bytes_read": "bytes of experts read from disk",
    "bytes_copied": "bytes copied from host memory to a device",
    "bytes_prefetched": "bytes of them read ahead of need",
    "bytes_loaded": "bytes read in the background, where all experts have room",
    "bytes_late": "bytes read ahead, but not in time",
    "bytes_wasted": "bytes read ahead and evicted unused",
    "late_loading": "of the late ones, those that were being loaded so",
    "announced": "needs of decoded tokens that the model said a token before (known-ahead.md)",
    "announced_late": "of these, those not in memory when needed",
    "unannounced": "needs it should have said and had not: 0",
    "read_errors": "reads that failed",
    "stall_s": "seconds spent waiting for reads",
    "tokens": "tokens the experts served",
    "peak_expert_bytes": "most memory the experts took",
    "capacity_bytes": "memory they may take: the budget",
    "warm_capacity_bytes": "the same of the tier in host memory",
    "live_bytes": "memory they take now",
    "prefetch_precision": "share of the bytes read ahead that were not evicted unused; or None",
    "prefetch_recall": "share of the needs not in memory anyway that were read ahead; or None",
    "prefetch": "by source of forecasts: records read ahead, those used, share of the idle link",
}  # fmt: skip


def render() -> str:
    """The whole page. Raises ValueError for a public name without a docstring."""
    parts = [_HEAD]
    for heading, module, names in _PARTS:
        if heading:
            parts.append(f"\n## {heading}\n")
        home = importlib.import_module(module)
        if not names:
            parts.append(_errors(home))
        parts += [_entry(getattr(home, name), name, module) for name in names.split()]
        if "GenerationResult" in names:
            rows = "".join(f"| `{name}` | {text} |\n" for name, text in STATS.items())
            parts.append(_STATS_HEAD + rows)
    return "".join(parts)


def _entry(thing: Any, name: str, module: str) -> str:
    if not inspect.isclass(thing):
        return f"\n### {module}.{name}\n\n{_function(thing, name)}"
    text = f"\n### {module}.{name}\n\n{_doc(thing, name)}\n"
    if dataclasses.is_dataclass(thing):
        fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(thing))
        text += f"\nFields: {fields}.\n"
    return text + "".join(_members(thing))


def _members(thing: type[Any]) -> Iterator[str]:
    """Public methods and properties that say something of themselves."""
    for name, member in vars(thing).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member):
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if inspect.getdoc(function):
                shown = f"{thing.__name__}.{name}"
                if isinstance(member, property):
                    yield f"\n`{shown}`: {_doc(function, shown)}\n"
                else:
                    yield "\n" + _function(function, shown)


def _function(function: Any, name: str) -> str:
    return f"```text\n{_signature(function, name)}\n```\n\n{_doc(function, name)}\n"


def _signature(function: Any, name: str) -> str:
    """As it is written, without self; a line each for parameters that do not fit into one."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    written = node.args
    if written.args and written.args[0].arg in ("self", "cls"):
        del written.args[0]
    end = f") -> {ast.unparse(node.returns)}" if node.returns else ")"
    assert not (written.posonlyargs or written.vararg or written.kwarg), name
    lines, required = [], len(written.args) - len(written.defaults)
    for number, parameter in enumerate(written.args):
        default = written.defaults[number - required] if number >= required else None
        lines.append(_parameter(parameter, default))
    if written.kwonlyargs:
        lines.append("*")
        pairs = zip(written.kwonlyargs, written.kw_defaults, strict=True)
        lines += [_parameter(parameter, default) for parameter, default in pairs]
    line = f"{name}({', '.join(lines)}{end}"
    if len(line) <= 90:
        return line
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), end])


def _parameter(parameter: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(parameter) + (f" = {ast.unparse(default)}" if default is not None else "")


def _doc(thing: Any, name: str) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"{name} has no docstring")
    return text


def _errors(home: Any) -> str:
    """Every error, below the one it is a kind of."""
    text = f"\n{(home.__doc__ or '').partition(chr(10) * 2)[2]}\n"
    rows = []
    for kind in vars(home).values():
        if inspect.isclass(kind) and issubclass(kind, ChronosError):
            about = f"{kind.__mro__[1].__name__} | {kind.exit_code} | {inspect.getdoc(kind)}"
            rows.append(f"| `chronos.{kind.__name__}` | {about} |")
    return text + "\n| error | is a | exit code | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
