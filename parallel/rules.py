"""Where each logical axis lives: tables from logical axis name to mesh axes, a few for each strategy."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax

from crescendo.parallel.mesh import AXES
from crescendo.parallel.schedules import SCHEDULES, Schedule
from crescendo.parallel.sizes import alternatives, divisors, nearest_multiples
from crescendo.ranges import Count, OneOf, checked

Tree = Any
Table = dict[str, tuple[str, ...]]

# A logical axis that a table doesn't name is replicated on every device. The stages of a pipeline have a part of the
# layers and of the vocabulary each.
TENSOR: Table = {
    "layers": ("stage",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "vocab": ("stage", "tensor"),
}
# Devices along `sequence` have the same parameters, and those along `expert` all but the experts': they share them like
# those along `fsdp`. Convolutions' kernels and norms have channels in place of a residual width.
SPLIT: Table = TENSOR | {"embed": ("fsdp", "expert", "sequence"), "channels": ("fsdp", "expert", "sequence")}
BATCH_AXES = ("data", "fsdp", "expert")
# Along the others what a device holds is no matter of its experts.
NOT_OF_EXPERTS = {
    "data": "holds replicas, of which each sums up its own gradients: use mesh expert in place of data",
    "stage": "splits layers, experts with them",
}
# Between matmuls the residual stream and its norms are split by tokens over `tensor` too (Korthikanti et al. 2022).
ACTIVATIONS: Table = TENSOR | {
    "batch": BATCH_AXES,
    "length": ("sequence",),
    "residual_length": ("sequence", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What is split along which mesh axes, and so when gradients are reduced.

    With Psi parameters over N devices of `fsdp`, Adam in mixed precision needs (Rajbhandari et al. 2020):

    | strategy | bytes a device | parameters' worth of traffic a step |
    | --- | --- | --- |
    | data | 16 Psi | 2 Psi |
    | zero1 | 4 Psi + 12 Psi / N | 2 Psi |
    | zero2 | 2 Psi + 14 Psi / N | 2 Psi |
    | fsdp | 16 Psi / N | 3 Psi |

    Attributes:
      parameters, gradients, optimizer: the tables of these arrays.
      ulysses: the part of the mesh axis `sequence` that splits heads inside attention (Ulysses); the rest is a ring.
      schedule: of the stages, one of `SCHEDULES`.
      chunks: into how many a stage's layers are cut, where `schedule` interleaves them.
      one_of: of so many neighbouring stages a microbatch goes through one, in turns (SkipPipe); in training alone.
      expert_chunks: into how many a device's tokens are cut, of which one is sent to its experts beside another's work.
    """

    parameters: Table
    gradients: Table
    optimizer: Table
    ulysses: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    one_of: int = 1
    expert_chunks: int = 1

    @property
    def experts(self) -> tuple[str, ...]:
        """The mesh axes that split the experts of a layer: tokens are sent along them.

        What attention splits along these axes is its own affair (MoE Parallel Folding, Liu et al. 2025).
        """
        return self.parameters.get("experts", ())

    def with_experts_over(self, axes: Sequence[str]) -> "Strategy":
        """The same, with a layer's experts split along other mesh axes.

        An axis that splits experts splits none of their matrices' own axes, so each is whole along it.

        Raises:
          ValueError: for an axis that there isn't, or along which experts can't be split.

        >>> folded = STRATEGIES["fsdp"].with_experts_over(("tensor", "sequence"))
        >>> mesh_axes(folded.parameters, ("experts", "embed", "mlp"))
        [('sequence', 'tensor'), ('fsdp', 'expert'), ()]
        """
        shown = ", ".join(map(str, axes))
        for axis in axes:
            if axis not in AXES or axis in NOT_OF_EXPERTS:
                why = f"the mesh axis {axis} {NOT_OF_EXPERTS[axis]}" if axis in AXES else f"{axis} is no axis of a mesh"
                could = alternatives(each for each in AXES if each not in NOT_OF_EXPERTS)
                raise ValueError(f"strategy.experts = {shown}: {why}; experts can be split along {could}")
        entry = {"experts": tuple(axis for axis in AXES if axis in axes)}
        return dataclasses.replace(
            self, parameters=self.parameters | entry, gradients=self.gradients | entry, optimizer=self.optimizer | entry
        )

    @property
    def deferred(self) -> tuple[str, ...]:
        """The axes of the batch along which gradients are summed once a step, at its end: those that split none.

        Along the others they are summed after every microbatch, as a whole sum would need more memory than the table
        says.
        """
        splitting = {axis for axes in self.gradients.values() for axis in axes}
        return tuple(axis for axis in BATCH_AXES if axis not in splitting)

    def replicated_along(self, name: str) -> "Strategy":
        """The same, with a logical axis of parameters, gradients and optimizer state that is not split.

        >>> "embed" in STRATEGIES["zero1"].replicated_along("embed").optimizer
        False
        """

        def rest(table: Table) -> Table:
            return {axis: where for axis, where in table.items() if axis != name}

        return dataclasses.replace(
            self,
            parameters=rest(self.parameters),
            gradients=rest(self.gradients),
            optimizer=rest(self.optimizer),
        )


