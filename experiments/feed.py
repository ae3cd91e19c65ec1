"""Rows of the stream, cut into microbatches and put on the devices ahead of the step that uses them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crescendo import parallel
from crescendo.experiments.data import Stream


class Feed:
    """Batches of any size in one fixed shape.

    Args:
      stream: the rows, by the clock.
      plan: the shape.
      mesh: the devices.
    """

    def __init__(self, stream: Stream, plan: parallel.BatchPlan, mesh: Mesh):
        self._stream, self._plan = stream, plan
        self._rows = parallel.batch_sharding(mesh, leading=1)
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def read(self, examples_seen: int, batch_size: int) -> dict:
        """The input of one step (`abstract_batch`): the unused microbatches at the end are zeros."""
        microbatch, k_max = self._plan.microbatch_examples, self._plan.max_microbatches

        def cut(rows):
            buffer = np.zeros((k_max * microbatch, rows.shape[1]), np.int32)
            buffer[: len(rows)] = rows
            return buffer.reshape(k_max, microbatch, -1)

        rows = {name: cut(x) for name, x in self._stream.read(examples_seen, batch_size).items()}
        return {
            "rows": jax.device_put(rows, self._rows),
            "microbatches": jax.device_put(np.int32(batch_size // microbatch), self._replicated),
            "examples_seen": jax.device_put(np.int32(examples_seen), self._replicated),
        }
