"""A run assembled: task, layout, optimizer, plan and the one compiled step.

Whatever trains goes through a session: `train`, the branches of `critical_batch`, `benchmark`, `describe`, the tests.
"""

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Gt, Le
from jax.sharding import AbstractMesh, Mesh

from crescendo import optim, parallel
from crescendo.experiments.data.rows import Order, row_order
from crescendo.experiments.data.subset import on_subset
from crescendo.experiments.runs.state import TrainState
from crescendo.experiments.runtime import hardware
from crescendo.experiments.runtime.arguments import checked
from crescendo.experiments.runtime.errors import UserError, user_values
from crescendo.experiments.tasks.base import Model, Source, Task
from crescendo.experiments.tasks.language_model import language_model
from crescendo.experiments.trainer.compilation import check_numbers, options, peak_bytes
from crescendo.experiments.trainer.evaluate import (
    evaluation_parameters,
    evaluation_program,
    make_evaluation,
    make_row_losses,
    named_means,
)
from crescendo.experiments.trainer.feed import Feed, check_rows
from crescendo.experiments.trainer.frozen import Trainable
from crescendo.experiments.trainer.gradient_statistics import check_statistics
from crescendo.experiments.trainer.hard import check_hard, flops_factor
from crescendo.experiments.trainer.microbatches import MEMORY_SHARE, max_microbatch_examples, plan_notes, plans
from crescendo.experiments.trainer.optimizer_checks import check_derivatives, check_optimizer
from crescendo.experiments.trainer.programs import CompiledStep, Programs, trace_step
from crescendo.experiments.trainer.shapes import (
    abstract_batch,
    abstract_state,
    initial_state,
    is_finite,
    state_shardings,
)
from crescendo.experiments.trainer.step import make_step
from crescendo.experiments.trainer.wrapping import Wraps, by_groups, wrapped
from crescendo.optim.batch_size import BatchSizePolicy, Coupling, constant
from crescendo.optim.checks import check_real
from crescendo.optim.groups import ParameterGroup
from crescendo.optim.noise_scale import required_statistics
from crescendo.ranges import Count, OneOf, Positive, Seed


