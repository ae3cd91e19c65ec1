"""What the compiler is told of a training step, and what it says of a program."""

import jax

# By platform. XLA would make one product of the projections to keys and to values, which share their input: their
# results are then cut out of it, and their gradients put together again, by copies of all of them.
STEP_OPTIONS: dict[str, dict[str, int]] = {"gpu": {"xla_gpu_dot_merger_threshold_mb": 0}}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """A device's memory at the peak: arguments, results that take no argument's place, and temporaries."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
