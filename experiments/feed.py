"""Rows of the stream, cut into microbatches and put on the devices ahead of the step that uses them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from crescendo import parallel
from crescendo.experiments.data import Stream


def put_rows(
    layout: parallel.Layout, shape: tuple[int, int, int], read: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> dict[str, jax.Array]:
    """Rows `[groups, examples, T]` on the devices, of which this process reads only what its own devices hold.

    Args:
      layout: where they go; its order of tokens within a row is made here, the same for all that goes with tokens.
      shape: of each array.
      read: from the numbers of rows, `group * examples + example`, to their arrays `[rows, T]`.
    """
    sharding, order = layout.rows(("length",), leading=1), layout.order(shape[2])
    places = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[1].indices(shape[1]) for index in places if index is not None]
    begin, end = min(start for start, _, _ in parts), max(stop for _, stop, _ in parts)
    numbers = np.arange(shape[0])[:, None] * shape[1] + np.arange(begin, end)
    mine = {name: x.reshape(*numbers.shape, shape[2]) for name, x in read(numbers.ravel()).items()}
    if order is not None:
        mine = {name: x[:, :, order] for name, x in mine.items()}

    def put(rows: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[1].indices(shape[1])
            return rows[:, start - begin : stop - begin, index[2]]

        with jax.transfer_guard("allow"):  # the loop's guard is against transfers that nobody asked for
            return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(x) for name, x in mine.items()}


class Feed:
    """Batches of any size in one fixed shape.

    While a step runs, the batch that follows if the size stays is read in a thread: a step's call can last as long as
    the step (a loop whose trip count the host must know does, on GPUs), and the device would wait.

    Args:
      stream: the rows, by the clock.
      plan: the shape.
      layout: the devices.
    """

    def __init__(self, stream: Stream, plan: parallel.BatchPlan, layout: parallel.Layout):
        self._stream, self._plan, self._layout = stream, plan, layout
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

        def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
            used = numbers[numbers < batch_size]
            rows = self._stream.take(examples_seen + used)
            return {name: np.pad(x, ((0, len(numbers) - len(used)), (0, 0))) for name, x in rows.items()}

        return {
            "rows": put_rows(self._layout, (k_max, microbatch, self._stream.sequence_length), read),
            "microbatches": self._scalar(batch_size // microbatch),
            "examples_seen": self._scalar(examples_seen),
        }

    def _scalar(self, value: int) -> jax.Array:
        """On every device, of every process; `jax.device_put` would compare it between processes first."""
        with jax.transfer_guard("allow"):
            return jax.make_array_from_callback((), self._layout.replicated, lambda _: np.int32(value))
