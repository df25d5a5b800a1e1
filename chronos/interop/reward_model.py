"""A reward model that Transformers builds: a classifier with one label, from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chronos.common.errors import UsageError


def scorer(folder: str) -> Callable[[Sequence[Mapping[str, str]]], float]:
    """A function that scores a conversation. No code of the folder's runs, no pickle is read.
    Raises UsageError for a model of more labels than one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True
    ).eval()
    if model.config.num_labels != 1:
        raise UsageError(
            f"a reward model has one label, this one {model.config.num_labels}", folder
        )

    @torch.no_grad()
    def score(messages: Sequence[Mapping[str, str]]) -> float:
        if tokenizer.chat_template:
            ids: Any = tokenizer.apply_chat_template(
                list(messages), return_tensors="pt", return_dict=True
            )
        else:
            ids = tokenizer("\n".join(m["content"] for m in messages), return_tensors="pt")
        return float(model(input_ids=ids["input_ids"]).logits[0, 0])

    return score
