"""Which runs are done already: those of the same configuration, and not only of the same name."""

from collections.abc import Collection, Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.run import is_complete, read_run
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.sweeps.points import Point
from crescendo.experiments.trainer.training import train


def is_finished(run: Path, *, but_for: Collection[str] = ()) -> bool:
    """Whether a folder holds a run that ended, of the configuration that was bound last, on the data that it reads now.

    Args:
      run: the run's folder, which need not be there.
      but_for: settings that may differ, beside the run's label.

    Raises:
      UserError: a run, ended or not, of another configuration, naming each setting that differs; one that ended on
        other data behind the same settings; data that can't be read.
    """
    if not (run / "run.json").is_file():
        return False
    earlier = read_run(run)
    try:
        before, now = configurables.differences(earlier.config, but_for={"train.label", *but_for})
    except SyntaxError:
        raise UserError(f"{run / 'config.gin'} is damaged: restore it, or give another folder with --run") from None
    run_folder.check_same(run, before, now)
    if not is_complete(run):
        return False
    if of_run := earlier.info.get("fixed", {}).get("data"):  # a run that goes on compares this itself
        data = configurables.arguments(train, ["data"])["data"]
        run_folder.check_same(run, {"data": of_run}, {"data": data.fingerprint})
    return True


def check_points(folder: Path, points: Sequence[Point], configs: Sequence[str], bindings: Sequence[str]) -> None:
    """That runs of a sweep's points that were begun before are those that would be trained now.

    Raises:
      UserError: as `is_finished`.
    """
    for point in points:
        if (folder / point.name / "run.json").is_file():
            configurables.bind(train, configs, [*bindings, *point.bindings])
            is_finished(folder / point.name)
