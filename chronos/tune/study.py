"""The study of a tuning, in Optuna's storage: a journal in a folder, or a database.

With `report`, the only module that talks to Optuna. A trial here has what `Study` keeps of it as
attributes: who works on it and since when, the rungs it was judged at, the folder it trains in. A
trial whose worker is gone is told as failed, and its choice queued again, to go on in the same
folder. Optuna prunes trials of one objective only, so what ended early is told as pruned with a
constraint "compute" for what it lacks: to the sampler it ranks behind every whole trial (c-TPE,
2211.14411).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chronos.common.disk.atomic import atomic_write, make_folder
from chronos.common.errors import ConfigError, CorruptFileError, UsageError
from chronos.tune.settings import Tuning
from chronos.tune.space import Values, own_values, suggest
from chronos.tune.written import required

if TYPE_CHECKING:
    import optuna

NAME, JOURNAL = "chronos", "study.journal"
CONTROL = "control"  # sampled in every trial, used by nothing: what chance makes of importances
ALIVE_S = 30.0  # between two signs of life of a worker
_GONE_S = 300.0  # without one, for workers of other machines
_ATTEMPTS = 4  # at opening a database
_AT_RANDOM = 8  # trials before the sampler learns
_TRIES = 3  # of one choice whose worker was killed each time
# States of a trial, as the log and `status` have them.
RUNNING, WHOLE, EARLY, INFEASIBLE, FAILED, INTERRUPTED = (
    "running", "whole", "ended early", "infeasible", "failed", "interrupted",
)  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """What a trial was found to be at one of its rungs."""

    number: int
    step: int
    values: tuple[float, ...]
    feasible: bool


@dataclass(frozen=True)
class TrialView:
    """A trial as the study has it.

    origin: the number of the trial whose choice and folder it goes on with, itself mostly. own: the
    user's recipe. repeat: the trial that it runs again with another seed, or None. values: of a
    whole trial, by objective. seed: of a repeat; others have the recipe's. measured: all that was
    found at the last rung. constraints: above 0 where violated. changes: keys of the recipe that it
    has other values of.
    """

    number: int
    state: str
    origin: int
    params: Values
    seed: int | None = None
    own: bool = False
    repeat: int | None = None
    values: tuple[float, ...] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0
    worker: str = ""
    changes: Values = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where it trains, below the study's folder."""
        return f"trials/{self.origin:04d}"


def me() -> dict[str, Any]:
    """This process, so that another one can tell whether it is still there."""
    import psutil  # here, and below: it does not import everywhere that we do

    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "began": psutil.Process(pid).create_time()}


def _gone(worker: Mapping[str, Any], alive: float) -> bool:
    import psutil

    if worker.get("host") != socket.gethostname():
        return time.time() - alive > _GONE_S
    try:
        began = psutil.Process(int(worker["pid"])).create_time()
    except (psutil.Error, KeyError, ValueError):
        return True
    return bool(abs(began - worker["began"]) > 1)


def storage_of(folder: Path, url: str | None) -> Any:
    """Optuna's storage of a study. Raises MissingBackendError, UsageError, CorruptFileError."""
    optuna = required("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is not None:
        return _database(url)
    make_folder(folder)
    path = folder / JOURNAL
    journal = optuna.storages.journal
    lock = journal.JournalFileOpenLock(str(path))
    mend_journal(path, lock)
    try:
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"the study cannot be read: {error}", str(path), "restore it, or name another folder"
        ) from None


def _database(url: str) -> Any:
    optuna, sqlalchemy = required("optuna"), required("sqlalchemy.exc")
    for attempt in range(_ATTEMPTS):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # SQLAlchemy's, and those of every database driver
            # Two workers that begin at once both make the tables, and one is refused.
            if attempt + 1 < _ATTEMPTS and isinstance(error, sqlalchemy.DatabaseError):
                time.sleep(0.5)
                continue
            text = str(error).partition("\n")[0]
            raise UsageError(
                f"the study's database cannot be opened: {text}",
                "--study",
                "give an URL of SQLAlchemy, such as sqlite:///study.db or postgresql+pg8000://... "
                "(pip install pg8000)",
            ) from None
    raise AssertionError


def mend_journal(path: Path, lock: Any) -> bool:
    """Take off a last line that was cut short when its writer was killed: what comes after it would
    make the journal unreadable. The torn one stays beside it. Returns whether there was one.

    lock: what its writers hold while a line grows; Optuna breaks one that is half a minute old.
    """
    if not path.exists() or _whole(path.read_bytes()):
        return False
    lock.acquire()
    try:
        found = path.read_bytes()
        if _whole(found):
            return False
        atomic_write(path.with_name(path.name + ".torn"), [found])
        atomic_write(path, [found[: found.rfind(b"\n") + 1]])
        return True
    finally:
        lock.release()


def _whole(journal: bytes) -> bool:
    return not journal or journal.endswith(b"\n")


