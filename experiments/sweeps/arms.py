"""Arms compared: each tries every learning rate with seed 0 and goes on with its own best, over all seeds.

An arm is a name and a mapping from gin names to Python values. Every run is a folder of its own, and a finished one is
never run again, so that the same command goes on where it was interrupted; one of another configuration is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.configs.statements import Bindings, Value, check_not_set, statements
from crescendo.experiments.reports.compare import compare, comparison_table
from crescendo.experiments.reports.equal_loss import equal_loss_table, reached
from crescendo.experiments.reports.write import write_report
from crescendo.experiments.runs.run import last_validation, read_run
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.runtime.files import replace_json
from crescendo.experiments.runtime.interruption import deadline, interrupted_at
from crescendo.experiments.sweeps.finished import is_finished
from crescendo.experiments.sweeps.runner import finite_loss
from crescendo.experiments.trainer.training import train
from crescendo.pallas_kernels.console import plain_console

# The macro that a swept learning rate binds.
LEARNING_RATE = "LEARNING_RATE"


class Trial(NamedTuple):
    """One run of a comparison, for what an arm computes of it.

    Attributes:
      arm: its name.
      learning_rate: that it tries; None where none is swept.
      seed: of the run.
      folder: the run's.
      before: the runs of the earlier arms with the same seed, by arm, each at its arm's best learning rate.
    """

    arm: str
    learning_rate: float | None
    seed: int
    folder: Path
    before: Mapping[str, Path]


# A value that depends on the trial is a function of it, called when the trial is about to train.
type Arm = Mapping[str, Value | Callable[[Trial], Value]]


class Outcome(NamedTuple):
    """What came of an arm.

    Attributes:
      learning_rate: its best; None where none was swept.
      sweep: the last validation loss with seed 0, by learning rate.
      runs: the run folders at the best learning rate, by seed.
      records: their last validation records.
    """

    learning_rate: float | None
    sweep: dict[float, float]
    runs: list[Path]
    records: list[dict[str, Any]]


def check_known(option: str, names: Sequence[str], known: Sequence[str], what: str = "arm") -> None:
    """Raises UserError for a name that an option doesn't take.

    >>> check_known("--arms", ["large"], ["constant", "large"])
    """
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: no such {what}; there are {', '.join(known)}")


def check_shares(option: str, shares: Sequence[float], what: str, *, least: int = 0) -> None:
    """Raises UserError unless an option's numbers are increasing and between 0 and 1, at least so many of them.

    >>> check_shares("--kept", [0.2, 0.5], "shares")
    """
    increasing = sorted(set(shares)) == list(shares) and all(0 < share < 1 for share in shares)
    if not increasing or len(shares) < least:
        raise UserError(f"{option} {' '.join(map(str, shares))}: give {what} between 0 and 1, increasing")


def compare_arms(
    folder: Path,
    arms: Mapping[str, Arm],
    *,
    command: str,
    title: str,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    common: Mapping[str, Value] = {},
    options: Mapping[str, str] = {},
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, Outcome]:
    """Trains every arm, prints the comparison, and writes `comparison.json` and `report/`.

    Args:
      folder: gets a run folder for each trial: ARM, with `-lrRATE` where rates are swept and `-seedN` where seeds are.
      arms: by name; the first is the baseline.
      command: as it is typed, for messages.
      title: of the report.
      configs: gin files.
      bindings: the user's gin statements; none may bind what the comparison binds itself.
      common: what is bound in every arm.
      options: for each binding of the arms or of `common` the command's option that sets it, where there is one.
      learning_rates: each arm tries all of them with seed 0 and goes on with its best; none: the config's own.
      seeds: how many, from 0.
      minutes: stop then, resumable; None: run to the end.

    Returns:
      What came of each arm, by its name.

    Raises:
      UserError: for a value out of its range, a user's binding of what the comparison binds itself, or a folder with a
        run of another configuration.
      Interrupted: when `minutes` are over or the process is asked to stop, with trials left.
    """
    stop, console = deadline(minutes), plain_console()
    if seeds < 1:
        raise UserError(f"--seeds {seeds} must be at least 1")
    rates = list(dict.fromkeys(learning_rates))
    for rate in rates:
        if not 0 < rate < math.inf:
            raise UserError(f"--learning-rates {rate} must be above 0 and finite")
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UserError(f"--learning-rates {' '.join(map(repr, rates))}: two differ by less than their folders' names")
    options = {"train.seed": "--seeds N", **({LEARNING_RATE: "--learning-rates"} if rates else {}), **options}
    own = [*common, "train.seed", *(name for arm in arms.values() for name in arm), *([LEARNING_RATE] if rates else [])]
    check_not_set(command, {name: options.get(name) for name in own}, bindings)
    _check_used(command, configs, arms, {**common, "train.seed": 0}, rates, bindings, options)
    outcomes: dict[str, Outcome] = {}

    def run(name: str, rate: float | None, seed: int) -> tuple[Path, dict[str, Any]]:
        suffix = "" if rate is None else f"-lr{rate:g}"
        path = folder / (name + suffix + (f"-seed{seed}" if suffix or seeds > 1 else ""))
        before = {earlier: outcome.runs[seed] for earlier, outcome in outcomes.items()}
        trial = Trial(name, rate, seed, path, before)
        of_arm = {key: value(trial) if callable(value) else value for key, value in arms[name].items()}
        swept = {} if rate is None else {LEARNING_RATE: rate}
        with user_values():
            every = [*statements({**common, "train.seed": seed}), *statements(of_arm), *bindings, *statements(swept)]
        bound = configurables.bind(train, configs, own=every)
        if is_finished(path):
            return path, last_validation(path)
        console.rule(path.name)
        with interrupted_at(stop):
            return path, bound(run=str(path), label=path.name)

    for name in arms:
        tried: list[float | None] = [*rates] or [None]
        first = {rate: run(name, rate, 0) for rate in tried}
        losses = {rate: record["loss"] for rate, (_, record) in first.items()}
        best = min(losses, key=lambda rate: finite_loss(losses[rate]))
        of_best = [first[best], *(run(name, best, seed) for seed in range(1, seeds))]
        sweep = {rate: loss for rate, loss in losses.items() if rate is not None}
        outcomes[name] = Outcome(best, sweep, [path for path, _ in of_best], [record for _, record in of_best])
    _report(folder, outcomes, title, console)
    return outcomes


def _check_used(
    command: str,
    configs: Sequence[str],
    arms: Mapping[str, Arm],
    common: Bindings,
    rates: Sequence[float],
    bindings: Sequence[str],
    options: Mapping[str, str | None],
) -> None:
    """That each arm uses what it binds, and at least one of them whatever else is bound: an option would be void."""
    shared: Bindings = {**common, **({LEARNING_RATE: rates[0]} if rates else {})}
    by_nobody: dict[str, str] | None = None
    for arm in arms.values():
        # What depends on the trial stands in for itself by nothing: it is followed, and not called.
        of_arm = {name: None if callable(value) else value for name, value in arm.items()}
        with user_values():
            own = {
                statement: name
                for each in (shared, of_arm)
                for name in each
                for statement in statements({name: each[name]})
            }
        unused = configurables.unused(train, configs, bindings, list(own))
        for statement, why in unused.items():
            if own.get(statement) in of_arm:
                raise UserError(_void(command, own[statement], options, why))
        by_nobody = {statement: why for statement, why in unused.items() if by_nobody is None or statement in by_nobody}
    for statement, why in (by_nobody or {}).items():
        if statement in own:
            raise UserError(_void(command, own[statement], options, why))
        raise UserError(f"--set: {why}")


def _void(command: str, name: str, options: Mapping[str, str | None], why: str) -> str:
    option = (options.get(name) or "").partition(" ")[0]
    said = f"{command} sets {name}{f' by {option}' if option else ''}, which nothing reads"
    if "." in name:
        return f"{said}: {why}"
    return f"{said}: write %{name} where the configs and --set give a value instead"


def _report(folder: Path, outcomes: Mapping[str, Outcome], title: str, console: Console) -> None:
    runs = [run for outcome in outcomes.values() for run in outcome.runs]
    page = write_report(runs, folder / "report", title=title)
    compared = compare([read_run(run) for run in runs])
    summary = [
        {
            "arm": name,
            "learning_rate": outcome.learning_rate,
            "sweep": {f"{rate:g}": loss for rate, loss in outcome.sweep.items()},
            "losses": [record["loss"] for record in outcome.records],
            "steps": arm.steps,
            "steps_saved": arm.steps_saved,
            "seconds": arm.seconds,
            "at_equal_loss": reached(arm, compared[0])._asdict(),
        }
        for (name, outcome), arm in zip(outcomes.items(), compared, strict=True)
    ]
    replace_json(folder / "comparison.json", summary)
    console.print(comparison_table(runs))
    console.print(equal_loss_table(compared))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
