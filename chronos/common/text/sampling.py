"""How the next token is chosen: the parameters, and their meaning written down in NumPy.

Order: penalties and rules by the ids so far, temperature, top-k, top-p of what is left, min-p.
`adjust_logits` is what both backends call for the first part; the rest they do on their own device
and are compared with `filter_logits`. Equal logits count as ordered by id, lower first.
Not covered: grammars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.errors import ChronosError, UsageError


@dataclass(frozen=True)
class Rules:
    """Which tokens may not follow the ids so far, as `generate()` of Transformers rules them out.

    suppress: never. begin_suppress: not as the first token. bad_words: not the last id of one of
    these after the others. no_repeat_ngram: no run of so many ids twice. min_length: of these ids
    (prompt included) and min_new_tokens: no token of `end` before. 0 and () are off.
    """

    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    no_repeat_ngram: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    end: tuple[int, ...] = ()


NO_RULES = Rules()


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. A seed repeats the draws.

    repetition_penalty is Transformers' (of every id so far; None: as the model's own
    generation_config.json says, else 1, which is off). presence_penalty and frequency_penalty are
    OpenAI's, of the tokens after the prompt. rules: the model's own where none are given.
    Raises UsageError naming the value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    rules: Rules = NO_RULES

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 31),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("seed", 0, (1 << 64) - 1),
            ("repetition_penalty", 0.0, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            if name in ("seed", "repetition_penalty") and value is None:
                continue
            _check_range(name, value, low, high)
        if self.top_p == 0:
            raise UsageError("top_p must be above 0; temperature 0 is greedy")
        if self.repetition_penalty == 0:
            raise UsageError("repetition_penalty must be above 0; 1 is off")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether the ids so far change the logits at all."""
        penalised = self.presence_penalty or self.frequency_penalty
        repetition = self.repetition_penalty not in (None, 1)
        return bool(penalised or repetition or self.rules != NO_RULES)


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    whole = isinstance(low, int)
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    # NaN fails the comparison as well.
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        raise UsageError(f"{name} must be {what} from {low} to {high}, not {value!r}")


@dataclass(frozen=True)
class Work:
    """What one pass of a model does for one sequence.

    seq: names the sequence. tokens: what is appended to it, a piece of a prompt or the token drawn
    last. last: the prompt ends with this piece, or it is a single token after one: sample the next.
    mask: bool [V], which tokens may be drawn; None for all. prompt: tokens the sequence has once
    its whole prompt is in (a model may rotate positions by that); 0 for a token after one. bias:
    float32 [V], added to the logits after penalties; None for none. every: keep the logits of all
    its tokens for `Session.every_logits`; those of the last are computed among others then, which
    may change their last bits. layers: with streamed experts, for which a piece of a prompt goes on
    in a pass beside others; 0 for all. Where more are left the outcome is AGAIN.
    """

    seq: int
    tokens: Sequence[int]
    sampling: SamplingParams
    last: bool = True
    mask: npt.NDArray[np.bool_] | None = None
    prompt: int = 0
    bias: npt.NDArray[np.float32] | None = None
    every: bool = False
    layers: int = 0


AGAIN = -2  # in place of a token: the next pass is to have this work again

PIECE = 512  # tokens of a prompt that go through a model at once: another cut is other bits


def pieces(
    seq: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    start: int = 0,
    mask: npt.NDArray[np.bool_] | None = None,
    bias: npt.NDArray[np.float32] | None = None,
) -> Iterator[Work]:
    """The work that takes a prompt in, piece by piece; from token `start` on, where the sequence
    has those before it already."""
    for at in range(start, len(prompt), PIECE):
        end = min(at + PIECE, len(prompt))
        last = end == len(prompt)
        work = Work(seq, prompt[at:end], sampling, last, prompt=len(prompt))
        yield replace(work, mask=mask, bias=bias) if last else work


