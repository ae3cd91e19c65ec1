"""Layers over the stages of a pipeline: every microbatch goes through all stages, several are on their way at once.

One loop over ticks, whose table is a `Schedule`. In a tick

1. all stages look up the next microbatch's tokens, each in its own rows of the vocabulary;
2. each stage runs its layers forward on what it has, and sends the result to the next one;
3. all stages compute loss and gradient of the microbatch that the last stage has finished, each for its own rows of the
   vocabulary (Yeung et al., 2024, "Balancing Pipeline Parallelism with Vocabulary Parallelism",
   https://arxiv.org/abs/2411.05288);
4. each stage runs its layers backward on a microbatch whose gradient has come, and sends the gradient on;
5. all stages add the gradient of what was looked up.

A stage keeps the inputs of the microbatches on their way, and computes its layers again in the backward pass. So memory
depends on the stages and not on how many microbatches there are, but with GPipe.

What is due on no stage is left out, by the tick alone, and what isn't due on one stage is masked there: as no branch
differs from stage to stage, layers may send among the devices of a stage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from crescendo.parallel.schedules import Schedule

Tree = Any
AXIS = "stage"
_EACH, _ALL = P(AXIS), P()  # how a stage sees an array: its own part of it, or all


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


class Sums(NamedTuple):
    """Over the microbatches of a batch.

    Attributes:
      loss_sum, extra: as `accumulate` gives them.
      microbatch_weights: float32 `[k_max]`; 0 from `count` on.
      entries: the sums of what `term` gave, the parameters' tree.
      rows: float32 `[k_max, layers]` of each parameter that is stacked in layers and `[k_max]` of each other: the
        products that `term` gave of each microbatch, summed by layer.
    """

    loss_sum: jax.Array
    extra: dict[str, jax.Array]
    microbatch_weights: jax.Array
    entries: Tree
    rows: Tree


Term = Callable[..., tuple[jax.Array, jax.Array]]
"""From a microbatch's gradient of a parameter, its weight and what else belongs to the parameter to `(entries,
products)` of the gradient's shape: to be summed over microbatches, and of each microbatch over all entries."""


def sums_through_stages(
    how: Pipeline,
    term: Term,
    keep: Callable[[Tree], Tree],
    parts: Any,
    parameters: Tree,
    microbatches: Tree,
    count: jax.Array,
    *others: Tree,
) -> Sums:
    """The sums over the first `count` microbatches, and those of `term` of each one's gradient.

    Args:
      how: the stages.
      term: see `Term`.
      keep: makes float32 of a tree of gradients, where they are to be added up; it has None for some parameters.
      parts: the loss, a `crescendo.models.parts.Parts`.
      parameters, microbatches, count: as `accumulate` takes them.
      others: what else `term` takes, the parameters' trees.
    """
    stages = _Stages(how, parts, parameters, microbatches, count)
    schedule, k_max, p = how.schedule, stages.k_max, how.schedule.stages
    others_own, others_shared = ([stages.take(tree, layered) for tree in others] for layered in (True, False))

    def terms(layered: bool, gradients: Tree, microbatch, weights, others) -> tuple[Tree, Tree]:
        """Of the stacked parameters or of the others: what is summed, and the rows of the products."""

        def one(gradient, *others):
            entries, products = term(gradient, weights[microbatch], *others)
            sums = jnp.sum(products, axis=tuple(range(int(layered), products.ndim)))
            return entries, jnp.zeros((k_max, *sums.shape)).at[microbatch].set(sums)

        pairs = jax.tree.map(one, gradients, *others)
        return jax.tree.transpose(jax.tree.structure(gradients), jax.tree.structure((0, 0)), pairs)

    # What is traced outside comes as an argument: inside of a region it would lie on another mesh.
    def backward(tick, count, own, kept, d_output, received, weights, microbatches, *others):
        stage = jax.lax.axis_index(AXIS)
        microbatch, due = stages.numbered(schedule.backward(tick, stage, count))
        rows, x = stages.rows(microbatches, microbatch), kept[0, microbatch % kept.shape[1]]
        _, pull = jax.vjp(lambda own, x: stages.layers(own, x, rows, stage), own, x)
        d_y = jnp.where(stage == p - 1, d_output, received[0])
        gradients, d_x = pull(jnp.where(due, d_y, 0))
        found = terms(True, keep(gradients), microbatch, weights, others)
        found = jax.tree.map(lambda x: jnp.where(due, x, 0), found)
        of_first = how.lay_out(_from_stage(0, d_x))
        return *found, how.lay_out(d_x)[None], of_first

    run_backward = stages.each(
        backward,
        (_ALL, _ALL, _EACH, _EACH, _ALL, _EACH, _ALL, _ALL, *(_EACH for _ in others)),
        (_EACH, P(None, AXIS), _EACH, _ALL),
    )

    def loss_of_finished(finished, rows):
        def loss(shared, x):
            loss_sum, weight, extra = parts.leave(stages.merged(None, shared), (x, None), rows)
            return loss_sum, (weight, dict(extra))

        loss_sum, pull, (weight, extra) = jax.vjp(loss, stages.shared, finished, has_aux=True)
        gradients, d_output = pull(jnp.ones_like(loss_sum))
        return loss_sum, weight, extra, keep(gradients), how.lay_out(d_output)

    def body(tick, carry):
        forward, d_x, waiting, weights, total = carry
        # What a pass has made is sent beside the other pass, which so takes its time.
        y, forward, returned = stages.forward(tick, forward, d_x)
        # The loss of what the last stage has finished; its part of the gradient waits for that of the look-up.
        microbatch, due = stages.numbered(schedule.backward(tick, p - 1, count))
        finished, rows = forward.finished[microbatch % len(forward.finished)], stages.rows(microbatches, microbatch)
        loss_sum, weight, extra, gradients, d_output = _only_if(due, loss_of_finished, finished, rows)
        waiting = _put(waiting, microbatch % p, due, gradients)
        weights = weights.at[microbatch].add(weight)
        (own, own_rows, d_x, d_input), received = _only_if(
            tick >= schedule.first_backward(count),
            run_backward,
            *(tick, count, stages.own, forward.kept, d_output, returned, weights, microbatches, *others_own),
            beside=lambda: stages.sent(y, 1),
        )

        def complete(d_input, rows, waiting, weights, microbatch):
            _, pull = jax.vjp(lambda shared: stages.enter(shared, rows), stages.shared)
            gradients = jax.tree.map(lambda g, slots: g + slots[microbatch % p], keep(*pull(d_input)), waiting)
            return terms(False, gradients, microbatch, weights, others_shared)

        microbatch, due = stages.numbered(schedule.backward(tick, 0, count))
        rows = stages.rows(microbatches, microbatch)
        shared, shared_rows = _only_if(due, complete, d_input, rows, waiting, weights, microbatch)
        new = loss_sum, extra, own, own_rows, shared, shared_rows
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        return forward._replace(received=received), d_x, waiting, weights, total

    def zeros(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    forward = stages.nothing(schedule.kept(k_max), schedule.finished(k_max))
    gradients = jax.eval_shape(keep, stages.shared)
    waiting = jax.tree.map(lambda x: jnp.zeros((p, *x.shape), x.dtype), gradients)
    begin = forward, forward.received, waiting, jnp.zeros(k_max), None
    total = zeros(jax.eval_shape(body, jnp.int32(0), begin)[-1])
    *_, weights, total = jax.lax.fori_loop(0, schedule.ticks(count), body, (*begin[:-1], total))
    loss_sum, extra, own, own_rows, shared, shared_rows = total
    return Sums(loss_sum, extra, weights, stages.merged(own, shared), stages.merged(own_rows, shared_rows))


def evaluate_through_stages(how: Pipeline, parts: Any, parameters: Tree, microbatches: Tree) -> Tree:
    """The sums that `parts.leave` gives, over all microbatches `[k, microbatch, ...]`."""
    k_max = jax.tree.leaves(microbatches)[0].shape[0]
    stages = _Stages(how, parts, parameters, microbatches, k_max)
    schedule = how.schedule

    def sums(finished, rows):
        return parts.leave(stages.merged(None, stages.shared), (finished, None), rows)

    def body(tick, carry):
        forward, total = carry
        y, forward, _ = stages.forward(tick, forward)
        microbatch, due = stages.numbered(schedule.forward(tick, schedule.stages - 1, k_max))
        new = _only_if(due, sums, forward.finished[0], stages.rows(microbatches, microbatch))
        forward = forward._replace(received=stages.sent(y, 1))
        return forward, new if total is None else jax.tree.map(jnp.add, total, new)

    forward = stages.nothing(0, 1)
    total = jax.eval_shape(body, jnp.int32(0), (forward, None))[1]
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)
    return jax.lax.fori_loop(0, schedule.passing(k_max), body, (forward, total))[1]


class _Forward(NamedTuple):
    """What the forward passes carry from tick to tick.

    Attributes:
      received: `[p, B, T, D]`, what each stage has from the one before.
      kept: `[p, slots, B, T, D]`, the inputs of its microbatches on their way.
      finished: `[slots, B, T, D]`, outputs of the last stage.
    """

    received: jax.Array
    kept: jax.Array
    finished: jax.Array


class _Stages:
    """The stages' work in a tick; `own` are parameters stacked in layers, `shared` the others, None in their places."""

    def __init__(self, how: Pipeline, parts: Any, parameters: Tree, microbatches: Tree, count: Any):
        self.how, self.parts, self.microbatches, self.count = how, parts, microbatches, count
        self.k_max = jax.tree.leaves(microbatches)[0].shape[0]
        self.own, self.shared = self.take(parameters, True), self.take(parameters, False)
        self._run_forward = self.each(self._forward, (_ALL, _ALL, _EACH, _EACH, _ALL, _ALL), (_EACH, _EACH, _ALL))
        self._run_keep = self.each(self._keep, (_ALL, _ALL, _EACH, _EACH), _EACH)

    def take(self, tree: Tree, layered: bool) -> Tree:
        """The arrays of the parameters that are, or aren't, stacked in layers."""
        return jax.tree.map(lambda stacked, x: x if stacked == layered else None, self.how.layered, tree)

    def merged(self, own: Tree, shared: Tree) -> Tree:
        """A tree of both; None for all of one is None."""
        if own is None or shared is None:
            return shared if own is None else own
        return jax.tree.map(lambda stacked, a, b: a if stacked else b, self.how.layered, own, shared)

    def numbered(self, work) -> tuple[jax.Array, jax.Array]:
        """The microbatch of some work, one that there is, and whether it is due."""
        return jnp.clip(work.microbatch, 0, self.k_max - 1), work.due

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

    def sent(self, x: jax.Array, by: int) -> jax.Array:
        """What each stage gets from the one so many places before, `[p, ...]`."""
        places = [(i, (i + by) % len(x)) for i in range(len(x))]
        send = self.each(lambda x: jax.lax.ppermute(self.how.lay_out(x[0]), AXIS, places)[None], (_EACH,), _EACH)
        return send(x)

    def enter(self, shared: Tree, rows: Tree) -> jax.Array:
        """The residual stream before the layers."""
        return _joined(self.parts.enter(self.merged(None, shared), rows))

    def layers(self, own: Tree, x: jax.Array, rows: Tree, stage: jax.Array) -> jax.Array:
        """The residual stream behind a stage's layers."""
        layers = jax.tree.leaves(own)[0].shape[0]
        return _joined(self.parts.layers(own, (x, None), rows, stage * layers))

    def _forward(self, tick, count, own, received, first, microbatches):
        stage = jax.lax.axis_index(AXIS)
        microbatch, _ = self.numbered(self.how.schedule.forward(tick, stage, count))
        x = jnp.where(stage == 0, first, received[0])
        y = self.layers(own, x, self.rows(microbatches, microbatch), stage)
        last = _from_stage(self.how.schedule.stages - 1, y)
        return self.how.lay_out(y)[None], x[None], self.how.lay_out(last)

    def _keep(self, tick, count, kept, x):
        microbatch, due = self.numbered(self.how.schedule.forward(tick, jax.lax.axis_index(AXIS), count))
        return _put(kept[0], microbatch % kept.shape[1], due, x[0])[None]

    def forward(self, tick, carry: _Forward, d_x: jax.Array | None = None) -> tuple[jax.Array, _Forward, Any]:
        """The forward passes of a tick: their results, still to be sent, and what each stage gets of `d_x`."""
        schedule = self.how.schedule
        microbatch, _ = self.numbered(schedule.forward(tick, 0, self.count))

        def run(received):
            first = self.enter(self.shared, self.rows(self.microbatches, microbatch))
            return self._run_forward(tick, self.count, self.own, received, first, self.microbatches)

        beside = (lambda: None) if d_x is None else lambda: self.sent(d_x, -1)
        (y, x, last), returned = _only_if(tick < schedule.passing(self.count), run, carry.received, beside=beside)
        kept = self._run_keep(tick, self.count, carry.kept, x) if carry.kept.shape[1] else carry.kept
        microbatch, due = self.numbered(schedule.forward(tick, schedule.stages - 1, self.count))
        finished = _put(carry.finished, microbatch % len(carry.finished), due, last)
        return y, _Forward(carry.received, kept, finished), returned

    def nothing(self, kept: int, finished: int) -> _Forward:
        """Before the first tick, with so many slots."""
        shape = jax.eval_shape(lambda: self.enter(self.shared, self.rows(self.microbatches, 0)))
        p, lay_out = self.how.schedule.stages, jax.vmap(self.how.lay_out)
        zeros = jnp.zeros(shape.shape, shape.dtype)
        of_stage = self.each(lambda: lay_out(jnp.zeros((kept, *shape.shape), shape.dtype))[None], (), _EACH)
        received = jnp.zeros((p, *zeros.shape), zeros.dtype)
        nothing_kept = of_stage() if kept else jnp.zeros((p, 0, *zeros.shape), zeros.dtype)
        return _Forward(received, nothing_kept, jnp.zeros((finished, *zeros.shape), zeros.dtype))


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


def _put(slots: Tree, slot, due, values: Tree) -> Tree:
    """The slots with the values in one of them, where they are due."""
    return jax.tree.map(lambda x, value: x.at[slot].set(jnp.where(due, value, x[slot])), slots, values)


def _only_if(due, function: Callable, *arguments, beside: Callable | None = None) -> Tree:
    """`function(*arguments)`, zeros where it isn't due; on all devices alike, so it may send among them.

    With `beside` also what that gives, due or not: in a condition of its own it would wait for the function's.
    """
    shapes, beside_it = jax.eval_shape(function, *arguments), beside or (lambda: None)

    def nothing(*_):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), beside_it()

    results, others = jax.lax.cond(due, lambda *of: (function(*of), beside_it()), nothing, *arguments)
    return results if beside is None else (results, others)
