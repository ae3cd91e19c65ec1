"""Searches: Optuna studies whose trials are runs of the training command."""

import functools
import math
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import file_access
from crescendo.experiments.runtime.text import visible
from crescendo.experiments.sweeps.finished import check_points
from crescendo.experiments.sweeps.points import Point, space_text, spaces
from crescendo.experiments.sweeps.runner import Outcomes, losses, run_points


def search(folder: Path, texts: Sequence[str], trials: int, outcomes: Outcomes, seed: int = 0, **options: Any) -> None:
    """Runs an Optuna study until it has so many trials that ended, pruned ones included.

    The study is `study.db` (SQLite) in the folder. A trial that was running when a sweep was interrupted goes on first.
    What trial n draws depends on the seed, on n and on the trials before it, so a search that goes on draws what it
    would have drawn.

    Raises:
      UserError: a study with trials outside of the spaces, or whose runs had another configuration.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions, states = spaces(texts), optuna.trial.TrialState
    with file_access("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    study, drawn = open_study(folder / "study.db")
    ended = 0
    left, trial_of = [], {}
    reported: dict[str, int] = {}
    _check_known(folder, drawn)
    for frozen in drawn:
        if frozen.state == states.FAIL:
            continue
        if frozen.state == states.RUNNING and len(frozen.params) < len(distributions):
            study.tell(frozen.number, state=states.FAIL)  # ended while it was drawn
            continue
        _check_drawn(folder, frozen, distributions)
        check_points(folder, [_trial_point(frozen)], options["configs"], options["bindings"])
        if frozen.state == states.RUNNING:
            left.append(frozen)
            reported[_trial_point(frozen).name] = len(frozen.intermediate_values)
        else:
            ended += 1
            status = "done" if frozen.state == states.COMPLETE else "pruned"
            outcomes.put(_trial_point(frozen), status)
            outcomes.ended += 1
    budget = max(0, trials - ended)

    def ask() -> optuna.trial.Trial:
        of_trial = np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False))])
        study.sampler = optuna.samplers.TPESampler(seed=int(of_trial.generate_state(1)[0]))
        return study.ask(distributions)

    def draw() -> Point | None:
        nonlocal budget
        if budget == 0:
            return None
        budget -= 1
        # Optuna has no public way to take up a trial that another process left running.
        trial = optuna.trial.Trial(study, left.pop(0)._trial_id) if left else ask()
        point = _trial_point(trial)
        trial_of[point.name] = trial
        return point

    def report(point: Point) -> bool:
        """Tells the trial of the losses that it doesn't know yet; whether there were any."""
        new = losses(folder / point.name)[reported.get(point.name, 0) :]
        for examples, loss in new:
            trial_of[point.name].report(loss, examples)
        reported[point.name] = reported.get(point.name, 0) + len(new)
        return bool(new)

    def prune(point: Point) -> bool:
        return report(point) and trial_of[point.name].should_prune()

    def finish(point: Point, status: str, loss: float) -> None:
        report(point)  # the pruner compares others with those of a run that ended between two looks too
        if status == "done" and math.isfinite(loss):
            study.tell(trial_of[point.name], loss)
        elif status == "pruned":
            study.tell(trial_of[point.name], state=states.PRUNED)
        elif status != "interrupted":
            study.tell(trial_of[point.name], state=states.FAIL)

    run_points(folder, draw, finish, prune, outcomes, **options)


def open_study(path: Path) -> tuple[optuna.Study, list[optuna.trial.FrozenTrial]]:
    """The study of a file, a new one where there is none, and its trials so far.

    Raises:
      UserError: a file that is no study's.
    """
    # A path within a URL would end at "?", and "%41" in it become "A".
    connect = functools.partial(sqlite3.connect, path, check_same_thread=False)
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect}),
            study_name="sweep",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        return study, study.get_trials(deepcopy=False)
    # The last three are what Optuna raises at contents that are none of its own.
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ValueError, LookupError, TypeError) as error:
        reason = visible((str(error).splitlines() or [type(error).__name__])[0])[:200]
        raise UserError(f"{path} can't be opened ({reason}): restore that file, or give another --run") from None


def _check_known(folder: Path, drawn: Sequence[optuna.trial.FrozenTrial]) -> None:
    """That every trial's run is one of the study's: trials to come would take another's for theirs.

    Raises:
      UserError: names a run that isn't.
    """
    runs = {path.parent.name for path in folder.glob("trial-*/run.json")}
    if unknown := sorted(runs - {_trial_point(trial).name for trial in drawn}):
        raise UserError(
            f"{folder / unknown[0]} is the run of a trial that {folder / 'study.db'} doesn't hold: restore that "
            "file, or give another --run"
        )


def _check_drawn(
    folder: Path,
    trial: optuna.trial.FrozenTrial,
    distributions: Mapping[str, optuna.distributions.BaseDistribution],
) -> None:
    """That a trial could have been drawn from these spaces; they may have become wider.

    Raises:
      UserError: says what differs.
    """
    if set(trial.params) != set(distributions):
        raise UserError(f"{folder} searched {sorted(trial.params)}, not {sorted(distributions)}: give another --run")
    for name, space in distributions.items():
        earlier, value = trial.distributions[name], trial.params[name]
        try:
            optuna.distributions.check_distribution_compatibility(earlier, space)
            drawn = space._contains(space.to_internal_repr(value))
        except ValueError:
            drawn = False
        if not drawn:
            raise UserError(
                f"{folder} searched {name} = {space_text(earlier)}, and {_trial_point(trial).name} at {value} is no "
                f"draw of {space_text(space)}: give the same, a wider range of its kind, or another --run"
            )


def _trial_point(trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> Point:
    # A choice is gin text already; a number's repr is.
    return Point(f"trial-{trial.number:04}", {name: str(value) for name, value in trial.params.items()})
