"""Fields left empty or filled with what is wrong: each button says so, and nothing is begun.

The pages are made in a process of their own, which leaves Gradio's warnings there: this file is
also the program that calls their handlers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATHS = ("/etc/passwd", "../x", "~", "a\0b", "absent", "-c", "x" * 2000)
RECIPES = ("[model", "x = 1", "[model]\nhidden_size = -3\n")
EMPTY = ""


def called(root: Path) -> Iterator[dict[str, Any]]:
    """What came of every handler of the pages with every text: what it said, or what it raised."""
    import gradio as gr

    from chronos.ui.app import pages

    def value(component: Any, text: str) -> Any:
        """What a browser says of a field in which that was typed."""
        if isinstance(component, gr.Radio | gr.Checkbox):
            return component.value
        if isinstance(component, gr.Number):
            return -1 if text else None
        free = isinstance(component, gr.Textbox | gr.Code) or (
            isinstance(component, gr.Dropdown) and component.allow_custom_value
        )
        return text if free else None

    for each in pages(root)[0].fns.values():
        events = {name for _, name in each.targets}
        if each.fn is None or not events & {"click", "submit", "input", "focus", "change"}:
            continue
        for text in (EMPTY, *PATHS, *RECIPES):
            given = [value(component, text) for component in each.inputs[1:]]  # after the language
            found = {"handler": f"{each.fn.__module__}.{each.name}", "events": sorted(events)}
            try:
                each.fn("en", *given)
            except gr.Error as error:
                found |= {"refused": str(error)}
            except Exception as error:
                found |= {"raised": f"{type(error).__name__}: {error} of {given}"}
            yield found


def test_nothing_that_is_typed_breaks_a_handler_or_begins_a_job(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="pages need the extra [ui]")
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each for each in found if "raised" in each] == []
    clicks = [each for each in found if "click" in each["events"]]
    assert len(clicks) > 100 and sum("refused" in each for each in clicks) > 50
    assert all(each.get("refused", "said") for each in found)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [".draft.json"]  # what was typed into Config


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.stdout.write(json.dumps(list(called(Path(sys.argv[1])))))
