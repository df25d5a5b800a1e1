"""What a backend is: the names every `chronos.backends.<name>` module must offer.

Ids cross this seam, tensors do not: token ids, keys `(layer, expert)`, byte counts, NumPy arrays,
plain floats. A backend is a module checked against `Backend` by mypy; there is no base class.
Not covered: how bytes move and when to wait, which is each backend's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

    from chronos.common.data import Batch
    from chronos.common.disk.header import TensorEntry
    from chronos.common.disk.tensors import Named
    from chronos.common.experts.feed import Feed, OpenArena
    from chronos.common.layout import Layout
    from chronos.common.model.config import ModelConfig
    from chronos.common.model.weights import Key
    from chronos.common.text.sampling import Work
    from chronos.common.training.lora import LoraRecipe
    from chronos.common.training.objectives import Objective, Terms
    from chronos.common.training.recipe import OptimizerRecipe

    # (seq, layer) to ids int64 and weights float32 [T, K], in place of what the gate would choose.
    RouteOverride = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class Model(Protocol):
    """The backend's own model object; only config and device are read on this side."""

    config: ModelConfig

    @property
    def device(self) -> Any: ...


class Observed(NamedTuple):
    """One forward pass in NumPy: L layers, N = B * T tokens, K top-k, J lookahead steps + 1."""

    logits_BTV: np.ndarray
    ids_LNK: np.ndarray
    weights_LNK: np.ndarray
    probs_LNE: np.ndarray
    lookahead_BTJLE: np.ndarray | None  # logits; None where the model has no LookaheadRouter


class Scores(NamedTuple):
    """What a frozen model says of a batch: log-probabilities of the labels in nats, float32, 0
    where there is none; its picks and its routers' probabilities."""

    log_probs_BT: np.ndarray
    ids_BTLK: np.ndarray
    probs_BTLE: np.ndarray


class Session(Protocol):
    """Sequences on one model, by number: their caches, their draws, the sampling on the device.

    A sequence is there from its first work on. It computes what it would compute alone, whatever
    the others of a pass are.
    """

    model: Any  # the backend's own, as `Backend.forward` takes it

    def run(
        self,
        work: Sequence[Work],
        *,
        record: bool = ...,
        route_override: RouteOverride | None = ...,
    ) -> list[int | None | Exception]:
        """One pass: of each work the token drawn, -1 where the logits hold a NaN or an infinity or
        rules and mask allow no token, None where its prompt goes on, AGAIN where some of its
        layers are left for the next pass, or the error that ended the sequence, which can only be
        dropped then. A seed's draws start at the end of a prompt.

        What raises instead leaves each sequence of the pass such that it can only be dropped.

        record: keep the routing for `routing`. route_override: (ids, weights) [T, K] in place of
        the gates' choice. Raises UsageError for work that makes no sense.
        """

    def position(self, seq: int) -> int:
        """Tokens the sequence has, 0 for one that is not there."""

    def logits(self, seq: int) -> np.ndarray:
        """float32 [V] of the last position; a copy."""

    def every_logits(self, seq: int) -> np.ndarray:
        """float32 [T, V] of the last pass's tokens, a copy; UsageError where its work did not say
        `every`."""

    def routing(self, seq: int) -> Sequence[tuple[np.ndarray, np.ndarray | None]]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens; weights are
        None where the model does not show them."""

    def keep(self, seq: int, tokens: int) -> int:
        """Forget what came after the first `tokens`; returns how many are there, a multiple of
        PIECE: whole pieces of its prompt, or 0 where the cache cannot go back (`fork` before)."""

    def fork(self, seq: int, new: int) -> None:
        """Make sequence `new` of one that is there: the same tokens, draws and caches, its own
        from here on."""

    def save(self, seq: int) -> list[Named] | None:
        """What the caches of a sequence hold, as (name, dtype, shape, bytes), valid until its next
        pass; None where they hold what only their library knows."""

    def restore(
        self, new: int, ids: Sequence[int], tensors: Iterable[tuple[TensorEntry, memoryview]]
    ) -> None:
        """Make sequence `new` of whole pieces of a prompt and what `save` gave behind them, in
        memory of its own. Raises ShapeMismatch for what does not fit; there is no such sequence
        then."""

    def nbytes(self, seq: int) -> int:
        """Bytes of the arrays that the sequence's caches hold, spare room included."""

    def drop(self, seq: int) -> None:
        """Forget a sequence, if it is there; the experts stay where they are."""


