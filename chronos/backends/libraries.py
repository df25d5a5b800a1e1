"""Which library runs an architecture: told by the source of its installed version, not by running.

Transformers is asked whether it has a text model of that type and whether that hands its experts to
its experts interface, MLX-LM whether its model computes them with a switch: what each backend asks
of the model it has built. Nothing is imported. What shows only in a built model (shapes, weights
that a library rearranges) is not known here, so a yes is a probable one and a no is certain.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_INSTALL = "not installed: pip install 'chronos-moe[guests]'"
_TYPES = re.compile(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = .*?^\)", re.M | re.S)
_REMAPPED = re.compile(r"^MODEL_REMAPPING = (\{.*?^\})", re.M | re.S)
_SWITCH = re.compile(r"\bSwitch(GLU|MLP)\(")
_SIBLINGS = re.compile(r"^from \.(?:(\w+) import| import (.+))", re.M)
_NAME = re.compile(r"\w+")
# MLX-LM only stacks their experts: all else has Transformers' names and values.
STACKED_ONLY = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "phimoe", "dots1"}
)
_WhyNot = Callable[[Path, str], str]  # the package's folder and a model_type: a reason or ""


class Verdict(NamedTuple):
    """Whether a library may run a model, in words too."""

    text: str
    may_run: bool


def who_runs(model_type: str, dialect: str) -> list[Verdict]:
    """Each library that could compute with records of this dialect (see `ModelSource.dialect`)."""
    if dialect == "chronos":
        return [Verdict("Chronos", True)]
    mlx_lm = _verdict("mlx_lm", "MLX-LM on mlx", _not_mlx_lm, model_type)
    transformers = _verdict("transformers", "Transformers on torch", _not_transformers, model_type)
    if dialect == "quantised":  # of these MLX computes with gpt-oss' MXFP4
        return [transformers, *([mlx_lm] if model_type == "gpt_oss" else [])]
    if dialect == "mlx":
        return [mlx_lm, *([transformers] if model_type in STACKED_ONLY else [])]
    return [transformers, mlx_lm]


def _verdict(package: str, label: str, why_not: _WhyNot, model_type: str) -> Verdict:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return Verdict(f"{label} ({_INSTALL})", True)
    reason = why_not(Path(spec.submodule_search_locations[0]), model_type)
    if reason:
        return Verdict(f"not {label}: {reason}", False)
    return Verdict(f"{label}, as far as its source tells", True)


def _not_transformers(home: Path, model_type: str) -> str:
    """Why not, or ""."""
    types = _TYPES.search(_text(home / "models/auto/modeling_auto.py"))
    if types and f'("{model_type}", ' not in types[0]:
        return f"the version here has no text model {model_type}"
    name = model_type.replace("-", "_")
    for folder in (home / "models" / name, home / "models" / name.removesuffix("_text")):
        sources = [_text(path) for path in folder.glob("modeling_*.py")]
        if sources and not any("use_experts_implementation" in source for source in sources):
            return f"its {model_type} computes experts in a way of its own"
    return ""


def _not_mlx_lm(home: Path, model_type: str) -> str:
    """Why not, or ""."""
    remapped = _REMAPPED.search(_text(home / "utils.py"))
    name = ast.literal_eval(remapped[1]).get(model_type, model_type) if remapped else model_type
    if "/" in name or not _text(home / f"models/{name}.py"):
        return f"the version here has no model {model_type}"
    if not _uses_switch(home / "models", name, set()):
        return f"its {model_type} computes experts in a way of its own"
    return ""


def _uses_switch(models: Path, name: str, seen: set[str]) -> bool:
    """Whether a model's source, or that of the models it builds on, makes a switch."""
    if name in seen or name == "switch_layers":
        return False
    seen.add(name)
    source = _text(models / f"{name}.py")
    imported = " ".join(map(" ".join, _SIBLINGS.findall(source)))
    siblings = _NAME.findall(imported)
    return bool(_SWITCH.search(source)) or any(_uses_switch(models, n, seen) for n in siblings)


def _text(path: Path) -> str:
    """A source file; "" where there is none, or a model_type is no file name."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
