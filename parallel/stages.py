"""The stages of a pipeline: what each has of a model, and the forward passes of a tick."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from crescendo.parallel import chunks
from crescendo.parallel.chunks import AXIS
from crescendo.parallel.schedules import Schedule, Work

Tree = Any
EACH, ALL = P(AXIS), P()
"""How a stage sees an array: its own part of it, or all."""


class Pipeline(NamedTuple):
    """How layers lie over stages.

    Attributes:
      schedule: its ticks.
      mesh: the devices.
      layered: of each parameter, whether it is stacked in layers, which the stages split; the parameters' tree.
      lay_out: lays a residual stream `[B, T, D]` out on a stage's devices.
    """

    schedule: Schedule
    mesh: Mesh | AbstractMesh
    layered: Tree
    lay_out: Callable[[jax.Array], jax.Array]


class Stages:
    """The stages' forward passes; `own` are parameters stacked in layers, `shared` the others, None in their places.

    What is traced outside comes into a region as an argument: inside it would lie on another mesh.
    """

    def __init__(self, how: Pipeline, parts: Any, parameters: Tree, microbatches: Tree, count: Any):
        self.how, self.schedule, self.parts = how, how.schedule, parts
        self.microbatches, self.count = microbatches, count
        self.k_max = jax.tree.leaves(microbatches)[0].shape[0]
        self.own, self.shared = self.stacked(parameters), self.not_stacked(parameters)
        self._run_forward = self.each(self._forward, (ALL, ALL, EACH, EACH, ALL, ALL), EACH)
        self._run_tell = self.each(self._tell, (ALL, ALL, EACH, EACH), EACH)

    def take(self, tree: Tree, layered: bool) -> Tree:
        """The arrays of the parameters that are, or aren't, stacked in layers."""
        return jax.tree.map(lambda stacked, x: x if stacked == layered else None, self.how.layered, tree)

    def stacked(self, tree: Tree) -> Tree:
        """The arrays of the parameters that are stacked in layers, each stage with those of its chunks."""
        return self.moved(chunks.interleaved, self.take(tree, True))

    def not_stacked(self, tree: Tree) -> Tree:
        """The arrays of the others."""
        return self.take(tree, False)

    def moved(self, move: Callable, tree: Tree, axis: int = 0) -> Tree:
        """Arrays whose layers, at an axis, have moved among the stages; see `chunks`."""
        p, v = self.schedule.stages, self.schedule.chunks
        if v == 1:
            return tree
        part = P(*(None,) * axis, AXIS)
        return self.each(lambda tree: jax.tree.map(lambda x: move(x, p, v, axis), tree), (part,), part)(tree)

    def merged(self, own: Tree, shared: Tree) -> Tree:
        """A tree of both; None for all of one is None."""
        if own is None or shared is None:
            return shared if own is None else own
        return jax.tree.map(lambda stacked, a, b: a if stacked else b, self.how.layered, own, shared)

    def work(self, passes: Callable[..., Work], tick, stage, count) -> Work:
        """What a stage does of some passes of the schedule, with the number of a microbatch that there is."""
        work = passes(tick, stage, count)
        return work._replace(microbatch=jnp.clip(work.microbatch, 0, self.k_max - 1))

    def entering(self, passes: Callable[..., Work], tick, stage: int) -> tuple[jax.Array, jax.Array]:
        """The microbatch with which a stage is before all layers in a tick, and whether there is one."""
        work = self.work(passes, tick, stage, self.count)
        return work.microbatch, work.due & self.schedule.enters(stage, work)

    def leaving(self, passes: Callable[..., Work], tick, stage: int) -> tuple[jax.Array, jax.Array]:
        """The microbatch with which a stage is behind all layers in a tick, and whether there is one."""
        work = self.work(passes, tick, stage, self.count)
        return work.microbatch, work.due & self.schedule.leaves(stage, work)

    def rows(self, microbatches: Tree, microbatch) -> Tree:
        """Those of a microbatch."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, microbatch, keepdims=False), microbatches)

    def each(self, function: Callable, in_specs: Tree, out_specs: Tree) -> Callable:
        """`function` on every stage's own part, automatic along all other axes."""
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else self.how.mesh
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={AXIS}, check_vma=False
        )

    def sent(self, x: jax.Array, tick, *, back: bool = False) -> jax.Array:
        """What each stage gets of what the stages have made in a tick, `[p, ...]`; see `Schedule.routes`."""

        def send(pairs):
            return self.each(lambda x: jax.lax.ppermute(self.how.lay_out(x[0]), AXIS, pairs)[None], (EACH,), EACH)

        ways = [send(pairs) for pairs in self.schedule.routes(back=back)]
        return ways[0](x) if len(ways) == 1 else jax.lax.switch(tick % len(ways), ways, x)

    def of_stage(self, stage: int, x: jax.Array) -> jax.Array:
        """A stage's part of `[p, B, T, D]`, handed to all."""
        part = self.each(lambda x: self.how.lay_out(_from_stage(stage, x[0])), (EACH,), ALL)
        return part(x)

    def enter(self, shared: Tree, rows: Tree) -> jax.Array:
        """The residual stream before the layers."""
        return _joined(self.parts.enter(self.merged(None, shared), rows))

    def layers(self, own: Tree, x: jax.Array, rows: Tree, stage: jax.Array, chunk: jax.Array) -> tuple[jax.Array, Tree]:
        """The residual stream behind the layers of a chunk, and what they say."""
        first = (chunk * self.schedule.stages + stage) * jax.tree.leaves(own)[0].shape[0]
        stream, told = self.parts.layers(own, (x, None), rows, first)
        return _joined(stream), told

    def chunk_of(self, own: Tree, work: Work) -> Tree:
        """Of a stage's own arrays those of a chunk."""
        return jax.tree.map(lambda x: chunks.chunk_of(x, work.chunk, self.schedule.chunks), own)

    def _forward(self, tick, count, own, received, first, microbatches):
        stage = jax.lax.axis_index(AXIS)
        work = self.work(self.schedule.forward, tick, stage, count)
        x = jnp.where(self.schedule.enters(stage, work), first[stage % len(first)], received[0])
        rows = self.rows(microbatches, work.microbatch)
        y, told = self.layers(self.chunk_of(own, work), x, rows, stage, work.chunk)
        return self.how.lay_out(y)[None], x[None], jax.tree.map(lambda x: jnp.where(work.due, x, 0), told)

    def _tell(self, tick, count, told, term):
        work = self.work(self.schedule.forward, tick, jax.lax.axis_index(AXIS), count)
        return jax.tree.map(lambda x, y: chunks.add_to_chunk(x, work.chunk, self.schedule.chunks, y), told, term)

    def forward(self, tick, received: jax.Array, told: Tree, beside: Callable = lambda: None) -> tuple[tuple, Any]:
        """The results of the stages' forward passes and what these began with, both `[p, ...]`; and see `only_if`.

        The third result is `told` with what the layers say added to it.
        """

        def first(stage: int):
            microbatch, due = self.entering(self.schedule.forward, tick, stage)
            return only_if(due, self.enter, self.shared, self.rows(self.microbatches, microbatch))

        (y, x, term), others = only_if(
            tick < self.schedule.passing(self.count),
            self._run_forward,
            *(tick, self.count, self.own, received, jnp.stack([*map(first, self.schedule.first_stages)])),
            self.microbatches,
            beside=beside,
        )
        return (y, x, self._run_tell(tick, self.count, told, term)), others

    @functools.cached_property
    def nothing_told(self) -> Tree:
        """Zeros for what all layers say, in the order of the stages' work."""
        rows = self.rows(self.microbatches, 0)
        return zeros(
            jax.eval_shape(lambda: self.parts.layers(self.own, (self.enter(self.shared, rows), None), rows, 0)[1])
        )

    def left(self, rows: Tree) -> Any:
        """The sums of a batch that goes through no layers: for their shapes."""
        return self.parts.leave(self.merged(None, self.shared), (self.enter(self.shared, rows), None), rows)

    def streams(self, slots: int | None = None) -> jax.Array:
        """Zeros for a residual stream on each stage, `[p, B, T, D]`; with slots `[p, slots, B, T, D]`."""
        x = jax.eval_shape(lambda: self.enter(self.shared, self.rows(self.microbatches, 0)))
        shape, lay_out = (
            (x.shape, self.how.lay_out) if slots is None else ((slots, *x.shape), jax.vmap(self.how.lay_out))
        )
        return self.each(lambda: lay_out(jnp.zeros(shape, x.dtype))[None], (), EACH)()


