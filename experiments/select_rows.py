"""Score a run's training rows by its model, and keep some of them: `crescendo select_rows RUN --score loss`."""

import argparse
import functools
from collections.abc import Sequence

from crescendo.experiments.configs import own_modules
from crescendo.experiments.data.subset import write_subset
from crescendo.experiments.runtime.cache import use_compilation_cache
from crescendo.experiments.runtime.cli import run_command
from crescendo.experiments.runtime.command import check_not_given, plain_parser
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.files import local_path
from crescendo.experiments.scoring.opened import open_run
from crescendo.experiments.scoring.scores import SCORES, Options, kept, scored
from crescendo.pallas_kernels.console import plain_console

EXAMPLES = """examples:
  crescendo select_rows runs/debug --score loss --out loss.npz
  crescendo select_rows runs/debug --score loss --out loss.npz --keep 0.5 --prefer high --subset hard.npz
  crescendo select_rows runs/debug --score facility_location --block-rows 4096 --out facility.npz
  crescendo select_rows runs/debug --score random --seed 1 --out random.npz --keep 0.5 --subset half.npz
  crescendo train --config debug.gin --set "train.rows = 'hard.npz'" --run runs/hard

Scores are of all rows of the run's data, also where it was trained on some of them; those in --out already are not
computed again. The same command goes on where it was interrupted."""

DEFAULTS = Options()


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = plain_parser("Score a run's training rows by its model, and keep some of them.", EXAMPLES)
    own_modules.add_option(result)
    add = result.add_argument
    add("run", type=local_path, metavar="RUN", help="a run's folder")
    add("--score", required=True, choices=tuple(SCORES), help="what the rows are ordered by")
    add("--out", required=True, type=local_path, metavar="FILE", help="the file for the scores, such as loss.npz")
    add("--at", type=int, metavar="EXAMPLES", help="the checkpoint (default: the newest)")
    add("--clusters", type=int, default=DEFAULTS.clusters, metavar="N", help="prototypes (default %(default)s)")
    add("--bins", type=int, default=DEFAULTS.bins, metavar="N", help="of dataset_quantization (default %(default)s)")
    says = "about how many rows a greedy choice is made among (default %(default)s)"
    add("--block-rows", type=int, default=DEFAULTS.block_rows, metavar="N", help=says)
    add("--seed", type=int, default=DEFAULTS.seed, metavar="N", help="of all that is drawn (default %(default)s)")
    add("--keep", type=float, metavar="SHARE", help="write the rows with the best scores, this share of each source's")
    add("--prefer", choices=("high", "low"), default="high", help="which scores are the best (default high)")
    add("--subset", type=local_path, metavar="FILE", help="the file for these rows, which train.rows takes")
    return result


def _check(options: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """That the values lie in their ranges, and that none is for nothing."""
    for name in ("clusters", "bins", "block_rows"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if not 0 <= arguments.seed < 2**31:
        raise UserError(f"--seed {arguments.seed} must be at least 0 and below 2^31")
    takes = SCORES[arguments.score].options
    without = [name for name in Options._fields if name not in takes]
    check_not_given(options, arguments, without, f" is nothing that --score {arguments.score} takes: leave it out")
    if arguments.keep is None:
        check_not_given(options, arguments, ["prefer", "subset"], " is of rows that are kept: add --keep SHARE")
    elif not 0 < arguments.keep <= 1:
        raise UserError(f"--keep {arguments.keep:g} must be above 0 and at most 1")
    elif arguments.subset is None:
        raise UserError(f"--keep {arguments.keep:g} needs --subset FILE, where the rows are written")
    elif arguments.subset == arguments.out:
        raise UserError(f"--subset {arguments.subset} is the file of the scores: give another one")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser()
    arguments = options.parse_args(argv)
    _check(options, arguments)
    use_compilation_cache()
    say = functools.partial(plain_console().print, highlight=False, soft_wrap=True)
    opened = open_run(arguments.run, at=arguments.at)
    taken = Options(**{name: getattr(arguments, name) for name in Options._fields})
    scores = scored(opened, arguments.score, taken, arguments.out, say)
    lowest, highest, mean = scores.scores.min(), scores.scores.max(), scores.scores.mean()
    say(f"{arguments.out}: {len(scores.scores):,} rows, {scores.by}; {lowest:.4g} to {highest:.4g}, mean {mean:.4g}")
    if arguments.keep is not None:
        chosen = kept(scores, arguments.keep, low=arguments.prefer == "low")
        write_subset(arguments.subset, chosen)
        say(f"{arguments.subset}: {len(chosen.rows):,} of {chosen.of_rows:,} rows, by {chosen.by}")


if __name__ == "__main__":
    run_command(main)
