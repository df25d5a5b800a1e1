"""A newcomer's way through the pages, in a real browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="pages need the extra [ui]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs_backend,
    pytest.mark.timeout(1800),
    # Of packages that are not ours, at their import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PICTURES = os.environ.get("CHRONOS_TEST_PICTURES")  # a folder: docs/img/ui is made so


class Reader:
    """Someone in front of a page."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.asked = page, []
        page.set_default_timeout(300_000)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: pytest.fail(f"the page failed: {error}"))
        page.goto(address)
        page.get_by_role("tab", selected=True).wait_for()

    def until(self, done: Any, seconds: float = 300) -> None:
        for _ in range(int(seconds * 10)):
            if done():
                return
            self.page.wait_for_timeout(100)
        pytest.fail("it did not happen")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def field(self, label: str) -> Any:
        return self.page.get_by_label(label, exact=True).locator("visible=true").first

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def pick(self, label: str, option: str | re.Pattern[str]) -> None:
        """An option of a dropdown, whose list is that of when it is opened."""
        box = self.field(label)
        box.click()
        if isinstance(option, str):
            option = re.compile(rf"^\s*✓?\s*{re.escape(option)}\s*$")
        self.page.get_by_role("option").filter(has_text=option).first.click()

    def sees(self, place: str, text: str | re.Pattern[str]) -> None:
        self.page.locator(place).get_by_text(text).first.wait_for()

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.wait_for_timeout(1500)
            self.page.screenshot(path=Path(PICTURES) / f"{name}.png", timeout=120_000)


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[Reader]:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, locale="en-US")
    yield Reader(context.new_page(), address)
    context.close()


