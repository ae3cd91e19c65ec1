"""What a training step costs on the devices at hand: `python -m crescendo.experiments.benchmark train`."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from rich.table import Table

from crescendo import optim, parallel
from crescendo.experiments.data.random_text import RandomText
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.runtime import hardware
from crescendo.experiments.trainer.session import Session
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import BatchSizePolicy, constant


class Speed(NamedTuple):
    """What a training step costs.

    Attributes:
      step_seconds: the median over the timed steps.
      tokens_per_second: of all devices together.
      mfu: the share of the devices' peak; None where the peak isn't known.
      peak_bytes: memory of a device, by the compiler's count.
      microbatch_examples: as the planner chose.
      compile_seconds: tracing and compilation.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_bytes: int
    microbatch_examples: int
    compile_seconds: float


class Loop(NamedTuple):
    """A session with its step, and a state and a batch to call it on."""

    session: Session
    step: jax.stages.Compiled
    state: TrainState
    batch: dict
    compile_seconds: float

    def timed(self, steps: int) -> tuple["Loop", list[float]]:
        """The loop after some steps, and the seconds of each."""
        state, seconds = self.state, []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = self.step(state, self.batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        return self._replace(state=state), seconds

    def median_seconds(self, steps: int) -> tuple["Loop", float]:
        """The loop after three steps to warm up and some timed ones, and the median of those in seconds."""
        loop, seconds = self.timed(steps + 3)
        return loop, statistics.median(seconds[3:])


def prepare(
    model: ModelConfig,
    *,
    sequence_length: int,
    batch_size: int,
    documents_in_row: int = 1,
    policy: BatchSizePolicy | None = None,
    noise_scale: optax.GradientTransformation | None = None,
    max_microbatch_examples: int | None = None,
    layout: parallel.Layout | None = None,
) -> Loop:
    """Compiles the loop's step, AdamW included, and fills a batch with random tokens, as skewed as a text's.

    Args:
      model: the decoder's shape.
      sequence_length: tokens in a row.
      batch_size: global, in examples.
      documents_in_row: packed documents of equal length.
      policy: of the batch size, whose first size is the batch's; None: constant.
      noise_scale: as `train` takes it.
      max_microbatch_examples: a bound below the one that memory sets.
      layout: mesh and strategy; None: all devices along `data`.
    """
    start = time.perf_counter()
    session = Session(
        data=RandomText(model.vocab_size, sequence_length, documents_in_row),
        model=model,
        optimizer=optim.adamw(3e-4),
        batch_size=constant(batch_size) if policy is None else policy,
        total_examples=2**31 - batch_size,
        noise_scale=noise_scale,
        max_microbatch_examples=max_microbatch_examples,
        mesh=layout.mesh if layout else None,
        strategy=layout.strategy if layout else "fsdp",
    )
    step = session.step  # compiles it
    seconds = time.perf_counter() - start
    return Loop(session, step, session.fresh_state(), session.feed().read(0, batch_size), seconds)


def measure(
    model: ModelConfig, *, sequence_length: int, batch_size: int, steps: int = 20, documents_in_row: int = 1
) -> tuple[Speed, Loop]:
    """Times the loop's own step (see `prepare`), after three steps to warm up; and the loop as it is then."""
    loop = prepare(model, sequence_length=sequence_length, batch_size=batch_size, documents_in_row=documents_in_row)
    loop, step_seconds = loop.median_seconds(steps)
    tokens_per_second = batch_size * sequence_length / step_seconds
    device = jax.devices()[0]
    peak = hardware.peak_flops_per_second(device)
    flops = tokens_per_second * model.flops_per_token(sequence_length)
    speed = Speed(
        step_seconds,
        tokens_per_second,
        flops / (peak * len(jax.devices())) if peak else None,
        loop.session.peak_bytes,
        loop.session.plan.microbatch_examples,
        loop.compile_seconds,
    )
    return speed, loop


def noise_scale_table(preset: str, *, sequence_length: int, batch_size: int, rounds: int = 8, steps: int = 10) -> Table:
    """What the noise scale and a policy cost a step: the variants take turns, so that a drift of the clock is shared.

    All run microbatches of half the batch, which the gradient's noise scale needs.
    """
    sizes: dict[str, Any] = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "max_microbatch_examples": max(1, batch_size // 2),
    }
    model = ModelConfig.preset(preset)
    following = optim.noise_scale_following(batch_size, batch_size)
    loops = {
        "neither": prepare(model, **sizes),
        "noise scale and policy": prepare(model, **sizes, policy=following, noise_scale=optim.gradient_noise_scale()),
        "and that of norm layers": prepare(
            model, **sizes, policy=following, noise_scale=optim.gradient_noise_scale(norm_layers=True)
        ),
        "and by layer": prepare(
            model, **sizes, policy=following, noise_scale=optim.gradient_noise_scale(groups="layer", norm_layers=True)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name in loops:
            loops[name], timed = loops[name].timed(steps)
            seconds[name] += timed if number else []  # the first round warms up
    base = statistics.median(seconds["neither"])
    title = f"{jax.devices()[0].device_kind}: {preset}, rows of {sequence_length}, batch {batch_size}"
    table = Table("measured", "ms a step", "more than neither", title=title)
    for name, timed in seconds.items():
        median = statistics.median(timed)
        table.add_row(name, f"{1e3 * median:.3f}", f"{median / base - 1:+.2%}")
    return table


def training_table(
    models: dict[str, ModelConfig],
    *,
    sequence_length: int,
    batch_size: int,
    steps: int,
    documents_in_row: int,
    after_each: Callable[[str, Loop], None] = lambda name, loop: None,
) -> Table:
    """One row a model; the arguments are those of `measure`, and what to do with each model's loop besides."""
    title = f"{len(jax.devices())} x {jax.devices()[0].device_kind}, rows of {sequence_length}, batch {batch_size}"
    table = Table("preset", "ms a step", "tokens/s", "MFU", "GiB", "microbatch", "compiled in", title=title)
    for name, model in models.items():
        speed, loop = measure(
            model,
            sequence_length=sequence_length,
            batch_size=batch_size,
            steps=steps,
            documents_in_row=documents_in_row,
        )
        table.add_row(
            name,
            f"{1e3 * speed.step_seconds:,.1f}",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.mfu:.1%}" if speed.mfu else "-",
            f"{speed.peak_bytes / 2**30:.2f}",
            str(speed.microbatch_examples),
            f"{speed.compile_seconds:.0f} s",
        )
        after_each(name, loop)
    return table