class Session:
    """What a run trains and how, and its compiled step.

    Nothing is compiled, and no device needed, before `step` is asked for.

    Args:
      data: what to train on, as the task takes it.
      model: the model's configuration, as the task takes it.
      optimizer: an optax transform; schedules in it are functions of examples seen, and end with the run unless they
        say otherwise.
      batch_size: global, in examples: a number, or a policy that moves it.
      total_examples: the length of the run; rounded down to whole microbatches.
      rows: a file that `select_rows` wrote: of the data these rows alone are trained on; None: all.
      task: makes the task of data and model.
      coupling: how the learning rate follows the batch size: "linear", "sqrt", "none".
      base_batch_size: the batch size that the learning rate is meant for; the initial one when None.
      noise_scale: `@gradient_noise_scale()`, to record the gradient noise scale; None: it isn't measured. It is known
        from batches of at least two microbatches, or with `gradient_noise_scale.norm_layers = True` from any.
      guard: `@guard()`, to leave out batches whose loss or gradient is an outlier, and to go back to a checkpoint where
        that doesn't help; None: only what isn't finite is left out.
      hard_share: of each batch this share is trained on, the examples with the highest losses; None: all.
      mesh: the devices; all of them along `data` when None.
      strategy: what is split along the mesh's axes: a key of `crescendo.parallel.STRATEGIES`, or `@strategy()`.
      seed: of the parameters, of the order of the data, and of the task's random draws.
      groups: of parameters, with multipliers of rate and decay, or frozen; the first that matches counts.
      average_examples: evaluate, and save for use, an exponential average of the parameters over so many examples;
        None: the parameters themselves.
      max_gradient_norm: clip the mean gradient to this l2 norm; None: never.
      max_microbatch_examples: a bound below the one that memory sets.
      further_sizes: batch sizes beyond the policy's that the step must serve.
      platform: "cpu", "gpu" or "tpu", where the mesh has no devices.

    Attributes:
      task: what is trained.
      policy: of the batch size.
      layout: mesh and strategy, as the model needs them.
      optimizer: with all that is wrapped around it.
      seed: as given.
      groups: as given.
      guard: as given.
      hard_share: as given.
      flops_per_example: that is read, forward and backward, by the matrix products.
      wraps: what lies around the optimizer.
      base_batch_size: the batch size that the learning rate is meant for.
      strategy: as given.
      asked_examples: the length of the run, as given.
      platform: "cpu", "gpu" or "tpu".
      trainable: which parameters are trained.
      statistics: what the step measures beyond norms.
      parameters: the shapes of the parameters.
      programs: what is compiled; that of another session whose data have the same shapes may take its place.
      compile_seconds: that were spent so far waiting for the step, the evaluation and the first state to be compiled.
      notes: what a person should hear of the run before it begins; complete once the step is compiled.

    Raises:
      UserError: for a value out of its range, or a model that mesh and data don't fit.
    """

    @functools.partial(checked, called="train")
    def __init__(
        self,
        *,
        data: Any,
        model: Model,
        optimizer: optax.GradientTransformation,
        batch_size: Count | BatchSizePolicy,
        total_examples: Count,
        rows: str | None = None,
        task: Callable[..., Task] = language_model,
        coupling: Coupling = "sqrt",
        base_batch_size: Count | None = None,
        noise_scale: optax.GradientTransformation | None = None,
        guard: optim.Guard | None = None,
        hard_share: Annotated[float, Gt(0), Le(1)] | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        strategy: Annotated[str, OneOf(parallel.STRATEGIES)] | parallel.Strategy = "fsdp",
        seed: Seed = 0,
        groups: Sequence[ParameterGroup] = (),
        average_examples: Count | None = None,
        max_gradient_norm: Positive | None = 1.0,
        max_microbatch_examples: Count | None = None,
        further_sizes: Sequence[Count] = (),
        platform: str | None = None,
    ):
        self.strategy, self.guard, self.hard_share = strategy, guard, hard_share
        self.wraps = Wraps(guard is not None, average_examples is not None, noise_scale is not None)
        self.seed, self.groups, self.notes = seed, tuple(groups), list[str]()
        self.compile_seconds = 0.0
        self._max_gradient_norm, self._max_microbatch_examples = max_gradient_norm, max_microbatch_examples
        self.asked_examples = total_examples
        self._said_of_lengths: list[str] = []
        self._kernels: dict[str, list[str]] = {}
        self.programs, self._traced = Programs(), threading.Event()
        mesh = parallel.make_mesh() if mesh is None else mesh
        if platform is None:
            assert isinstance(mesh, Mesh)
            platform = mesh.devices.flat[0].platform
        self.platform = "gpu" if platform == "cuda" else platform
        with user_values():
            self.policy = batch_size if isinstance(batch_size, BatchSizePolicy) else constant(batch_size)
            self.sizes = (*self.policy.sizes, *further_sizes)
            layout = parallel.Layout(mesh, strategy)
            parallel.plan_batches(self.sizes, layout.batch_shards, stages=layout.sizes["stage"])
        with user_values():
            check_numbers(model, mesh)
            self.task = task(data=on_subset(data, rows), model=model.for_platform(self.platform))
            self.layout = self.task.place(layout)
            if self.policy.for_rows is not None:
                self.policy = self.policy.for_rows(self.task.units_per_example)
        logical_axes = self.task.logical_axes()
        self.parameters = jax.eval_shape(lambda: self.task.initialize(jax.random.key(0)))
        with user_values():
            # The gradient of a complex parameter is conjugated: a step along it would climb.
            check_real(self.parameters, "a training step")
            self.layout.parameters(logical_axes, self.parameters)
            self.layout.optimizer(logical_axes, self.parameters)
            frozen = optim.frozen_mask(groups, self.parameters, logical_axes)
        if all(jax.tree.leaves(frozen)):
            raise UserError("train.groups freeze every parameter: leave at least one to train")
        if self.layout.schedule is not None and any(jax.tree.leaves(frozen)):
            raise UserError(
                "train.groups freeze parameters, and the stages of a pipeline train all of theirs: use mesh.stage = 1, "
                f"not {layout.sizes['stage']}"
            )
        self.trainable = Trainable(jax.tree.map(lambda is_frozen: not is_frozen, frozen))
        with user_values():
            self.notes += check_optimizer(optimizer, self.trainable.take(self.parameters), self.policy)
            self.optimizer = wrapped(
                by_groups(optimizer, groups, self.trainable.take(logical_axes)),
                self.policy,
                coupling=coupling,
                base_batch_size=base_batch_size,
                noise_scale=noise_scale,
                average_examples=average_examples,
                guard=guard,
            )
            opt_state = jax.eval_shape(self.optimizer.init, self.trainable.take(self.parameters))
            check_derivatives(opt_state, self.layout)
        self.base_batch_size = base_batch_size or self.policy.sizes[0]
        self.statistics = tuple(sorted({*self.policy.statistics, *required_statistics(opt_state)}))
        check_statistics(self.statistics, self.task, self.trainable.take(self.parameters))
        if hard_share is not None:
            noisy = noise_scale is not None or bool(self.statistics)
            check_hard(hard_share, self.layout, self.policy, measured=noisy)
        self.flops_per_example = self.task.flops_per_example * flops_factor(hard_share)
        if self.policy.measured_on not in (None, self.task.fingerprint):
            raise UserError(
                f"the batch-size policy follows what was measured on another model or data (fingerprint "
                f"{self.policy.measured_on}, not {self.task.fingerprint}): measure it on this with critical_batch"
            )

    @functools.cached_property
    def shardings(self) -> TrainState:
        """The sharding of every array of the state."""
        return state_shardings(self.task, self.optimizer, self.layout, self.trainable)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.task, self.optimizer, self.shardings, self.trainable)

    def lower(
        self, plan: parallel.BatchPlan, *, total_examples: int | None = None, implementation: str | None = None
    ) -> jax.stages.Lowered:
        """The step for the mesh's devices, which need not be there: topology descriptions will do.

        Args:
          plan: how batches are cut.
          total_examples: the run's length; None: as asked for.
          implementation: of the task's kernels; None leaves it to the device.

        Raises:
          UserError: a schedule whose parts don't fit the run's length, or an optimizer that asks for second derivatives
            which the mesh doesn't have.
        """
        step = make_step(
            self.task,
            self.optimizer,
            max_gradient_norm=self._max_gradient_norm,
            layout=self.layout,
            statistics=self.statistics,
            total_examples=self.asked_examples if total_examples is None else total_examples,
            trainable=self.trainable,
            implementation=implementation,
            hard_share=self.hard_share,
        )
        told = options(self.task, self.platform, self.layout)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None), compiler_options=told)
        batch = abstract_batch(self.task, self.layout, plan)
        traced, self._kernels, self._said_of_lengths = trace_step(
            jitted, (self.abstract_state, batch), self.layout.mesh.devices.flat[0]
        )
        return traced.lower(lowering_platforms=("cuda" if self.platform == "gpu" else self.platform,))

    @functools.cached_property
    def _compiled(self) -> CompiledStep:
        with self._compiling():
            step = self.compile_step()
        self.notes += plan_notes(
            step,
            self.policy,
            asked_examples=self.asked_examples,
            shards=self.layout.parts,
            noise_of_microbatches=self.wraps.noisy and "norm_layers" not in self.statistics,
        )
        return step

    def compile_step(self) -> CompiledStep:
        """The step with the largest microbatch that fits the device's memory, by the compiler's own count."""
        try:
            return self.programs.get("step", self._compile_step)
        finally:
            self._traced.set()

    def _compile_step(self) -> CompiledStep:
        limit = hardware.memory_bytes(self.layout.mesh.local_devices[0])
        for plan in self.plans():
            total = self.asked_examples - self.asked_examples % plan.microbatch_examples
            if total == 0:
                raise UserError(
                    f"train.total_examples = {self.asked_examples} is less than one microbatch of "
                    f"{plan.microbatch_examples}: raise it, or lower train.max_microbatch_examples"
                )
            lowered = self.lower(plan, total_examples=total)
            self._traced.set()
            peak = peak_bytes(compiled := lowered.compile())
            if limit is None or peak <= MEMORY_SHARE * limit:
                return CompiledStep(plan, total, compiled, self._kernels, tuple(self._said_of_lengths))
        assert limit is not None
        raise UserError(
            f"one example a device needs {peak / 2**30:.1f} GiB and a device has {limit / 2**30:.1f} GiB: "
            "use a smaller model, model.remat = 'full', a shorter sequence, or more devices along fsdp"
        )

    def plans(self) -> Iterator[parallel.BatchPlan]:
        """How batches can be cut, from the largest microbatch that makes a step faster down to one example a device."""
        bound = max_microbatch_examples(self.task, self.layout, self.platform)
        bound = min(bound, self._max_microbatch_examples or bound)
        return plans(self.sizes, self.layout, bound, self.policy.min_microbatches)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - begin

    @property
    def step(self) -> jax.stages.Compiled:
        """The compiled step, `(state, batch) -> (state, metrics)`; it gives the state's memory back."""
        return self._compiled.program

    @property
    def kernels(self) -> Mapping[str, Sequence[str]]:
        """The implementations that the step takes of each kernel, by the kernel's name."""
        return self._compiled.kernels

    @property
    def plan(self) -> parallel.BatchPlan:
        """How batches are cut."""
        return self._compiled.plan

    @property
    def total_examples(self) -> int:
        """The length of the run, in whole microbatches."""
        return self._compiled.total_examples

    @property
    def peak_bytes(self) -> int:
        """A device's memory at the step's peak, by the compiler's count."""
        return peak_bytes(self._compiled.program)

    def fresh_state(self, parameters: Any = None) -> TrainState:
        """The state at the begin of a run, with random parameters or the given ones, laid out as the step wants it."""
        if parameters is None:
            with self._compiling():
                begin = self._first_state()
            return begin()

        def state_of(parameters) -> TrainState:
            opt_state = self.optimizer.init(self.trainable.take(parameters))
            return TrainState(parameters, opt_state, jnp.int32(0), jnp.int32(0))

        return jax.jit(state_of, out_shardings=self.shardings)(parameters)

    def _first_state(self) -> jax.stages.Compiled:
        begin = functools.partial(initial_state, self.task, self.optimizer, self.seed, self.trainable)
        return self.programs.get("state", lambda: jax.jit(begin, out_shardings=self.shardings).lower().compile())

    def fitting(self, batch_size: int) -> int:
        """The size where the step serves it, else the policy's next lower: another plan's state may hold any."""
        if batch_size in self.sizes:
            return batch_size
        return max((size for size in self.policy.sizes if size < batch_size), default=self.policy.sizes[0])

    def end_from(self, examples_seen: int) -> int:
        """Where a run that goes on from there ends: whole microbatches later, and not past `total_examples`.

        Another batch size may have left over what fills none of this plan's microbatches.
        """
        left = max(0, self.total_examples - examples_seen)
        return examples_seen + left - left % self.plan.microbatch_examples

    def is_finite(self, state: TrainState) -> bool:
        """Whether the parameters, and what the optimizer keeps of their shapes, are finite."""
        return bool(jax.device_get(self.programs.get("is_finite", self._is_finite)(state)))

    def _is_finite(self) -> jax.stages.Compiled:
        finite = functools.partial(is_finite, {x.shape for x in jax.tree.leaves(self.parameters)})
        return jax.jit(finite, out_shardings=self.layout.replicated).lower(self.abstract_state).compile()

    def averaged(self, state: TrainState) -> Any:
        """The parameters to evaluate and to use."""
        return self.programs.get("averaged", self._averaged)(state)

    def _averaged(self) -> jax.stages.Compiled:
        average = functools.partial(evaluation_parameters, trainable=self.trainable)
        return jax.jit(average, out_shardings=self.shardings.parameters).lower(self.abstract_state).compile()

    def compile_others(self, evaluation_examples: int) -> None:
        """What a run needs beside its step, in a thread beside the step's.

        It begins once that is traced, which Python does one at a time, and believes that its first plan fits.
        """
        self._traced.wait()
        microbatch_examples = next(self.plans()).microbatch_examples
        self._first_state()
        if self.task.held_out:
            self._evaluation(microbatch_examples, -(-evaluation_examples // microbatch_examples))
        self._compile_for_saving()

    def _compile_for_saving(self) -> None:
        self.programs.get("is_finite", self._is_finite)
        if optim.has_evaluation_params(self.abstract_state.opt_state):
            self.programs.get("averaged", self._averaged)

    def _evaluation(self, microbatch_examples: int, groups: int) -> jax.stages.Compiled:
        arguments = self.task, self.layout, self.abstract_state, groups, microbatch_examples, self.trainable

        def compiled() -> jax.stages.Compiled:
            lowered = evaluation_program(*arguments)
            self.compile_step()  # at the same time each would disturb how the other's matmuls are timed
            return lowered.compile()

        return self.programs.get(("evaluation", microbatch_examples, groups), compiled)

    @functools.cached_property
    def order(self) -> Order:
        """Which row each example of the run is."""
        return row_order(self.task.train, self.seed)

    def check_rows(self) -> None:
        """Raises UserError for data that don't serve the run."""
        check_rows(self.task.train, self.order, max(self.sizes), self.asked_examples)

    def feed(self, seed: int | None = None) -> Feed:
        """The batches of the run, or of one with another seed, by the clock."""
        return Feed(self.task, self.task.train, self.plan, self.layout, self.seed if seed is None else seed)

    def evaluation(self, examples: int) -> Callable[[TrainState], dict[str, float]]:
        """`state -> means` over the same `examples` rows of each held-out set; compiled now, as is what saving needs.

        Those of the set "validation", or of the mean that stands for it, go by their own names (`loss`), others by the
        set's too (`test/loss`).
        """
        microbatch_examples = self.plan.microbatch_examples
        with self._compiling():
            self._compile_for_saving()
            calls = {
                name: make_evaluation(
                    self.task,
                    name,
                    self.layout,
                    functools.partial(self._evaluation, microbatch_examples),
                    evaluation_examples=examples,
                    microbatch_examples=microbatch_examples,
                )
                for name in self.task.held_out
            }

        def evaluate(state: TrainState) -> dict[str, float]:
            return named_means(self.task, {name: call(state) for name, call in calls.items()})

        return evaluate

    def row_losses(self, source: Source | None = None) -> Callable[[TrainState, np.ndarray], np.ndarray]:
        """`(state, row numbers) -> each row's loss`, float32 `[rows]`; of the training rows unless given others."""
        return make_row_losses(
            self.task,
            self.task.train if source is None else source,
            self.layout,
            microbatch_examples=self.plan.microbatch_examples,
            trainable=self.trainable,
        )


def session_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `train`'s arguments that a session takes."""
    taken = inspect.signature(Session).parameters
    return {name: value for name, value in arguments.items() if name in taken}
