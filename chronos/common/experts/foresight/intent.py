"""The intent classifier: from a prompt's routing, how likely a reply's tokens use each expert.

A logistic model of what a prompt's tokens were routed to: each expert's own share of use in the
prompt, and a low-rank map over all of them. It is trained with binary cross-entropy on recorded
sequences cut in two at random places, a prompt and the reply's first tokens, and kept as the side
file intent.safetensors. Its use is to preload before the first token; `compare_preloads` says what
that is worth beside what is free: popularity, the prompt's own routing, a primed predictor. The
answer depends on the model (bench/log/intent.md): `train_if_it_wins` keeps one only where it wins.
Not covered: token ids of the prompt, whose routing says what they would.

Shape legend: B samples, L layers, E experts, R rank, N = L * E.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.header import read_header
from chronos.common.disk.io import FileIO, StrPath, corrupt
from chronos.common.experts.foresight.network import Floats, sigmoid
from chronos.common.experts.foresight.params import read_params, write_params

INTENT = "intent.safetensors"
_FLOOR = 0.02  # added to a share before its logarithm
_FORMAT = "chronos-intent"
_PARAMS = ("bias", "own", "enter", "leave")


@dataclass(frozen=True, eq=False)
class IntentModel:
    """params: bias [L, E], own [L, E], enter [N, R], leave [R, N]; float32."""

    params: dict[str, Floats]

    @property
    def shape(self) -> tuple[int, int]:
        layers, experts = self.params["bias"].shape
        return layers, experts

    def use(self, prompt_TLK: NDArray[Any]) -> NDArray[np.float64]:
        """[L, E], the chance that a token of the reply's beginning uses an expert."""
        x_1N = features(prompt_TLK, self.shape[1])[None]
        chance_N = sigmoid(logits(self.params, x_1N))[0]
        return np.asarray(chance_N.reshape(self.shape), np.float64)

    def save(self, path: StrPath) -> None:
        """Write the side file atomically."""
        write_params(path, self.params, {"format": _FORMAT, "version": "1"})

    @classmethod
    def load(cls, path: StrPath, io: FileIO | None = None) -> IntentModel:
        """Read a side file strictly. Raises CorruptFileError naming the file and what is wrong."""
        header = read_header(path, io=io)
        if header.metadata.get("format") != _FORMAT or header.metadata.get("version") != "1":
            raise corrupt(path, "is not an intent classifier")
        found = {name: entry.shape for name, entry in header.entries.items()}
        if sorted(found) != sorted(_PARAMS) or len(found["bias"]) != 2:
            raise corrupt(path, "holds other tensors than an intent classifier has")
        count, rank = int(np.prod(found["bias"])), found["leave"][0] if found["leave"] else 0
        wanted = {"own": found["bias"], "enter": (count, rank), "leave": (rank, count)}
        if any(found[name] != shape for name, shape in wanted.items()) or any(
            entry.dtype != "F32" for entry in header.entries.values()
        ):
            raise corrupt(path, "holds tensors whose shapes do not fit together")
        return cls(read_params(path, io))


def shares(ids_TLK: NDArray[Any], experts: int) -> Floats:
    """[N], the share of the tokens that use each expert."""
    tokens, layers = ids_TLK.shape[:2]
    flat = ids_TLK.astype(np.intp) + np.arange(layers)[:, None] * experts
    counts = np.bincount(flat.ravel(), minlength=layers * experts)
    return np.asarray(counts / max(1, tokens), np.float32)


def features(ids_TLK: NDArray[Any], experts: int) -> Floats:
    share_N = shares(ids_TLK, experts)
    return np.asarray(0.5 * np.log(share_N + _FLOOR) + 1.0, np.float32)


def logits(params: Mapping[str, Floats], x_BN: Floats) -> Floats:
    low_BN = (x_BN @ params["enter"]) @ params["leave"]
    return np.asarray(low_BN + x_BN * params["own"].ravel() + params["bias"].ravel(), np.float32)
