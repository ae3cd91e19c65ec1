"""Which runs are done already: those of the same configuration, and not only of the same name."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.data.subset import on_subset
from crescendo.experiments.runs import folder as run_folder
from crescendo.experiments.runs.run import is_complete, read_run
from crescendo.experiments.runtime import from_python
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
    from_python.check_repeatable(earlier.config, f"{run / 'config.gin'}")
    run_folder.check_same(run, *run_folder.changed_settings(run, configurables.differences, but_for))
    if not is_complete(run):
        return False
    if of_run := earlier.info.get("fixed", {}).get("data"):  # a run that goes on compares this itself
        given = configurables.arguments(train, ["data", "rows"])
        run_folder.check_same(run, {"data": of_run}, {"data": on_subset(given["data"], given["rows"]).fingerprint})
    return True


def check_points(folder: Path, points: Sequence[Point], configs: Sequence[str], bindings: Sequence[str]) -> None:
    """That runs of a sweep's points that were begun before are those that would be trained now.

    Raises:
      UserError: as `is_finished`.
    """
    for point in points:
        if (folder / point.name / "run.json").is_file():
            configurables.bind(train, configs, own=[*bindings, *point.bindings])
            is_finished(folder / point.name)


def check_used(points: Sequence[Point], configs: Sequence[str], bindings: Sequence[str], option: str) -> None:
    """That each point's run uses what the point sets, and one of them at least whatever else is bound.

    Args:
      points: all of the sweep's, or of a search's one for each of its choices.
      configs: gin files.
      bindings: gin statements of every point.
      option: by which the points' values are given.

    Raises:
      UserError: a value that makes no difference, by its name.
    """
    # What is used depends on what refers to what, and not on numbers.
    alike = {
        tuple((name, value if re.search("[@%]", value) else "") for name, value in p.values.items()): p for p in points
    }
    by_none: set[str] | None = None
    for point in alike.values():
        unused = configurables.unused(train, configs, bindings, point.bindings)
        for name, statement in zip(point.values, point.bindings, strict=True):
            if statement in unused:
                others = ", ".join(f"{other} = {value}" for other, value in point.values.items() if other != name)
                raise UserError(f"{option} {name}: {unused[statement]}{f' (at {others})' if others else ''}")
        by_none = set(unused) if by_none is None else by_none & set(unused)
    for statement in bindings:
        if statement in (by_none or ()):
            raise UserError(f"--set: {unused[statement]}")
