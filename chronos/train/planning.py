"""`--dry-run`: what a stage would take of memory and time, without a run folder.

The stage is opened as a run opens it, recipe, data and models, with two updates in place of all;
one update is computed twice, and the weights it leaves are thrown away. Memory is counted
(`common.training.memory`), time is measured. What a stage writes while it makes batches goes to a
folder that is removed.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chronos import backends
from chronos.backends.probe import memory_limits, peak_memory
from chronos.backends.protocol import Backend
from chronos.common.errors import UsageError
from chronos.common.training import memory
from chronos.common.training.recipe import Recipe
from chronos.train.adapters import RESIDENT
from chronos.train.loop import Event, Task, set_threads

_MEASURED = 2  # micro-batches of the update that is timed, at most


@dataclass(frozen=True)
class Plan:
    """What a run would take. Bytes, seconds, tokens.

    parameters: those that are trained. update: micro-batches of the first update, and rows, tokens
    a row and labels of its largest; `together` of them go through the model layer by layer. memory:
    parts of an update, and their total. time: what was measured, and what follows for the run;
    `measured_micro_batches` of the update's `micro_batches` were computed. peak_bytes: of this
    process, with what it imported, a reference and a teacher; on a GPU its memory is not in it.
    """

    stage: str
    backend: str
    device: str
    parameters: int
    update: dict[str, int]
    memory: dict[str, int]
    free_bytes: int
    peak_bytes: int
    time: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"activations_are": memory.ACTIVATIONS}


def plan(
    prepare: Callable[..., Task],
    recipe: Recipe[Any],
    *,
    backend: str | None = None,
    device: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Plan:
    """Raises what a run of the stage raises before its first update."""
    loaded = backends.load(backend)
    if loaded.processes().count > 1:
        raise UsageError("a plan is made in one process", "--dry-run", "leave the launcher out")
    loaded.check_recipe(recipe.optimizer)
    # What depends on the length is done for two updates and one batch of the evaluation.
    cadence = dataclasses.replace(recipe.cadence, steps=2, eval_batches=1)
    short = dataclasses.replace(recipe, cadence=cadence)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        task = prepare(short, loaded, Path(folder), device=device, on_event=on_event)
        try:
            return _measure(recipe, loaded, task, time.perf_counter() - began, on_event)
        finally:
            task.close()


def _measure(
    recipe: Recipe[Any],
    backend: Backend,
    task: Task,
    open_s: float,
    on_event: Callable[[Event], None],
) -> Plan:
    set_threads(backend, recipe, on_event)
    optimizer, cadence, config = recipe.optimizer, recipe.cadence, task.model.config
    began = time.perf_counter()
    batches = task.batches.at(0)
    batches_s = (time.perf_counter() - began) / task.period
    largest = max(batches, key=lambda batch: batch.ids_BT.size)
    rows, seq_len = largest.ids_BT.shape
    labels = max(batch.tokens for batch in batches)
    adapters = [] if task.adapt is None else [task.adapt(task.batches)]
    step, together = backend.train_step(task.model, optimizer, *adapters), 1
    if recipe.lora is not None and not recipe.lora.dropout and recipe.budget not in ("", RESIDENT):
        together = len(batches)  # layer by layer, so that none can be left out
    taken = batches[: max(together, _MEASURED)]
    for number in range(2):  # the first one allocates, and compiles
        on_event({"message": f"{len(taken)} of {len(batches)} micro-batches, {number + 1} of 2"})
        began = time.perf_counter()
        step.step(taken, task.objective, optimizer.min_learning_rate, number)
        update_s = (time.perf_counter() - began) * len(batches) / len(taken)
    evaluate_s = 0.0
    if task.valid:
        began = time.perf_counter()
        step.evaluate(task.valid[:1], task.objective)
        each_s = (time.perf_counter() - began) * cadence.eval_batches
        evaluate_s = each_s * -(-cadence.steps // cadence.eval_every)
    tokens = sum(batch.ids_BT.size for batch in batches)
    lookahead, held = task.model.lookahead is not None, None
    if adapters:
        shapes = {name: shape for name, _, shape, _ in adapters[0].tensors()}
        held = dict(task.frozen) | memory.trained(shapes, optimizer)
    takes = memory.of_update(
        config,
        optimizer,
        rows,
        seq_len,
        labels,
        lookahead=lookahead,
        held=held,
        together=together,
    )
    return Plan(
        recipe.stage.SECTION,
        backend.name,
        str(task.model.device),
        takes["parameters"] // memory.FLOAT,
        {
            "micro_batches": len(batches),
            "rows": rows,
            "seq_len": seq_len,
            "labels": labels,
            "tokens": tokens,
            "together": together,
        },
        takes,
        memory_limits().free,
        peak_memory(),
        {
            "measured_micro_batches": len(taken),
            "open_s": open_s,
            "batches_s": batches_s,
            "update_s": update_s,
            "tokens_per_s": tokens / (batches_s + update_s),
            "evaluate_s": evaluate_s,
            "run_s": cadence.steps * (batches_s + update_s) + evaluate_s,
        },
    )
