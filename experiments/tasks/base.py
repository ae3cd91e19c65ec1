"""What a task is: what is trained, on what, and how its quality is measured.

The trainer knows nothing else of it. A task is made by a function `(data, model) -> Task` that configs name, such as
`train.task = @masked_lm`; a new one is a file in this folder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from numpy.typing import ArrayLike

from crescendo.experiments.data.rows import Source
from crescendo.experiments.runtime.errors import UserError
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.parts import Parts

Tree = Any
EXAMPLE = "example"
"""The array of every batch that says which examples its rows are, int32 `[B]`: their numbers on the clock."""


class RowArray(NamedTuple):
    """One array of an example.

    Attributes:
      shape: of one example's, without the batch.
      dtype: such as "int32".
      axes: the logical names of its axes (`crescendo.models.axes`); None where an axis is never split.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may know beside parameters and rows.

    Attributes:
      layout: how arrays lie over the devices.
      seed: of the random draws, an integer or a uint32 scalar.
      examples_seen: the clock before the batch, int32; None where there is no run.
      training: whether parameters are being trained: dropout and terms that only training has.
      implementation: of attention, and of every other op where it is "reference"; None: the first one that serves.
    """

    layout: Layout = ONE_DEVICE
    seed: Any = 0
    examples_seen: Any = None
    training: bool = True
    implementation: str | None = None

    def keys(self, rows: Mapping[str, jax.Array], use: int) -> jax.Array:
        """A random key for each example, `[B]`: a function of the seed, the example and the use alone.

        So a draw is the same on every mesh, in every microbatch, and after a resume.

        Args:
          rows: a batch; its array `example` numbers them.
          use: what the draw is for, so that two uses differ; a number of the task's own.

        >>> import jax.numpy as jnp
        >>> rows = {"example": jnp.array([3, 4])}
        >>> Context(seed=1).keys(rows, use=0).shape
        (2,)
        """
        key = jax.random.fold_in(jax.random.key(self.seed), use)
        return jax.vmap(lambda number: jax.random.fold_in(key, number))(rows[EXAMPLE])


class Loss(NamedTuple):
    """A loss as sums, so that microbatches and devices add up; the mean is taken once.

    Attributes:
      sum: float32.
      weight: float32, what the sum is divided by.
      extra: further named sums over the same weight, for the record: float32 each.
    """

    sum: jax.Array
    weight: jax.Array
    extra: Mapping[str, jax.Array] = {}


class Model(Protocol):
    """A model's configuration."""

    def for_platform(self, platform: str) -> Any:
        """The configuration with what it leaves open decided for "cpu", "gpu" or "tpu"."""


class Task(Protocol):
    """What is trained.

    Attributes:
      name: of the task, such as "language_model".
      unit: what a loss is taken over and what is counted in records: "token", "image".
      units_per_example: how many of them a row has.
      flops_per_example: forward and backward, by the matrix products.
      row: every array of an example, by name.
      train: the examples to train on.
      held_out: sets of held-out examples by name; the first one, "validation", decides what is best, or in its place
        the mean of the sets that `data.validation_weights` names.
      bytes_per_unit: by held-out set, how many bytes of text a unit of the loss stands for on average, for bits per
        byte; of no set where the loss isn't one over all of a text.
      data: what it was made of; `str(data)` describes it to a person, `data.fingerprint` changes whenever the rows do.
        Data whose held-out sets have no "validation" have `validation_weights`, shares by name that add up to 1.
      identity: what fixes the model, as JSON: a run goes on only as what it was. Nothing that only says how fast.
      fingerprint: of the model and the data together.
      per_example_norms: whether the model takes its normalisation layers' scales one row an example
        (`crescendo.models.norm_probes`).
    """

    name: str
    unit: str
    units_per_example: int
    flops_per_example: float
    row: Mapping[str, RowArray]
    train: Source
    held_out: Mapping[str, Source]
    bytes_per_unit: Mapping[str, float]
    data: Any
    identity: Mapping[str, Any]
    fingerprint: str
    per_example_norms: bool

    def initialize(self, key: jax.Array) -> Tree:
        """Fresh float32 parameters as nested dicts; pure, so that it can be jitted with output shardings."""
        ...

    def logical_axes(self) -> Tree:
        """The logical names of every parameter's axes, as nested dicts of tuples."""
        ...

    def place(self, layout: Any) -> Any:
        """The layout as this model needs it.

        Raises:
          ValueError: for a mesh that can't divide the model or its rows, or an axis that the model has no use for.
        """
        ...

    def loss(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> Loss:
        """The training loss of a batch."""
        ...

    def evaluate(
        self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Named sums and their weights over a batch of held-out rows; "loss" is among them. Padding rows weigh 0."""
        ...

    def features(self, parameters: Tree, rows: Mapping[str, jax.Array], context: Context) -> jax.Array:
        """What the model makes of each row before its last layer: the mean of its hidden states, float32 `[B, D]`."""
        ...

    def parts(self, context: Context, *, scores: bool = False) -> Parts | None:
        """The training loss, or what is evaluated if `scores`, as stages of a pipeline share it; None: they can't."""
        ...


def padded_rows(source: Source, examples: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """`count` rows: these examples of the source with their numbers (`EXAMPLE`), and zeros behind them."""
    rows = {**source.take(examples), EXAMPLE: examples.astype(np.int32)}
    return {name: np.pad(x, ((0, count - len(examples)), *((0, 0),) * (x.ndim - 1))) for name, x in rows.items()}


def refuse_outside(
    name: str, array: np.ndarray, row_numbers: ArrayLike, of: str, size: int, counts: np.ndarray | bool = True
) -> None:
    """Raises UserError for a token or a label that a model has nothing for; it names the first.

    Args:
      name: of the array.
      array: int32 `[rows, ...]`, whose entries must lie in 0..size - 1.
      row_numbers: the rows' numbers in their source.
      of: what the size is of.
      size: of the vocabulary, or how many classes there are.
      counts: where it matters.

    >>> refuse_outside("labels", np.array([3, -1]), [5, 7], "classes", 4)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ...
    UserError: train.data: labels of row 7 is -1, and of classes = 4 it must lie in 0..3
    """
    outside = counts & ((array < 0) | (array >= size))
    if outside.any():
        row, *place = np.argwhere(outside)[0]
        where = name + "".join(f"[{i}]" for i in place)
        raise UserError(
            f"train.data: {where} of row {np.asarray(row_numbers)[row]} is {array[(row, *place)]}, "
            f"and of {of} = {size} it must lie in 0..{size - 1}"
        )
