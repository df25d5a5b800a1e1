"""A model as the server shows it before and while it is loaded: name, tokenizer, limits.

Read from the folder without a framework, so that requests are checked, rendered and counted, and
refused, while the weights are still being read or another model runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos.common.errors import UsageError
from chronos.common.model.guest import GuestConfig, end_ids, read_config
from chronos.common.text.generation_config import read_sampling
from chronos.common.text.tokenizer import Tokenizer
from chronos.run.models import resolve_model
from chronos.serve.problem import Problem

ANY = "*"  # as an alias: whatever a client calls the model


@dataclass(frozen=True, eq=False)
class Served:
    """name: what clients call it. context: tokens of prompt and reply. sampling: what the folder
    asks of a reply where the request says nothing."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    context: int
    vocab_size: int
    stop_ids: frozenset[int]
    sampling: Mapping[str, Any]
    created: int

    @classmethod
    def open(cls, model: str, name: str = "", context: int | None = None) -> Served:
        """Raises what `resolve_model` and the readers of its files do, and UsageError where it has
        no tokenizer."""
        folder = resolve_model(model)
        config = read_config(folder)
        if not (folder / "tokenizer.json").exists():
            raise UsageError(
                f"model {model!r} has no tokenizer.json, so it takes no text",
                str(folder),
                "put the tokenizer's files beside config.json",
            )
        tokenizer = Tokenizer.load(folder, config.vocab_size)
        ends = end_ids(folder) if isinstance(config, GuestConfig) else frozenset()
        return cls(
            name or Path(model).name,
            folder,
            tokenizer,
            context or config.max_position_embeddings,
            config.vocab_size,
            tokenizer.stop_ids | ends,
            read_sampling(folder),
            int(time.time()),
        )

    def room(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Tokens the reply to a prompt may have: what was asked for, or what the context leaves.
        Raises Problem in the words by which clients know that they must compact."""
        if not prompt:
            raise Problem(400, "the prompt is empty", code="invalid_value", param="prompt")
        if max(prompt) >= self.vocab_size or min(prompt) < 0:
            raise Problem(
                400,
                f"token ids are from 0 to {self.vocab_size - 1}",
                code="invalid_value",
                param="prompt",
            )
        if len(prompt) > self.context:
            raise Problem(
                400,
                f"prompt is too long: {len(prompt)} tokens > {self.context} maximum "
                f"(maximum context length is {self.context} tokens)",
                code="context_length_exceeded",
                param="messages",
            )
        # A prompt may fill the context: one token is still drawn from it.
        left = max(1, self.context - len(prompt) + 1)
        return left if max_tokens is None else min(left, max_tokens)


class Catalogue:
    """The models of a server; names come from the command line alone."""

    def __init__(self, models: Sequence[Served], aliases: Sequence[str] = ()) -> None:
        """aliases: other names of the first model; ANY: every name that is no other's."""
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise UsageError(
                "two models have the same name", "--name", "name each: --name ONE --name TWO"
            )
        self.first, self._aliases = models[0], frozenset(aliases)

    def find(self, name: str | None) -> Served:
        """The model of that name, the first where none is named. Raises Problem."""
        if name is None or name in self._aliases:
            return self.first
        found = self.models.get(name)
        if found is None and ANY in self._aliases:
            return self.first
        if found is None:
            names = ", ".join(self.models)
            raise Problem(
                404,
                f"there is no model {name[:60]!r}; there is: {names}",
                code="model_not_found",
                param="model",
            )
        return found
