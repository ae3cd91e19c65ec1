"""Compare rows that scores keep with as many random ones, at several shares.

Sorscher et al. 2022, "Beyond neural scaling laws": with a good score the error falls faster than by a power of the
number of examples, where hard ones are kept of plenty of data and easy ones of few. Here every arm trains on as many
examples, each share of the rows at its own best learning rate, and scores are those of the arm that has all rows.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from crescendo.experiments.configs import binding as configurables
from crescendo.experiments.data.subset import write_subset
from crescendo.experiments.papers import Paper
from crescendo.experiments.runtime import command
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.scoring.opened import open_run
from crescendo.experiments.scoring.scores import SCORES, Options, kept, scored
from crescendo.experiments.sweeps.arms import Arm, Trial, check_known, check_shares, compare_arms
from crescendo.pallas_kernels.console import plain_console
from crescendo.ranges import Count

PAPER = Paper(
    title="Beyond neural scaling laws: beating power law scaling via data pruning",
    authors="Sorscher et al. 2022",
    arxiv="2206.14486",
    claim="With a good score error falls exponentially with the number of examples kept, and not by a power; by the "
    "distance to self-supervised prototypes 80% of ImageNet do for all.",
    command="crescendo data_pruning --kept 0.2 --by random loss-high loss-low centroid_distance-high "
    "centroid_distance-low --set 'TOTAL_EXAMPLES = 2048' --set 'text_data.documents = @text_files()' "
    "--set 'text_files.paths = [\"pages/*.txt\"]'",
    device="two CPU cores",
    expected="By one seed, with a fifth of 3,566 rows: those near prototypes end 0.08 nats below random ones, those "
    "far from them 0.24 above, those of the highest loss 0.27 above.",
)

EXAMPLES = """examples:
  crescendo data_pruning --kept 0.2 0.6 --by random loss-high loss-low
  crescendo data_pruning --config images_resnet.gin --learning-rates 1e-3 2e-3 4e-3 --seeds 3
  crescendo data_pruning --config lm_30m.gin --by random facility_location-high --learning-rates 1e-3 2e-3

The same command goes on where it was interrupted; a finished run is never run again."""

ALL = "all"


def make_arms(kept_shares: Sequence[float], by: Sequence[str], clusters: int = Options().clusters) -> dict[str, Arm]:
    """What each arm binds, by its name: all rows, then each score at each share.

    Args:
      kept_shares: of the rows, between 0 and 1.
      by: "random", or a score and whether its high or its low rows are kept, such as "loss-high".
      clusters: how many prototypes.

    Raises:
      UserError: for shares that aren't between 0 and 1, and what is no score.

    >>> list(make_arms([0.2, 0.5], ["random", "loss-low"]))
    ['all', 'random-20', 'loss-low-20', 'random-50', 'loss-low-50']
    """
    check_shares("--kept", kept_shares, "shares")
    every = ["random", *(f"{name}-{side}" for name in SCORES if name != "random" for side in ("high", "low"))]
    check_known("--by", by, every, "choice")
    return {
        ALL: {},
        **{
            f"{name}-{100 * share:g}": {"train.rows": functools.partial(_selected, name, share, clusters)}
            for share in kept_shares
            for name in dict.fromkeys(by)
        },
    }


def _selected(name: str, share: float, clusters: int, trial: Trial) -> str:
    """The file of the rows that an arm keeps, by the model of the arm that has all rows and the same seed."""
    score, _, side = name.partition("-")
    of, say = trial.before[ALL], functools.partial(plain_console().print, highlight=False, soft_wrap=True)
    folder = of.with_name("rows")
    folder.mkdir(exist_ok=True)
    scores = folder / f"{of.name}-{score}.npz"
    path = folder / f"{of.name}-{name}-{100 * share:g}.npz"
    if not path.exists():
        options = Options(clusters=clusters, seed=trial.seed)
        write_subset(path, kept(scored(open_run(of), score, options, scores, say), share, low=side == "low"))
    return str(path)


def data_pruning(
    run: Path = Path("runs/data_pruning"),
    *,
    configs: Sequence[str] = ("debug.gin",),
    bindings: Sequence[str] = (),
    kept: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    by: Sequence[str] = ("random", "loss-high", "loss-low", "centroid_distance-high", "centroid_distance-low"),
    clusters: Count = 64,
    learning_rates: Sequence[float] = (),
    seeds: int = 1,
    minutes: float | None = None,
) -> dict[str, list[dict]]:
    """Compares rows that scores keep with as many random ones, and with all.

    Every arm trains on as many examples, with every seed; a table is printed and a report written. Rows are scored by
    the run of the first arm, on all rows, with the same seed.

    Args:
      run: the folder for the runs, their rows, `comparison.json` and the report.
      configs: gin files; of macros `LEARNING_RATE` where learning rates are given.
      bindings: further gin statements.
      kept: shares of the rows, increasing.
      by: random, or a score of `select_rows` and which side of it, such as loss-high.
      clusters: how many prototypes.
      learning_rates: each arm tries all with seed 0 and goes on with its best; by default the config's own.
      seeds: how many seeds, from 0.
      minutes: stop then; the same command goes on.

    Returns:
      The last validation record of each run at its arm's best learning rate, by arm.
    """
    outcomes = compare_arms(
        run,
        make_arms(kept, by, clusters),
        command="data_pruning",
        title="Rows kept by scores compared",
        configs=configs,
        bindings=bindings,
        options={"train.rows": "--by"},
        learning_rates=learning_rates,
        seeds=seeds,
        minutes=minutes,
    )
    return {name: outcome.records for name, outcome in outcomes.items()}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    return command.make_parser(data_pruning, EXAMPLES, configurables.parser)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command.call(data_pruning, parser().parse_args(argv))


if __name__ == "__main__":
    run_command(main)
