"""How a global batch is cut into microbatches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from crescendo.parallel.sizes import nearest_multiples


class BatchPlan(NamedTuple):
    """One compiled shape for every batch size of a run.

    Attributes:
      microbatch_examples: examples in a microbatch, over all devices.
      max_microbatches: microbatches in the largest batch.
    """

    microbatch_examples: int
    max_microbatches: int

    def microbatches(self, batch_size: int) -> int:
        """How many microbatches make a batch of `batch_size` examples."""
        return batch_size // self.microbatch_examples


def plan_batches(
    sizes: Sequence[int],
    shards: int,
    max_microbatch_examples: int | None = None,
    *,
    min_microbatches: int = 1,
    stages: int = 1,
) -> BatchPlan:
    """The largest microbatch that divides every batch size, splits over the devices, and is within the bounds.

    Args:
      sizes: every batch size that the run may take, in examples.
      shards: the number of parts that a microbatch is split in, one a device along the batch-like mesh axes.
      max_microbatch_examples: the bound that memory sets; None for no bound. One example a shard is always allowed.
      min_microbatches: every batch is cut into at least so many: what compares microbatches needs two.
      stages: of a pipeline, which needs as many microbatches, or stages would never all have work.

    Raises:
      ValueError: for a size below 1, one that the shards can't divide, or one of fewer than `min_microbatches`
        or `stages` examples a shard.

    >>> plan_batches([4, 8, 24], shards=2)
    BatchPlan(microbatch_examples=4, max_microbatches=6)
    >>> plan_batches([4, 8, 24], shards=2, max_microbatch_examples=3)
    BatchPlan(microbatch_examples=2, max_microbatches=12)
    >>> plan_batches([8, 24], shards=2, min_microbatches=2)
    BatchPlan(microbatch_examples=4, max_microbatches=6)
    >>> plan_batches([8, 24], shards=8, min_microbatches=2)
    Traceback (most recent call last):
    ...
    ValueError: batch_size = 8 over 8 devices can't be cut into 2 microbatches: use a multiple of 8 from 16 on, such \
as 16 or 24
    """
    needed = f"{min_microbatches} microbatches"
    if stages > min_microbatches:
        min_microbatches, needed = stages, f"{stages} microbatches, as many as stages"
    for size in sizes:
        if size < 1:
            raise ValueError(f"batch_size = {size} must be at least 1")
        if size % shards:
            nearest = nearest_multiples(size, shards)
            raise ValueError(f"batch_size = {size} does not divide over {shards} devices: use {nearest}")
        if size < min_microbatches * shards:
            over, least = "", min_microbatches * shards
            fitting = f"{least} or more"
            if shards > 1:
                over, fitting = f" over {shards} devices", f"a multiple of {shards} from {least} on"
            raise ValueError(
                f"batch_size = {size}{over} can't be cut into {needed}: use {fitting}, such as {least} or "
                f"{least + shards}"
            )
    common = math.gcd(*sizes)
    bound = max(common if max_microbatch_examples is None else max_microbatch_examples, shards)
    bound = min(bound, min(sizes) // min_microbatches)
    microbatch = max(
        divisor for divisor in range(shards, common + 1, shards) if common % divisor == 0 and divisor <= bound
    )
    return BatchPlan(microbatch, max(sizes) // microbatch)
