"""What forecasts are worth as ranks of what to keep.

    python -m bench.runs.forecast TRACE --seeds 0,1,2 [-o R.json]

Trains a forecaster per seed on the training sequences of a trace and replays the test sequences
against caches and predictors at four budgets: one pool of slots over all layers, as the stores have
it, and for the first seed equal slots in every layer. Ceiling: MIN with bypass, 100 % of the gap;
what it can do when it sees only the next N tokens is listed. The result file is written after every
seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from chronos.cli import charts
from chronos.cli.simulate import draw, result_json
from chronos.common.experts.foresight.forecast import ForecastModel
from chronos.common.traces.fit import FitOptions, fit, split
from chronos.common.traces.measure import measure
from chronos.common.traces.simulate import slots_for
from chronos.common.traces.trace import RoutingTrace

SHARES = (0.125, 0.25, 0.375, 0.5)
WARMUP = 0.1


def run(
    trace: RoutingTrace, options: FitOptions, model_file: Path, *, per_layer: bool
) -> dict[str, Any]:
    """One seed: training, and every policy on the test sequences."""
    parts = split(trace)
    fitted = fit(parts.train, parts.validation, options)
    fitted.model.save(model_file)
    result: dict[str, Any] = {
        "seed": options.seed,
        "fit_s": fitted.seconds,
        "validation_losses": fitted.losses,
        "pooled": tested(parts.test, fitted.model, pooled=True),
    }
    if per_layer:
        result["per_layer"] = tested(parts.test, fitted.model, pooled=False)
    return result


def tested(test: RoutingTrace, model: ForecastModel, *, pooled: bool) -> dict[str, Any]:
    sizes = [slots_for(test, share, pooled=pooled) for share in SHARES]
    results = measure(test, sizes, model, pooled=pooled, warmup=WARMUP)
    return {
        str(share): result_json(*result, 1) for share, result in zip(SHARES, results, strict=True)
    }


def table(runs: list[dict[str, Any]], where: str) -> list[str]:
    """Hits and share of the gap by budget; of the forecaster, the median over seeds and all."""
    lines = []
    for share in map(str, SHARES):
        results = [run[where][share] for run in runs if where in run]
        for name, policy in results[0]["policies"].items():
            gaps = [result["policies"][name]["eta_policy"] for result in results]
            hits = [result["policies"][name]["hit_rate"] for result in results]
            line = (
                f"{where:9} {share:6} {name:15} hits {100 * statistics.median(hits):5.1f} "
                f"gap {100 * statistics.median(gaps):6.1f}"
            )
            if name == "forecast":
                line += "  " + " ".join(f"{100 * gap:.1f}" for gap in gaps)
            if "recall_at_k" in policy:
                line += f"  recall {100 * policy['recall_at_k']:.1f} / "
                line += f"{100 * policy['recall_at_k3']:.1f}"
            lines.append(line)
    return lines


def chart(name: str, result: dict[str, Any], path: Path) -> None:
    """Hits by budget of one seed's pooled caches."""
    rates = {
        float(share): {policy: found["hit_rate"] for policy, found in budget["policies"].items()}
        for share, budget in result.items()
    }
    draw(path, rates, f"{name}: expert cache hits on test sequences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=FitOptions.epochs)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--models", type=Path, default=Path("bench/scratch"))
    parser.add_argument("--png", type=Path, help="draw the chart of the first seed")
    given = parser.parse_args()
    if given.png:
        charts.require()
    trace = RoutingTrace.load(given.trace)
    runs: list[dict[str, Any]] = []
    out = given.out or Path(f"bench/results/forecast-{given.trace.stem}.json")
    given.models.mkdir(parents=True, exist_ok=True)
    for seed in map(int, given.seeds.split(",")):
        file = given.models / f"forecast-{given.trace.stem}-{seed}.safetensors"
        options = FitOptions(epochs=given.epochs, seed=seed)
        runs.append(run(trace, options, file, per_layer=not runs))
        out.write_text(json.dumps({"trace": given.trace.stem, "runs": runs}, indent=1) + "\n")
        print("\n".join(table(runs, "pooled") + table(runs, "per_layer")), flush=True)
        if given.png and len(runs) == 1:
            chart(given.trace.stem, runs[0]["pooled"], given.png)
    etas = [run["pooled"]["0.25"]["policies"]["forecast"]["eta_policy"] for run in runs]
    print(json.dumps({"trace": given.trace.stem, "eta_policy_25": statistics.median(etas)}))


if __name__ == "__main__":
    main()
