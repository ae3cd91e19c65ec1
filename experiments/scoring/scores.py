"""Scores of a run's training rows: what there is, their file, and the rows that are kept by them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crescendo.experiments.data.documents import digest
from crescendo.experiments.data.mixed_rows import MixedRows
from crescendo.experiments.data.npz import Expected, check_arrays, read_npz
from crescendo.experiments.data.subset import Chosen, write_arrays
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.scoring import clusters, rows, submodular
from crescendo.experiments.scoring.opened import Opened
from crescendo.experiments.scoring.pieces import by_piece

FORMAT = 1  # of what scores mean: to be raised when the same settings give others
PIECE_ROWS = 4096


class Options(NamedTuple):
    """What scores depend on beside the model and the rows.

    Attributes:
      clusters: how many prototypes.
      bins: of a dataset quantization.
      block_rows: about how many rows a greedy choice is made among.
      seed: of prototypes' beginnings, blocks, bins and random scores.
    """

    clusters: int = 64
    bins: int = 10
    block_rows: int = 1024
    seed: int = 0


class Score(NamedTuple):
    """A kind of score.

    Attributes:
      measure: from an opened run to a function of row numbers, what is computed of each row; None: nothing is.
      finish: what is measured of all rows, and the options, to scores `[N]`.
      options: those that it takes, by name.
    """

    measure: Callable[[Opened], rows.Measure] | None
    finish: Callable[[np.ndarray, Options], np.ndarray]
    options: tuple[str, ...] = ()


def _of_clusters(score: Callable) -> Callable[[np.ndarray, Options], np.ndarray]:
    def finish(features: np.ndarray, options: Options) -> np.ndarray:
        if options.clusters > len(features):
            raise UserError(f"--clusters {options.clusters} are more than the {len(features):,} rows: use fewer")
        x_ND = clusters.unit_rows(features)
        return score(x_ND, clusters.prototypes(x_ND, options.clusters, options.seed))

    return finish


def _facility(features: np.ndarray, options: Options) -> np.ndarray:
    return submodular.facility_gains(clusters.unit_rows(features), options.block_rows, options.seed)


def _quantized(features: np.ndarray, options: Options) -> np.ndarray:
    return submodular.quantized_ranks(clusters.unit_rows(features), options.bins, options.block_rows, options.seed)


def _random(numbers: np.ndarray, options: Options) -> np.ndarray:
    return np.random.default_rng(options.seed).permutation(len(numbers)).astype(np.float32)


SCORES: dict[str, Score] = {
    "loss": Score(rows.losses, lambda losses, options: losses),
    "gradient_norm": Score(rows.gradient_norms, lambda norms, options: norms),
    "centroid_distance": Score(rows.features, _of_clusters(clusters.centroid_distances), ("clusters", "seed")),
    "cluster_entropy": Score(rows.features, _of_clusters(clusters.cluster_entropies), ("clusters", "seed")),
    "facility_location": Score(rows.features, _facility, ("block_rows", "seed")),
    "dataset_quantization": Score(rows.features, _quantized, ("bins", "block_rows", "seed")),
    "random": Score(None, _random, ("seed",)),
}
"""By the names that users type."""

_ARRAYS = {
    **{"scores": Expected("f", 1), "sources": Expected("iu", 1)},
    **{name: Expected("U", 0) for name in ("data", "by", "made_of")},
}


class Scores(NamedTuple):
    """What a file of scores holds.

    Attributes:
      scores: of every row, float32 `[N]`.
      sources: how many rows each source has, one behind the other, int64 `[S]`.
      data: the fingerprint of the data.
      by: for people: which scores, by which model.
      made_of: a hash of all that they follow from.
    """

    scores: np.ndarray
    sources: np.ndarray
    data: str
    by: str
    made_of: str


def scored(opened: Opened, name: str, options: Options, path: Path, say: Callable[[str], None]) -> Scores:
    """The scores of a run's training rows; read, where the file has them already, else computed and written there.

    What was computed of rows when the process was asked to stop stays in a folder beside the file, and is gone on from.

    Args:
      opened: the run.
      name: a key of `SCORES`.
      options: of those that the score takes no others count.
      path: of the file.
      say: prints a line.

    Raises:
      UserError: for a file of other scores, and for scores that aren't finite.
    """
    task, score = opened.task, SCORES[name]
    taken = {option: getattr(options, option) for option in score.options}
    model = {} if score.measure is None else {"run": str(opened.run.folder), "examples": opened.examples_seen}
    by = name + (f" of {opened.run.folder} at {opened.examples_seen:,} examples" if model else "")
    by += "".join(f", {option.replace('_', ' ')} {value:,}" for option, value in taken.items())
    begun = opened.run.info.get("started", "") if model else ""
    made_of = digest([FORMAT, name, taken, model, begun, task.data.fingerprint])
    if path.exists():
        found = read_scores(path)
        if found.made_of != made_of:
            raise UserError(f"{path} holds other scores ({found.by}): give another --out, or remove it")
        say(f"{path} has the scores already")
        return found
    count = len(task.train)
    numbers = np.arange(count)
    if score.measure is None:
        values = score.finish(numbers, options)
    else:
        pieces = path.with_name(f"{path.name}.{made_of[:8]}.pieces")
        piece_rows = -(-PIECE_ROWS // opened.microbatch_examples) * opened.microbatch_examples
        measured = by_piece(score.measure(opened), count, piece_rows, pieces, say)
        bad = np.flatnonzero(~np.isfinite(measured.reshape(count, -1)).all(axis=1))
        if len(bad):
            shutil.rmtree(pieces)
            raise UserError(f"--score {name}: what the model makes of row {bad[0]:,} isn't finite: take another --at")
        values = score.finish(measured, options)
    train = task.data.train
    lengths = [len(part) for part in train.parts.values()] if isinstance(train, MixedRows) else [count]
    result = Scores(values.astype(np.float32), np.array(lengths, np.int64), task.data.fingerprint, by, made_of)
    write_arrays(path, result._asdict())
    if score.measure is not None:
        shutil.rmtree(pieces)
    return result


def read_scores(path: Path) -> Scores:
    """A file of scores.

    Raises:
      UserError: if it isn't one.
    """
    arrays = read_npz(path)
    check_arrays(arrays, _ARRAYS, str(path))
    if arrays["sources"].sum() != len(arrays["scores"]) or min(arrays["sources"], default=0) < 1:
        raise UserError(
            f"{path}: sources must be counts of rows that add up to the {len(arrays['scores']):,} scores, and are "
            f"{arrays['sources'].tolist()}"
        )
    texts = {name: str(arrays[name]) for name in ("data", "by", "made_of")}
    return Scores(arrays["scores"].astype(np.float32), arrays["sources"].astype(np.int64), **texts)


def kept(scores: Scores, share: float, *, low: bool = False) -> Chosen:
    """The rows with the highest scores, or the lowest: so many of each source, at least one.

    Of equal scores the first row's counts as the higher one, and as the lower one.

    Args:
      scores: of all rows.
      share: of each source's rows, in (0, 1], rounded to whole ones.
      low: keep the lowest.

    >>> of = Scores(np.array([3, 1, 2, 9, 8], np.float32), np.array([3, 2]), "aa", "hand", "")
    >>> kept(of, 0.5).rows.tolist(), kept(of, 0.5, low=True).rows.tolist()
    ([0, 2, 3], [1, 2, 4])
    """
    rows_of, begin = [], 0
    for count in scores.sources.tolist():
        own = scores.scores[begin : begin + count]
        ranked = np.argsort(own if low else -own, kind="stable")
        rows_of.append(begin + ranked[: max(1, round(share * count))])
        begin += count
    by = f"{'lowest' if low else 'highest'} {share:.4g} of {scores.by}"
    return Chosen(np.sort(np.concatenate(rows_of)), len(scores.scores), scores.data, by)
