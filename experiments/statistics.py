"""The gradient of a batch and what else the batch-size policies want to know of it."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from crescendo import parallel
from crescendo.models.norm_probes import example_squared_norms, norm_probes, norm_scales, with_probes
from crescendo.optim.batch_size import STATISTICS, BatchStats
from crescendo.optim.noise_scale import layer_squared_norms
from crescendo.parallel.accumulate import WHOLE, squared_norm

Tree = Any


def check_statistics(statistics: Collection[str]) -> None:
    """Raises ValueError for a name that isn't in `STATISTICS`."""
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}: use {', '.join(STATISTICS)}")


def measured_gradients(
    loss_fn: Callable,
    parameters: Tree,
    batch: dict,
    statistics: Collection[str] = (),
    spread: parallel.Spread = WHOLE,
) -> tuple[Tree, BatchStats]:
    """The mean gradient over the batch, and the statistics of `BatchStats` that are always known or asked for.

    Args:
      loss_fn: `(parameters, rows) -> (loss_sum, weight)`.
      parameters: nested dicts of arrays.
      batch: the input of a step; see `abstract_batch`.
      statistics: members of `STATISTICS`.
      spread: how gradients are summed over the devices. What is measured of microbatches is measured of their parts.
    """
    rows = batch["rows"]
    count, examples = batch["microbatches"] * spread.parts, rows["tokens"].shape[1] // spread.parts

    def loss_and_extra(parameters, rows):
        return (*loss_fn(parameters, rows), {})

    def probed_loss(both, rows):
        return loss_and_extra(with_probes(*both), rows)

    def measure(both) -> dict[str, jax.Array]:
        gradients, of_probes = both
        found = {"all": squared_norm(gradients)}
        if "layers" in statistics:
            found["layers"] = layer_squared_norms(gradients)
        if "norm_layers" in statistics:
            found["examples"] = jnp.sum(example_squared_norms(of_probes))
        return found

    probes = norm_probes(parameters, examples) if "norm_layers" in statistics else {}
    total = parallel.accumulate(
        probed_loss,
        (parameters, probes),
        rows,
        batch["microbatches"],
        measure=measure,
        spread=spread._replace(
            keep=lambda both: (spread.keep(both[0]), both[1]),
            scattered=(spread.scattered, jax.tree.map(lambda _: -1, probes)),
            others=(spread.others, jax.tree.map(lambda _: jax.P(), probes)),
        ),
    )
    weight = jnp.maximum(total.weight, 1.0)
    gradients = jax.tree.map(lambda g: g / weight, total.gradients[0])
    squares = total.squared_norms
    stats = BatchStats(
        examples_seen=batch["examples_seen"],
        batch_size=count * examples,
        loss=total.loss_sum / weight,
        squared_norm=squared_norm(gradients),
        microbatch_squared_norms=squares["all"],
        microbatches=count,
    )
    if "layers" in statistics:
        stats = stats._replace(
            layer_squared_norms=layer_squared_norms(gradients), microbatch_layer_squared_norms=squares["layers"]
        )
    if "norm_layers" in statistics:
        # An example's gradient is over its share w / b of the weight, so that the mean over examples is the batch's.
        stats = stats._replace(
            norm_squared_norm=squared_norm(norm_scales(gradients)),
            norm_example_squared_norm=jnp.sum(squares["examples"]) * examples / count,
        )
    if {"dot_products", "coordinates"} & set(statistics):
        found = parallel.deviations(loss_and_extra, parameters, rows, batch["microbatches"], gradients, spread=spread)
        variance = jax.tree.map(lambda x: x * examples / jnp.maximum(count - 1, 1), found.squares)
        # An entry without noise passes at any size, also where it is 0.
        ratios = jax.tree.map(lambda v, g: jnp.max(jnp.where(v > 0, v / jnp.square(g), 0)), variance, gradients)
        stats = stats._replace(
            microbatch_dot_products=found.dot_products,
            coordinate_variance_ratio=jnp.max(jnp.stack(jax.tree.leaves(ratios))),
        )
    return gradients, stats