def metrics(root: Path) -> list[dict[str, Any]]:
    lines = (root / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def said(folder: Path) -> list[str]:
    """What was said in a conversation, in turns."""
    lines = (folder / "chat.jsonl").read_text().splitlines()
    return [json.loads(line)["content"] for line in lines]


def test_a_newcomer_trains_watches_exports_and_chats(reader: Reader, root: Path, address: str):
    page = reader.page
    # Config: a recipe by its form; what it would be follows at once.
    reader.until(lambda: reader.field("Name").input_value() == "mine")  # a draft of the demo's
    reader.pick("Begin with recipe", "recipes/tiny.toml")
    reader.press("Load")
    reader.until(lambda: reader.field("hidden_size").input_value() == "32")
    before = page.locator("#estimate").inner_text()
    reader.field("num_experts").fill("16")
    reader.until(lambda: "num_experts = 16" in page.locator("#recipe").inner_text())
    assert page.locator("#estimate").inner_text() != before
    reader.field("num_experts").press("Tab")
    reader.field("Name").fill("mine")
    reader.press("Save")
    reader.until((root / "recipes" / "mine.toml").exists)
    saved = (root / "recipes" / "mine.toml").read_text()
    assert "num_experts = 16" in saved and saved.startswith("# A model that trains")
    reader.picture("config")

    # Pipeline: what would be trained, then the run, across a reload and in a second tab.
    reader.tab("Pipeline")
    reader.pick("Recipe", "recipes/mine.toml")
    reader.pick("Data", "rows.jsonl")
    page.get_by_text("Preview of the data").click()
    reader.press("Look")
    reader.sees("body", re.compile("After 0 comes 1"))
    reader.press("Start")
    reader.sees("#run-state", "running")
    reader.until(lambda: (root / "runs" / "one" / "metrics.jsonl").exists())
    page.reload()
    reader.sees("#run-state", re.compile("running|done"))  # the tab and the run are found again
    reader.picture("pipeline")
    second = page.context.new_page()
    other = Reader(second, address)
    other.tab("Pipeline")
    other.sees("#run-state", "done")
    reader.sees("#run-state", "done")
    assert metrics(root)[-1]["step"] == 400
    for each in (reader, other):
        each.sees("#run-state", "400/400")
    second.close()

    # Export: packed, as the command line packs.
    reader.tab("Export")
    reader.pick("Model", "runs/one/model")
    reader.field("Folder to write").fill("models/mine")
    reader.press("Start")
    reader.sees("#export-state", "done")
    assert (root / "models" / "mine" / "experts" / "cluster_manifest.json").exists()

    # Chat: two budgets side by side.
    reader.tab("Chat")
    reader.pick("Model", "models/mine")
    reader.field("Memory for experts").fill("50%")
    reader.field("And beside it (a second budget)").fill("all")
    reader.press("Start server")
    for side in ("left", "right"):
        numbers = page.locator(f"#numbers-{side}")
        numbers.get_by_text("running").wait_for()
        numbers.get_by_text("The model is being loaded").wait_for(state="hidden")
    reader.field("Message").fill("What follows 7?")
    reader.field("Temperature").fill("0")
    reader.field("Tokens at most").fill("40")
    reader.press("Send")
    reader.sees("#numbers-left", "Tokens/s of the reply")
    reader.sees("#numbers-right", "Tokens/s of the reply")
    asked, reply = said(root / "runs" / "chat")
    assert asked == "What follows 7?" and said(root / "runs" / "chat-2") == [asked, reply]
    for side in ("left", "right"):
        reader.sees(f"#chat-{side}", reply.strip())
    reader.picture("chat")

    # I/O: the numbers of the server's own log.
    reader.tab("I/O monitor")
    reader.sees("#io-state", "hits")
    reader.picture("experts")
    log = root / "runs" / "chat" / "experts.jsonl"
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["hits"] + last["late"] + last["misses"] == last["routed"] > 0

    # Nothing is asked of anybody else.
    assert [u for u in reader.asked if not u.startswith((address, "data:", "blob:"))] == []


def test_the_best_of_a_study_becomes_a_recipe_and_is_undone(reader: Reader, root: Path):
    before = (root / "recipes" / "tiny.toml").read_text()
    mine = root / "recipes" / "best.toml"
    mine.write_text(before)
    reader.tab("Auto-Tune")
    reader.until(lambda: reader.field("Recipe to improve").input_value() != "")
    reader.pick("Recipe to improve", "recipes/quick.toml")
    reader.field("Trials").fill("2")
    reader.press("Start or go on")
    reader.sees("#tune-state", "done")
    reader.sees("#tune-trials", "whole")
    reader.picture("tune")
    reader.field("Name of the recipe to write").fill("best")
    reader.press("Apply best")
    reader.sees("#tune-changes", re.compile("recipes/best.toml"))
    assert mine.read_text() == (root / "runs" / "search" / "applied.toml").read_text() != before
    reader.tab("Config")
    reader.page.reload()  # the page is filled from the draft that was applied
    reader.until(lambda: reader.field("Name").input_value() == "best")
    reader.press("Undo last save")
    reader.until(lambda: mine.read_text() == before)


def test_who_goes_elsewhere_at_once_stays_there(reader: Reader, address: str):
    page = reader.page
    reader.tab("Runs")
    page.wait_for_function("localStorage['chronos-ui']")
    for _ in range(2):  # it is gone back to, as often as the page is opened
        page.reload()
        reader.until(lambda: page.get_by_role("tab", selected=True).inner_text() == "Runs")
    page.reload(wait_until="commit")
    reader.tab("Export")  # as soon as it can be clicked
    # By then the page has been told all that it asks for when it is opened.
    page.get_by_label("Folder to write").wait_for()
    page.wait_for_timeout(2000)
    assert page.get_by_role("tab", selected=True).inner_text() == "Export"
    page.reload()
    reader.until(lambda: page.get_by_role("tab", selected=True).inner_text() == "Export")


def test_by_keyboard_in_a_narrow_window_in_another_language(browser: Any, address: str):
    context = browser.new_context(viewport={"width": 390, "height": 800}, locale="ja-JP")
    reader = Reader(context.new_page(), address)
    page = reader.page
    page.get_by_role("tab", name="設定", exact=True).wait_for()
    for name in ("設定", "パイプライン"):
        page.get_by_role("tab", name=name, exact=True).click()
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 1, name  # nothing is pushed out at the side
    reader.picture("narrow")
    # The keyboard alone reaches the tabs, the stages and the button that starts.
    reached = set()
    page.get_by_role("tab", selected=True).focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + document.activeElement.type"))
        text = page.evaluate("document.activeElement.innerText || ''").strip()
        if text == "開始":
            break
    else:
        pytest.fail(f"the keyboard never reached the button that starts: {reached}")
    assert "INPUTradio" in reached
    context.close()


def test_a_path_that_leads_out_is_refused(reader: Reader, root: Path):
    reader.tab("Pipeline")
    reader.pick("Recipe", "recipes/tiny.toml")
    before = sorted((root / "runs").iterdir()) if (root / "runs").exists() else []
    for path in ("/etc/passwd", "../rows.jsonl"):
        reader.field("Data").fill(path)
        reader.field("Data").press("Enter")
        reader.field("Name of the run").fill("out")
        reader.press("Start")
        reader.sees("body", re.compile("not a path below the root|leads out of the root"))
        assert (sorted((root / "runs").iterdir()) if before else []) == before
