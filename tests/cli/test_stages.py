"""The fine-tuning stages as a user runs them, one after the other, on both backends."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chronos.run.engine import load
from tests.cli.test_train import RECIPE

STAGES = ("sft", "dpo", "orpo", "grpo", "distill")
CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": n * 2}]}
    for n in ("ab", "ba", "aa", "bb", "abc", "cab")
]
PAIRS = [
    {"prompt": f"say {n}", "chosen": n * 2, "rejected": n[::-1] + "x"}
    for n in ("ab", "ba", "abc", "cab", "bc", "cb")
]
PROMPTS = [{"prompt": f"say {n}", "letter": n[0]} for n in ("ab", "ba", "abc", "cab")]
COMMON = """
[model]
path = "{model}"
[data]
path = "{data}"
validation_share = {share}
[cadence]
steps = {steps}
log_every = 1
eval_every = 2
save_every = 2
[optimizer]
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_steps = 1
"""
SECTIONS = {
    "sft": "[sft]\nbatch_size = 2\nseq_len = 32\n",
    "dpo": "[dpo]\nbatch_size = 2\nmax_length = 32\nsft_weight = 0.0\n",
    "orpo": "[orpo]\nbatch_size = 2\nmax_length = 32\n",
    "grpo": """[grpo]
rewards = ["reward.py:letters"]
prompts = 2
generations = 2
batch_size = 2
max_tokens = 6
max_prompt = 32
mask_truncated = false
""",
    "distill": """[distill]
teacher = "{teacher}"
teacher_budget = "50%"
batch_size = 2
seq_len = 32
on_policy = 0.5
max_tokens = 6
""",
}
REWARD = """
def letters(prompts, completions, letter, **columns):
    return [text.count(one) - 0.01 * len(text) for text, one in zip(completions, letter)]
