"""`train STAGE --lora` and `merge` as a user runs them: native models, guests, both backends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chronos.common.disk.header import read_header
from chronos.common.layout import open_layout
from chronos.testing.tiny import tiny_packed
from tests.cli.test_stages import SECTIONS, Runs
from tests.support.guests import tiny_guest

LORA = '[lora]\nrank = 4\ntargets = ["attention", "experts"]\nmin_picks = 2\n'


@pytest.fixture
def runs(backend: Any, chronos: Any, tmp_path: Path) -> Runs:
    return Runs(tmp_path, backend.name, chronos)


def packed(kind: str, folder: Path) -> Path:
    return tiny_packed(folder / kind) if kind == "native" else tiny_guest(folder / kind)


def recipe(runs: Runs, model: Path, stage: str = "sft", steps: int = 2, lora: str = LORA) -> Path:
    path = runs.recipe(stage, model, steps, section=SECTIONS[stage] + lora)
    path.write_text(path.read_text("utf-8").replace("warmup_steps = 1", "warmup_steps = 0"))
    return path


def bytes_of(runs: Runs, out: str) -> bytes:
    return (runs.folder / out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_an_adapter_is_the_same_at_every_budget(runs: Runs, kind: str) -> None:
    model = packed(kind, runs.folder)
    least = 2 * open_layout(model).record_nbytes
    for out, budget in (("all", "all"), ("half", "50%"), ("least", str(least))):
        done = runs.train("sft", recipe(runs, model), out, "--budget", budget)
        assert done.code == 0, done.err
        assert done.out.strip() == str(runs.folder / out / "adapter")
    assert bytes_of(runs, "all") == bytes_of(runs, "half") == bytes_of(runs, "least")
    losses = [line["ce"] for line in runs.lines("least") if "ce" in line]
    assert losses[-1] < losses[0]
    assert not (runs.folder / "all" / "model").exists()


def test_a_run_goes_on_at_another_budget(runs: Runs) -> None:
    model = packed("native", runs.folder)
    assert runs.train("sft", recipe(runs, model, steps=4), "run", "--budget", "all").code == 0
    expected = bytes_of(runs, "run")
    (runs.folder / "run" / "checkpoints" / "step-00000004.safetensors").unlink()
    shutil.rmtree(runs.folder / "run" / "adapter")
    again = runs.train("sft", recipe(runs, model, steps=4), "run", "--resume", "--budget", "25%")
    assert again.code == 0, again.err
    assert bytes_of(runs, "run") == expected


@pytest.mark.parametrize("stage", ["dpo", "orpo", "grpo"])
def test_other_stages_train_adapters_too(runs: Runs, stage: str) -> None:
    model = packed("native", runs.folder)
    done = runs.train(stage, recipe(runs, model, stage), stage, "--budget", "50%")
    assert done.code == 0, done.err
    assert len(bytes_of(runs, stage)) > 1000
    if stage == "dpo":
        assert runs.lines(stage)[0]["loss"] == pytest.approx(0.693147, abs=2e-5)


def test_a_live_reference_is_the_model_without_its_adapter(runs: Runs) -> None:
    """DPO scores by it while the adapter is trained, to the bits of scores made before; GRPO's
    divergence begins at 0."""
    model = packed("native", runs.folder)
    for out, live in (("before", "true"), ("live", "false")):
        section = SECTIONS["dpo"] + f"precompute_reference = {live}\n" + LORA
        at = runs.recipe("dpo", model, 3, section=section)
        done = runs.train("dpo", at, out, "--budget", "50%")
        assert done.code == 0, done.err
    assert bytes_of(runs, "live") == bytes_of(runs, "before")
    margins = [line["rewards/margins"] for line in runs.lines("live") if "loss" in line]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] != 0
    at = runs.recipe("grpo", model, 3, section=SECTIONS["grpo"] + "beta = 0.1\n" + LORA)
    done = runs.train("grpo", at, "grpo", "--budget", "50%")
    assert done.code == 0, done.err
    kl = [line["kl"] for line in runs.lines("grpo")]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 0


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_a_dry_run_counts_what_an_adapter_takes(runs: Runs, kind: str) -> None:
    """What is frozen as stored, what is trained as it is in the adapter that a run writes."""
    model = packed(kind, runs.folder)
    layout, at = open_layout(model), recipe(runs, model, steps=1)
    flags = ("--budget", "50%", "--dry-run", "--json")
    plan = runs.train("sft", at, "plan", *flags).json
    assert not (runs.folder / "plan").exists()
    parts, trained = plan["memory"], plan["parameters"]
    assert parts["experts"] == layout.total_bytes // 2
    assert parts["dense"] < (model / "model.safetensors").stat().st_size < 2 * parts["dense"]
    assert parts["parameters"] == parts["gradients"] == 4 * trained == parts["optimizer"] // 2
    assert ("activations" in parts) == (kind == "native")
    assert parts["total"] == sum(parts.values()) - parts["total"]
    assert runs.train("sft", at, "run", "--budget", "50%").code == 0
    tensors = read_header(runs.folder / "run" / "adapter" / "adapter_model.safetensors").entries
    assert sum(entry.nbytes for entry in tensors.values()) == 4 * trained
    shown = runs.train("sft", at, "plan", *flags[:-1])
    assert ("activations not counted" in shown.out) == (kind == "guest")


@pytest.mark.parametrize("kind", ["native", "guest"])
def test_merge_makes_the_model_of_both(runs: Runs, chronos: Any, kind: str) -> None:
    model = packed(kind, runs.folder)
    done = runs.train("sft", recipe(runs, model, lora=""), "run", "--lora", "4", "--budget", "50%")
    assert done.code == 0, done.err
    merged, adapter = runs.folder / "merged", runs.folder / "run" / "adapter"
    found = chronos("merge", model, adapter, "-o", merged, "--json").json
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert found["matrices"] == len(config["target_modules"]) > 0 and config["r"] == 4
    assert chronos("verify", merged).code == 0
    expert = next((model / "experts").glob("*.ctsr"))
    assert (merged / "experts" / expert.name).stat().st_ino == expert.stat().st_ino
    prompt = (
        "generate",
        "--prompt",
        "say",
        "-n",
        "4",
        "--backend",
        runs.backend,
        "--budget",
        "25%",
    )
    assert chronos(*prompt[:1], merged, *prompt[1:]).code == 0
    twice = chronos("merge", merged, adapter, "-o", runs.folder / "twice")
    assert "another model" in twice.error[0]
    assert chronos("verify", model).code == 0


def test_what_cannot_be_done_is_refused_first(runs: Runs) -> None:
    model = packed("native", runs.folder)
    plain = runs.folder / "native-unpacked"
    cases = {
        "has its experts in memory": (model, "", "50%"),
        "from a packed model only": (plain, LORA, "50%"),
        "is too small": (model, LORA, "1KiB"),
        "names nothing": (model, '[lora]\ntargets = ["q_projection"]\n', "all"),
        "must list names": (model, '[lora]\ntargets = "attention"\n', "all"),
        "dropout": (model, "[lora]\ndropout = 1.0\n", "all"),
    }
    for number, (words, (folder, lora, budget)) in enumerate(cases.items()):
        at = recipe(runs, folder, lora=lora)
        done = runs.train("sft", at, f"bad{number}", "--budget", budget)
        assert done.code and words in done.err, done.err
        assert not list((runs.folder / f"bad{number}").glob("*/step-*"))


def test_another_librarys_model_has_its_own_dtype(runs: Runs) -> None:
    at = recipe(runs, packed("guest", runs.folder))
    text = at.read_text("utf-8").replace("[optimizer]", '[optimizer]\ncompute_dtype = "bfloat16"')
    at.write_text(text, "utf-8")
    done = runs.train("sft", at, "half", "--budget", "50%")
    words = "own dtype" if runs.backend == "torch" else "trains in float32"
    assert done.code in (2, 3) and words in done.err
    assert not (runs.folder / "half" / "tokenizer.json").exists()


def test_another_librarys_gates_weigh_what_they_choose(runs: Runs) -> None:
    """So no other experts can be replayed."""
    model = packed("guest", runs.folder)
    for section in ('router_replay = "R3"\n', "iterations = 2\n"):
        at = recipe(runs, model, "grpo", lora=section + LORA + "[anchor]\nweight = 0.0\n")
        done = runs.train("grpo", at, "replayed", "--budget", "50%")
        assert done.code and 'router_replay = "none"' in done.err, done.err


def test_experts_are_merged_before_packing(runs: Runs, chronos: Any) -> None:
    model = tiny_packed(runs.folder / "packed", num_shared_experts=1)
    plain = runs.folder / "packed-unpacked"
    lora = LORA.replace('"experts"', '"experts", "shared", "gate"')
    lora += '[anchor]\nweight = 1.0\nform = "gate"\n'
    done = runs.train("sft", recipe(runs, plain, lora=lora), "run")
    assert done.code == 0, done.err
    anchors = [line["anchor"] for line in runs.lines("run") if "anchor" in line]
    assert anchors[0] == pytest.approx(0, abs=1e-6) and anchors[-1] > 0  # gates move, held
    adapter = runs.folder / "run" / "adapter"
    refused = chronos("merge", model, adapter, "-o", runs.folder / "no")
    assert refused.code and not (runs.folder / "no").exists()
    assert chronos("merge", plain, adapter, "-o", runs.folder / "yes").code == 0
    words = ("--prompt", "say", "-n", "4", "--backend", runs.backend)
    assert chronos("generate", runs.folder / "yes", *words).code == 0