def check_work(work: Sequence[Work], vocab_size: int) -> None:
    """Raises UsageError for what no pass can do."""
    if len({each.seq for each in work}) < len(work):
        raise UsageError("a pass has two works for one sequence")
    for each in work:
        if not 0 < len(each.tokens) <= PIECE:
            raise UsageError(
                f"a work has {len(each.tokens)} tokens",
                f"sequence {each.seq}",
                f"give 1 to {PIECE}",
            )
        mask = each.mask
        if mask is not None and (
            mask.shape != (vocab_size,) or mask.dtype != bool or not mask.any()
        ):
            raise UsageError(
                f"a mask {mask.dtype} {mask.shape} that allows {np.count_nonzero(mask)} tokens",
                f"sequence {each.seq}",
                f"give {vocab_size} bools, one of them true at least",
            )
        bias = each.bias
        if bias is not None and (bias.shape != (vocab_size,) or not np.isfinite(bias).all()):
            raise UsageError(
                f"a logit bias of shape {bias.shape}",
                f"sequence {each.seq}",
                f"give {vocab_size} finite values; a mask forbids tokens",
            )


def adjust_logits(
    logits_V: npt.ArrayLike, ids: Sequence[int], prompt_tokens: int, params: SamplingParams
) -> npt.NDArray[np.float32]:
    """Logits after penalties and rules. [V] -> [V], float32, as Transformers computes them.

    ids: prompt and answer so far, of which the first `prompt_tokens` are the prompt. Ids that the
    logits do not cover are passed over. Every token may end up at -inf.
    """
    logits = np.array(logits_V, np.float32)
    known = np.array(ids, np.int64)
    known = known[known < len(logits)]
    if params.repetition_penalty is not None:
        seen, penalty = np.unique(known), np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    if params.presence_penalty or params.frequency_penalty:
        answer = np.array(ids[prompt_tokens:], np.int64)
        counts = np.bincount(answer[answer < len(logits)], minlength=len(logits))
        costs = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits -= costs.astype(np.float32)
    forbidden = np.fromiter(_forbidden(ids, prompt_tokens, params.rules), np.int64)
    logits[forbidden[forbidden < len(logits)]] = -np.inf
    return logits


def _forbidden(ids: Sequence[int], prompt_tokens: int, rules: Rules) -> Iterator[int]:
    yield from rules.suppress
    if len(ids) == prompt_tokens:
        yield from rules.begin_suppress
    if len(ids) < max(rules.min_length, prompt_tokens + rules.min_new_tokens):
        yield from rules.end
    for *before, last in rules.bad_words:
        if len(before) <= len(ids) and list(ids[len(ids) - len(before) :]) == before:
            yield last
    yield from _repeating(ids, rules.no_repeat_ngram)


def _repeating(ids: Sequence[int], size: int) -> Iterator[int]:
    """Ids that would complete a run of `size` ids which is there already."""
    if not 0 < size <= len(ids):
        return
    runs = np.lib.stride_tricks.sliding_window_view(np.array(ids), size)
    last = np.array(ids)[len(ids) - size + 1 :]
    yield from runs[(runs[:, :-1] == last).all(axis=1), -1]


def filter_logits(logits_V: npt.ArrayLike, params: SamplingParams) -> npt.NDArray[np.float64]:
    """Logits over temperature with every token that may not be drawn at -inf. [V] -> [V].

    At least one token stays. Raises ChronosError if a logit is NaN or +inf, or all are -inf.
    """
    logits = np.array(logits_V, np.float64)
    if np.isnan(logits).any() or not math.isfinite(logits.max(initial=-math.inf)):
        raise ChronosError("the logits are not finite", "", "check the weights with chronos verify")
    order = np.argsort(-logits, kind="stable")
    if params.greedy:
        return _keep(logits, order[:1])
    logits = (logits - logits.max()) / params.temperature
    order = order[: params.top_k or None]
    ranked = np.exp(logits[order])
    ranked /= ranked.sum()
    # A token stays while the mass before it has not reached top_p: the smallest set that does.
    before = np.concatenate(([0.0], np.cumsum(ranked)[:-1]))
    stays = (before < params.top_p) & (ranked >= params.min_p * ranked[0])
    return _keep(logits, order[stays])


def probabilities(logits_V: npt.ArrayLike, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The distribution a token is drawn from. [V]"""
    filtered = filter_logits(logits_V, params)
    weights = np.exp(filtered - filtered.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result


def draw(logits_V: npt.ArrayLike, params: SamplingParams, uniform: float) -> int:
    """The token a uniform number in [0, 1) selects: the first id whose cumulated probability
    exceeds it."""
    cumulated = np.cumsum(probabilities(logits_V, params))
    # Rounding may leave the last sum below 1; scaling keeps every uniform inside.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], "right"))


def _keep(logits: npt.NDArray[np.float64], kept: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    filtered = np.full_like(logits, -np.inf)
    filtered[kept] = logits[kept]
    return filtered
