"""How a run's batches are cut into microbatches: the largest that fit and make a step faster."""

from collections.abc import Iterator, Sequence

from crescendo import parallel
from crescendo.experiments.runtime.errors import user_values
from crescendo.experiments.tasks.base import Task
from crescendo.experiments.trainer.programs import CompiledStep
from crescendo.optim.batch_size import BatchSizePolicy, stays_throughout

# Past this many tokens on a device a larger microbatch makes no step faster, and only takes memory (on two shared
# CPU cores, the debug model: 14,300 tokens/s in microbatches of 512 tokens, 7,900 in ones of 1,024).
MAX_MICROBATCH_UNITS = {"cpu": 512, "gpu": 65_536, "tpu": 65_536}
# What the allocator loses to fragmentation, and the host's own buffers take.
MEMORY_SHARE = 0.92
# So many times as many passes of a stage as there are stages, where a batch has microbatches for them, leave a pipeline
# idle for less than a fifth of the time.
STAGE_PASSES = 4


def max_microbatch_examples(task: Task, layout: parallel.Layout, platform: str) -> int:
    """The examples past which a larger microbatch makes no step faster, over all devices."""
    return max(1, MAX_MICROBATCH_UNITS[platform] // task.units_per_example) * layout.batch_shards


def plans(
    sizes: Sequence[int], layout: parallel.Layout, most_examples: int, min_microbatches: int
) -> Iterator[parallel.BatchPlan]:
    """How batches can be cut, down to one example a device.

    Args:
      sizes: of the batches.
      layout: the devices.
      most_examples: of a microbatch.
      min_microbatches: of a batch, those of all devices counted.

    Raises:
      UserError: sizes that the devices can't divide.
    """
    shards, stages, bound = layout.batch_shards, layout.sizes["stage"], most_examples
    if stages > 1:
        wanted = -(-STAGE_PASSES // layout.strategy.chunks) * stages
        bound = min(bound, max(1, min(sizes) // wanted))
    least = -(-min_microbatches // layout.parts)
    while True:
        with user_values():
            plan = parallel.plan_batches(sizes, shards, bound, min_microbatches=least, stages=stages)
        yield plan
        if plan.microbatch_examples == shards:
            return
        bound = plan.microbatch_examples // 2


def plan_notes(
    step: CompiledStep, policy: BatchSizePolicy, *, asked_examples: int, shards: int, noise_of_microbatches: bool
) -> list[str]:
    """What a person should hear of how a run's batches are cut.

    Args:
      step: the run's.
      policy: of its batch size.
      asked_examples: its length, as it was given.
      shards: parts of a microbatch whose gradients are known apart.
      noise_of_microbatches: whether the gradient noise scale is measured of microbatches alone.
    """
    plan, total, notes = step.plan, step.total_examples, list(step.notes)
    if total < asked_examples:
        notes.append(
            f"the run ends at {total:,} examples, not {asked_examples:,}: a step takes whole microbatches "
            f"of {plan.microbatch_examples}"
        )
    if stays := stays_throughout(policy, total):
        notes.append(stays)
    smallest = min(policy.sizes)
    if noise_of_microbatches and min(map(plan.microbatches, policy.sizes)) * shards == 1:
        notes.append(
            f"a batch of {smallest} is one microbatch, which says nothing of the gradient noise scale: set "
            f"train.max_microbatch_examples = {max(1, smallest // 2)}, or gradient_noise_scale.norm_layers = True"
        )
    return notes
