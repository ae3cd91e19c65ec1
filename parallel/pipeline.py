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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from crescendo.parallel import chunks
from crescendo.parallel.stages import ALL, AXIS, EACH, Pipeline, Stages, only_if, put, zeros

Tree = Any


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
products)` of the gradient's shape: to be summed over microbatches, and of each microbatch over all entries. Of a
gradient of 0 they don't depend on the weight, and the products are 0."""


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
    stages = _Training(how, term, keep, parts, parameters, microbatches, count, others)
    return stages.sums(jax.lax.fori_loop(0, how.schedule.ticks(count), stages.tick, stages.nothing()))


def evaluate_through_stages(how: Pipeline, parts: Any, parameters: Tree, microbatches: Tree) -> Tree:
    """The sums that `parts` give, over all microbatches `[k, microbatch, ...]`."""
    k_max = jax.tree.leaves(microbatches)[0].shape[0]
    stages = Stages(how._replace(schedule=how.schedule.whole), parts, parameters, microbatches, k_max)
    (last,) = stages.schedule.last_stages

    def sums(y, rows):
        return parts.leave(stages.merged(None, stages.shared), (stages.of_stage(last, y), None), rows)

    def body(tick, carry):
        received, told, total = carry
        (y, _, told), _ = stages.forward(tick, received, told)
        microbatch, due = stages.leaving(stages.schedule.forward, tick, last)
        new = only_if(due, sums, y, stages.rows(microbatches, microbatch))
        return stages.sent(y, tick), told, new if total is None else jax.tree.map(jnp.add, total, new)

    received, told = stages.streams(), stages.nothing_told
    _, _, total = jax.eval_shape(body, jnp.int32(0), (received, told, None))
    _, told, total = jax.lax.fori_loop(0, stages.schedule.passing(k_max), body, (received, told, zeros(total)))
    return parts.finish(total, stages.moved(chunks.in_order, told))


class _Carry(NamedTuple):
    """What ticks hand on to each other.

    Attributes:
      received: `[p, B, T, D]`, what each stage has from the one before.
      d_x: `[p, B, T, D]`, the gradient that each stage has for the one before, still to be sent.
      kept: `[p, slots, B, T, D]`, the inputs of each stage's work on its way.
      finished: `[p, slots, B, T, D]`, outputs that wait for the loss, of which those of the last stage count.
      waiting: `[p, ...]` of each shared parameter, gradients of losses that wait for those of the look-ups.
      weights: float32 `[k_max]`, of the microbatches.
      sums: what the last part gives of all of them.
      told: what the layers say, in the order of the stages' work.
      own, own_rows: the sums over gradients, and the products, of parameters that are stacked in layers.
      shared, shared_rows: the same of the others.
    """

    received: jax.Array
    d_x: jax.Array
    kept: jax.Array
    finished: jax.Array
    waiting: Tree
    weights: jax.Array
    sums: Any
    told: Tree
    own: Tree
    own_rows: Tree
    shared: Tree
    shared_rows: Tree


class _Training(Stages):
    """The stages' passes in both directions, a tick at a time."""

    def __init__(self, how, term, keep, parts, parameters, microbatches, count, others):
        super().__init__(how, parts, parameters, microbatches, count)
        self.term, self.keep, self.d_told = term, keep, self._cotangents_of_told()
        self.others_own = [self.stacked(tree) for tree in others]
        self.others_shared = [self.not_stacked(tree) for tree in others]
        self._run_store = self.each(self._store, (ALL, ALL, EACH, EACH, EACH, EACH), EACH)
        self._run_backward = self.each(
            self._backward, (ALL, ALL, EACH, EACH, ALL, EACH, EACH, ALL, ALL, *(EACH for _ in others)), EACH
        )
        rows = P(None, AXIS)
        self._run_add = self.each(self._add, (ALL, ALL, EACH, rows, EACH, EACH), (EACH, rows))

    def tick(self, tick, carry: _Carry) -> _Carry:
        """All that is due."""
        # What a pass has made is sent beside the other pass, which so takes its time.
        (y, x, told), d_y = self.forward(
            tick, carry.received, carry.told, beside=lambda: self.sent(carry.d_x, tick - 1, back=True)
        )
        kept, finished = self._run_store(tick, self.count, carry.kept, carry.finished, x, y)
        carry, d_outputs = carry._replace(kept=kept, finished=finished, told=told), []
        for stage in self.schedule.last_stages:
            carry, d_output = self.add_loss(tick, stage, carry)
            d_outputs.append(d_output)
        carry = self.add_layers(tick, carry, jnp.stack(d_outputs), d_y, y)
        for stage in self.schedule.first_stages:
            carry = self.add_look_up(tick, stage, carry)
        return carry

    def add_loss(self, tick, stage: int, carry: _Carry) -> tuple[_Carry, jax.Array]:
        """With the loss of what a last stage has finished, whose gradient waits for the look-up's; and `d_output`."""

        def of_finished(finished, rows):
            def loss(shared, x):
                sums = self.parts.leave(self.merged(None, shared), (x, None), rows)
                return sums[0], sums

            loss_sum, pull, sums = jax.vjp(loss, self.shared, self.of_stage(stage, finished), has_aux=True)
            gradients, d_output = pull(jnp.ones_like(loss_sum))
            return sums, self.keep(gradients), self.how.lay_out(d_output)

        microbatch, due = self.leaving(self.schedule.backward, tick, stage)
        finished = carry.finished[:, microbatch % carry.finished.shape[1]]
        rows = self.rows(self.microbatches, microbatch)
        sums, gradients, d_output = only_if(due, of_finished, finished, rows)
        carry = carry._replace(
            waiting=put(carry.waiting, microbatch % self.schedule.stages, due, gradients),
            weights=carry.weights.at[microbatch].add(sums[1]),
            sums=jax.tree.map(jnp.add, carry.sums, sums),
        )
        return carry, d_output

    def add_layers(self, tick, carry: _Carry, d_outputs, d_y, y) -> _Carry:
        """With the gradients of the layers that are due, and with `y` sent."""
        (entries, sums, d_x), received = only_if(
            tick >= self.schedule.first_backward(self.count),
            self._run_backward,
            *(tick, self.count, self.own, carry.kept, d_outputs, d_y, self.d_told, carry.weights, self.microbatches),
            *self.others_own,
            beside=lambda: self.sent(y, tick),
        )
        own, own_rows = self._run_add(tick, self.count, carry.own, carry.own_rows, entries, sums)
        return carry._replace(received=received, d_x=d_x, own=own, own_rows=own_rows)

    def add_look_up(self, tick, stage: int, carry: _Carry) -> _Carry:
        """With the gradients of what all stages share, of a microbatch that has gone back to a first stage."""

        def complete(d_x, rows, waiting, microbatch, weights):
            _, pull = jax.vjp(lambda shared: self.enter(shared, rows), self.shared)
            (gradients,) = pull(self.of_stage(stage, d_x))
            slot = microbatch % self.schedule.stages
            gradients = jax.tree.map(lambda g, slots: g + slots[slot], self.keep(gradients), waiting)
            return self.terms(False, gradients, weights[microbatch], self.others_shared)

        microbatch, due = self.entering(self.schedule.backward, tick, stage)
        rows = self.rows(self.microbatches, microbatch)
        entries, sums = only_if(due, complete, carry.d_x, rows, carry.waiting, microbatch, carry.weights)
        return carry._replace(
            shared=jax.tree.map(jnp.add, carry.shared, entries),
            shared_rows=jax.tree.map(lambda rows, x: rows.at[microbatch].add(x), carry.shared_rows, sums),
        )

    def terms(self, layered: bool, gradients: Tree, weight: jax.Array, others: Sequence[Tree]) -> tuple[Tree, Tree]:
        """`term` of a microbatch's gradients of parameters that are, or aren't, stacked: entries, and sums by layer."""

        def one(gradient, *others):
            entries, products = self.term(gradient, weight, *others)
            return entries, jnp.sum(products, axis=tuple(range(int(layered), products.ndim)))

        pairs = jax.tree.map(one, gradients, *others)
        return jax.tree.transpose(jax.tree.structure(gradients), jax.tree.structure((0, 0)), pairs)

    def _cotangents_of_told(self) -> Tree:
        """Of the loss by what layers say: the same for each microbatch, as the loss is linear in it."""
        sums = zeros(jax.eval_shape(lambda: self.left(self.rows(self.microbatches, 0))))
        cotangents = jax.grad(lambda told: self.parts.finish(sums, told)[0])(self.nothing_told)
        return self.moved(chunks.interleaved, cotangents)

    def _store(self, tick, count, kept, finished, x, y):
        work = self.work(self.schedule.forward, tick, jax.lax.axis_index(AXIS), count)
        kept = put(kept[0], self.schedule.slot(work, self.k_max), work.due, x[0])
        finished = put(finished[0], work.microbatch % finished.shape[1], work.due, y[0])
        return kept[None], finished[None]

    def _backward(self, tick, count, own, kept, d_outputs, d_y, d_told, weights, microbatches, *others):
        stage = jax.lax.axis_index(AXIS)
        work = self.work(self.schedule.backward, tick, stage, count)
        rows, x = self.rows(microbatches, work.microbatch), kept[0, self.schedule.slot(work, self.k_max)]
        d_y = jnp.where(self.schedule.leaves(stage, work), d_outputs[stage % len(d_outputs)], d_y[0])
        _, pull = jax.vjp(lambda own, x: self.layers(own, x, rows, stage, work.chunk), self.chunk_of(own, work), x)
        cotangents = d_y, self.chunk_of(d_told, work)
        gradients, d_x = pull(jax.tree.map(lambda x: jnp.where(work.due, x, 0), cotangents))
        of_chunk = [self.chunk_of(tree, work) for tree in others]
        found = self.terms(True, self.keep(gradients), weights[work.microbatch], of_chunk)
        return *jax.tree.map(lambda x: jnp.where(work.due, x, 0), found), self.how.lay_out(d_x)[None]

    def _add(self, tick, count, own, own_rows, entries, sums):
        work = self.work(self.schedule.backward, tick, jax.lax.axis_index(AXIS), count)

        def added(x, term):
            return chunks.add_to_chunk(x, work.chunk, self.schedule.chunks, term)

        def added_to_row(rows, term):
            return rows.at[work.microbatch].set(added(rows[work.microbatch], term))

        return jax.tree.map(added, own, entries), jax.tree.map(added_to_row, own_rows, sums)

    def nothing(self) -> _Carry:
        """Before the first tick."""
        p, k_max, schedule = self.schedule.stages, self.k_max, self.schedule

        def shapes():
            rows, weight = self.rows(self.microbatches, 0), jnp.float32(0)
            own, shared = self.keep(self.own), self.keep(self.shared)
            of_own = self.terms(True, own, weight, self.others_own)
            return self.left(rows), shared, of_own, self.terms(False, shared, weight, self.others_shared)

        sums, gradients, (own, own_sums), (shared, shared_sums) = jax.eval_shape(shapes)
        return _Carry(
            received=self.streams(),
            d_x=self.streams(),
            kept=self.streams(schedule.kept(k_max)),
            finished=self.streams(schedule.finished(k_max)),
            waiting=zeros(gradients, p),
            weights=jnp.zeros(k_max),
            sums=zeros(sums),
            told=self.nothing_told,
            own=zeros(own),
            own_rows=zeros(own_sums, k_max),
            shared=zeros(shared),
            shared_rows=zeros(shared_sums, k_max),
        )

    def with_skipped(self, own: Tree) -> Tree:
        """With the terms of the gradients that are 0, as a microbatch has skipped a stage."""
        counted = (jnp.arange(self.k_max) < self.count)[:, None]
        skipped = jnp.sum(counted & ~self.schedule.passed(self.k_max), axis=0)

        def one(x, *others):
            each, _ = self.term(jnp.zeros_like(x), jnp.float32(1), *others)
            times = jnp.repeat(skipped, len(x) // len(skipped))
            return x + each * times.reshape(-1, *(1,) * (x.ndim - 1))

        return jax.tree.map(one, own, *self.others_own)

    def sums(self, carry: _Carry) -> Sums:
        """What was added up, layers in their order."""
        own = carry.own if self.schedule.one_of == 1 else self.with_skipped(carry.own)
        own, own_rows = self.moved(chunks.in_order, own), self.moved(chunks.in_order, carry.own_rows, axis=1)
        entries, rows = self.merged(own, carry.shared), self.merged(own_rows, carry.shared_rows)
        loss_sum, _, extra = self.parts.finish(carry.sums, self.moved(chunks.in_order, carry.told))
        return Sums(loss_sum, dict(extra), carry.weights, entries, rows)
