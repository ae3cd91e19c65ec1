"""The training step, compiled ahead of time for one shape that serves every batch size of a run."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from crescendo import parallel
from crescendo.experiments import cache, hardware
from crescendo.experiments.errors import UserError, user_values
from crescendo.experiments.state import TrainState, abstract_batch, abstract_state, make_step, state_shardings
from crescendo.models import ModelConfig
from crescendo.pallas_kernels.op import target

# Past this many tokens on a device a larger microbatch makes no step faster, and only takes memory (on two shared
# CPU cores, the debug model: 14,300 tokens/s in microbatches of 512 tokens, 7,900 in ones of 1,024).
MAX_MICROBATCH_TOKENS = {"cpu": 512, "gpu": 65_536, "tpu": 65_536}
# What the allocator loses to fragmentation, and the host's own buffers take.
MEMORY_SHARE = 0.92


class CompiledStep(NamedTuple):
    """One executable and what it was compiled for.

    Attributes:
      call: `(state, batch) -> (state, metrics)`; gives the state's memory back.
      plan: how batches are cut.
      abstract_state: shapes, dtypes and shardings of the state.
      peak_bytes: a device's memory at the step's peak, by the compiler's count.
      layout: where everything lives.
    """

    call: Callable
    plan: parallel.BatchPlan
    abstract_state: TrainState
    peak_bytes: int
    layout: parallel.Layout


def lower_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    plan: parallel.BatchPlan,
    *,
    sequence_length: int,
    strategy: str | parallel.Strategy = "fsdp",
    max_gradient_norm: float | None = 1.0,
    attention: str | None = None,
    statistics: Collection[str] = (),
) -> jax.stages.Lowered:
    """The step for the mesh's devices, which need not be there: topology descriptions will do.

    `attention` names the implementation; None leaves it to the device.
    """
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform == "cuda" else platform
    layout = parallel.Layout(mesh, strategy).with_heads(config.heads, config.kv_heads)
    layout.order(sequence_length)  # raises for a length that the mesh can't divide
    shardings = state_shardings(config, optimizer, layout)
    step = make_step(
        config,
        optimizer,
        max_gradient_norm=max_gradient_norm,
        attention=attention,
        layout=layout,
        statistics=statistics,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    # Kernels choose by the device that the step is for.
    with target(mesh.devices.flat[0]):
        traced = jitted.trace(
            abstract_state(config, optimizer, shardings), abstract_batch(layout, plan, sequence_length)
        )
    return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


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


def compile_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    sizes: Sequence[int],
    *,
    sequence_length: int,
    strategy: str | parallel.Strategy = "fsdp",
    max_gradient_norm: float | None = 1.0,
    max_microbatch_examples: int | None = None,
    statistics: Collection[str] = (),
) -> CompiledStep:
    """Compiles the step with the largest microbatch that fits the device's memory, by the compiler's own count.

    Args:
      sizes: every batch size that the run may take, in examples.
      max_microbatch_examples: a bound below the one that memory sets.
      statistics: what else to measure (`make_step`), such as the policy's `statistics`.

    Raises:
      UserError: for a batch size, a row or a model's dimension that the mesh can't divide, or a model that doesn't fit
        at one example a device.
    """
    device = mesh.local_devices[0]
    with user_values():
        layout = parallel.Layout(mesh, strategy).with_heads(config.heads, config.kv_heads)
        shardings = state_shardings(config, optimizer, layout)
        layout.order(sequence_length)
    shards = layout.batch_shards
    bound = max(1, MAX_MICROBATCH_TOKENS[device.platform] // sequence_length) * shards
    if max_microbatch_examples is not None:
        bound = min(bound, max_microbatch_examples)
    limit = hardware.memory_bytes(device)
    while True:
        with user_values():
            plan = parallel.plan_batches(sizes, shards, bound)
        compiled = lower_step(
            config,
            optimizer,
            mesh,
            plan,
            sequence_length=sequence_length,
            strategy=strategy,
            max_gradient_norm=max_gradient_norm,
            statistics=statistics,
        ).compile()
        peak = peak_bytes(compiled)
        if limit is None or peak <= MEMORY_SHARE * limit:
            return CompiledStep(compiled, plan, abstract_state(config, optimizer, shardings), peak, layout)
        if plan.microbatch_examples == shards:
            raise UserError(
                f"one example a device needs {peak / 2**30:.1f} GiB and a device has {limit / 2**30:.1f} GiB: "
                "use a smaller model, model.remat = 'full', a shorter sequence, or more devices along fsdp"
            )
        bound = plan.microbatch_examples // 2


class CompilationCounter:
    """Counts the programs compiled, or read from the cache, since it was made.

    >>> counter = CompilationCounter()
    >>> _ = jax.jit(lambda x: x + 1)(1.0)
    >>> counter.count >= 1
    True
    """

    _total = 0

    def __init__(self) -> None:
        _count_compilations()
        self._start = CompilationCounter._total

    @property
    def count(self) -> int:
        """How many so far."""
        return CompilationCounter._total - self._start


@functools.cache
def _count_compilations() -> None:
    def listener(event: str, duration_secs: float, **_) -> None:
        del duration_secs
        CompilationCounter._total += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listener)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the second start of a run compiles nothing; JAX's own setting wins."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / "xla"))