def _joined(stream: tuple) -> jax.Array:
    x, added = stream
    return x if added is None else x + added


def _from_stage(stage: int, x: jax.Array) -> jax.Array:
    """On every stage the `x` of one of them, inside a region that is manual over `AXIS`."""
    # Of the addends one is not 0, so the sum is exact in any dtype. XLA for CPUs makes float32 of sums in bfloat16 and
    # ends the process over it, where other axes are automatic ("Invalid binary instruction opcode copy").
    addend = jnp.where(jax.lax.axis_index(AXIS) == stage, x, 0)
    return jax.lax.platform_dependent(
        addend,
        cpu=lambda x: jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype),
        default=lambda x: jax.lax.psum(x, AXIS),
    )


def zeros(shapes: Tree, *leading: int) -> Tree:
    """Arrays like these, or with axes before theirs."""
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), shapes)


def put(slots: Tree, slot, due, values: Tree) -> Tree:
    """The slots with the values in one of them, where they are due."""
    return jax.tree.map(lambda x, value: x.at[slot].set(jnp.where(due, value, x[slot])), slots, values)


def only_if(due, function: Callable, *arguments, beside: Callable | None = None) -> Tree:
    """`function(*arguments)`, zeros where it isn't due; on all devices alike, so it may send among them.

    With `beside` also what that gives, due or not: in a condition of its own it would wait for the function's.
    """
    shapes, beside_it = jax.eval_shape(function, *arguments), beside or (lambda: None)

    def nothing(*_):
        return zeros(shapes), beside_it(), False

    # Of a condition with one result XLA refuses branches that lay it out differently, as zeros don't: so there are two.
    results, others, _ = jax.lax.cond(due, lambda *of: (function(*of), beside_it(), True), nothing, *arguments)
    return results if beside is None else (results, others)