class TrainStep(Protocol):
    """Gradients and optimizer of one model; owns the optimizer's state.

    An update's micro-batches give the gradient and the terms of the batch they make together,
    however uneven they are: sums over counts of the whole update, balance by all of its picks.
    """

    def step(
        self, batches: Sequence[Batch], objective: Objective, rate: float, number: int
    ) -> Terms:
        """One update; `skipped` = 1 where the loss or gradient is not finite. Random numbers follow
        from the recipe's seed and `number`, counted from 0."""

    def evaluate(self, batches: Sequence[Batch], objective: Objective) -> Terms:
        """The terms of all batches together, without dropout or masks."""

    def state(self) -> Iterator[tuple[str, str, tuple[int, ...], Any]]: ...
    def load_state(self, tensors: Iterable[Any]) -> None: ...


class Processes(Protocol):
    """Those that share an update, by their launcher; one is alone. The first writes."""

    rank: int
    count: int

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them; all have to ask."""


class Adapter(Protocol):
    """The parameters beside a model's frozen weights, by their names in peft's files."""

    def off(self) -> AbstractContextManager[None]:
        """The model without them, as long as the context lasts."""

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
        """(name, dtype, shape, bytes) of every parameter, in float32."""

    def load(self, tensors: Iterable[tuple[TensorEntry, memoryview]]) -> None:
        """Take over what an adapter's file holds. Raises ShapeMismatch if it is another one's."""


class Backend(Protocol):
    """The module itself."""

    name: str

    def build(
        self,
        config: ModelConfig,
        *,
        seed: int,
        device: str | None = ...,
        weights: Iterable[tuple[TensorEntry, memoryview]] | None = ...,
    ) -> Model:
        """A model to be trained, in float32. weights: its first ones, by name; None: random ones.
        Where they lack the LookaheadRouter, so does the model."""

    def load(
        self,
        folder: Path,
        *,
        device: str | None,
        resident: bool,
        dense: Iterable[tuple[TensorEntry, memoryview]] | None = None,
        layout: Layout | None = None,
    ) -> Model:
        """dense: the tensors of the dense part, where they are being read already. layout: the
        packed experts, where they are opened already."""

    def save(self, model: Any, folder: Path) -> None: ...
    def tensors(self, model: Any) -> Iterable[tuple[str, str, tuple[int, ...], memoryview]]:
        """(name on disk, dtype, shape, bytes) of every parameter, in float32."""

    def forward(
        self,
        model: Any,
        ids_BT: np.ndarray,
        *,
        segments_BT: np.ndarray | None = ...,
        cache: Any = ...,
        source: Any = ...,
    ) -> Observed:
        """segments_BT: document numbers, -1 for padding. cache: from `model.new_cache()`; worthless
        after an error."""

    @property
    def open_arena(self) -> OpenArena:
        """Memory for routed experts."""

    def session(self, model: Any, feed: Feed | None) -> Session: ...
    def train_step(self, model: Any, recipe: OptimizerRecipe, adapter: Any = ...) -> TrainStep:
        """adapter: what is trained beside a frozen model, where it has one."""

    def check_recipe(self, recipe: OptimizerRecipe) -> None:
        """Raises UsageError or MissingBackendError for what cannot be trained with here, as
        `train_step` does, before there is a model."""

    def processes(self) -> Processes: ...
    def streamed(self, model: Any, feed: Feed) -> Any:
        """A model without its experts, to be called, and differentiated, as one that has them."""

    def attach(
        self, model: Any, recipe: LoraRecipe, *, seed: int = ..., experts: Collection[Key] = ...
    ) -> Adapter:
        """Freeze a model and put adapters beside it; its answers stay the same. experts: the routed
        ones that get one. Raises UsageError for a target that names nothing."""

    def score(
        self, model: Any, batch: Batch, temperature: float = 1.0, *, replay: bool = ...
    ) -> Scores:
        """What references and old policies think of a batch. replay: with the experts in its array
        `picks` [B, T, L, K]."""

    def anchor(self, model: Any) -> None:
        """Keep a frozen copy of every gate, which losses compare the routers with."""

    def set_threads(self, count: int | None) -> int | None:
        """Have products on a CPU take so many threads, in the whole process; None leaves the
        number. Returns how many they take, None where that cannot be set."""

    def devices(self) -> Iterable[str]:
        """Names accepted as `device`, the one taken by default first."""
