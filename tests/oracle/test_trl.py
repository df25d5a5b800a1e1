"""The stages against TRL's trainers: loss, the gradient of every parameter, metrics, five updates.

TRL tokenises, collates and computes its loss by its own code on a native model that Transformers
knows; Chronos does the same from the same rows by the code of its stages. The policy is the
reference with noise, everything is float32.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.data import (
    IGNORE,
    BadRows,
    Batch,
    Example,
    FittedRows,
    Pair,
    PairBatches,
    ReadReport,
    encode_examples,
    encode_pairs,
)
from chronos.common.data.rows import parse_row
from chronos.common.model.config import ModelConfig
from chronos.common.text.tokenizer import Tokenizer
from chronos.common.training import losses
from chronos.common.training.objectives import (
    Distillation,
    NextToken,
    OddsRatio,
    PolicyGradient,
    Preference,
    Terms,
)
from chronos.common.training.recipe import OptimizerRecipe
from chronos.testing.tiny import tiny_model
from chronos.train.grpo import notes_of
from chronos.train.rollouts import Answer, rows
from chronos.train.start import build

NEEDS = ("torch", "transformers", "trl", "datasets")
# Their warnings are about their own future; Trainer's about a CPU.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "def add left right return class Stack push item for line in open path print strip".split()
BETA1 = 0.5


def text(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts, each with two answers, of all lengths."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": turn("user", text(rng, 1, 9)),
            "chosen": turn("assistant", text(rng, 1, 12)),
            "rejected": turn("assistant", text(rng, 1, 12)),
        }
        for _ in range(count)
    ]


def as_text(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without a chat template. No token spans the border of a prompt and its answer."""
    before = {"prompt": "", "chosen": " ", "rejected": " "}
    return [{name: before[name] + row[name][0]["content"] for name in row} for row in pairs]


def completions(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]


def prompts(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in pairs]