STRATEGIES: dict[str, Strategy] = {
    "data": Strategy(TENSOR, TENSOR, TENSOR),
    "zero1": Strategy(TENSOR, TENSOR, SPLIT),
    "zero2": Strategy(TENSOR, SPLIT, SPLIT),
    "fsdp": Strategy(SPLIT, SPLIT, SPLIT),
}


@checked
def strategy(
    name: Annotated[str, OneOf(STRATEGIES)] = "fsdp",
    *,
    ulysses: Count = 1,
    schedule: Annotated[str, OneOf(SCHEDULES)] = "1f1b",
    chunks: Count = 1,
    one_of: Count = 1,
    experts: Sequence[Annotated[str, OneOf(AXES)]] = ("expert",),
    expert_chunks: Count = 1,
) -> Strategy:
    """One of `STRATEGIES` by name.

    Args:
      name: "data" (replicas), "zero1" (optimizer state split), "zero2" (gradients too) or "fsdp" (parameters too).
        Tensor and sequence parallelism come with the mesh: every strategy uses those axes where they are above 1.
      ulysses: see `Strategy`.
      schedule: where the mesh's `stage` is above 1, "1f1b", "gpipe" or "interleaved" (`parallel.schedules`).
      chunks: of a stage's layers, for "interleaved": 2 or more.
      one_of: with "1f1b", of so many neighbouring stages a microbatch goes through one, in turns, and skips the others;
        evaluation goes through all.
      experts: along which mesh axes the experts of a layer are split, of fsdp, expert, sequence and tensor, whatever
        attention splits along them (MoE Parallel Folding). Along `tensor` an expert's width is split where it isn't
        named.
      expert_chunks: into how many a device's tokens are cut where they are sent to experts: one chunk travels beside
        the work on another (Tutel).

    Raises:
      ValueError: an unknown name or schedule, a degree below 1, chunks or skipped stages that the schedule has
        no use for, or an axis along which experts can't be split.

    >>> strategy("zero1").optimizer["embed"]
    ('fsdp', 'expert', 'sequence')
    """
    Schedule(schedule, stages=one_of, chunks=chunks, one_of=one_of)  # refuses what it has no use for
    chosen = dataclasses.replace(STRATEGIES[name], ulysses=ulysses, schedule=schedule, chunks=chunks, one_of=one_of)
    return dataclasses.replace(chosen.with_experts_over(experts), expert_chunks=expert_chunks)


def spec_entries(table: Table, names: tuple[str | None, ...], without: frozenset[str] = frozenset()) -> list:
    """The entries of a `PartitionSpec` for an array whose axes have these names, some mesh axes left out.

    >>> spec_entries(ACTIVATIONS, ("batch", "length", None), frozenset({"data"}))
    [('fsdp', 'expert'), 'sequence', None]
    """
    kept = [tuple(axis for axis in axes if axis not in without) for axes in mesh_axes(table, names)]
    return [axes[0] if len(axes) == 1 else axes or None for axes in kept]


