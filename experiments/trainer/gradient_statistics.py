"""The gradient of a batch and what else batch-size policies and transforms want to know of it.

What is measured only on demand is a `GradientStatistic`: a new one is an entry in `STATISTICS` and the fields of
`BatchStats` that it fills.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crescendo import parallel
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import EXAMPLE, Task
from crescendo.models.norm_probes import example_squared_norms, norm_probes, norm_scales, with_probes
from crescendo.models.parts import Parts
from crescendo.optim.batch_size import BatchStats
from crescendo.optim.noise_scale import layer_squared_norms
from crescendo.parallel.accumulate import NOT_SPREAD, inner_products, over_weight, squared_norm

Tree = Any


class Measured(NamedTuple):
    """What a statistic is finished from.

    Attributes:
      mean_gradients: of the batch.
      squares: what the statistic's `measure` gave of every part, `[k_max * parts, ...]`.
      deviations: of the parts' gradients from the mean; None without a second pass.
      parts: int32, how many there were.
      examples: in a part.
    """

    mean_gradients: Tree
    squares: Tree
    deviations: parallel.Deviations | None
    parts: jax.Array
    examples: int


class GradientStatistic(NamedTuple):
    """One thing to know of a batch's gradients.

    Attributes:
      measure: `(a part's gradients, those of the norm layers' probes) -> sums of squares`; None: nothing of parts.
      finish: `Measured -> the fields of BatchStats that it fills`.
      probes: whether the gradients of normalisation layers are wanted per example (`models.norm_probes`).
      passes: how often the gradients are computed: 1 or 2.
    """

    measure: Callable[[Tree, Tree], Tree] | None
    finish: Callable[[Measured], dict[str, jax.Array]]
    probes: bool = False
    passes: int = 1


def _layers(of: Measured) -> dict[str, jax.Array]:
    return {
        "layer_squared_norms": layer_squared_norms(of.mean_gradients),
        "microbatch_layer_squared_norms": of.squares,
    }


def _norm_layers(of: Measured) -> dict[str, jax.Array]:
    # An example's gradient is over its share w / b of the weight, so that the mean over examples is the batch's.
    return {
        "norm_squared_norm": squared_norm(norm_scales(of.mean_gradients)),
        "norm_example_squared_norm": jnp.sum(of.squares) * of.examples / of.parts,
    }


def _dot_products(of: Measured) -> dict[str, jax.Array]:
    assert of.deviations is not None
    return {"microbatch_dot_products": of.deviations.dot_products}


def _coordinates(of: Measured) -> dict[str, jax.Array]:
    assert of.deviations is not None
    variance = jax.tree.map(lambda x: x * of.examples / jnp.maximum(of.parts - 1, 1), of.deviations.squares)

    def largest(v: jax.Array, g: jax.Array) -> jax.Array:
        # An entry without noise passes at any size, also where it is 0.
        return jnp.max(jnp.where(v > 0, v / jnp.where(v > 0, inner_products(g, g), 1), 0))

    ratios = jax.tree.map(largest, variance, of.mean_gradients)
    return {"coordinate_variance_ratio": jnp.max(jnp.stack(jax.tree.leaves(ratios)))}


STATISTICS: dict[str, GradientStatistic] = {
    "layers": GradientStatistic(lambda gradients, probes: layer_squared_norms(gradients), _layers),
    "norm_layers": GradientStatistic(
        lambda gradients, probes: jnp.sum(example_squared_norms(probes)), _norm_layers, probes=True
    ),
    "dot_products": GradientStatistic(None, _dot_products, passes=2),
    "coordinates": GradientStatistic(None, _coordinates, passes=2),
}
"""By the names that transforms and policies ask for them by."""


def chosen_statistics(names: Collection[str]) -> dict[str, GradientStatistic]:
    """The statistics of these names, in the order of `STATISTICS`.

    Raises:
      ValueError: a name that isn't in `STATISTICS`.
    """
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}: use {', '.join(STATISTICS)}")
    return {name: statistic for name, statistic in STATISTICS.items() if name in names}


def check_statistics(names: Collection[str], task: Task, trained: Tree) -> None:
    """That a model has what the statistics of these names are measured of.

    Args:
      names: of statistics.
      task: whose model it is.
      trained: the parameters that are trained, or their shapes.

    Raises:
      UserError: for gradients of normalisation layers per example, which it doesn't give or doesn't train.
    """
    probed = [name for name, statistic in chosen_statistics(names).items() if statistic.probes]
    if probed and not task.per_example_norms:
        raise UserError(
            f"{probed[0]} needs normalisation layers that give their gradients per example, and this {task.name} model "
            "has none: leave norm_layers out, or use the source 'gradient'"
        )
    if probed and not norm_scales(trained):
        raise UserError(f"{probed[0]} needs normalisation layers that are trained, and train.groups freeze them all")


def measured_gradients(
    loss_fn: Callable | Parts,
    parameters: Tree,
    batch: dict,
    statistics: Collection[str] = (),
    spread: parallel.Spread = NOT_SPREAD,
) -> tuple[Tree, BatchStats, dict[str, jax.Array]]:
    """The mean gradient over the batch, its statistics, and the means of the loss's extra sums.

    Args:
      loss_fn: `(parameters, rows) -> (sum, weight, extra)`, as `tasks.base.Loss`; for a pipeline its `Parts`.
      parameters: nested dicts of arrays.
      batch: the input of a step; see `abstract_batch`.
      statistics: keys of `STATISTICS`.
      spread: how gradients are summed over the devices. What is measured of microbatches is measured of their parts.
    """
    chosen = chosen_statistics(statistics)
    rows = batch["rows"]
    parts, examples = batch["microbatches"] * spread.parts, rows[EXAMPLE].shape[1] // spread.parts

    def probed_loss(both, rows):
        return loss_fn(with_probes(*both), rows)

    def measure(both) -> dict[str, Tree]:
        gradients, of_probes = both
        of_parts = {name: s.measure(gradients, of_probes) for name, s in chosen.items() if s.measure is not None}
        return {"all": squared_norm(gradients), **of_parts}

    probes = norm_probes(parameters, examples) if any(s.probes for s in chosen.values()) else {}
    whole = jax.tree.map(lambda _: jax.P(), probes)
    total = parallel.accumulate(
        loss_fn.of(lambda both: with_probes(*both)) if isinstance(loss_fn, Parts) else probed_loss,
        (parameters, probes),
        rows,
        batch["microbatches"],
        measure=measure,
        spread=spread._replace(
            keep=lambda both: (spread.keep(both[0]), both[1]),
            held=(spread.held, whole),
            scattered=(spread.scattered, whole),
            others=(spread.others, whole),
            pipeline=spread.pipeline
            and spread.pipeline._replace(layered=(spread.pipeline.layered, jax.tree.map(lambda x: x.ndim > 2, probes))),
        ),
    )
    gradients = over_weight(total.gradients[0], total.weight)
    squares = total.squared_norms
    stats = BatchStats(
        examples_seen=batch["examples_seen"],
        batch_size=parts * examples,
        loss=over_weight(total.loss_sum, total.weight),
        squared_norm=squared_norm(gradients),
        microbatch_squared_norms=squares["all"],
        microbatches=parts,
    )
    deviations = None
    if any(s.passes > 1 for s in chosen.values()):
        deviations = parallel.deviations(loss_fn, parameters, rows, batch["microbatches"], gradients, spread=spread)
    for name, statistic in chosen.items():
        measured = Measured(gradients, squares.get(name), deviations, parts, examples)
        stats = stats._replace(**statistic.finish(measured))
    return gradients, stats, over_weight(total.extra, total.weight)