"""


class Runs:
    """A folder of runs of one backend: recipes beside their data."""

    def __init__(self, folder: Path, backend: str, chronos: Any) -> None:
        self.folder, self.backend, self.chronos = folder, backend, chronos
        for name, rows in (("chats", CHATS), ("pairs", PAIRS), ("prompts", PROMPTS)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, "utf-8")
        (folder / "reward.py").write_text(REWARD, "utf-8")

    def recipe(self, stage: str, model: Path, steps: int = 2, section: str = "") -> Path:
        data = {"dpo": "pairs", "orpo": "pairs", "grpo": "prompts"}.get(stage, "chats")
        head = COMMON.format(
            model=model.as_posix(),
            data=f"{data}.jsonl",
            steps=steps,
            share=0.0 if stage == "grpo" else 0.3,
        )
        teacher = (self.folder / "teacher").as_posix()
        text = head + (section or SECTIONS[stage].replace("{teacher}", teacher))
        path = self.folder / f"{stage}.toml"
        path.write_text(text, "utf-8")
        return path

    def train(self, stage: str, recipe: Path, out: str, *flags: object) -> Any:
        words = ("-c", recipe, "-o", self.folder / out, "--backend", self.backend, *flags)
        return self.chronos("train", stage, *words)

    def lines(self, out: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        text = (self.folder / out / name).read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def weights(self, out: str) -> bytes:
        return (self.folder / out / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def runs(backend: Any, chronos: Any, tmp_path: Path, text: Path) -> Iterator[Runs]:
    """With `base/model` pretrained, and packed as `teacher`."""
    made = Runs(tmp_path, backend.name, chronos)
    recipe = tmp_path / "base.toml"
    recipe.write_text(RECIPE.format(data=text.as_posix(), steps=4), "utf-8")
    done = made.train("pretrain", recipe, "base", "-q")
    assert done.code == 0, done.err
    done = chronos("pack", tmp_path / "base" / "model", "-o", tmp_path / "teacher")
    assert done.code == 0, done.err
    yield made


def test_one_stage_after_the_other(runs: Runs, chronos: Any) -> None:
    model = runs.folder / "base" / "model"
    for stage in STAGES:
        done = runs.train(stage, runs.recipe(stage, model), stage)
        assert done.code == 0, done.err
        model = runs.folder / stage / "model"
        assert done.out.strip() == str(model) and "step 2/2" in done.err
    first = {stage: runs.lines(stage)[0] for stage in STAGES}
    assert first["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["dpo"]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for stage in ("dpo", "orpo", "grpo"):  # routers begin where their anchors are
        assert first[stage]["anchor"] == pytest.approx(0, abs=1e-6)
        assert first[stage]["router/shift"] == 0
    assert first["grpo"].keys() >= {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/letters/mean", "policy", "entropy",
        "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean",
    }  # fmt: skip
    assert first["distill"].keys() >= {"kd", "ce", "on_policy"}
    assert first["sft"].keys() >= {"ce", "mean_token_accuracy", "router/effective_experts"}
    answers = runs.lines("grpo", "completions.jsonl")
    assert [line["step"] for line in answers] == [0] * 4 + [1] * 4
    assert answers[0]["prompt"] == answers[1]["prompt"] and "letters" in answers[0]["rewards"]
    packed = runs.folder / "packed"
    assert chronos("pack", model, "-o", packed).code == 0
    flags = ("-p", "say ab", "-n", 4, "--budget", "50%", "--backend", runs.backend, "--json")
    assert chronos("generate", packed, *flags).json["finish_reason"] in ("length", "stop")


def test_a_learnt_reply_ends_by_itself(runs: Runs) -> None:
    """Rows learnt by heart come back as they were trained, their end too: what `chat` feeds is what
    training fed."""
    base = runs.folder / "base" / "model"
    recipe = runs.recipe("sft", base, 300, "[sft]\nbatch_size = 6\nseq_len = 32\n")
    text = recipe.read_text("utf-8").replace("learning_rate = 1e-3", "learning_rate = 8e-3", 1)
    for name in ("eval_every = 2", "save_every = 2", "log_every = 1"):
        text = text.replace(name, name.split("=")[0] + "= 300")
    recipe.write_text(text.replace("share = 0.3", "share = 0.0"), "utf-8")
    done = runs.train("sft", recipe, "learnt", "-q")
    assert done.code == 0, done.err
    with load(runs.folder / "learnt" / "model", backend=runs.backend) as engine:
        assert engine.tokenizer is not None
        for row in CHATS:
            asked, answer = row["messages"]
            result = engine.generate(engine.tokenizer.apply_chat([asked]), max_tokens=12).result
            assert (result.finish_reason, result.text) == ("stop", answer["content"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_resumed_is_the_same_run(runs: Runs, stage: str) -> None:
    """To the last bit: batches, samples, references and answers follow from the step number."""
    model = runs.folder / "base" / "model"
    assert runs.train(stage, runs.recipe(stage, model, 4), "straight", "-q").code == 0
    assert runs.train(stage, runs.recipe(stage, model, 2), "parts", "-q").code == 0
    # The rate follows the longer schedule, so both runs take its first half from the same file.
    checkpoint = "checkpoints/step-00000002.safetensors"
    (runs.folder / "parts" / checkpoint).write_bytes(
        (runs.folder / "straight" / checkpoint).read_bytes()
    )
    done = runs.train(stage, runs.recipe(stage, model, 4), "parts", "--resume", "-q")
    assert done.code == 0, done.err
    assert runs.weights("parts") == runs.weights("straight")
    last = [lines[-1] for lines in (runs.lines("straight"), runs.lines("parts"))]
    for name in last[0].keys() - {"tokens_per_s", "eta_s"}:
        assert last[0][name] == last[1][name], name
    if stage == "grpo":
        answers = [runs.lines(out, "completions.jsonl") for out in ("straight", "parts")]
        assert answers[0] == answers[1]


# Runs one after the other, each of them killed; forked, since imports take longer than a run.
_KILLED = """
import importlib, json, os, signal, sys
from pathlib import Path
from chronos.cli.main import main
from chronos.run.batch import Batch

backend, runs = sys.argv[1], json.loads(sys.argv[2])
update = importlib.import_module(f"chronos.backends.{backend}.train").TrainStep

for stage, saved, words in runs:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    owner, name = (Batch if stage in ("grpo", "distill") else update), "step"
    call, left = getattr(owner, name), [2]

    def killed(*args, **options):
        left[0] -= Path(saved).exists()
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)

    setattr(owner, name, killed)
    sys.argv[1:] = words
    main()
