"""The loss curve and router health of a training run, as a table and a picture, and its length.

    python -m bench.runs.curve runs/demo/metrics.jsonl --png docs/demo-model.png

The picture needs matplotlib, which Chronos itself does not.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

_COLUMNS = {
    "step": "step",
    "ce": "loss, training",
    "valid_ce": "loss, held out",
    "valid_router/entropy": "router entropy",
    "valid_router/effective_experts_min": "effective experts, worst layer",
    "valid_router/largest_share": "largest expert share",
    "valid_recall_0": "recall, this token",
    "valid_recall_1": "next token",
    "valid_recall_2": "the one after",
}


def rows(path: Path) -> list[dict[str, Any]]:
    """One row per evaluation, joined with the training line of the same step."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines():
        event = json.loads(line)
        steps.setdefault(event["step"], {}).update(event)
    return [event for event in steps.values() if "valid_ce" in event]


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "|" + "---|" * len(_COLUMNS)]
    for event in found:
        cells = [event.get(name) for name in _COLUMNS]
        shown = [
            f"{c:.3f}" if isinstance(c, float) else str(c if c is not None else "") for c in cells
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def minutes(path: Path, tokens: int) -> float:
    """How long the updates took, by the speed of each logged line. tokens: of an update."""
    taken, before = 0.0, 0
    for line in path.read_text("utf-8").splitlines():
        event = json.loads(line)
        if "tokens_per_s" in event:
            taken += (event["step"] - before) * tokens / event["tokens_per_s"]
            before = event["step"]
    return taken / 60


def draw(path: Path, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    events = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    train = [(e["step"], e["ce"], e["router/entropy"]) for e in events if e.get("ce") is not None]
    valid = [(e["step"], e["valid_ce"]) for e in events if "valid_ce" in e]
    health = [
        (e["step"], e["router/effective_experts_min"])
        for e in events
        if "router/effective_experts_min" in e
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*[t[:2] for t in train], strict=True), lw=0.8, label="training")
    left.plot(*zip(*valid, strict=True), "o-", ms=3, label="held out")
    left.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss")
    left.legend()
    right.plot(*zip(*health, strict=True), lw=0.8, label="effective experts, worst layer")
    right.plot(
        [t[0] for t in train], [math.exp(t[2]) for t in train], lw=0.8, label="exp(router entropy)"
    )
    right.set(xlabel="step", ylabel="experts of 32", ylim=(0, 33), title="Router health")
    right.legend(loc="lower right")
    figure.savefig(png, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--update-tokens", type=int, default=16 * 256, help="batch times length")
    args = parser.parse_args()
    print(table(rows(args.metrics)))
    print(f"{minutes(args.metrics, args.update_tokens):.0f} minutes of training")
    if args.png:
        draw(args.metrics, args.png)


if __name__ == "__main__":
    main()
