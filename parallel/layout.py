"""A mesh and a strategy together: the sharding of every array of a training step."""

import copy
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from crescendo.parallel import experts, sequence, vocab
from crescendo.parallel.accumulate import Spread
from crescendo.parallel.rules import (
    ACTIVATIONS,
    BATCH_AXES,
    TENSOR,
    Strategy,
    Table,
    check_divides,
    check_experts,
    check_length,
    entries_alike,
    is_names,
    key_copies,
    spec_entries,
    strategy,
)
from crescendo.parallel.schedules import Schedule
from crescendo.parallel.sizes import divisors
from crescendo.parallel.stages import Pipeline

Tree = Any
# Why a mesh has none: what has gradients of its own making.
NO_SECOND_DERIVATIVES = {
    "sequence": "attention over devices that share rows has",
    "expert": "rows that are sent to their experts have",
    "stage": "a pipeline has",
}


class SecondDerivativeError(ValueError):
    """A layout that has no second derivatives."""


class Layout:
    """Where parameters, gradients, optimizer state, batches and activations live.

    Args:
      mesh: as `make_mesh` makes it; one without devices (`MeshSpec.abstract`) will do for all but running.
      plan: a `Strategy`, or the name of one.

    Attributes:
      parts: how many parts of a microbatch keep their gradients apart until the end of a step.
      batch_shards: how many parts a microbatch is split in, by examples.
      implementation: of ops that are called on arrays as they lie, outside of `on_parts`, `attend` and the like:
        "reference" over several devices, as the partitioner can split only what XLA compiled; None, the first that
        serves, on one.
      vocab_axes, expert_axes: the mesh axes of several devices that split the vocabulary, and a layer's experts.
      key_copies: on how many devices along `tensor` each key head is; see `with_heads`.
      schedule: that of the stages; None with one stage.

    Raises:
      ValueError: an unknown strategy, an axis that it doesn't use, a Ulysses degree that doesn't divide the axis
        `sequence`, or stages that the schedule can't group.

    >>> from crescendo.parallel.mesh import MeshSpec
    >>> layout = Layout(MeshSpec(data=2, fsdp=4).abstract(8), "fsdp")
    >>> layout.parameters({"table": ("vocab", "embed")})["table"].spec
    P(('stage', 'tensor'), ('fsdp', 'expert', 'sequence'))
    >>> layout.batch_shards, layout.parts
    (8, 2)
    """

    def __init__(self, mesh: Mesh | AbstractMesh, plan: str | Strategy = "fsdp"):
        self.mesh = mesh
        self.strategy = strategy(plan) if isinstance(plan, str) else plan
        self.sizes = dict(mesh.shape)
        if self.sizes["sequence"] % self.strategy.ulysses:
            raise ValueError(
                f"ulysses = {self.strategy.ulysses} does not divide the mesh's sequence = {self.sizes['sequence']}: "
                f"use one of {divisors(self.sizes['sequence'])}"
            )
        self.deferred = tuple(axis for axis in self.strategy.deferred if self.sizes[axis] > 1)
        self.parts = math.prod(self.sizes[axis] for axis in self.deferred)
        self.batch_shards = math.prod(self.sizes[axis] for axis in BATCH_AXES)
        self.vocab_axes = tuple(axis for axis in vocab.AXES if self.sizes[axis] > 1)
        self.expert_axes = tuple(axis for axis in self.strategy.experts if self.sizes[axis] > 1)
        self.implementation = None if mesh.size == 1 else "reference"
        self.key_copies = 1
        of, stages = self.strategy, self.sizes["stage"]
        schedule = Schedule(of.schedule, stages, of.chunks, of.one_of)  # one stage can't be skipped
        self.schedule = schedule if stages > 1 else None
        self._plain_gradients = False

    def parameters(self, logical_axes: Tree, arrays: Tree | None = None) -> Tree:
        """The shardings of parameters; see `shardings`."""
        return self.shardings(self.strategy.parameters, logical_axes, arrays)

    def gradients(self, logical_axes: Tree) -> Tree:
        """The shardings in which gradients are added up."""
        return self.shardings(self.strategy.gradients, logical_axes)

    def optimizer(self, logical_axes: Tree, arrays: Tree | None = None) -> Tree:
        """The shardings of optimizer arrays that are shaped like a parameter."""
        return self.shardings(self.strategy.optimizer, logical_axes, arrays)

    def shardings(self, table: Table, logical_axes: Tree, arrays: Tree | None = None) -> Tree:
        """The `NamedSharding` of every array, from the logical names of its axes.

        Args:
          table: from logical axis to mesh axes.
          logical_axes: a tree with tuples of names as leaves.
          arrays: the tree's arrays or their shapes: checked when given.

        Raises:
          ValueError: names the first dimension that its mesh axes can't divide, and what sizes would do.
        """
        if arrays is not None:
            check_divides(self.sizes, table, logical_axes, arrays, chunks=self.strategy.chunks)

        def sharding(names):
            return NamedSharding(self.mesh, PartitionSpec(*spec_entries(table, names)))

        return jax.tree.map(sharding, logical_axes, is_leaf=is_names)

    def like_parameter(
        self, table: Table, names: tuple[str, ...], parameter_shape: tuple[int, ...], array_shape: tuple[int, ...]
    ) -> NamedSharding:
        """The sharding of an optimizer's array that belongs to a parameter, whatever its shape.

        An array of the parameter's shape lies like it. Otherwise each dimension lies like the parameter's first one of
        the same size that no dimension before it took, where the mesh divides it; one without such a size isn't split.

        Args:
          table: from logical axis to mesh axes, as if the array were the parameter.
          names: the logical names of the parameter's axes.
          parameter_shape, array_shape: the two shapes.

        >>> from crescendo.parallel.mesh import MeshSpec
        >>> layout = Layout(MeshSpec(data=1, fsdp=4, tensor=2).abstract(8))
        >>> names, shape = ("layers", "embed", "mlp"), (3, 16, 40)  # [L, D, F]
        >>> def spec(*array_shape):
        ...     return layout.like_parameter(layout.strategy.optimizer, names, shape, array_shape).spec
        >>> spec(3, 16), spec(3, 40)  # Adafactor's factors of rows and columns
        (P('stage', ('fsdp', 'expert', 'sequence')), P('stage', 'tensor'))
        >>> spec(3, 5, 40), spec(1)  # GaLore's moments of rank 5, a placeholder
        (P('stage', None, 'tensor'), P(None,))
        """
        entries = spec_entries(table, names)
        if array_shape != parameter_shape:
            entries = entries_alike(self.sizes, entries, parameter_shape, array_shape)
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    @property
    def replicated(self) -> NamedSharding:
        """Not split: all of an array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self, axes: tuple[str | None, ...], *, leading: int = 0) -> NamedSharding:
        """The sharding of arrays `[..., B, *axes]`, B being split like the batch.

        Args:
          axes: the logical names of the axes of one example's array; None is an axis that isn't split.
          leading: how many axes there are before B, none of them split.

        >>> from crescendo.parallel.mesh import MeshSpec
        >>> layout = Layout(MeshSpec(data=2, sequence=4).abstract(8))
        >>> layout.rows(("length",), leading=1).spec
        P(None, ('data', 'fsdp', 'expert'), 'sequence')
        """
        entries = spec_entries(ACTIVATIONS, (*(None,) * leading, "batch", *axes))
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def in_row_order(self, array: jax.Array, axis: int = 1) -> jax.Array:
        """An array made in the natural order of a row's tokens, put into the order in which rows lie on the devices.

        What is drawn at random for each token goes through it, so that a token gets the same on every mesh.

        Args:
          array: any with an axis of tokens.
          axis: that axis.

        Raises:
          ValueError: for a length that the mesh can't divide.
        """
        order = self.order(array.shape[axis])
        return array if order is None else jnp.take(array, order, axis=axis)

    def constrain(self, array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """The activation, laid out by the logical names of its axes; None is an axis that isn't split."""
        return self._lay_out(ACTIVATIONS, array, names)

    def weight(self, array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """The weight of a matmul; its gradient is first what the sum over all tokens is, and split only then.

        Left to itself the partitioner may split the gradient first, and gather all devices' activations for that.

        Where key heads have copies (`with_heads`), the axis `kv_heads` of the result has one for each device along
        `tensor`: a device multiplies by its own head alone, and the copies' gradients are summed.
        """
        if self.mesh.size == 1:
            return jax.lax.optimization_barrier(array)  # as `models.layout.OneDevice`
        if self._plain_gradients:
            return self._copied(array, names)
        steered = jax.custom_vjp(lambda array: self._copied(array, names))
        steered.defvjp(lambda array: (self._copied(array, names), None), lambda _, g: (self._summed(g, names),))
        return steered(array)

    def whole(self, array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """The weight of a matmul that has a derivative rule of its own, gathered in the dtype that it has.

        Its axis `kv_heads` may grow as by `weight`; the gradient is to go through `weight_gradient`.
        """
        return self._lay_out(TENSOR, self._copied(array, names), names)

    def weight_gradient(self, gradient: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """The gradient of a weight out of that of what `whole` made: summed over tokens and copies, and split."""
        return self._lay_out(self.strategy.gradients, self._summed(gradient, names), names)

    def _summed(self, gradient: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        """The sum over all tokens first, split only then; and over the copies of a key head."""
        gradient = self._lay_out(TENSOR, gradient, names)
        if self.key_copies == 1 or "kv_heads" not in names:
            return gradient
        axis, shape = names.index("kv_heads"), gradient.shape
        gradient = jnp.sum(gradient.reshape(*shape[:axis], -1, self.key_copies, *shape[axis + 1 :]), axis + 1)
        return self._lay_out(self.strategy.gradients, gradient, names)

    def _copied(self, array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        if self.key_copies == 1 or "kv_heads" not in names:
            return array
        array = jnp.repeat(array, self.key_copies, names.index("kv_heads"))
        return self._lay_out(self.strategy.parameters | TENSOR, array, names)

    def for_second_derivatives(self) -> "Layout":
        """The layout with no gradients of its own making, which have no second derivatives: slower, and as right.

        Raises:
          SecondDerivativeError: for a mesh with an axis of `NO_SECOND_DERIVATIVES`.
        """
        of_experts = dict.fromkeys(self.expert_axes, NO_SECOND_DERIVATIVES["expert"])
        for axis, what in (NO_SECOND_DERIVATIVES | of_experts).items():
            if self.sizes[axis] > 1:
                raise SecondDerivativeError(
                    f"mesh {axis} = {self.sizes[axis]}: {what} no second derivatives, which this optimizer asks for: "
                    f"use {axis} = 1{'' if axis in NO_SECOND_DERIVATIVES else ', or strategy.experts without it'}"
                )
        plain = copy.copy(self)
        plain._plain_gradients = True
        return plain

    def lay_out(self, table: Table, tree: Tree, logical_axes: Tree) -> Tree:
        """The arrays, laid out by `table` whatever made them; None stays."""
        return jax.tree.map(
            lambda names, array: None if array is None else self._lay_out(table, array, names),
            *(logical_axes, tree),
            is_leaf=is_names,
        )

    def _lay_out(self, table: Table, array: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        context = jax.sharding.get_abstract_mesh()
        manual = frozenset(context.manual_axes)  # inside a shard_map these axes are spoken for
        spec = PartitionSpec(*spec_entries(table, names, manual))
        return jax.lax.with_sharding_constraint(array, NamedSharding(context if manual else self.mesh, spec))

    def on_parts(self, function: Callable, arrays: Sequence[jax.Array], inputs: tuple, outputs: tuple) -> Any:
        """`function(*arrays)` on every device's own parts, by the logical names of the axes, see `models.layout`."""
        if self.mesh.size == 1:
            return function(*arrays)
        return self._by_device(function, inputs, outputs)(*arrays)

    def attend(
        self, attention: Callable, q_BTHE, k_BTKE, v_BTKE, segment_ids_BT, *, causal: bool, blocks: Any
    ) -> jax.Array:
        """`attention(q, k, v, segment_ids)` on each device's own rows and heads.

        Where `sequence` is above 1, ring or Ulysses attention by `blocks` takes its place
        (`crescendo.parallel.sequence`).
        """
        if self.mesh.size == 1:
            return attention(q_BTHE, k_BTKE, v_BTKE, segment_ids_BT)
        if self.sizes["sequence"] > 1:
            attention = functools.partial(
                sequence.attention,
                blocks=blocks,
                ring=self.sizes["sequence"] // self.strategy.ulysses,
                ulysses=self.strategy.ulysses,
                causal=causal,
            )
        heads, rows = ("batch", "length", "heads", None), ("batch", "length")
        local = self._by_device(attention, (heads, heads, heads, rows), heads)
        return local(q_BTHE, k_BTKE, v_BTKE, segment_ids_BT)

    def look_up(self, table_VD, tokens_BT, dtype) -> jax.Array:
        """`table[tokens]` in `dtype`, zeros outside of the table, whose rows are split over `vocab_axes`."""
        local = self._by_device(
            lambda table, tokens: vocab.look_up(table, tokens, dtype, axes=self.vocab_axes),
            (("vocab", None), ("batch", "length")),
            ("batch", "residual_length", None),
        )
        return local(table_VD, tokens_BT)

    def cross_entropy(self, loss: Callable, hidden_BTD, table_VD, labels_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
        """The sums of `loss(hidden, table, labels, weights, vocab_axis=...)` over all rows."""
        if self.mesh.size == 1:
            return loss(hidden_BTD, table_VD, labels_BT, weights_BT)
        rows, unsplit = ("batch", "length"), self._unsplit()
        local = self._by_device(
            functools.partial(
                vocab.cross_entropy,
                loss,
                axes=self.vocab_axes,
                rows=tuple(axis for axis in (*BATCH_AXES, "sequence") if axis not in unsplit),
            ),
            ((*rows, None), ("vocab", None), rows, rows),
            ((), ()),
        )
        return local(hidden_BTD, table_VD, labels_BT, weights_BT)

    def experts(
        self,
        function: Callable,
        tokens: Sequence[jax.Array],
        kernels: Sequence[jax.Array],
        names: Sequence[tuple[str | None, ...]],
    ) -> jax.Array:
        """`function(*tokens, *kernels)` on each device's own tokens and experts, see `models.layout`."""
        if self.mesh.size == 1:
            return function(*tokens, *map(self.weight, kernels, names))
        held, unsplit, rows = self.strategy.parameters, self._unsplit(), ("batch", "residual_length", None)
        local = functools.partial(
            experts.on_device,
            function,
            gathers=[spec_entries(held, of, unsplit | {*self.expert_axes, "tensor"}) for of in names],
            tensor="tensor" not in {*unsplit, *self.expert_axes},
            axes=self.expert_axes,
            chunks=self.strategy.expert_chunks,
            # XLA has none for CPUs.
            ragged=isinstance(self.mesh, Mesh) and self.mesh.devices.flat[0].platform != "cpu",
        )
        inputs = (*(rows for _ in tokens), *names)
        return self._by_device(local, inputs, rows, table=ACTIVATIONS | held)(*tokens, *kernels)

    def _by_device(self, function: Callable, inputs: tuple, outputs: tuple, table: Table = ACTIVATIONS) -> Callable:
        """`function` on every device's own parts, from the logical axes of its arguments and of its results."""
        context, unsplit = jax.sharding.get_abstract_mesh(), self._unsplit()
        manual = frozenset(context.manual_axes)

        def spec(names):
            return PartitionSpec(*spec_entries(table, names, unsplit))

        one = all(isinstance(name, str | None) for name in outputs)
        return jax.shard_map(
            function,
            mesh=context if manual else self.mesh,
            in_specs=tuple(map(spec, inputs)),
            out_specs=spec(outputs) if one and outputs else tuple(map(spec, outputs)),
            axis_names=set(self.mesh.axis_names) - manual,
        )

    def _unsplit(self) -> frozenset[str]:
        """The axes over which arrays don't vary on their parts: those of one device, and those spoken for already."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return frozenset(manual) | {axis for axis, size in self.sizes.items() if size == 1}

    def order(self, sequence_length: int) -> np.ndarray | None:
        """The order in which a row's tokens must be put on the devices (`sequence.zigzag`), or None: as they are.

        Raises:
          ValueError: for a length that the mesh can't divide.
        """
        check_length(sequence_length, self.strategy, self.sizes)
        ring = self.sizes["sequence"] // self.strategy.ulysses
        return sequence.zigzag(sequence_length, ring) if ring > 1 else None

    def with_heads(self, heads: int, kv_heads: int) -> "Layout":
        """The layout for attention with so many query and key heads.

        A head is never split over `tensor`. With fewer key heads than devices each has a copy of the one that its
        queries share: the parameters' axis `kv_heads` is then replicated along `tensor` (Megatron-LM does the same),
        and `weight` makes the copies.

        Raises:
          ValueError: heads that `tensor` can't divide, key heads that neither divide `tensor` nor are divided by it, or
            a Ulysses degree that can't divide the heads of a device.

        >>> from crescendo.parallel.mesh import MeshSpec
        >>> layout = Layout(MeshSpec(data=1, tensor=8).abstract(8))
        >>> layout.with_heads(16, 2).key_copies, layout.with_heads(16, 8).key_copies
        (4, 1)
        >>> layout.with_heads(16, 2).parameters({"key": ("embed", "kv_heads")})["key"].spec
        P(('fsdp', 'expert', 'sequence'), None)
        """
        copies = key_copies(heads, kv_heads, tensor=self.sizes["tensor"], ulysses=self.strategy.ulysses)
        if copies == self.key_copies:
            return self
        layout = copy.copy(self)
        layout.key_copies = copies
        if copies > 1:
            layout.strategy = self.strategy.replicated_along("kv_heads")
        return layout

    def without_stages(self, why: str = "this task's loss is not in the parts that stages share") -> "Layout":
        """The layout, for a task that stages can't share.

        Raises:
          ValueError: where the mesh has devices along `stage`.
        """
        return self._without("stage", why)

    def with_experts(self, experts: int | None) -> "Layout":
        """The layout, for a model with so many experts in a layer, or None.

        Raises:
          ValueError: experts that their mesh axes can't divide, or devices along `expert` for a model without any.
        """
        if experts is None:
            self._without("expert", "this model has no experts, and would hold replicas along it")
        check_experts(experts, self.strategy, self.sizes)
        return self

    def _without(self, axis: str, why: str) -> "Layout":
        if self.sizes[axis] > 1:
            raise ValueError(f"mesh {axis} = {self.sizes[axis]}: {why}: use {axis} = 1, and data or fsdp for the batch")
        return self

    def spread(self, logical_axes: Tree) -> Spread:
        """How `accumulate` sums gradients over this mesh."""
        return Spread(
            mesh=self.mesh,
            axes=self.deferred,
            keep=lambda gradients: self.lay_out(self.strategy.gradients, gradients, logical_axes),
            held=self._specs(self.strategy.parameters, logical_axes, along=self.deferred),
            scattered=self._specs(self.strategy.optimizer, logical_axes, along=self.deferred),
            others=self._specs(
                self.strategy.gradients, logical_axes, along=[axis for axis in self.sizes if axis not in self.deferred]
            ),
            pipeline=self.pipeline(logical_axes),
        )

    def pipeline(self, logical_axes: Tree) -> Pipeline | None:
        """How layers lie over stages; None with one stage."""
        if self.schedule is None:
            return None
        return Pipeline(
            self.schedule,
            self.mesh,
            jax.tree.map(lambda names: "layers" in names, logical_axes, is_leaf=is_names),
            lambda x_BTD: self.constrain(x_BTD, ("batch", "residual_length", None)),
        )

    def _specs(self, table: Table, logical_axes: Tree, *, along: Collection[str]) -> Tree:
        """How some of the mesh's axes split every array."""
        without = frozenset(self.sizes) - set(along)
        return jax.tree.map(
            lambda names: PartitionSpec(*spec_entries(table, names, without)), logical_axes, is_leaf=is_names
        )
