"""Every fenced block of the README and the docs is run, as it stands, in the order of its page.

A block names its language. `python` runs in a process of its own; of `sh`, commands of Chronos run
here, and of other lines it is tried that what they name is there. `toml` is a recipe. A block that
cannot run has `<!-- not run: why -->` above it. Models and data that pages take for granted
(MODEL, T.npz, D ...) lie where the blocks run; what takes hours is made short by SHORTER.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chronos.cli import main
from chronos.common.training import recipe as recipes
from chronos.common.training.recipe import CadenceRecipe, load_recipe
from chronos.testing import tiny
from chronos.train import STAGES
from chronos.train.pretrain import PretrainRecipe

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
# Words of commands, and what they are here; the first are hours of work, or the network's.
SHORTER = {"60000": "3000", "stdlib": "D", "organisation/name": "MODEL"}
TALK = ("text", "json")  # languages of blocks that show, and say nothing to run
_NOT_RUN = re.compile(r"<!-- not run: (.{10,}) -->")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    excuse: str


def blocks(page: str) -> list[Block]:
    found, lines = [], (ROOT / page).read_text("utf-8").split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a block does not end"
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        excuse = _NOT_RUN.fullmatch(lines[first - 1]) if first else None
        text = "\n".join(lines[first + 1 : last])
        found.append(Block(page, first + 1, lines[first][3:], text, excuse[1] if excuse else ""))
    return found


RUN = [page for page in PAGES if any(b.language not in TALK for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_a_block_names_its_language(page: str) -> None:
    for block in blocks(page):
        assert block.language in ("python", "sh", "toml", *TALK), f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks(page: str) -> None:
    """Indented lines would escape the test below; docs/cli.md has the usage of commands so."""
    if page != "docs/cli.md":
        text = (ROOT / page).read_text("utf-8")
        assert re.findall(r"^ {4,}(?:chronos|python -m) .*", text, re.M) == []


def test_pages_that_need_it_are_tried() -> None:
    assert {"README.md", "docs/guests.md", "docs/extending.md"} <= set(RUN)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages take for granted."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.support.guests import ARCHITECTURES, BASE

    folder = tmp_path_factory.mktemp("pages")
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    settings = BASE | ARCHITECTURES["qwen3_moe"] | wide | {"vocab_size": 320}
    config = transformers.AutoConfig.for_model("qwen3_moe", **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "MODEL")
    tiny.tiny_tokenizer().save(folder / "MODEL")
    tiny.tiny_model(folder / "runs" / "demo" / "model")
    (folder / "D").mkdir()
    for number in range(60):
        (folder / "D" / f"{number}.txt").write_text(f"# {number}\n" + "".join(tiny.TEXTS), "utf-8")
    trace = ["trace", "demo", "--data", str(folder / "D"), "-n", "3000"]
    assert main.run([*trace, "-o", str(folder / "T.npz")]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, where blocks run; recipes are tiny ones here."""
    for name in [name for name in os.environ if name.startswith("CHRONOS_")]:
        monkeypatch.delenv(name)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(recipes, "load_recipe", shortened)
    yield tmp_path


def shortened(path: Any, stage: type[Any]) -> Any:
    """The recipe, checked, with the tiny model and few steps in its place."""
    found = load_recipe(path, stage)
    return dataclasses.replace(
        found,
        model=tiny.CONFIG,
        stage=dataclasses.replace(found.stage, batch_size=2, seq_len=32),
        data=dataclasses.replace(found.data, path="D"),
        tokenizer=dataclasses.replace(found.tokenizer, vocab_size=300),
        cadence=CadenceRecipe(steps=2),
    )


@pytest.mark.slow
@pytest.mark.needs_backend
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN)
def test_blocks_run_as_they_stand(page: str, here: Path) -> None:
    for block in blocks(page):
        if block.excuse or block.language in TALK:
            continue
        where = f"{page}:{block.line}"
        if block.language == "python":
            run_python(block.text, where)
        elif block.language == "toml":
            Path("own.toml").write_text(block.text, "utf-8")
            sections = {stage.section.SECTION: stage.section for stage in STAGES.values()}
            stage = next((sections[n] for n in tomllib.loads(block.text) if n in sections), None)
            load_recipe("own.toml", stage or PretrainRecipe)
        else:
            for line in block.text.split("\n"):
                if line:
                    run_line(line, where)


def run_python(text: str, where: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}\n{done.stderr}"


def run_line(line: str, where: str) -> None:
    words = [SHORTER.get(word, word) for word in shlex.split(line, comments=True)]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if not words:
        return
    match words[0].removeprefix(".venv/bin/"), words[1:]:
        case "chronos", rest:
            assert main.run(rest) == 0, f"{where}: {line}"
        case "pip", ["install", what]:
            assert extras(what) <= declared(), f"{where}: {line}"
        case "make", [target]:
            rule = rf"^{target}:"
            assert re.search(rule, (ROOT / "Makefile").read_text(), re.M), f"{where}: {line}"
        case "python", ["-m", "mlx_lm", *rest]:
            pytest.importorskip("mlx_lm")
            run_python(f"import runpy, sys; sys.argv = {['mlx_lm', *rest]}\n"
                       "runpy.run_module('mlx_lm', run_name='__main__')", where)  # fmt: skip
        case "python", ["-m", module, *rest]:
            assert importlib.util.find_spec(module), f"{where}: {line}"
            paths = [word for word in rest if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), f"{where}: {line}"
        case _:
            pytest.fail(f"{where}: nobody knows how to try {line!r}; excuse it or teach this test")


def extras(what: str) -> set[str]:
    """Those of `chronos-moe[a,b]`."""
    found = re.fullmatch(r"(?:chronos-moe|\.)(?:\[([\w,]+)\])?", what)
    assert found, what
    return set(filter(None, (found[1] or "").split(",")))


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return set(project["optional-dependencies"])


def test_links_are_no_use_on_an_index() -> None:
    """The README is the page of the package index too, where relative links lead nowhere."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"\]\((?!https?://)", text) == []
    named = re.findall(r"`((?:docs/)?[\w-]+\.md|docs/[\w.-]+)`", text)
    assert len(named) > 8 and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    """Paths in backticks, from the root or from the package, and modules that are to be run."""
    text = (ROOT / page).read_text("utf-8")
    for path in re.findall(r"`((?:chronos|tests|bench|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "chronos" / path).exists(), f"{page}: {path}"
    for module in re.findall(r"python -m ((?:chronos|bench)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page}: {module}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
