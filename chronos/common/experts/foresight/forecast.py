"""The full-stack forecaster: the routing of all layers in, the use of every expert to come out.

A `ForecastModel` is what `fit` trained, kept as the side file forecast.safetensors; a `Forecaster`
is that model following one sequence, with a `RoutingMemory` of it whose votes it weighs in.
Forecasts are renewed a few times a token: what shallow layers chose says much about the deeper ones
of the same token. In between, a layer that has had its turn is ranked by the uses after that turn.
Knows ids only, no weights of a router and no hidden states. Not covered: training (`fit`).

Shape legend: T tokens, L layers, E experts, K top-k, D decays.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chronos.common.disk.header import Header, read_header
from chronos.common.disk.io import FileIO, StrPath, corrupt
from chronos.common.errors import ShapeMismatch
from chronos.common.experts.foresight.memory import RoutingMemory, Vote
from chronos.common.experts.foresight.network import (
    ANSWERS,
    DECAYS,
    INPUTS,
    Floats,
    Geometry,
    Params,
    blend,
    history_input,
    sigmoid,
)
from chronos.common.experts.foresight.params import read_params, write_params
from chronos.common.experts.foresight.predictor import (
    DISCOUNT,
    RANK_DISCOUNT,
    ByRouting,
    Scores,
    TokenClock,
)

FORECAST = "forecast.safetensors"
HORIZON = 8  # turns that the second answer looks ahead to, the first answer's included
LAYERS_A_MOMENT = 4  # forecasts are renewed after so many layers,
_MOMENTS = 6  # and at least so often in a token, or after each layer of fewer
# Discounted uses a layer could have in turns 2 to HORIZON, as seen from turn 2.
LATER = (1.0 - DISCOUNT ** (HORIZON - 1)) / (1.0 - DISCOUNT)
_FORMAT, _VERSION = "chronos-forecast", "1"
_KNOWN = "known"
_SIZES = ("layers", "experts", "top_k", "hidden", "rank")


@dataclass(frozen=True, eq=False)
class ForecastModel:
    """Trained parameters, and which model they were trained for (`fingerprint`, "" if unknown)."""

    geometry: Geometry
    params: Params
    fingerprint: str = ""
    known_TLK: NDArray[Any] | None = None  # routing it was trained on, for its memory

    def predictor(self) -> Forecaster:
        return Forecaster(self)

    def save(self, path: StrPath) -> None:
        """Write the side file atomically."""
        sizes = {name: str(getattr(self.geometry, name)) for name in _SIZES}
        metadata = {"format": _FORMAT, "version": _VERSION, "fingerprint": self.fingerprint}
        known = {} if self.known_TLK is None else {_KNOWN: self.known_TLK}
        write_params(path, known | self.params, metadata | sizes)

    @classmethod
    def load(cls, path: StrPath, io: FileIO | None = None) -> ForecastModel:
        """Read a side file strictly. Raises CorruptFileError naming the file and what is wrong."""
        header = read_header(path, io=io)
        geometry = _geometry(header, path)
        found = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        wanted = {name: ("F32", shape) for name, shape in geometry.shapes.items()}
        tokens = found[_KNOWN][1][0] if _KNOWN in found and found[_KNOWN][1] else 0
        if tokens:
            wanted[_KNOWN] = (_id_dtype(geometry), (tokens, geometry.layers, geometry.top_k))
        if found != wanted:
            raise corrupt(path, "holds other tensors than a forecaster of its geometry has")
        params = read_params(path, io)
        known = params.pop(_KNOWN, None)
        if known is not None and known.max() >= geometry.experts:
            raise corrupt(path, "remembers experts that its geometry does not have")
        return cls(geometry, params, header.metadata.get("fingerprint", ""), known)

    def check_fits(
        self, layers: int, experts: int, top_k: int, fingerprint: str = "", where: str = ""
    ) -> None:
        """Raises ShapeMismatch unless it was trained for this model, as far as both know."""
        own = self.geometry
        fix = "train one for this model: chronos fit MODEL"
        if (own.layers, own.experts, own.top_k) != (layers, experts, top_k):
            raise ShapeMismatch(
                f"a forecaster of {own.layers} layers x {own.experts} experts, top-{own.top_k}, "
                f"cannot serve {layers} x {experts}, top-{top_k}",
                where,
                fix,
            )
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise ShapeMismatch("the forecaster was trained for other weights", where, fix)


def _id_dtype(geometry: Geometry) -> str:
    return "U8" if geometry.experts <= 256 else "U16"


def _geometry(header: Header, path: StrPath) -> Geometry:
    metadata = header.metadata
    if metadata.get("format") != _FORMAT:
        raise corrupt(path, "is not a forecaster")
    if metadata.get("version") != _VERSION:
        raise corrupt(path, f"has version {metadata.get('version')!r}; {_VERSION!r} is known")
    sizes = {name: metadata.get(name, "") for name in _SIZES}
    if not all(text.isascii() and text.isdigit() and len(text) < 6 for text in sizes.values()):
        raise corrupt(path, f"has a malformed geometry: {sizes}")
    geometry = Geometry(**{name: int(text) for name, text in sizes.items()})
    if not 0 < geometry.top_k <= geometry.experts or not geometry.layers:
        raise corrupt(path, f"has an impossible geometry: {sizes}")
    return geometry


class History:
    """How often each expert was used lately, at every decay, and what was used last."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._decay_D1 = np.array(DECAYS, np.float32)[:, None]
        self.share_LDE = np.full((layers, len(DECAYS), experts), top_k / experts, np.float32)
        self.last_LE = np.zeros((layers, experts), np.float32)

    def observe(self, layer: int, experts: Collection[int]) -> None:
        chosen = list(experts)
        share_DE, last_E = self.share_LDE[layer], self.last_LE[layer]
        share_DE *= self._decay_D1
        share_DE[:, chosen] += 1.0 - self._decay_D1
        last_E[:] = 0.0
        last_E[chosen] = 1.0

    def observe_all(self, ids_LK: NDArray[Any]) -> None:
        """Every layer of one token, at once."""
        self.last_LE[:] = 0.0
        np.put_along_axis(self.last_LE, ids_LK, 1.0, 1)
        self.share_LDE *= self._decay_D1
        self.share_LDE += (1.0 - self._decay_D1) * self.last_LE[:, None]

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        """As `observe` token by token, at once."""
        tokens, layers = ids_TLK.shape[:2]
        if not tokens:
            return
        rows_L1 = np.arange(layers)[:, None]
        for place, decay in enumerate(DECAYS):
            share_LE = self.share_LDE[:, place] * decay**tokens
            weight_T = (1.0 - decay) * decay ** np.arange(tokens - 1, -1, -1.0)
            np.add.at(share_LE, (rows_L1, ids_TLK), weight_T[:, None, None])
            self.share_LDE[:, place] = share_LE
        self.last_LE[:] = 0.0
        self.last_LE[rows_L1, ids_TLK[-1]] = 1.0


