"""Rows of the stream, cut into microbatches and put on the devices ahead of the step that uses them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from crescendo import parallel
from crescendo.experiments.data.rows import Order, Stream
from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.tasks.base import Source, Task, padded_rows
from crescendo.experiments.trainer.shapes import row_arrays
from crescendo.models import axes


def put_rows(
    task: Task,
    layout: parallel.Layout,
    groups: int,
    examples: int,
    read: Callable[[np.ndarray], dict[str, np.ndarray]],
    *,
    natural_order: bool = False,
) -> dict[str, jax.Array]:
    """Rows `[groups, examples, ...]` on the devices, of which this process reads only what its own devices hold.

    Args:
      task: says what a row is.
      layout: where they go; its order of tokens within a row is made here, the same for all that goes with tokens.
      groups: how many, such as microbatches.
      examples: in a group.
      read: from the numbers of rows, `group * examples + example`, to their arrays `[rows, ...]`.
      natural_order: leave the tokens of a row in their own order.
    """
    places = layout.rows((), leading=1).addressable_devices_indices_map((groups, examples)).values()
    parts = [index[1].indices(examples) for index in places if index is not None]
    begin, end = min(start for start, _, _ in parts), max(stop for _, stop, _ in parts)
    numbers = np.arange(groups)[:, None] * examples + np.arange(begin, end)
    mine = read(numbers.ravel())

    def put(name: str) -> jax.Array:
        array = row_arrays(task)[name]
        rows = np.asarray(mine[name], array.dtype).reshape(*numbers.shape, *array.shape)
        for axis, logical in enumerate(array.axes):
            order = None if natural_order or logical != axes.LENGTH else layout.order(array.shape[axis])
            rows = rows if order is None else np.take(rows, order, axis=axis + 2)

        def part(index):
            start, stop, _ = index[1].indices(examples)
            return rows[(slice(None), slice(start - begin, stop - begin), *index[2:])]

        with jax.transfer_guard("allow"):  # the loop's guard is against transfers that nobody asked for
            shape = (groups, examples, *array.shape)
            return jax.make_array_from_callback(shape, layout.rows(array.axes, leading=1), part)

    return {name: put(name) for name in row_arrays(task)}


def check_rows(source: Source, order: Order, largest_batch: int, total_examples: int) -> None:
    """That the data serve a run.

    Raises:
      UserError: fewer rows than its largest batch, or what its order says of its length.
    """
    if len(source) < largest_batch:
        raise UserError(
            f"the data have {len(source)} rows, fewer than one batch of {largest_batch}: use a smaller "
            "train.batch_size, or more data (of text, a shorter text_data.sequence_length gives more rows)"
        )
    order.check(total_examples)


class Feed:
    """Batches of any size in one fixed shape.

    While a step runs, the batch that follows if the size stays is read in a thread: a step's call can last as long as
    the step (a loop whose trip count the host must know does, on GPUs), and the device would wait.

    Args:
      task: says what a row is.
      source: the examples.
      plan: the shape.
      layout: the devices.
      seed: of the order of the examples, and of the task's random draws.
    """

    def __init__(self, task: Task, source: Source, plan: parallel.BatchPlan, layout: parallel.Layout, seed: int):
        self._task, self._stream, self._plan, self._layout, self._seed = task, Stream(source, seed), plan, layout, seed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[tuple[int, int], Future[dict]] | None = None

    def read(self, examples_seen: int, batch_size: int) -> dict:
        """The input of one step (`abstract_batch`): the unused microbatches at the end are zeros."""
        wanted, following = (examples_seen, batch_size), (examples_seen + batch_size, batch_size)
        if self._ahead is None or self._ahead[0] != wanted:
            self._ahead = wanted, self._thread.submit(self._read, *wanted)
        batch = self._ahead[1].result()
        self._ahead = following, self._thread.submit(self._read, *following)
        return batch

    def _read(self, examples_seen: int, batch_size: int) -> dict:
        microbatch, k_max = self._plan.microbatch_examples, self._plan.max_microbatches
        assert batch_size % microbatch == 0, f"{batch_size} examples are no whole microbatches of {microbatch}"
        assert batch_size <= k_max * microbatch, f"{batch_size} examples are more than {k_max} x {microbatch}"

        def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
            used = numbers[numbers < batch_size]
            return padded_rows(self._stream, examples_seen + used, len(numbers))

        return {
            "rows": put_rows(self._task, self._layout, k_max, microbatch, read),
            "microbatches": self._scalar(batch_size // microbatch),
            "examples_seen": self._scalar(examples_seen),
            "seed": self._scalar(self._seed, np.uint32),
        }

    def _scalar(self, value: int, dtype: type = np.int32) -> jax.Array:
        """On every device, of every process; `jax.device_put` would compare it between processes first."""
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback((), self._layout.replicated, lambda _: np.asarray(value, dtype))