class Study:
    """A study and its trials, shared by every worker that opens it."""

    def __init__(self, study: optuna.Study, objectives: Sequence[str]) -> None:
        self.study, self.objectives = study, tuple(objectives)

    @classmethod
    def open(cls, tuning: Tuning, folder: Path, url: str | None) -> Study:
        """The study of a tuning; a new one begins with the recipe itself. Raises ConfigError for
        one of another tuning, and what `storage_of` raises."""
        optuna = required("optuna")
        storage = storage_of(folder, url)
        settings = tuning.settings
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            directions=["minimize"] * len(tuning.objectives),
            load_if_exists=True,
            sampler=_sampler(settings.seed),
            pruner=_pruner(settings.pruner, settings.eta, tuning),
        )
        known = study.user_attrs.get("tuning")
        if known is None:
            study.set_user_attr("tuning", tuning.digest)
            study.set_user_attr("objectives", list(tuning.objectives))
            study.enqueue_trial(
                own_values(tuning.recipe, tuning.space),
                user_attrs={"own": True},
                skip_if_exists=True,
            )
        elif known != tuning.digest:
            raise ConfigError(
                "recipe, data or settings differ from the study's",
                str(folder),
                "restore them, or begin another study",
            )
        return cls(study, tuning.objectives)

    @classmethod
    def of(cls, folder: Path, url: str | None) -> Study:
        """A study that is there, to look at. Raises UsageError."""
        optuna = required("optuna")
        if url is None and not (folder / JOURNAL).exists():
            raise UsageError(
                "the folder holds no study", str(folder), "begin one: chronos tune start"
            )
        try:
            study = optuna.load_study(storage=storage_of(folder, url), study_name=NAME)
        except KeyError:
            raise UsageError("there is no study yet", url or str(folder)) from None
        return cls(study, study.user_attrs.get("objectives", ()))

    @property
    def stopping(self) -> bool:
        """Whether somebody asked its workers to stop."""
        return bool(self.study.user_attrs.get("stop"))

    def ask_to_stop(self, wanted: bool) -> None:
        if self.stopping != wanted:
            self.study.set_user_attr("stop", wanted)

    def trials(self) -> list[TrialView]:
        """All that were begun."""
        return [
            _view(trial)
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.name != "WAITING" and not trial.user_attrs.get("surplus")
        ]

    def count(self) -> int:
        """Trials that are done or at work, repeats and what was interrupted left out."""
        return sum(trial.repeat is None and trial.state != INTERRUPTED for trial in self.trials())

    def waiting(self) -> int:
        """Choices that are queued: the recipe, repeats, what killed workers left."""
        state = required("optuna").trial.TrialState.WAITING
        return len(self.study.get_trials(deepcopy=False, states=(state,)))

    def ask(self, tuning: Tuning) -> Asked:
        """The next trial, now this process'."""
        trial = self.study.ask()
        trial.set_user_attr("worker", me())
        trial.set_user_attr("alive", time.time())
        values = suggest(trial, tuning.recipe, tuning.space)
        trial.suggest_float(CONTROL, 0.0, 1.0)
        return Asked(self, trial, values)

    def recover(self) -> list[int]:
        """Queue again what workers that are gone were doing. Returns those trials' numbers."""
        optuna = required("optuna")
        running = optuna.trial.TrialState.RUNNING
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):
            attrs = trial.user_attrs
            if "worker" not in attrs:  # asked for this very moment, or killed in it
                begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
                if time.time() - begun < ALIVE_S:
                    continue
            elif not _gone(attrs["worker"], attrs.get("alive", 0.0)):
                continue
            if self._again(trial, "its worker was killed"):
                found.append(trial.number)
        return found

    def _again(self, trial: optuna.trial.FrozenTrial, why: str) -> bool:
        """End a trial, and queue its choice to go on in its folder. False where another worker did
        so first."""
        optuna = required("optuna")
        tries = int(trial.user_attrs.get("tries", 1))
        last = tries >= _TRIES and why != INTERRUPTED
        with contextlib.suppress(KeyError):
            storage, number = self.study._storage, trial._trial_id
            storage.set_trial_user_attr(number, "why", why)
            if not last:
                storage.set_trial_user_attr(number, "again", True)
        try:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        if last:
            return True
        kept = {"own", "repeat", "seed", "rungs", "measured", "changes"}
        attrs = {k: v for k, v in trial.user_attrs.items() if k in kept}
        attrs["origin"] = trial.user_attrs.get("origin", trial.number)
        attrs["tries"] = tries if why == INTERRUPTED else tries + 1
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        self.study.enqueue_trial(dict(params), user_attrs=attrs)
        return True

    def repeat(self, number: int, params: Values, seed: int) -> None:
        """Queue a trial's choice with another seed."""
        self.study.enqueue_trial(dict(params), user_attrs={"repeat": number, "seed": seed})


