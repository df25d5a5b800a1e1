"""What a model's generation_config.json asks of every reply, beside where it ends.

`generate()` of Transformers takes penalties and rules from this file in greedy decoding too, so the
same tokens need them. Temperature and what else shapes sampling are the caller's choice here.
Knows no logits: `sampling.adjust_logits` gives the values their meaning.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.errors import ChronosError, ConfigError
from chronos.common.model.config import load_config
from chronos.common.model.guest import end_ids
from chronos.common.text.sampling import NO_RULES, Rules, SamplingParams

# What `generate()` would do in greedy decoding and is not done here, with the values that are off.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "num_beams": (None, 1),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "stop_strings": (None, [], ""),
}


@dataclass(frozen=True)
class ReplyDefaults:
    """The model's own penalties and rules. ignored: names in the file that have no effect here."""

    repetition_penalty: float = 1.0
    rules: Rules = NO_RULES
    ignored: tuple[str, ...] = ()

    def fill(self, params: SamplingParams) -> SamplingParams:
        """`params` with the model's values where the caller gave none."""
        given = params.repetition_penalty
        return dataclasses.replace(
            params,
            repetition_penalty=self.repetition_penalty if given is None else given,
            rules=self.rules if params.rules == NO_RULES else params.rules,
        )


def read_defaults(folder: str | Path) -> ReplyDefaults:
    """Of a model folder; nothing where it has no such file. Raises ConfigError naming the key."""
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return ReplyDefaults()
    data, where = load_config(path)
    penalty = data.get("repetition_penalty")
    try:
        SamplingParams(repetition_penalty=penalty)
    except ChronosError as error:
        raise ConfigError(error.what, where) from None
    rules = Rules(
        suppress=_ids(data, "suppress_tokens", where),
        begin_suppress=_ids(data, "begin_suppress_tokens", where),
        bad_words=_words(data, where),
        no_repeat_ngram=_size(data, "no_repeat_ngram_size", where),
        min_length=_size(data, "min_length", where),
        min_new_tokens=_size(data, "min_new_tokens", where),
    )
    if rules.min_length or rules.min_new_tokens or rules.bad_words:
        end = tuple(sorted(end_ids(folder)))
        words = tuple(word for word in rules.bad_words if not (len(word) == 1 and word[0] in end))
        rules = dataclasses.replace(rules, end=end, bad_words=words)
    ignored = tuple(name for name, off in _IGNORED.items() if data.get(name) not in off)
    return ReplyDefaults(1.0 if penalty is None else float(penalty), rules, ignored)


def read_sampling(folder: str | Path) -> dict[str, Any]:
    """How the file would have replies drawn, as fields of SamplingParams: for whoever leaves that
    choice to the model. Greedy unless it says `do_sample`. Raises ConfigError naming the key."""
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return {}
    data, where = load_config(path)
    if data.get("do_sample") is not True:
        return {}
    names = ("temperature", "top_p", "top_k", "min_p")
    asked = {name: data[name] for name in names if data.get(name) is not None}
    asked.setdefault("temperature", 1.0)
    try:
        SamplingParams(**asked)
    except ChronosError as error:
        raise ConfigError(error.what, where) from None
    return asked


def _size(data: dict[str, Any], key: str, where: str) -> int:
    value = data.get(key)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise ConfigError(f"{key} must be a count, not {str(value)[:80]}", where)
    return value


def _ids(data: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise ConfigError(f"{key} must be a list of token ids, not {str(value)[:80]}", where)
    return tuple(value)


def _words(data: dict[str, Any], where: str) -> tuple[tuple[int, ...], ...]:
    value = data.get("bad_words_ids")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(value):
        raise ConfigError(f"bad_words_ids must be lists of token ids, not {str(value)[:80]}", where)
    return tuple(_ids({"bad_words_ids": word}, "bad_words_ids", where) for word in value)
