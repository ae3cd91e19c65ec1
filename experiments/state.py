"""What a run is at one moment, and the one compiled step that moves it."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crescendo import models, parallel
from crescendo.experiments.statistics import check_statistics, measured_gradients
from crescendo.models import ModelConfig
from crescendo.models.layout import ONE_DEVICE
from crescendo.models.loss import next_token_loss
from crescendo.optim.batch_size import current_batch_size, current_learning_rate_factor
from crescendo.optim.noise_scale import current_noise_scales
from crescendo.parallel.accumulate import WHOLE

Tree = Any

NOISE_SCALES = {"gradient": "noise_scale", "norm_layers": "norm_layers_noise_scale"}
"""The columns of the noise scales, in examples, by their source; `_error` behind it is the standard error's."""

TRUST_RATIOS = ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")
"""The columns of the layers' trust ratios, where the optimizer has them (LAMB, LARS)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays of a run. With the clock (`Clock`) they are all that a checkpoint holds.

    Attributes:
      parameters: float32 arrays in nested dicts.
      opt_state: the optimizer's, the schedule's and the batch-size policy's state.
      skipped_steps: int32, updates left out because the loss or a gradient was not finite.
      skipped_in_a_row: int32, how many of them were the latest ones.
    """

    parameters: Tree
    opt_state: Tree
    skipped_steps: Any
    skipped_in_a_row: Any


@dataclasses.dataclass(frozen=True)
class Clock:
    """The host's integers of a run: nothing here waits for the device.

    Attributes:
      examples_seen: global examples drawn so far; the data position and the argument of every schedule.
      steps: optimizer steps so far.
      batch_size: examples in the next batch.
      seconds: training time so far, over all resumes.
    """

    examples_seen: int = 0
    steps: int = 0
    batch_size: int = 0
    seconds: float = 0.0


def initial_state(config: ModelConfig, optimizer: optax.GradientTransformationExtraArgs, seed: int) -> TrainState:
    """A fresh state; pure, so that it can be jitted with output shardings or traced for its shapes."""
    parameters = models.initialize(config, jax.random.key(seed))
    return TrainState(parameters, optimizer.init(parameters), jnp.int32(0), jnp.int32(0))


def state_shardings(config: ModelConfig, optimizer, layout: parallel.Layout) -> TrainState:
    """The sharding of every array; optimizer arrays shaped like a parameter are laid out by the same names.

    Raises:
      ValueError: a dimension of the model that the mesh can't divide.
    """
    layout = layout.with_heads(config.heads, config.kv_heads)
    replicated, logical_axes = layout.replicated, models.logical_axes(config)
    state = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    of_parameters = layout.parameters(logical_axes, state.parameters)
    of_opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda array, parameter, sharding: sharding if array.shape == parameter.shape else replicated,
        state.opt_state,
        state.parameters,
        layout.optimizer(logical_axes, state.parameters),
        transform_non_params=lambda _: replicated,
    )
    return TrainState(of_parameters, of_opt_state, replicated, replicated)


def abstract_state(config: ModelConfig, optimizer, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state: what restoring and compiling need."""
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def describe_arrays(config: ModelConfig, optimizer) -> dict[str, str]:
    """Every array of a state by its path, as `float32[3, 128]`: what a checkpoint must match to be restored."""
    state = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def abstract_batch(layout: parallel.Layout, plan: parallel.BatchPlan, sequence_length: int) -> dict:
    """The input of one step: `rows` of shape `[k_max, microbatch, T]`, their `count`, and the clock."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    shape = (plan.max_microbatches, plan.microbatch_examples, sequence_length)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.rows(("length",), leading=1))
    names = ("tokens", "labels", "segment_ids", "positions")
    return {"rows": dict.fromkeys(names, rows), "microbatches": scalar, "examples_seen": scalar}


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    max_gradient_norm: float | None,
    attention: str | None = None,
    layout: parallel.Layout | None = None,
    statistics: Collection[str] = (),
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`(state, batch) -> (state, metrics)`: gradients over the microbatches, then one optimizer update.

    A step whose loss or gradient norm is not finite leaves parameters and optimizer as they were, and is counted.
    The statistics that adapt the batch size go to the transforms as extra arguments; norms are taken before clipping.

    Args:
      config: of the model, decided for the platform.
      optimizer: a chain that ends in `adaptive_batch_size`.
      max_gradient_norm: the mean gradient is scaled down to this l2 norm where it is longer; None: never.
      attention: the implementation that `jax.nn.dot_product_attention` takes.
      layout: where everything lives; None: on one device.
      statistics: what else to measure for the transforms, members of `crescendo.optim.batch_size.STATISTICS`.

    Raises:
      ValueError: an unknown statistic.
    """
    check_statistics(statistics)
    logical_axes = models.logical_axes(config)
    layout = None if layout is None else layout.with_heads(config.heads, config.kv_heads)
    activations = ONE_DEVICE if layout is None else layout
    spread = WHOLE if layout is None else layout.spread(logical_axes)

    def split_for_update(tree: Tree) -> Tree:
        """Each device updates the part of the parameters whose optimizer state it has."""
        return tree if layout is None else layout.lay_out(layout.strategy.optimizer, tree, logical_axes)

    def loss_fn(parameters, rows):
        return next_token_loss(
            config, parameters, rows, z_loss=config.z_loss, implementation=attention, layout=activations
        )

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        gradients, stats = measured_gradients(loss_fn, state.parameters, batch, statistics, spread)
        gradients, parameters_before = split_for_update(gradients), split_for_update(state.parameters)
        loss, norm = stats.loss, jnp.sqrt(stats.squared_norm)
        l1_norm = sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(gradients))
        if max_gradient_norm is not None:
            shrink = jnp.minimum(1.0, max_gradient_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            gradients = jax.tree.map(lambda g: g * shrink, gradients)
        updates, opt_state = optimizer.update(
            gradients,
            state.opt_state,
            parameters_before,
            examples_seen=batch["examples_seen"],
            batch_stats=stats,
            value=loss,
        )
        parameters = optax.apply_updates(parameters_before, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        parameters, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (parameters, opt_state),
            (parameters_before, state.opt_state),
        )
        bad = 1 - finite.astype(jnp.int32)
        state = TrainState(parameters, opt_state, state.skipped_steps + bad, (state.skipped_in_a_row + 1) * bad)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "gradient_l1_norm": l1_norm,
            "learning_rate": _learning_rate(opt_state) * current_learning_rate_factor(opt_state),
            "next_batch_size": current_batch_size(opt_state),
            "skipped_steps": state.skipped_steps,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        for source, found in current_noise_scales(opt_state).items():
            metrics |= {NOISE_SCALES[source]: found.value, f"{NOISE_SCALES[source]}_error": found.standard_error}
        return state, metrics | _trust_ratios(opt_state)

    return step


def _trust_ratios(opt_state) -> dict[str, jax.Array]:
    """The least, the median and the largest trust ratio of the layers that have one: all but those of exactly 1."""
    ratios = optax.tree_utils.tree_get(opt_state, "trust_ratio")
    if ratios is None:
        return {}
    ratios = jnp.where(ratios == 1, jnp.nan, ratios)  # excluded, or of a layer that is still 0
    found = (jnp.nanmin(ratios), jnp.nanmedian(ratios), jnp.nanmax(ratios))
    return dict(zip(TRUST_RATIOS, found, strict=True))


def _learning_rate(opt_state):
    rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
    return jnp.float32(jnp.nan) if rate is None else jnp.asarray(rate, jnp.float32)