class Asked:
    """A trial of this process."""

    def __init__(self, study: Study, trial: optuna.Trial, values: Values) -> None:
        self.study, self.trial, self.values = study, trial, values
        attrs = trial.user_attrs
        self.number = trial.number
        self.origin = int(attrs.get("origin", trial.number))
        self.own = bool(attrs.get("own"))
        self.repeat: int | None = attrs.get("repeat")
        self.seed: int | None = attrs.get("seed")
        self.rungs: list[dict[str, Any]] = list(attrs.get("rungs", []))
        self.measured: dict[str, float] = dict(attrs.get("measured", {}))

    def alive(self) -> None:
        self.trial.set_user_attr("alive", time.time())

    def keep_changes(self, changes: Values) -> None:
        """What the choice changes of the recipe, for who applies it."""
        self.trial.set_user_attr("changes", changes)

    def judged(
        self, step: int, values: Sequence[float], measured: Mapping[str, float], feasible: bool
    ) -> None:
        self.rungs.append({"step": step, "values": list(values), "feasible": feasible})
        self.measured = dict(measured)
        self.trial.set_user_attr("rungs", self.rungs)
        self.trial.set_user_attr("measured", self.measured)

    def prune(self, step: int, value: float) -> bool:
        """What Optuna's pruner says of a trial of one objective."""
        self.trial.report(value, step)
        return bool(self.trial.should_prune())

    def whole(self, values: Sequence[float], constraints: Mapping[str, float]) -> None:
        self._constrain(constraints)
        self.study.study.tell(self.trial, list(values))

    def early(self, constraints: Mapping[str, float], why: str) -> None:
        """It did not come to its end: it lacks compute, or must not be what it is."""
        self._constrain(constraints)
        self._end(why, "PRUNED")

    def surplus(self) -> None:
        """Another worker was first: it is as if it had not been asked for."""
        self.trial.set_user_attr("surplus", True)
        self._end("", "FAIL")

    def failed(self, why: str) -> None:
        """Nothing is learned of it."""
        self._end(why, "FAIL")

    def interrupted(self) -> None:
        """Saved: it goes on when a worker is there again."""
        frozen = self.study.study.get_trials(deepcopy=False)[self.number]
        self.study._again(frozen, INTERRUPTED)

    def _constrain(self, constraints: Mapping[str, float]) -> None:
        for name, value in constraints.items():
            self.trial.set_constraint(name, float(value))

    def _end(self, why: str, state: str) -> None:
        self.trial.set_user_attr("why", why)
        states = required("optuna").trial.TrialState
        self.study.study.tell(self.trial, state=states[state])


def _view(trial: optuna.trial.FrozenTrial) -> TrialView:
    attrs, name = trial.user_attrs, trial.state.name
    violated = {k for k, v in trial.constraints.items() if v > 0}
    state = {"RUNNING": RUNNING, "COMPLETE": WHOLE, "PRUNED": EARLY, "FAIL": FAILED}[name]
    if attrs.get("again"):
        state = INTERRUPTED
    elif violated - {"compute"} and state in (WHOLE, EARLY):
        state = INFEASIBLE
    begun, ended = trial.datetime_start, trial.datetime_complete
    seconds = (ended - begun).total_seconds() if begun and ended else 0.0
    worker = attrs.get("worker", {})
    return TrialView(
        trial.number,
        state,
        int(attrs.get("origin", trial.number)),
        dict(trial.params),
        attrs.get("seed"),
        bool(attrs.get("own")),
        attrs.get("repeat"),
        tuple(trial.values or ()) if name == "COMPLETE" else (),
        dict(trial.constraints),
        tuple(_rungs(attrs.get("rungs", []))),
        dict(attrs.get("measured", {})),
        attrs.get("why", ""),
        seconds,
        f"{worker.get('host', '')}:{worker.get('pid', '')}",
        dict(attrs.get("changes", {})),
    )


def _rungs(saved: Sequence[Mapping[str, Any]]) -> Iterator[Rung]:
    for number, rung in enumerate(saved):
        yield Rung(number, rung["step"], tuple(rung["values"]), rung["feasible"])


def _sampler(seed: int) -> Any:
    """TPE that is seeded anew by each trial's number: workers draw apart from each other, and one
    that was killed goes on as it would have."""
    optuna = required("optuna")

    class ByNumber(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined]
        def before_trial(self, study: Any, trial: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `multivariate` may still change, says Optuna
                self._tpe = optuna.samplers.TPESampler(
                    multivariate=True,
                    group=True,
                    seed=(seed * 1_000_003 + trial.number) % (1 << 32),
                    n_startup_trials=_AT_RANDOM,
                )
            self._tpe.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._tpe.infer_relative_search_space(study, trial)

        def sample_relative(self, *args: Any) -> Any:
            return self._tpe.sample_relative(*args)

        def sample_independent(self, *args: Any) -> Any:
            return self._tpe.sample_independent(*args)

    return ByNumber()


def _pruner(name: str, eta: int, tuning: Tuning) -> Any:
    pruners = required("optuna").pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=3)
    if name == "hyperband":
        steps = tuning.recipe.cadence.steps
        first = max(1, round(steps / eta ** (tuning.settings.rungs - 1)))
        return pruners.HyperbandPruner(first, steps, eta)
    return pruners.NopPruner()
