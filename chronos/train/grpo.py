"""GRPO (2402.03300): answers are sampled and judged, and the better of a group made likelier.

A generation is `prompts` prompts with `generations` answers each, and serves `iterations` updates.
Answers follow from the weights, the seed and the step alone, so a run that was ended in the middle
of one samples it again, token for token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from chronos.backends.protocol import Backend
from chronos.common.data import IGNORE, Batch, Prompt, encode_prompts
from chronos.common.data.packing import order
from chronos.common.errors import ConfigError
from chronos.common.training import losses
from chronos.common.training.objectives import PolicyGradient
from chronos.common.training.recipe import Recipe, at_least_one
from chronos.train.data import read_split
from chronos.train.dpo import ALIGNED
from chronos.train.judge import Judge
from chronos.train.loop import Event, Task, start
from chronos.train.rollouts import Answer, Sampler, content, picks, rows, seed_of
from chronos.train.start import (
    Start,
    check_length,
    check_reference,
    open_reference,
    open_start,
    refer,
)

_KINDS = ("dapo", "grpo", "dr_grpo", "bnpo")
_SCALES = ("group", "batch", "none")
_REPLAYS = ("R2", "R3", "none")


@dataclass(frozen=True)
class GrpoRecipe:
    """The section [grpo]: what is sampled, how it is judged, and the loss."""

    SECTION: ClassVar[str] = "grpo"
    STARTS: ClassVar[bool] = True
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = ALIGNED | {"data": {"validation_share": 0.0}}
    rewards: list[str] = field(default_factory=list)
    """Functions `module:name` or `file.py:name`, or folders of reward models; summed."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each in the sum; none: 1 each."""
    reward_timeout: float = 60.0
    """Seconds the rewards of a generation may take."""
    prompts: int = 4
    """Prompts of a generation."""
    generations: int = 8
    """Answers to each."""
    max_tokens: int = 256
    """Tokens of an answer, at most."""
    max_prompt: int = 512
    """Tokens of a prompt, at most."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained."""
    top_p: float = 1.0
    """Of sampling; 1 is off."""
    top_k: int = 0
    """Of sampling; 0 is off."""
    sequences: int = 8
    """Answers sampled at a time."""
    batch_size: int = 8
    """Answers of a micro-batch."""
    iterations: int = 1
    """Updates a generation serves. From 2 on ratios are clipped."""
    router_replay: str = "R2"
    """Experts that are trained: `R2`, those of the model before a generation's first update; `R3`,
    those of sampling; `none`, what the routers choose."""
    loss: str = "dapo"
    """What token losses are divided by: `dapo`, `grpo`, `dr_grpo` or `bnpo`."""
    level: str = "token"
    """Of the ratio between policies: `token` or `sequence`."""
    beta: float = 0.0
    """Weight of the divergence from the reference; 0: there is none."""
    reference: str = ""
    """A folder of another model than the one the stage begins with."""
    epsilon: float = 0.2
    """How far a ratio may fall below 1 before it is clipped."""
    epsilon_high: float = 0.0
    """How far above; 0: as far as epsilon."""
    scale_rewards: str = "group"
    """What advantages are divided by: the spread of the `group`, the `batch`, or `none`."""
    mask_truncated: bool = True
    """Whether answers that did not end by themselves are left out of the loss."""

    def __post_init__(self) -> None:
        names = ("prompts", "max_tokens", "max_prompt", "sequences", "batch_size", "iterations")
        at_least_one(self.SECTION, self, *names)
        if self.generations < 2:
            raise ConfigError("grpo.generations must be at least 2: a group of one has no better")
        if not self.rewards:
            raise ConfigError(
                "grpo.rewards names no reward",
                "",
                'name one, such as "chronos.train.rewards:parses_as_python"',
            )
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"grpo.reward_weights has {len(self.reward_weights)} weights for"
                f" {len(self.rewards)} rewards"
            )
        for name, known in (
            ("loss", _KINDS), ("level", ("token", "sequence")), ("scale_rewards", _SCALES),
            ("router_replay", _REPLAYS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ConfigError(f"grpo.{name} must be one of {', '.join(known)}")
        if not (self.temperature > 0 and self.reward_timeout > 0 and 0 < self.top_p <= 1):
            raise ConfigError("grpo.temperature, reward_timeout must be above 0, top_p in (0, 1]")
        if not (0 < self.epsilon < 1 and self.epsilon_high >= 0 and self.beta >= 0):
            raise ConfigError("grpo.epsilon must be in (0, 1), epsilon_high, beta at least 0")
        if self.level == "sequence" and self.loss != "grpo":
            raise ConfigError(
                'grpo.level = "sequence" gives each answer one ratio, so each counts once',
                "",
                'set loss = "grpo"',
            )


class Generations:
    """The batches of a run: those of one generation at a time, sampled when they are asked for."""

    def __init__(
        self,
        recipe: Recipe[GrpoRecipe],
        found: Start,
        backend: Backend,
        prompts: Sequence[Prompt],
        judge: Judge,
        log: Path,
        refers: Callable[[Batch], Mapping[str, npt.NDArray[Any]]] | None,
    ) -> None:
        """log: a file that gets a line an answer. refers: what a reference says of a batch."""
        self._stage, self._seed = recipe.stage, recipe.optimizer.seed
        self._found, self._backend, self._prompts, self._judge = found, backend, prompts, judge
        self._sampler = Sampler(backend, found, self._stage.sequences)
        self._log, self._refers = log, refers
        self._number, self._batches = -1, list[Batch]()
        self._notes: dict[str, float] = {}

    @property
    def fingerprint(self) -> str:
        known = [[p.ids, p.row.columns] for p in self._prompts]
        text = json.dumps([self._seed, known], default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def notes(self) -> Mapping[str, float]:
        return self._notes

    def at(self, number: int) -> list[Batch]:
        generation = number // self._stage.iterations
        if generation != self._number:
            self._batches = self._make(generation)
            self._number = generation
        return self._batches

    def _make(self, generation: int) -> list[Batch]:
        stage, G = self._stage, self._stage.generations
        visits = order(self._seed, len(self._prompts), generation * stage.prompts, stage.prompts)
        prompts = [self._prompts[i] for i in visits for _ in range(G)]
        ids = [prompt.ids for prompt in prompts]
        answers = self._sampler(
            ids,
            [seed_of(self._seed, generation, i) for i in range(len(ids))],
            max_tokens=stage.max_tokens,
            temperature=stage.temperature,
            top_k=stage.top_k,
            top_p=stage.top_p,
            routing=stage.router_replay == "R3",
        )
        rewards_FN = self._rewards(prompts, answers)
        weights_F = np.array(stage.reward_weights or [1.0] * len(rewards_FN))[:, None]
        known = np.isfinite(rewards_FN)
        total_N = np.where(known, rewards_FN * weights_F, 0.0).sum(0)
        total_N = np.where(known.any(0), total_N, np.nan)
        advantages_N = losses.advantages(total_N.reshape(-1, G), scale=stage.scale_rewards).reshape(
            -1
        )
        self._notes = notes_of(self._judge.labels, rewards_FN, total_N.reshape(-1, G), answers)
        self._write(generation, prompts, answers, rewards_FN, advantages_N)
        size = stage.batch_size
        return [
            self._batch(ids[at : at + size], answers[at : at + size], advantages_N[at : at + size])
            for at in range(0, len(ids), size)
        ]

    def _batch(
        self, ids: list[list[int]], answers: list[Answer], advantages_B: npt.NDArray[Any]
    ) -> Batch:
        batch = rows(ids, answers, self._found.tokenizer.pad_id)
        if self._stage.mask_truncated:
            cut = np.array([answer.truncated for answer in answers])
            batch.labels_BT[cut] = IGNORE
        batch = batch.with_extra({"advantages": advantages_B.astype(np.float32)})
        replay = self._stage.router_replay
        if replay == "R3":
            batch = batch.with_extra({"picks": picks(answers, batch)})
        if self._stage.iterations > 1:
            old = self._backend.score(
                self._found.model, batch, self._stage.temperature, replay=replay == "R3"
            )
            batch = batch.with_extra({"old": old.log_probs_BT})
            if replay == "R2":
                batch = batch.with_extra({"picks": old.ids_BTLK.astype(np.int32)})
        return batch.with_extra(self._refers(batch)) if self._refers else batch

    def _rewards(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> npt.NDArray[np.float64]:
        names = sorted({name for prompt in prompts for name in prompt.row.columns})
        return self._judge(
            [prompt.row.prompt for prompt in prompts],
            [content(p.row.prompt, a.text) for p, a in zip(prompts, answers, strict=True)],
            [answer.ids for answer in answers],
            {name: [prompt.row.columns.get(name) for prompt in prompts] for name in names},
        )

    def _write(
        self,
        generation: int,
        prompts: Sequence[Prompt],
        answers: Sequence[Answer],
        rewards_FN: npt.NDArray[np.float64],
        advantages_N: npt.NDArray[np.float64],
    ) -> None:
        step = generation * self._stage.iterations
        with self._log.open("a", encoding="utf-8") as file:
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                line = {
                    "step": step,
                    "prompt": prompt.row.prompt,
                    "completion": answer.text,
                    "tokens": len(answer.ids),
                    "truncated": answer.truncated,
                    "rewards": {
                        label: None if np.isnan(x) else float(x)
                        for label, x in zip(self._judge.labels, rewards_FN[:, i], strict=True)
                    },
                    "advantage": float(advantages_N[i]),
                }
                file.write(json.dumps(line) + "\n")


def notes_of(
    labels: Sequence[str],
    rewards_FN: npt.NDArray[np.float64],
    total_GN: npt.NDArray[np.float64],
    answers: Sequence[Answer],
) -> dict[str, float]:
    """What TRL logs of a generation, under its names; spreads are unbiased.

    total_GN: the weighted sums by group; NaN for an answer that nothing judged.
    """
    spreads = [_spread(group) for group in total_GN]
    lengths = [len(answer.ids) for answer in answers]
    ended = [len(answer.ids) for answer in answers if not answer.truncated] or [0]
    notes = {
        "reward": _mean(total_GN),
        "reward_std": _spread(total_GN),
        "frac_reward_zero_std": float(np.mean([spread < 1e-8 for spread in spreads])),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([a.truncated for a in answers])),
        "completions/mean_terminated_length": float(np.mean(ended)),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
    }
    for label, rewards_N in zip(labels, rewards_FN, strict=True):
        notes[f"rewards/{label}/mean"] = _mean(rewards_N)
        notes[f"rewards/{label}/std"] = _spread(rewards_N)
        notes[f"rewards/{label}/unjudged"] = float((~np.isfinite(rewards_N)).sum())
    return notes


def prepare(
    recipe: Recipe[GrpoRecipe],
    backend: Backend,
    out: Path,
    *,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Task:
    """Open the start model, read the prompts, start the rewards. Raises DataError, ConfigError,
    UsageError, RewardError."""
    stage = recipe.stage
    check_reference(recipe, stage.reference)
    found = open_start(recipe, backend, device, noise=False)
    check_length("grpo.max_prompt + max_tokens", stage.max_prompt + stage.max_tokens, found.config)
    replays = stage.router_replay == "R3" or (stage.router_replay == "R2" and stage.iterations > 1)
    if replays and not found.native:
        raise ConfigError(
            "the gates of a model of another library weigh the experts that they choose, and no"
            " others",
            "grpo.router_replay",
            'use router_replay = "none"',
        )
    states = bool(recipe.anchor.weight) and recipe.anchor.form == "states"
    training, _, bad = read_split(recipe, on_event)
    prompts = encode_prompts(found.tokenizer, training, stage.max_prompt, bad)
    judge = Judge(stage.rewards, stage.reward_timeout, Path(recipe.folder))
    judge.start()
    refers = None
    if stage.beta or states or stage.reference:
        scored = open_reference(
            stage.reference, found, backend, device, own=True, temperature=stage.temperature
        )
        refers = partial(refer, scored, anchor=states)
    log = out / "completions.jsonl"
    batches = Generations(recipe, found, backend, prompts, judge, log, refers)
    objective = PolicyGradient(
        found.weights,
        anchor=recipe.anchor.weight,
        kind=stage.loss,
        level=stage.level,
        beta=stage.beta,
        epsilon=stage.epsilon,
        epsilon_high=stage.epsilon_high or stage.epsilon,
        temperature=stage.temperature,
        max_tokens=stage.max_tokens,
    )
    return found.task(
        recipe,
        backend,
        batches,
        objective,
        period=stage.iterations,
        logs=(log,),
        alone="answers are sampled and judged in one process",
        close=judge.close,
    )


def _mean(x: npt.NDArray[np.float64]) -> float:
    """Of what is there; NaN for nothing, which a log writes as null."""
    known = x[np.isfinite(x)]
    return float(known.mean()) if len(known) else float("nan")


def _spread(x: npt.NDArray[np.float64]) -> float:
    """Standard deviation of what is there, unbiased; 0 of fewer than two."""
    known = x[np.isfinite(x)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


grpo = partial(start, GrpoRecipe, prepare)