class Forecaster(ByRouting):
    """A `Predictor` made of a trained model, following one sequence."""

    name = "forecast"

    def __init__(self, model: ForecastModel, moments: int = 0) -> None:
        """moments: how often in a token forecasts are renewed; 0 for a number that suits."""
        self._params, self._geometry = model.params, model.geometry
        geometry = model.geometry
        L, E = geometry.layers, geometry.experts
        self.renews_after = renewals(L, moments)
        self._history = History(L, E, geometry.top_k)
        self._memory = RoutingMemory(L, E, geometry.top_k, HORIZON, DISCOUNT, model.known_TLK)
        self._low_LR = np.zeros((L, geometry.rank), np.float32)
        self._joined_H = np.zeros(geometry.hidden, np.float32)  # low_LR through `join`
        self._alone_LX = np.zeros((L, ANSWERS * E), np.float32)
        self._clock = TokenClock(L)
        self._changed = (0, L)  # rows whose inputs are out of date
        self._served = L - 1  # the layer taken in last
        self._observed: list[tuple[int, list[int]]] = []  # and not taken in yet
        self._next_LE: Scores  # chance of use at each layer's next turn
        self._renew()

    def observe(self, layer: int, experts: Collection[int]) -> None:
        self._observed.append((layer, list(experts)))
        self._clock.observe(layer)
        self._now_LE[layer] = self._later_LE[layer]
        self._next_LE[layer] = self._later_LE[layer] / LATER

    def reconsider(self) -> None:
        for layer, experts in self._observed:
            self._history.observe(layer, experts)
            self._memory.observe(layer, experts)
            first, last = self._changed
            self._changed = (min(first, layer), max(last, layer + 1))
            self._served = layer
            if layer in self.renews_after:
                self._renew()
        self._observed.clear()

    def end_token(self) -> None:
        self.reconsider()
        self._clock.end_token()
        self._memory.end_token()
        self._served = self._geometry.layers - 1

    def prime(self, ids_TLK: NDArray[Any]) -> None:
        self._history.prime(ids_TLK[:-1])
        self._memory.prime(ids_TLK[:-1])
        self._changed = (0, self._geometry.layers)
        for ids_LK in ids_TLK[-1:].tolist():
            for layer, experts in enumerate(ids_LK):
                self.observe(layer, experts)
                self.reconsider()
            self.end_token()

    def fork(self) -> Forecaster:
        shared = (self._params, self._geometry, self.renews_after)
        return deepcopy(self, {id(part): part for part in shared})

    def scores(self) -> Scores:
        scores: Scores = self._now_LE * self._clock.weight_L[:, None]
        return scores

    def next_uses(self) -> Scores:
        return self._next_LE

    def _renew(self) -> None:
        """Forecasts are renewed at fixed moments, whether somebody asks or not: if they depended on
        when somebody asked, a run could not be repeated."""
        logits_OLE, vote = self.parts()
        if vote is not None:
            logits_OLE = blend(self._params["blend"], logits_OLE, *vote)
        answers_OLE = sigmoid(logits_OLE).astype(np.float64)
        self._next_LE, self._later_LE = answers_OLE[0], answers_OLE[1] * LATER
        self._now_LE = self._next_LE + RANK_DISCOUNT * self._later_LE

    def parts(self) -> tuple[Floats, Vote | None]:
        """What the network and the memory each say of this moment: logits [O, L, E], a vote."""
        return self._logits(), self._memory.vote()

    def _logits(self) -> Floats:
        """[O, L, E]: `network.forward` for one input, of which only some rows are new."""
        params, L = self._params, self._geometry.layers
        self._renew_rows(*self._changed)
        self._changed = (L, 0)
        hidden = np.maximum(self._joined_H + params["moment"][self._served], 0.0)
        parted = (hidden @ params["part"]).reshape(L, 1, -1)
        logits = np.matmul(parted, params["leave"])[:, 0] + self._alone_LX
        return np.ascontiguousarray(logits.reshape(L, ANSWERS, -1).transpose(1, 0, 2))

    def _renew_rows(self, first: int, last: int) -> None:
        """What follows from the inputs of layers `first` to `last` - 1 alone."""
        params, E, R = self._params, self._geometry.experts, self._geometry.rank
        rows = slice(first, last)
        last_LE, share_LDE = self._history.last_LE[rows], self._history.share_LDE[rows]
        inputs = np.concatenate([last_LE[:, None], history_input(share_LDE)], 1)  # [rows, I, E]
        flat = inputs.reshape(-1, 1, INPUTS * E)
        low = np.matmul(flat, params["enter"][rows])[:, 0]
        change = (low - self._low_LR[rows]).ravel()
        self._low_LR[rows] = low
        if self._served == self._geometry.layers - 1:  # once a token: rounding does not pile up
            self._joined_H = self._low_LR.ravel() @ params["join"]
        else:
            self._joined_H += change @ params["join"][first * R : last * R]
        by_self = inputs[:, :, None] * params["self"][rows].reshape(-1, INPUTS, ANSWERS, E)
        alone = params["bias"][rows] + by_self.sum(1).reshape(-1, ANSWERS * E)
        if "own" in params:
            alone += np.matmul(last_LE[:, None], params["own"][rows])[:, 0]
        self._alone_LX[rows] = alone


def renewals(layers: int, moments: int = 0) -> set[int]:
    """Layers after which forecasts are renewed, the last one always among them."""
    moments = min(moments or max(_MOMENTS, layers // LAYERS_A_MOMENT), layers)
    return {round((i + 1) * layers / moments) - 1 for i in range(moments)}


def find_forecast(folder: StrPath) -> Path | None:
    """The side file of a model folder, if it has one."""
    path = Path(folder) / FORECAST
    return path if path.is_file() else None
