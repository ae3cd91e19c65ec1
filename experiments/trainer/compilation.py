"""What the compiler says of a program."""

import jax


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
