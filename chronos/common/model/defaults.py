"""What Transformers takes where a config.json leaves a key out: the defaults of its config classes.

Told by the source of the installed version; nothing is imported. Only defaults written as plain
values are seen. Not known here: which keys are asked for.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any


def class_defaults(model_type: str) -> dict[str, Any]:
    """The defaults of the config class of this model_type; {} where none is found."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return {}
    models = Path(spec.submodule_search_locations[0]) / "models"
    name = model_type.replace("-", "_")
    for folder in dict.fromkeys((name, name.removesuffix("_text"))):
        if folder.isidentifier():
            for path in sorted((models / folder).glob("configuration_*.py")):
                if found := _in_source(path, model_type):
                    return found
    return {}


def _in_source(path: Path, model_type: str) -> dict[str, Any]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    classes = [_values(node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return next((found for found in classes if found.get("model_type") == model_type), {})


def _values(node: ast.ClassDef) -> dict[str, Any]:
    """Attributes of a class that are plain values; parameters of its `__init__` in older ones."""
    pairs: list[tuple[Any, Any]] = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            pairs.append((line.target, line.value))
        elif isinstance(line, ast.Assign):
            pairs += [(target, line.value) for target in line.targets]
        elif isinstance(line, ast.FunctionDef) and line.name == "__init__":
            given = line.args.args[len(line.args.args) - len(line.args.defaults) :]
            named = [ast.Name(argument.arg) for argument in given]
            pairs += zip(named, line.args.defaults, strict=True)
    return {
        target.id: value.value
        for target, value in pairs
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
    }
