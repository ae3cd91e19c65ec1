"""How good a state is on held-out rows."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from crescendo import optim, parallel
from crescendo.experiments.data.rows import Stream
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.tasks.base import Context, Source, Task, padded_rows
from crescendo.experiments.trainer.compilation import options
from crescendo.experiments.trainer.feed import put_rows
from crescendo.experiments.trainer.frozen import Trainable
from crescendo.experiments.trainer.shapes import abstract_rows
from crescendo.parallel.accumulate import over_weight
from crescendo.parallel.pipeline import evaluate_through_stages


def evaluation_parameters(state: TrainState, trainable: Trainable | None = None):
    """The parameters to evaluate: those that the optimizer averages (`optim.evaluation_params`), else the state's."""
    trained = state.parameters if trainable is None else trainable.take(state.parameters)
    averaged = optim.evaluation_params(state.opt_state, trained)
    return averaged if trainable is None else trainable.put(averaged, state.parameters)


def evaluation_program(
    task: Task,
    layout: parallel.Layout,
    state: TrainState,
    groups: int,
    microbatch_examples: int,
    trainable: Trainable | None = None,
) -> jax.stages.Lowered:
    """`(state, rows) -> means by name`, of rows `[groups, microbatch_examples, ...]`; to be compiled.

    Args:
      task: what is evaluated (`Task.evaluate`).
      layout: as the training's.
      state: shapes, dtypes and shardings of the state.
      groups, microbatch_examples: of the rows.
      trainable: which parameters the optimizer knows.
    """
    context, pipeline = Context(layout=layout, training=False), layout.pipeline(task.logical_axes())
    parts = None if pipeline is None else task.parts(context, scores=True)

    def means(state: TrainState, batch):
        parameters = evaluation_parameters(state, trainable)

        if pipeline is not None:
            total = evaluate_through_stages(pipeline, parts, parameters, batch)
            return {name: x / weight for name, (x, weight) in total.items()}

        def sums(rows):
            return task.evaluate(parameters, rows, context)

        def add(so_far, rows):
            return jax.tree.map(jnp.add, so_far, sums(rows)), None

        shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, batch)
        return {name: x / weight for name, (x, weight) in total.items()}

    rows = abstract_rows(task, layout, groups, microbatch_examples)
    told = options(task, layout.mesh.devices.flat[0].platform, layout)
    return jax.jit(means, out_shardings=layout.replicated, compiler_options=told).lower(state, rows)


def make_evaluation(
    task: Task,
    held_out: str,
    layout: parallel.Layout,
    program: Callable[[int], jax.stages.Compiled],
    *,
    evaluation_examples: int,
    microbatch_examples: int,
) -> Callable[[TrainState], dict[str, float]]:
    """`state -> means by name` over a sample of `evaluation_examples` rows: always the same ones.

    Of a text the means have `bits_per_byte` too, which unlike a loss in nats a token can be compared between
    tokenizers: loss / (ln 2 * bytes per token), where the bytes per token are those of the whole set.

    Args:
      task: what is evaluated (`Task.evaluate`).
      held_out: the name of its rows, of which all are taken where there are fewer.
      layout: as the training's.
      program: gives `evaluation_program` of so many groups, compiled: now, so that nothing is while a loop runs.
      evaluation_examples: how many rows.
      microbatch_examples: how many at a time; the last group is filled up with padding.
    """
    source, bytes_per_unit = task.held_out[held_out], task.bytes_per_unit.get(held_out)
    count = min(evaluation_examples, len(source))
    groups = -(-count // microbatch_examples)
    stream = Stream(source, seed=0)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return padded_rows(stream, numbers[numbers < count], len(numbers))

    batch, compiled = put_rows(task, layout, groups, microbatch_examples, read), program(groups)

    def evaluate(state: TrainState) -> dict[str, float]:
        numbers = {name: float(x) for name, x in jax.device_get(compiled(state, batch)).items()}
        if bytes_per_unit is not None:
            numbers["bits_per_byte"] = numbers["loss"] / (math.log(2) * bytes_per_unit)
        return numbers

    return evaluate


def validation_weights(task: Task) -> Mapping[str, float]:
    """The shares of held-out sets in the mean that stands for "validation"; of none where that is a set of the task."""
    return getattr(task.data, "validation_weights", {})


def validation_mean(task: Task, by_set: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over held-out sets that stands for "validation": of every number that all of them have.

    Args:
      task: says the sets' shares (`validation_weights`); where it says none, there is no mean.
      by_set: the means of each set, by the set's name.
    """
    weights = validation_weights(task)
    every = [by_set[name] for name in weights]
    names = [name for name in (every[0] if every else {}) if all(name in each for each in every)]
    return {name: sum(share * by_set[of][name] for of, share in weights.items()) for name in names}


def named_means(task: Task, by_set: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What a record has: the means of "validation" by their own names, those of another set by the set's too.

    Args:
      task: see `validation_mean`.
      by_set: the means of each set, by the set's name.
    """
    means = validation_mean(task, by_set)
    for name, own in by_set.items():
        means |= {metric if name == "validation" else f"{name}/{metric}": value for metric, value in own.items()}
    return means


def make_row_losses(
    task: Task,
    source: Source,
    layout: parallel.Layout,
    *,
    microbatch_examples: int,
    trainable: Trainable | None = None,
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """`(state, row numbers) -> float32 [rows]`: each row's "loss" of `Task.evaluate`, its sum over its weight.

    Args:
      task: what is evaluated.
      source: where the rows are.
      layout: as the training's.
      microbatch_examples: how many at a time.
      trainable: which parameters the optimizer knows.
    """
    # Attention too is called on rows as they lie.
    context = Context(training=False, implementation=layout.implementation)

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def losses(state: TrainState, batch):
        parameters = evaluation_parameters(state, trainable)

        def one(row):
            total, weight = task.evaluate(parameters, jax.tree.map(lambda x: x[None], row), context)["loss"]
            return over_weight(total, weight)

        # Every row is a batch of its own, as on one device; the partitioner spreads them.
        return jax.vmap(one)(jax.tree.map(lambda x: x[0], batch))

    return over_rows(losses, task, source, layout, microbatch_examples=microbatch_examples, natural_order=True)


def over_rows(
    program: Callable[[TrainState, dict[str, jax.Array]], jax.Array],
    task: Task,
    source: Source,
    layout: parallel.Layout,
    *,
    microbatch_examples: int,
    natural_order: bool = False,
) -> Callable[[TrainState, np.ndarray], np.ndarray]:
    """`(state, row numbers) -> [rows, ...]`: what a program makes of any rows, of which it takes one shape.

    Args:
      program: `(state, rows [1, microbatch_examples, ...]) -> [microbatch_examples, ...]`, float32 on every device.
      task: says what a row is.
      source: where the rows are.
      layout: of the devices.
      microbatch_examples: how many at a time; the last ones are filled up with zeros.
      natural_order: leave the tokens of a row in their own order.
    """

    def call(state: TrainState, numbers: np.ndarray) -> np.ndarray:
        parts = []
        for begin in range(0, len(numbers), microbatch_examples):
            some = np.asarray(numbers)[begin : begin + microbatch_examples]

            def read(places: np.ndarray, some=some) -> dict[str, np.ndarray]:
                return padded_rows(source, some[places[places < len(some)]], len(places))

            batch = put_rows(task, layout, 1, microbatch_examples, read, natural_order=natural_order)
            parts.append(np.asarray(program(state, batch))[: len(some)])
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    return call
