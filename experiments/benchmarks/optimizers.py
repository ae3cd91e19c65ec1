"""Speed of one optimizer update against the memory bandwidth: `python -m crescendo.experiments.benchmark optim`.

An update can be no faster than reading the gradient, the parameters and the state once and writing the parameters and
the state once, at the bandwidth of a plain copy on the same device.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from crescendo import models, optim
from crescendo.models import ModelConfig

# Ours, and optax's own under the same options where it has one.
PEERS: dict[str, tuple[Callable, Callable]] = {
    "adamw": (optim.adamw, functools.partial(optax.adamw, b2=0.95, weight_decay=0.1)),
    "lion": (optim.lion, optax.lion),
    "lamb": (optim.lamb, functools.partial(optax.lamb, weight_decay=0.01)),
    "lars": (optim.lars, optax.lars),
    "sgd": (optim.sgd, functools.partial(optax.sgd, momentum=0.9)),
}


class UpdateSpeed(NamedTuple):
    """What one update costs.

    Attributes:
      seconds: the mean over the timed updates.
      minimum_bytes: what must move: gradient read once, parameters and state read and written once.
      state_bytes: the optimizer's state, from the compiled program's arguments.
    """

    seconds: float
    minimum_bytes: int
    state_bytes: int


def copy_bytes_per_second(size_bytes: int = 2**32) -> float:
    """The bandwidth of a plain copy, bytes read plus bytes written."""
    source = jax.random.normal(jax.random.key(0), (size_bytes // 4,))
    copy = jax.jit(lambda x: x + 1.0)
    return 2 * source.nbytes / _seconds(lambda: copy(source))


def measure_update(optimizer: optax.GradientTransformation, config: ModelConfig, *, updates: int = 20) -> UpdateSpeed:
    """Times updates of the model's parameters, in float32, in place.

    Args:
      optimizer: any optax transform.
      config: the model, for the number and the shapes of the parameters.
      updates: how many to time, after three to warm up.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    parameters = jax.jit(functools.partial(models.initialize, config))(jax.random.key(0))
    gradients = jax.jit(lambda tree: jax.tree.map(lambda x: 1e-3 * jnp.cos(1e3 * x), tree))(parameters)
    state = jax.jit(optimizer.init)(parameters)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(parameters, state, gradients):
        changes, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, changes), state

    compiled = update.lower(parameters, state, gradients).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(parameters))
    state_bytes = memory.argument_size_in_bytes - 2 * parameter_bytes

    def once():
        nonlocal parameters, state
        parameters, state = compiled(parameters, state, gradients)
        return parameters

    return UpdateSpeed(_seconds(once, updates), 3 * parameter_bytes + 2 * state_bytes, state_bytes)


def _seconds(call: Callable, repeats: int = 20) -> float:
    """The mean time of a call when many are dispatched in a row, so that the host's own time is hidden."""
    for _ in range(3):
        jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def optimizer_table(names: list[str], preset: str) -> Table:
    """Each optimizer and optax's own: milliseconds, share of the bandwidth bound, size of the state."""
    config = ModelConfig.preset(preset).for_platform(jax.default_backend())
    shapes = jax.eval_shape(functools.partial(models.initialize, config), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    bandwidth = copy_bytes_per_second(min(2**32, 8 * count))
    title = f"{count / 1e6:,.1f}M parameters on {jax.devices()[0].device_kind}, copy {bandwidth / 1e9:,.0f} GB/s"
    table = Table("optimizer", "ms", "of the bound", "optax's ms", "of the bound", "state / parameters", title=title)
    for name in names:
        ours, theirs = (measure_update(make(1e-4), config) for make in PEERS[name])
        cells = [
            (f"{1e3 * speed.seconds:.2f}", f"{speed.minimum_bytes / bandwidth / speed.seconds:.0%}")
            for speed in (ours, theirs)
        ]
        table.add_row(name, *cells[0], *cells[1], f"{ours.state_bytes / (4 * count):.3f}")
    return table