"""


@pytest.mark.slow
def test_runs_that_are_killed_go_on(runs: Runs) -> None:
    """SIGKILL behind a checkpoint, in the middle of an update or of an answer: each stage, resumed,
    is to the last bit the run that nobody killed."""
    model, recipes, children = runs.folder / "base" / "model", {}, []
    for stage in STAGES:
        section = SECTIONS[stage].replace("on_policy = 0.5", "on_policy = 1.0")
        section = section.replace("{teacher}", (runs.folder / "teacher").as_posix())
        recipes[stage] = runs.recipe(stage, model, 4, section)
        assert runs.train(stage, recipes[stage], f"{stage}-straight", "-q").code == 0
        out = runs.folder / stage
        saved = out / "checkpoints" / "step-00000002.safetensors"
        words = ("train", stage, "-c", recipes[stage], "-o", out, "--backend", runs.backend, "-q")
        children.append((stage, str(saved), [str(word) for word in words]))
    given = (sys.executable, "-c", _KILLED, runs.backend, json.dumps(children))
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(STAGES), done.stderr
    for stage in STAGES:
        assert not (runs.folder / stage / "model").exists()
        done = runs.train(stage, recipes[stage], stage, "--resume", "-q")
        assert done.code == 0, done.err
        assert runs.weights(stage) == runs.weights(f"{stage}-straight"), stage
    answers = [runs.lines(out, "completions.jsonl") for out in ("grpo-straight", "grpo")]
    assert answers[0] == answers[1]


def test_what_cannot_be_is_said_before_work(runs: Runs, packed: Path) -> None:
    base = runs.folder / "base" / "model"
    bad = (
        ("sft", "[sft]\nseq_len = 4096\n", "do not fit the model's context"),
        ("sft", "[sft]\nseq_len = 2\n", "there is room for 2"),
        ("dpo", '[dpo]\nloss = "hinge"\n', "dpo.loss must be one of"),
        ("dpo", "[dpo]\nlabel_smoothing = 0.5\n", "label_smoothing"),
        ("dpo", f'[dpo]\nreference = "{base.as_posix()}"\n', "is the model that is trained"),
        ("grpo", "[grpo]\n", "names no reward"),
        ("grpo", '[grpo]\nrewards = ["a:b"]\ngenerations = 1\n', "a group of one"),
        ("grpo", '[grpo]\nrewards = ["reward.py:absent"]\nmax_prompt = 32\nmax_tokens = 8\n',
         "has no attribute 'absent'"),
        ("grpo", '[grpo]\nrewards = ["a:b"]\nrouter_replay = "R1"\n', "router_replay must be"),
        ("distill", "[distill]\n", "names no model"),
        ("distill", f'[distill]\nteacher = "{packed.as_posix()}"\nseq_len = 32\n',
         "another vocabulary"),
        ("distill", '[distill]\nteacher = "x"\nbeta = 0.001\ndivergence = "jsd"\n', "distill.beta"),
    )  # fmt: skip
    for stage, section, said in bad:
        done = runs.train(stage, runs.recipe(stage, base, section=section), "none", "-q")
        assert done.code != 0 and said in done.err, (section, done.err)
        assert not (runs.folder / "none" / "model").exists()
    recipe = runs.recipe("sft", base)
    recipe.write_text(recipe.read_text("utf-8").replace(f'path = "{base.as_posix()}"\n', ""))
    assert "no model to go on with" in runs.train("sft", recipe, "none").err
    done = runs.train("sft", recipe, "none", "--model", runs.folder / "absent")
    assert done.code != 0 and "absent" in done.err


@pytest.mark.parametrize("replay", ["R3", "none"])
def test_the_experts_of_sampling_are_trained(runs: Runs, replay: str) -> None:
    """They are those that the model would choose again: the first of two updates has ratios of 1
    and the gradient of a run without replay, since nothing has moved the routers yet."""
    base = runs.folder / "base" / "model"
    section = SECTIONS["grpo"] + f'iterations = 2\nrouter_replay = "{replay}"\n'
    for out, text in (("replayed", section), ("plain", SECTIONS["grpo"])):
        done = runs.train("grpo", runs.recipe("grpo", base, 2, text), out, "-q")
        assert done.code == 0, done.err
    first, plain = (runs.lines(out)[0] for out in ("replayed", "plain"))
    assert first["clip_ratio/region_mean"] == 0 and first["router/shift"] == 0
    assert first["policy"] == pytest.approx(plain["policy"], abs=1e-6)
    assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_a_resumed_run_wants_the_model_it_began_with(runs: Runs) -> None:
    base = runs.folder / "base" / "model"
    assert runs.train("sft", runs.recipe("sft", base), "run", "-q").code == 0
    recipe = runs.recipe("sft", runs.folder / "run" / "model", 4)
    done = runs.train("sft", recipe, "run", "--resume")
    assert done.code == 3 and "the model to go on with is not the run's" in done.err


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_references_agree(runs: Runs, reference: str) -> None:
    base, section = runs.folder / "base" / "model", SECTIONS["dpo"]
    if reference == "live":
        section += "precompute_reference = false\n"
    done = runs.train("dpo", runs.recipe("dpo", base, 3, section), reference, "-q")
    assert done.code == 0, done.err
    other = runs.train("dpo", runs.recipe("dpo", base, 3), "other", "-q")
    assert other.code == 0
    assert runs.weights(reference) == runs.weights("other")


def test_a_policy_has_neither_dropout_nor_misses(runs: Runs) -> None:
    """Else it would not be its reference at the first update, which DPO's loss shows."""
    base = runs.folder / "base" / "model"
    config = json.loads((base / "config.json").read_text("utf-8"))
    config |= {"dropout": 0.1, "fallback_mask_prob": 0.1}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    assert runs.train("dpo", runs.recipe("dpo", base), "dpo", "-q").code == 0
    assert runs.lines("dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert runs.train("sft", runs.recipe("sft", base), "sft", "-q").code == 0
    still = json.loads((runs.folder / "sft" / "model" / "config.json").read_text("utf-8"))
    assert still["dropout"] == 0.1  # a stage before them keeps its noise
