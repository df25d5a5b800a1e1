"""What a study has found: its best trials, which parameters mattered, and whether that is luck.

Only whole, feasible trials are compared. An importance says how much a parameter decides whether
the first objective is in its best quarter (PED-ANOVA, 2304.10255; conditional parameters by
2601.20800). Beside it stand two controls, what the same trials say with their losses shuffled, and
a parameter that was sampled like the others and is used by nothing: a sampler that closes in moves
all parameters with the loss, which shuffling does not show.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from chronos.tune.pareto import front
from chronos.tune.study import CONTROL, INTERRUPTED, WHOLE, Study, TrialView
from chronos.tune.written import required

_LEAST = 10  # whole trials that importances are computed of
_SHUFFLES = 20
_HIGH = 0.95  # quantile of the shuffled ones that a real importance must exceed
_BEST = 0.25  # of the trials, what an importance is about


def best(trials: Sequence[TrialView]) -> list[TrialView]:
    """Whole, feasible trials that no other one is better than in all objectives, by the first."""
    whole = [t for t in trials if t.state == WHOLE and t.repeat is None]
    kept = [whole[place] for place in front([trial.values for trial in whole])]
    return sorted(kept, key=lambda trial: trial.values)


def spread(trials: Sequence[TrialView], count: int) -> list[TrialView]:
    """So many of them at most, with both ends."""
    if len(trials) <= count:
        return list(trials)
    places = {round(at) for at in np.linspace(0, len(trials) - 1, count)}
    return [trials[place] for place in sorted(places)]


def seeds(trial: TrialView, trials: Sequence[TrialView]) -> list[tuple[float, ...]]:
    """The values of a trial and of its repeats that came to their end."""
    again = (t for t in trials if t.repeat == trial.number and t.values)
    return [trial.values, *(t.values for t in again)]


def chosen(trials: Sequence[TrialView], number: int | None = None) -> TrialView | None:
    """The trial to apply: the one named, or the best in the first objective, by the mean of its
    seeds, of those that read no more than the recipe itself."""
    if number is not None:
        return next((t for t in trials if t.number == number and t.values), None)
    own = next((t for t in trials if t.own and t.state == WHOLE), None)
    candidates = best(trials)
    if own is not None:
        candidates = [t for t in candidates if t.values[1:] <= own.values[1:]] or [own]
    # One seed more or less is luck: where some were run again, these are compared.
    repeated = [t for t in candidates if len(seeds(t, trials)) > 1]
    candidates = repeated or candidates
    means = [statistics.fmean(v[0] for v in seeds(t, trials)) for t in candidates]
    return candidates[means.index(min(means))] if means else None


def status(study: Study) -> dict[str, Any]:
    """All of it, as JSON."""
    trials = study.trials()
    shown = [trial for trial in trials if trial.state != INTERRUPTED]
    counts: dict[str, int] = {}
    for trial in shown:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    apply = chosen(trials)
    return {
        "objectives": list(study.objectives),
        "stopping": study.stopping,
        "counts": counts,
        "waiting": study.waiting(),
        "best": [_row(trial, study, trials) for trial in best(trials)],
        "apply": None if apply is None else apply.number,
        "importances": importances(study, trials),
        "trials": [_row(trial, study, trials) for trial in shown],
    }


def _row(trial: TrialView, study: Study, trials: Sequence[TrialView]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trial": trial.number,
        "state": trial.state,
        "own": trial.own,
        "repeat_of": trial.repeat,
        "seed": trial.seed,
        "params": trial.params,
        "values": dict(zip(study.objectives, trial.values, strict=False)),
        "measured": dict(trial.measured),
        "constraints": dict(trial.constraints),
        "rungs": [
            {"step": rung.step, "values": dict(zip(study.objectives, rung.values, strict=False))}
            for rung in trial.rungs
        ],
        "why": trial.why,
        "seconds": trial.seconds,
        "worker": trial.worker,
        "folder": trial.folder,
    }
    found = seeds(trial, trials) if trial.values and trial.repeat is None else []
    if len(found) > 1:
        by_objective = list(zip(*found, strict=True))
        row["seeds"] = {
            name: {"mean": statistics.fmean(v), "stdev": statistics.stdev(v), "runs": len(v)}
            for name, v in zip(study.objectives, by_objective, strict=True)
        }
    return row


def importances(study: Study, trials: Sequence[TrialView]) -> dict[str, Any]:
    """Parameter -> its importance for the first objective, in how many trials it had a use, the
    mean and the 95 % quantile with the losses shuffled, and whether it exceeds that and the
    parameter that nothing uses. Empty below 10 whole trials."""
    numbers = [t.number for t in trials if t.state == WHOLE and t.repeat is None]
    if len(numbers) < _LEAST:
        return {}
    known = study.study.get_trials(deepcopy=False)
    whole = [known[number] for number in numbers]
    losses = [float(trial.values[0]) for trial in whole]
    found = _importance(whole, losses)
    random = np.random.default_rng(0)
    shuffled = [_importance(whole, random.permutation(losses).tolist()) for _ in range(_SHUFFLES)]
    result = {}
    for name, value in sorted(found.items(), key=lambda pair: -pair[1]):
        chance = [each.get(name, 0.0) for each in shuffled]
        high = float(np.quantile(chance, _HIGH))
        result[name] = {
            "importance": value,
            "used_in": 0 if name == CONTROL else sum(name in trial.params for trial in whole),
            "shuffled_mean": statistics.fmean(chance),
            "shuffled_high": high,
            "beyond_chance": value > max(high, found.get(CONTROL, 0.0)),
        }
    return result


def _importance(whole: Sequence[Any], losses: Sequence[float]) -> dict[str, float]:
    """Of trials as if these had been their losses; not normalised, so that shuffled ones compare.
    Of a trial only the parameters that had a use in it were sampled (`space.suggest`)."""
    optuna = required("optuna")
    study = optuna.create_study()
    for trial, loss in zip(whole, losses, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.params, distributions=trial.distributions, value=loss
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `normalize` may still change, says Optuna
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    return dict(found)