def mesh_axes(table: Table, names: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array: one that an axis before has taken splits no other.

    >>> mesh_axes(SPLIT, ("experts", "embed", "mlp"))
    [('expert',), ('fsdp', 'sequence'), ('tensor',)]
    """
    taken: set[str] = set()
    found = []
    for name in names:
        found.append(tuple(axis for axis in table.get(name or "", ()) if axis not in taken))
        taken |= {*found[-1]}
    return found


def entries_alike(sizes: dict[str, int], entries: list, shape: tuple[int, ...], other: tuple[int, ...]) -> list:
    """Entries for an array of another shape: each dimension's are those of the first free one of the same size.

    None for one without such a size, or that its mesh axes can't divide.

    >>> entries_alike({"tensor": 2}, ["stage", None, "tensor"], (3, 16, 40), (3, 40))
    ['stage', 'tensor']
    """
    free, found = list(range(len(shape))), []
    for size in other:
        match = next((i for i in free if shape[i] == size), None)
        entry = None
        if match is not None:
            free.remove(match)
            entry = entries[match]
        ways = math.prod(sizes.get(axis, 1) for axis in ((entry,) if isinstance(entry, str) else entry or ()))
        found.append(entry if size % ways == 0 else None)
    return found


def check_divides(sizes: dict[str, int], table: Table, logical_axes: Tree, arrays: Tree, *, chunks: int = 1) -> None:
    """Raises ValueError for the first dimension of an array that its mesh axes can't divide.

    Args:
      sizes: of the mesh's axes.
      table: from logical axis to mesh axes.
      logical_axes, arrays: the names of the arrays' axes, and the arrays or their shapes.
      chunks: in which a stage's layers are to be cut.

    >>> query = jax.ShapeDtypeStruct((6,), "float32")
    >>> check_divides({"tensor": 4}, {"heads": ("tensor",)}, {"query": ("heads",)}, {"query": query})
    Traceback (most recent call last):
    ...
    ValueError: parameter query: its axis heads = 6 does not divide over tensor = 4: use a tensor of 1, 2, 3 or 6, or \
heads = 4 or 8
    """
    named = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_names)
    for (path, names), array in zip(named, jax.tree.leaves(arrays), strict=True):
        for name, size, every in zip(names, array.shape, mesh_axes(table, names), strict=True):
            axes = [axis for axis in every if sizes[axis] > 1]
            ways = math.prod(sizes[axis] for axis in axes)
            if name == "layers" and ways > 1 and size % (ways * chunks) and size % ways == 0:
                of_stage = size // ways
                raise ValueError(
                    f"layers = {size} over stage = {ways} are {of_stage} a stage, which strategy.chunks = {chunks} "
                    f"does not divide: use chunks of {alternatives(divisors(of_stage))}, or layers = "
                    f"{nearest_multiples(size, ways * chunks)}"
                )
            if size % ways:
                shown = " x ".join(f"{axis} = {sizes[axis]}" for axis in axes)
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='.')}: its axis {name} = {size} "
                    f"does not divide over {shown}: use a {' x '.join(axes)} of {alternatives(divisors(size))}, "
                    f"or {name} = {nearest_multiples(size, ways)}"
                )


def key_copies(heads: int, kv_heads: int, *, tensor: int, ulysses: int) -> int:
    """On how many devices along `tensor` each key head is, see `Layout.with_heads`.

    Raises:
      ValueError: heads that the axis or Ulysses can't divide.

    >>> key_copies(16, 2, tensor=8, ulysses=1)
    4
    """
    if heads % tensor or (kv_heads % tensor and tensor % kv_heads):
        would = alternatives(n for n in divisors(heads) if kv_heads % n == 0 or n % kv_heads == 0)
        wrong = (
            f"heads = {heads} does not divide over tensor = {tensor}"
            if heads % tensor
            else f"neither of kv_heads = {kv_heads} and tensor = {tensor} divides the other"
        )
        raise ValueError(f"{wrong}: use a tensor of {would}")
    copies = max(1, tensor // kv_heads)
    local, local_kv = heads // tensor, kv_heads * copies // tensor
    if local % ulysses or (local_kv % ulysses and ulysses % local_kv):
        possible = [n for n in divisors(local) if local_kv % n == 0 or n % local_kv == 0]
        raise ValueError(
            f"ulysses = {ulysses} can't split the {local} query and {local_kv} key heads of a device (heads = "
            f"{heads}, kv_heads = {kv_heads}, tensor = {tensor}): use one of {possible}"
        )
    return copies


def check_experts(experts: int | None, plan: Strategy, sizes: dict[str, int]) -> None:
    """Raises ValueError for experts that their mesh axes can't divide, or what is said of experts to no effect.

    Args:
      experts: of a layer; None: the model has none.
      plan: with the axes.
      sizes: of the mesh's axes.

    >>> check_experts(6, strategy(experts=("sequence", "tensor")), dict(expert=1, sequence=2, tensor=4))
    Traceback (most recent call last):
    ...
    ValueError: experts = 6 does not divide over sequence = 2 x tensor = 4: use a sequence x tensor of 1, 2, 3 or 6, \
or experts = 8
    """
    named = ", ".join(plan.experts) or "[]"
    if experts is None:
        if plan.experts not in ((), TENSOR["experts"]):
            raise ValueError(f"strategy.experts = {named}: this model has no experts: leave it out")
        if plan.expert_chunks > 1:
            raise ValueError(f"strategy.expert_chunks = {plan.expert_chunks}: this model has no experts: leave it out")
        return
    over = {axis: sizes[axis] for axis in plan.experts if sizes[axis] > 1}
    ways, shown = math.prod(over.values()), " x ".join(f"{axis} = {size}" for axis, size in over.items())
    if sizes["expert"] > 1 and "expert" not in over:
        raise ValueError(
            f"mesh expert = {sizes['expert']}, and strategy.experts = {named} doesn't name it: name it too, or use "
            "fsdp in its place"
        )
    if experts % ways:
        axes = " x ".join(over)
        raise ValueError(
            f"experts = {experts} does not divide over {shown}: use {'an' if axes == 'expert' else 'a'} {axes} of "
            f"{alternatives(divisors(experts))}, or experts = {nearest_multiples(experts, ways)}"
        )
    if plan.expert_chunks > 1 and ways == 1:
        raise ValueError(
            f"strategy.expert_chunks = {plan.expert_chunks} cuts what is sent to experts, and this mesh sends nothing: "
            "use 1, or devices along mesh expert, or name axes of several in strategy.experts"
        )


def check_length(sequence_length: int, plan: Strategy, sizes: dict[str, int]) -> None:
    """Raises ValueError for rows whose tokens the mesh's axes, or the chunks that are sent to experts, can't divide.

    >>> check_length(24, strategy(expert_chunks=4), dict(sequence=2, tensor=4))
    Traceback (most recent call last):
    ...
    ValueError: sequence_length = 24 does not divide over sequence = 2, tensor = 4 and strategy.expert_chunks = 4: use \
a multiple of 32, such as 32
    """
    split, chunks = sizes["sequence"] * sizes["tensor"], plan.expert_chunks
    ring = sizes["sequence"] // plan.ulysses
    multiple = math.lcm(split * chunks, 2 * ring * plan.ulysses) if ring > 1 else split * chunks
    if sequence_length % multiple:
        cut = f" and strategy.expert_chunks = {chunks}" if chunks > 1 else ""
        nearest = nearest_multiples(sequence_length, multiple)
        raise ValueError(
            f"sequence_length = {sequence_length} does not divide over sequence = {sizes['sequence']}, tensor = "
            f"{sizes['tensor']}{cut}: use a multiple of {multiple}, such as {nearest}"
        )


def check_groups(layers: int, of_group: int, *, stage: int, chunks: int = 1) -> None:
    """Raises ValueError for layers stacked in groups that the mesh axis `stage` can't divide, or a schedule's chunks.

    >>> check_groups(6, of_group=2, stage=2)
    Traceback (most recent call last):
    ...
    ValueError: layers = 6 are 3 groups of moe_every = 2, which stage = 2 does not divide: use a stage of 1 or 3, or \
layers = 4 or 8
    """
    groups, ways = layers // of_group, stage * chunks
    if stage > 1 and groups % ways:
        shown = f"{groups} group{'s' if groups > 1 else ''}"
        of, over = ("stage", "") if chunks == 1 else ("stage x chunks", f" x strategy.chunks = {chunks}")
        raise ValueError(
            f"layers = {layers} are {shown} of moe_every = {of_group}, which stage = {stage}{over} does not "
            f"divide: use a {of} of {alternatives(divisors(groups))}, or layers = "
            f"{nearest_multiples(layers, of_group * ways)}"
        )


def is_names(x: Any) -> bool:
    """Whether this is the names of an array's axes: a tuple, and not a placeholder for what is frozen, a named one."""
    return type(x) is tuple
