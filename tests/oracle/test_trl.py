"""The stages against TRL's trainers: loss, the gradient of every parameter, metrics, five updates.

TRL tokenises, collates and computes its loss by its own code on a native model that Transformers
knows; Chronos does the same from the same rows by the code of its stages. The policy is the
reference with noise, everything is float32.
"""

from __future__ import annotations

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
    FittedRows,
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

    def score(self, batch: Batch, folder: Path | None = None) -> Any:
        from chronos.backends import torch as backend

        return backend.score(self.ours(folder or self.reference), batch).log_probs_BT

    def documents(self, data: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [parse_row(json.dumps(row).encode(), f"rows:{i}") for i, row in enumerate(data)]

    def rows_of(self, data: Sequence[Mapping[str, Any]]) -> Batch:
        """As `chronos train sft` makes them, an example a row."""
        examples = encode_examples(self.tokenizer, self.documents(data), 200, BadRows(0, ReadReport()))
        pad = self.tokenizer.pad_id
        fitted = FittedRows(examples, seq_len=200, pad_id=pad, seed=0, packed=False)
        return fitted.assemble(np.arange(len(examples)))

    def pairs_of(self, data: Sequence[Mapping[str, Any]], prompts: bool = False) -> Batch:
        """As `chronos train dpo` and `orpo` make them."""
        pairs = encode_pairs(self.tokenizer, self.documents(data), 200, BadRows(0, ReadReport()))
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

    def trainer(self, kind: str, data: Sequence[Any], given: Any = (), **config: Any) -> Any:
        """Their trainer of the policy, by the stage's name. given: its further arguments."""
        import trl
        import trl.experimental.orpo as orpo
        from datasets import Dataset
        from transformers import AutoTokenizer

        module = orpo if kind == "ORPO" else trl
        return getattr(module, f"{kind}Trainer")(
            model=self.theirs(),
            args=getattr(module, f"{kind}Config")(**self.arguments(data, **config)),
            train_dataset=Dataset.from_list(list(data)),
            processing_class=AutoTokenizer.from_pretrained(self.policy),
            **dict(given),
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    import datasets

    datasets.disable_progress_bars()
    return Models(tmp_path_factory.mktemp("trl"))


def batch_of(trainer: Any) -> Any:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def theirs_of(trainer: Any, inputs: Any) -> tuple[float, dict[str, np.ndarray], dict[str, Any]]:
    """Loss, gradients and metrics of one batch by their code."""
    model = trainer.model.train()
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
    "sigmoid": ({}, Preference()),
    "smoothed": ({"label_smoothing": 0.2, "loss_type": "robust"}, Preference(kind="robust", label_smoothing=0.2)),
    "ipo": ({"loss_type": "ipo"}, Preference(kind="ipo")),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm", "beta": 2.0}, Preference(kind="sigmoid_norm", beta=2.0)),
    "ld_alpha": ({"ld_alpha": 0.4}, Preference(ld_alpha=0.4)),
    "ld_alpha of means": ({"ld_alpha": 0.4, "loss_type": "sigmoid_norm"}, Preference(kind="sigmoid_norm", ld_alpha=0.4)),
    "with sft": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, Preference(sft=0.3)),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_dpo(models: Models, name: str) -> None:
    data, (config, objective) = chats(4), PREFERENCES[name]
    given = {"ref_model": models.theirs(models.reference)}
    trainer = models.trainer("DPO", data, given, **config)
    batch = models.pairs_of(data)
    batch = batch.with_extra({"reference": models.score(batch)})
    theirs = theirs_of(trainer, batch_of(trainer))
    without = ["num_tokens", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"]
    check(theirs, ours_of(models, batch, objective), without=without)
