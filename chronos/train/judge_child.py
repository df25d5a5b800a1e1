"""The process that a run's rewards are computed in, started with their names as arguments.

A function is `module:name`, `file.py:name`, or the folder of a reward model that Transformers
builds as a classifier of one label. An object with `get_score(messages)` is asked for each
completion. A request is a line of JSON with prompts, completions, completion_ids and columns, the
answer a line {"scores": [[number or null, ...], ...]} or {"error", "function"}. What a function
prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Reward = Callable[..., Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    functions: list[tuple[str, Reward]] = []
    for name in sys.argv[1:]:
        try:
            functions.append((name, resolve(name)))
        except BaseException as error:
            _answer(answers, {"error": f"{type(error).__name__}: {error}", "function": name})
            return
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, _scores(functions, json.loads(line)))


def resolve(name: str) -> Reward:
    """The function a recipe names."""
    if Path(name).is_dir():
        # By name: this room imports no framework itself.
        interop = importlib.import_module("chronos.interop.reward_model")
        return _by_score(interop.scorer(name))
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise FileNotFoundError(f"no such file: {place}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    found = getattr(module, attribute)
    if inspect.isclass(found):
        found = found()
    return _by_score(found.get_score) if hasattr(found, "get_score") else found


def _scores(functions: list[tuple[str, Reward]], request: dict[str, Any]) -> dict[str, Any]:
    count, scores = len(request["completions"]), []
    columns = request.pop("columns")
    for name, function in functions:
        try:
            found = list(function(**request, **columns))
            numbers = [None if x is None else float(x) for x in found]
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "function": name}
        if len(numbers) != count:
            said = f"it returned {len(numbers)} rewards for {count} completions"
            return {"error": said, "function": name}
        scores.append([x if x is not None and math.isfinite(x) else None for x in numbers])
    return {"scores": scores}


def _by_score(score: Callable[[list[dict[str, str]]], float]) -> Reward:
    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [score(_chat(p, c)) for p, c in zip(prompts, completions, strict=True)]

    return reward


def _chat(prompt: Any, completion: Any) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return [*turns, *completion]


def _answer(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