class Models:
    """A policy and its reference, opened by either side."""

    def __init__(self, home: Path) -> None:
        import torch

        self.home, self.reference = home, tiny_model(home / "reference", num_hidden_layers=2)
        self.policy = Path(shutil.copytree(self.reference, home / "policy"))
        torch.manual_seed(0)
        moved = self.theirs(self.policy)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        moved.save_pretrained(self.policy)
        self.config = ModelConfig.from_json(self.policy)
        self.tokenizer = Tokenizer.load(self.policy)

    def theirs(self, folder: Path | None = None) -> Any:
        from transformers import AutoModelForCausalLM

        import chronos.interop.transformers  # noqa: F401

        return AutoModelForCausalLM.from_pretrained(folder or self.policy)

    def ours(self, folder: Path | None = None) -> Any:
        from chronos.backends import torch as backend

        return build(backend, folder or self.policy, self.config, None)

    def score(self, batch: Batch, temperature: float = 1.0) -> Any:
        """What the reference says of the labels."""
        from chronos.backends import torch as backend

        return backend.score(self.ours(self.reference), batch, temperature).log_probs_BT

    def examples(self, data: Sequence[Mapping[str, Any]]) -> list[Example]:
        bad = BadRows(0, ReadReport())
        return encode_examples(self.tokenizer, self.documents(data), 200, bad)

    def pairs(self, data: Sequence[Mapping[str, Any]]) -> list[Pair]:
        bad = BadRows(0, ReadReport())
        return encode_pairs(self.tokenizer, self.documents(data), 200, bad)

    def documents(self, data: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [parse_row(json.dumps(row).encode(), f"rows:{i}") for i, row in enumerate(data)]

    def rows_of(self, data: Sequence[Mapping[str, Any]]) -> Batch:
        """As `chronos train sft` makes them, an example a row."""
        examples = self.examples(data)
        pad = self.tokenizer.pad_id
        fitted = FittedRows(examples, seq_len=200, pad_id=pad, seed=0, packed=False)
        return fitted.assemble(np.arange(len(examples)))

    def pairs_of(self, data: Sequence[Mapping[str, Any]], prompts: bool = False) -> Batch:
        """As `chronos train dpo` and `orpo` make them."""
        pairs = self.pairs(data)
        batches = PairBatches(
            pairs, batch_size=len(pairs), accumulate=1, pad_id=self.tokenizer.pad_id,
            seed=0, prompts=prompts,
        )  # fmt: skip
        return batches.group(0)

    def arguments(self, data: Sequence[Any], **changes: Any) -> dict[str, Any]:
        """Of any of their configs: on a CPU, in float32, all rows at once in their order."""
        return {
            "output_dir": str(self.home / "out"), "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "per_device_train_batch_size": len(data),
            "logging_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0,
            "train_sampling_strategy": "sequential", "max_grad_norm": 1e9, "adam_beta1": BETA1,
        } | changes  # fmt: skip

    def trainer(
        self, kind: str, data: Sequence[Any], given: Any = (), *, reference: Any = None,
        **config: Any,
    ) -> Any:  # fmt: skip
        """Their trainer of the policy, by the stage's name. given: its further arguments.
        reference: a folder that the trainer itself opens as the model it began with."""
        import trl
        import trl.experimental.orpo as orpo
        from datasets import Dataset
        from transformers import AutoTokenizer

        module = orpo if kind == "ORPO" else trl
        model = self.theirs()
        if reference:
            model.config.name_or_path = str(reference)
        return getattr(module, f"{kind}Trainer")(
            model=model,
            args=getattr(module, f"{kind}Config")(**self.arguments(data, **config)),
            train_dataset=Dataset.from_list(list(data)),
            processing_class=AutoTokenizer.from_pretrained(self.policy),
            **dict(given),
        )

    def tokenised(self, kind: str, data: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each row as their trainer prepares it."""
        found = self.trainer(kind, data).train_dataset
        if kind == "SFT":
            return [(row["input_ids"], row["labels"]) for row in found]
        return [
            (row["prompt_ids"] + row[name], [IGNORE] * len(row["prompt_ids"]) + row[name])
            for row in found
            for name in ("chosen_ids", "rejected_ids")
        ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    import datasets

    datasets.disable_progress_bars()
    return Models(tmp_path_factory.mktemp("trl"))


def batch_of(trainer: Any) -> Any:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what their loop sets
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def theirs_of(trainer: Any, inputs: Any) -> tuple[float, dict[str, np.ndarray], dict[str, Any]]:
    """Loss, gradients and metrics of one batch by their code."""
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    metrics = getattr(trainer, "_stored_metrics", None) or trainer._metrics
    return float(loss), gradients_of(model), {n: x[-1] for n, x in metrics["train"].items()}


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("native."): parameter.grad.numpy().astype(np.float64)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def ours_of(models: Models, batch: Batch, objective: Any) -> tuple[Terms, dict[str, np.ndarray]]:
    from chronos.backends import torch as backend

    step = backend.train_step(models.ours(), OptimizerRecipe(clip=1e9, beta1=BETA1))
    terms = step.step([batch], objective, 0.0, 0)
    return terms, {
        name.removeprefix("exp_avg."): np.frombuffer(bytes(data), np.float32).reshape(shape)
        / (1 - BETA1)
        for name, _, shape, data in step.state()
        if name.startswith("exp_avg.")
    }


def check(
    theirs: tuple[float, dict[str, np.ndarray], dict[str, Any]],
    ours: tuple[Terms, dict[str, np.ndarray]],
    *,
    without: Sequence[str] = (),
) -> None:
    """Loss, gradients and metrics agree to 1e-5. without: their metrics that Chronos has not."""
    loss, expected, metrics = theirs
    terms, found = ours
    assert terms["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    untouched = {name for name in found if not np.abs(found[name]).max()}
    assert found.keys() - expected.keys() <= untouched
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5, rtol=1e-5, err_msg=name)
    assert max(np.abs(gradient).max() for gradient in expected.values()) > 1e-3
    assert metrics.keys() - terms.keys() == set(without)
    for name in metrics.keys() & terms.keys():
        assert terms[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_sft(models: Models, kind: str) -> None:
    data = completions(chats(5))
    trainer = models.trainer("SFT", data, loss_type=kind)
    objective = NextToken(routing=Preference().routing, dft=kind == "dft", details=True)
    theirs = theirs_of(trainer, batch_of(trainer))
    check(theirs, ours_of(models, models.rows_of(data), objective), without=["num_tokens"])


PREFERENCES = {
    "sigmoid": Preference(),
    "robust": Preference(kind="robust", label_smoothing=0.2),
    "ipo": Preference(kind="ipo"),
    "sigmoid_norm": Preference(kind="sigmoid_norm", beta=0.5),
    "ld_alpha": Preference(ld_alpha=0.4),
    "ld_alpha of means": Preference(kind="sigmoid_norm", ld_alpha=0.4),
    "with sft": Preference(sft=0.3),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_dpo(models: Models, name: str) -> None:
    data, o = chats(4), PREFERENCES[name]
    kinds = {o.kind: 1.0} | ({"sft": o.sft} if o.sft else {})
    trainer = models.trainer(
        "DPO", data, reference=models.reference,
        loss_type=list(kinds), loss_weights=list(kinds.values()),
        beta=o.beta, label_smoothing=o.label_smoothing, ld_alpha=o.ld_alpha,
    )  # fmt: skip
    batch = models.pairs_of(data)
    batch = batch.with_extra({"reference": models.score(batch)})
    theirs = theirs_of(trainer, batch_of(trainer))
    check(theirs, ours_of(models, batch, o), without=["num_tokens"])


def test_orpo(models: Models) -> None:
    """Their cross-entropy is of the prompt too, their mean logits of the padding. Behind the token
    that ends a turn of a chat they would train a second end, so this is of texts."""
    data = as_text(chats(4))
    trainer = models.trainer("ORPO", data, max_length=200, beta=0.3, remove_unused_columns=False)
    theirs = theirs_of(trainer, batch_of(trainer))
    ours = ours_of(models, models.pairs_of(data, prompts=True), OddsRatio(beta=0.3))
    check(theirs, ours, without=["logits/chosen", "logits/rejected"])


POLICIES = {
    "dapo": PolicyGradient(),
    "dapo beta": PolicyGradient(beta=0.1),
    "grpo": PolicyGradient(kind="grpo", epsilon_high=0.28),
    "grpo sequence": PolicyGradient(kind="grpo", level="sequence", epsilon=0.02, epsilon_high=0.03),
    "dr_grpo beta": PolicyGradient(kind="dr_grpo", beta=0.1, max_tokens=12),
    "bnpo beta": PolicyGradient(kind="bnpo", beta=0.2),
}


def rewards(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """Of a completion's letters, so that no two are likely the same; none for the second."""
    found: list[float | None] = [sum(map(ord, c[0]["content"])) % 97 / 9 for c in completions]
    return [*found[:1], None, *found[2:]]


@pytest.mark.parametrize("name", POLICIES)
def test_grpo(models: Models, name: str) -> None:
    """On answers of their own sampling. The policy they are from is moved, so that ratios are
    clipped on both sides."""
    import torch

    o = dataclasses.replace(POLICIES[name], temperature=0.9)
    trainer = models.trainer(
        "GRPO", prompts(chats(2)), {"reward_funcs": rewards}, reference=models.reference,
        per_device_train_batch_size=8, num_generations=4, num_iterations=2,
        steps_per_generation=1, max_completion_length=12, temperature=o.temperature,
        loss_type=o.kind, importance_sampling_level=o.level, beta=o.beta,
        epsilon=o.epsilon, epsilon_high=o.epsilon_high,
    )  # fmt: skip
    torch.manual_seed(1)
    inputs = batch_of(trainer)
    check_sampling(trainer, inputs)
    inputs["old_per_token_logps"] += 0.3 * torch.randn_like(inputs["old_per_token_logps"])
    batch = sampled(models, inputs)
    if o.beta:
        scored = models.score(batch, temperature=o.temperature)
        at = batch.labels_BT != IGNORE
        found = inputs["ref_per_token_logps"][inputs["completion_mask"].bool()]
        np.testing.assert_allclose(scored[at], found, atol=1e-5)
        batch = batch.with_extra({"reference": scored})
    theirs, ours = theirs_of(trainer, inputs), ours_of(models, batch, o)
    assert ours[0]["clip_ratio/low_mean"] > 0.02 and ours[0]["clip_ratio/high_mean"] > 0.02
    if o.level == "sequence":  # theirs are of rows, ours of tokens
        for part in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"):
            del theirs[2][f"clip_ratio/{part}"]
    check(theirs, ours)


def check_sampling(trainer: Any, inputs: Mapping[str, Any]) -> None:
    """Advantages, and what is logged of the sampling, which their trainer forgets here."""
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    scores = np.array(trainer._logs["rewards"]["rewards"])
    assert np.isnan(scores).any() and not np.isnan(scores).all()
    expected = losses.advantages(scores.reshape(-1, 4)).flatten()
    np.testing.assert_allclose(list(trainer._logs["advantages"]), expected, atol=1e-5)
    answers = [Answer(ids, "", ids[-1] not in trainer.eos_token_ids) for ids in answers_of(inputs)]
    found = notes_of(["rewards"], scores[None], scores.reshape(-1, 4), answers)
    assert found.pop("rewards/rewards/unjudged") == np.isnan(scores).sum()
    assert theirs.keys() - found.keys() == {"num_tokens"}
    assert found == pytest.approx({name: theirs[name] for name in found}, rel=1e-5, abs=1e-5)


def answers_of(inputs: Mapping[str, Any]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]


def sampled(models: Models, inputs: Mapping[str, Any]) -> Batch:
    """Their sampled batch as `chronos train grpo` makes one: no padding between the two parts."""
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    answers = [Answer(ids, "", False) for ids in answers_of(inputs)]
    batch = rows(prompts, answers, models.tokenizer.pad_id)
    old_BT = np.zeros(batch.ids_BT.shape, np.float32)
    old_BT[batch.labels_BT != IGNORE] = inputs["old_per_token_logps"][
        inputs["completion_mask"].bool()
    ].numpy()
    return batch.with_extra({"old": old_BT, "advantages": inputs["advantages"].numpy()})


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_gkd(models: Models, beta: float) -> None:
    """At a temperature, which their trainer's own call leaves out."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    data = completions(chats(4))
    trainer = models.trainer("SFT", data)
    inputs, policy, teacher = (
        batch_of(trainer), models.theirs().train(), models.theirs(models.reference)
    )  # fmt: skip
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        taught = teacher(**given).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    loss = GKDTrainer.generalized_jsd_loss(
        policy(**given).logits[:, :-1], taught, labels, beta=beta, temperature=2.0
    )
    loss.backward()
    batch = models.rows_of(data)
    batch = batch.with_extra({"teacher": taught[labels != IGNORE].numpy()})
    objective = Distillation(alpha=1.0, temperature=2.0, jsd=beta)
    check((float(loss.detach()), gradients_of(policy), {}), ours_of(models, batch, objective))


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_five_updates(models: Models, kind: str) -> None:
    """AdamW with a clipped norm, over two micro-batches each, of as many rows and not as many
    labels: TRL's loop against TrainStep's."""
    from chronos.backends import torch as backend

    rate, clip, data = 1e-3, 0.5, chats(20, seed=3)
    data = completions(data) if kind == "SFT" else data
    trainer = models.trainer(
        kind, data, reference=models.reference, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=5,
        learning_rate=rate, max_grad_norm=clip,
    )  # fmt: skip
    before = {name: x.detach().clone() for name, x in trainer.model.native.named_parameters()}
    trainer.train()
    step = backend.train_step(
        models.ours(), OptimizerRecipe(clip=clip, beta1=BETA1, beta2=0.999, weight_decay=0.0)
    )
    log = [line for line in trainer.state.log_history if "loss" in line]
    for number in range(5):
        parts = [data[at : at + 2] for at in (4 * number, 4 * number + 2)]
        if kind == "SFT":
            batches, objective = list(map(models.rows_of, parts)), NextToken(Preference().routing)
        else:
            batches, objective = list(map(models.pairs_of, parts)), Preference()
            batches = [batch.with_extra({"reference": models.score(batch)}) for batch in batches]
        terms = step.step(batches, objective, rate, number)
        assert terms["loss"] == pytest.approx(log[number]["loss"], rel=1e-4)
        assert terms["grad_norm"] == pytest.approx(log[number]["grad_norm"], rel=1e-4)
        assert terms["grad_norm"] > clip
    for name, found in step.model.named_parameters():
        expected = trainer.model.native.get_parameter(name)
        moved, apart = (expected - before[name]).norm(), (expected - found).norm()
        assert (moved > 0) != name.startswith("lookahead."), name
        assert apart <= 1e-4 * moved, name


def ours_as_rows(examples: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), np.where(trained, ids, IGNORE).tolist()) for ids, trained in examples]


def test_rows_of_chats(models: Models) -> None:
    """Ids and what of them is trained, the ends of turns too."""
    data = chats(50, seed=1)
    ours = ours_as_rows(models.examples(completions(data)))
    assert ours == models.tokenised("SFT", completions(data))
    ours = ours_as_rows([example for pair in models.pairs(data) for example in pair])
    assert ours == models.tokenised("DPO", data)


def test_rows_of_texts(models: Models) -> None:
    """Where no token of the joined text spans the border, the rows are the same. Where one does,
    they train on a prompt that nobody will type; Chronos keeps the prompt's own ids."""
    data = completions(as_text(chats(50, seed=2)))
    for row in data[::2]:  # "... in" + " path" becomes "... in " + "path"
        row["prompt"], row["completion"] = row["prompt"] + " ", row["completion"][1:]
    encode, differ = models.tokenizer.encode, 0
    theirs, ours = models.tokenised("SFT", data), ours_as_rows(models.examples(data))
    for row, found, expected in zip(data, ours, theirs, strict=True):
        prompt, whole = encode(row["prompt"]), encode(row["prompt"] + row["completion"])
        ids, labels = found
        assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [IGNORE] * len(prompt)
        assert models.tokenizer.decode(ids) == row["prompt"] + row["completion"]
        assert ids[-1] == labels[-1] == models.tokenizer.eos_id
        spans = whole != prompt + encode(row["completion"])
        assert (found != expected) == spans
        differ += spans
    assert 0 < differ < len(data)


def test_grpo_trains(models: Models) -> None:
    """Their whole loop: sampling by `generate`, a reference it opens itself, two updates."""
    trainer = models.trainer(
        "GRPO", prompts(chats(2)), {"reward_funcs": rewards}, reference=models.reference,
        per_device_train_batch_size=4, num_generations=4, max_completion_length=6, beta=0.1,
        max_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    before = {name: x.detach().clone() for name, x in trainer.model.native.named_parameters()}
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert len(log) == 2 and all(line["grad_norm"] > 0 and line["kl"] > 0 for line in log)
    moved = [n for n, x in trainer.model.native.named_parameters() if not x.equal(before[n])]
    assert "model.layers.0.mlp.gate.weight" in moved and "model.embed_tokens.weight" in moved


def test_a_run_of_theirs_is_resumed(models: Models) -> None:
    """From the folder that a native model is saved as."""
    data, found = completions(chats(8)), []
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(models.home / "resumed")}
    for resume in (None, str(models.home / "resumed" / "checkpoint-2")):
        trainer = models.trainer("SFT", data, **options, **saving)
        trainer.train(resume_from_checkpoint=resume)
        found.append(dict(trainer.model.native.named_parameters()))
    for name, parameter in found[0].items():
        np.testing.assert_allclose(
            found[1][name].detach(), parameter.detach(), atol=1e-7, err_msg=name
        )
