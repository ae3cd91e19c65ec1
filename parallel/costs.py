"""What a training step sends between devices, in closed form: the bytes that each device sends, by kind of collective.

With Psi parameters, ZeRO moves 2, 2, 2 and 3 Psi a step (data, zero1, zero2, fsdp), the last two once a microbatch; a
layer's tensor parallelism moves its residual stream ten times; ring attention its keys and values, Ulysses its heads.
Experts on other devices get the rows of their tokens and send them back. A pipeline sends a residual stream to the next
stage and its gradient to the one before, in every tick, and its stages sum what they look up and the gradients of what
they all see. Where it interleaves chunks of layers, these move to the stages whose work they are and their gradients
back, once a step. Sums of scalars and of whole vectors are left out.
"""

import dataclasses
import math
from typing import Any

import jax

from crescendo.parallel.chunks import share_moved
from crescendo.parallel.collectives import KINDS
from crescendo.parallel.layout import Layout
from crescendo.parallel.rules import Table, mesh_axes

Tree = Any
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
      microbatches: in a step.
      examples: of a microbatch, over all devices.
      sequence_length: tokens in a row.
      layers, width, heads, kv_heads, head_width: of the model.
      compute_bytes: of a number in matmuls and activations.
      weight_bytes: of a number of the layers' matrices as they are gathered.
      quantised: whether the layers' products have a derivative rule of their own, which keeps what the backward pass
        needs of the inputs, and adds up the gradient of an input for each weight apart.
      full_remat: whether the backward pass computes the layers again.
      sparse_layers: how many layers have experts.
      experts_per_token: of these.
    """

    microbatches: int
    examples: int
    sequence_length: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    compute_bytes: int = 2
    weight_bytes: int = 2
    quantised: bool = False
    full_remat: bool = False
    sparse_layers: int = 0
    experts_per_token: int = 0


@dataclasses.dataclass(frozen=True)
class _Runs:
    """How often a device runs in a step, idle ticks of a pipeline included.

    Attributes:
      layers: that a pass goes through.
      forward, backward: passes.
      enters, leaves: look-ups, and losses.
      gathers: of the weights of a layer that are split: for a forward pass, and again for what a backward pass needs.
      ticks: in which the stages of a pipeline send.
    """

    layers: float
    forward: float
    backward: float
    enters: float
    leaves: float
    gathers: float
    ticks: float = 0


def _runs(layout: Layout, work: Work) -> _Runs:
    schedule, m = layout.schedule, work.microbatches
    if schedule is None:
        return _Runs(work.layers, m, m, m, m, 2 * m)
    passing = schedule.passing(m)
    layers = work.layers / (schedule.stages * schedule.chunks)
    # Where a microbatch goes through one stage alone, nothing is sent to a next one.
    ticks = schedule.ticks(m) if schedule.hops > 1 else 0
    # The backward pass of a stage begins with another forward pass.
    return _Runs(layers, 2 * passing, passing, m, m, 3 * passing, ticks)


def step_traffic(layout: Layout, arrays: Tree, logical_axes: Tree, work: Work) -> dict[str, float]:
    """Bytes sent by each device in one step, by kind of collective.

    Args:
      layout: mesh and strategy.
      arrays: the parameters' shapes.
      logical_axes: their names.
      work: what is computed.
    """
    sent = dict.fromkeys(KINDS, 0.0)
    moved = {"collective-permute": moved_bytes(layout, arrays, logical_axes)}
    parts = (_tensor(layout, work), _sequence(layout, work), _stages(layout, work), _experts(layout, work), moved)
    for part in (_parameters(layout, arrays, logical_axes, work), *parts):
        for kind, size in part.items():
            sent[kind] += size
    return sent


def _parameters(layout: Layout, arrays: Tree, logical_axes: Tree, work: Work) -> dict[str, float]:
    """Parameters and gradients."""
    sizes, strategy, runs = layout.sizes, layout.strategy, _runs(layout, work)
    named = _named(arrays, logical_axes)
    tables = sum("vocab" in names for names, _ in named)
    sent = dict.fromkeys(KINDS, 0.0)

    def ways(table: Table, names, axes) -> int:
        return math.prod(sizes[axis] for each in mesh_axes(table, names) for axis in each if axis in axes)

    for names, array in named:
        stacked = "layers" in names
        # Matrices of layers are cast before they cross; tables and vectors, which are used in float32, are not.
        matrix = stacked and len(names) > 2
        each = work.compute_bytes if matrix else FLOAT32
        gathered = work.weight_bytes if matrix else FLOAT32
        own = ("stage", "tensor", "expert") if "experts" in names else ("stage", "tensor")
        count = math.prod(array.shape) / ways(strategy.parameters, names, own)
        split = ("fsdp", "sequence") if "experts" in names else ("fsdp", "expert", "sequence")
        of_parameters = ways(strategy.parameters, names, split)
        of_gradients = ways(strategy.gradients, names, split)
        of_updates = ways(strategy.optimizer, names, split)
        gathers = scatters = runs.leaves
        if stacked:  # of a device's layers a pass goes through one chunk
            chunk = runs.layers * sizes["stage"] / work.layers
            gathers, scatters = runs.gathers * chunk, runs.backward * chunk
        if "vocab" in names and layout.schedule is not None:  # looked up and multiplied by apart, all tables together
            gathers, scatters = (runs.enters + runs.leaves) / tables, 2 * runs.leaves / tables
        # A device works with its own copy of a key head: so much of the weight, replicated along `tensor`, crosses.
        copied = layout.key_copies > 1 and "kv_heads" in names
        heads = sizes["tensor"] // layout.key_copies if copied else 1
        if of_parameters > 1:  # gathered for the forward pass, and a layer again for the backward pass
            sent["all-gather"] += gathers * _share(of_parameters) * count / heads * gathered
        elif of_updates > 1:
            sent["all-gather"] += _share(of_updates) * count * FLOAT32
        if of_gradients > 1:
            sent["reduce-scatter"] += scatters * _share(of_gradients) * count / heads * each
            count /= of_gradients
        else:
            summed = math.prod(sizes[axis] for axis in split if axis != "fsdp")
            sent["all-reduce"] += 2 * scatters * _share(summed) * count / heads * each
        if copied:
            sent["all-reduce"] += 2 * scatters * _share(layout.key_copies) * count / heads * each
            sent["all-gather"] += scatters * _share(heads) * count * each
        rest = [axis for axis in layout.deferred if axis != "fsdp"]
        if "fsdp" in layout.deferred:
            if ways(strategy.optimizer, names, ("fsdp",)) > 1:
                sent["reduce-scatter"] += _share(sizes["fsdp"]) * count * FLOAT32
                count /= sizes["fsdp"]
            else:
                rest.append("fsdp")
        sent["all-reduce"] += 2 * _share(math.prod(sizes[axis] for axis in rest)) * count * FLOAT32
    return sent


def _tensor(layout: Layout, work: Work) -> dict[str, float]:
    """Megatron with sequence-split norms: a layer takes in all tokens twice and gives back its share of them twice.

    Forward that is two gathers and two scattered sums; backward their transposes, and the two gathers again, because
    what the backward pass needs is split. Embedding and output gather once each way; the embedding scatters once,
    and the loss, whose gradients are computed with it, adds up those of its hidden states unsplit and in float32, over
    all that split the vocabulary. Quantised inputs are kept unsplit, and their gradients are four scattered sums: of q,
    k, v, and gate with up, which is gathered once more.
    """
    ways, runs = layout.sizes["tensor"], _runs(layout, work)
    entries = _rows(layout, work) * work.width
    residual = entries * _share(ways) * work.compute_bytes
    recomputed = work.full_remat  # the sum behind attention is needed again, the one behind the feed-forward part not
    gathered = 3 + 2 * recomputed if work.quantised else 4
    scattered = (4 if work.quantised else 2) + recomputed
    gathers = runs.layers * (2 * runs.forward + gathered * runs.backward) + 2 * runs.leaves
    scatters = runs.layers * (2 * runs.forward + scattered * runs.backward) + runs.enters
    return {
        "all-gather": residual * gathers,
        "reduce-scatter": residual * scatters,
        "all-reduce": 2 * entries * _share(ways * layout.sizes["stage"]) * FLOAT32 * runs.leaves,
    }


def _stages(layout: Layout, work: Work) -> dict[str, float]:
    """Sent to a neighbour, to and from all stages."""
    runs, stages = _runs(layout, work), layout.sizes["stage"]
    residual = _rows(layout, work) * work.width * work.compute_bytes / layout.sizes["tensor"]
    # What is looked up, and what the last stage has made; the gradient that the first one has.
    summed = 2 * runs.enters + runs.leaves
    return {
        "collective-permute": 2 * runs.ticks * residual,
        "all-reduce": 2 * _share(stages) * summed * residual,
    }


def moved_bytes(layout: Layout, arrays: Tree, logical_axes: Tree) -> float:
    """Bytes that a device sends in a step to bring layers to the stages whose work they are, and gradients back.

    Args:
      layout, arrays, logical_axes: as `step_traffic` takes them.
    """
    if layout.schedule is None or layout.schedule.chunks == 1:
        return 0.0
    stacked = [(names, array) for names, array in _named(arrays, logical_axes) if "layers" in names]
    total = 0.0
    for table in (layout.strategy.parameters, layout.strategy.gradients):
        for names, array in stacked:
            ways = math.prod(layout.sizes[axis] for axes in mesh_axes(table, names) for axis in axes)
            total += math.prod(array.shape) / ways * FLOAT32
    return share_moved(layout.schedule.stages, layout.schedule.chunks) * total


def _sequence(layout: Layout, work: Work) -> dict[str, float]:
    """Ring and Ulysses attention."""
    degree = layout.strategy.ulysses
    ring = layout.sizes["sequence"] // degree
    runs = _runs(layout, work)
    # Of one head over the device's tokens; groups of Ulysses trade tokens for heads, which changes no size.
    head = _rows(layout, work) * work.head_width * runs.layers / layout.sizes["tensor"]
    kv_heads = max(work.kv_heads, degree * layout.sizes["tensor"])  # copies, so that each device has a head
    sent = dict.fromkeys(KINDS, 0.0)
    keys_and_values = 2 * kv_heads * head
    # Once forward and once backward, where layers that are computed again use the same; their gradients in float32.
    each_way = runs.forward * work.compute_bytes + runs.backward * (work.compute_bytes + FLOAT32)
    sent["collective-permute"] = (ring - 1) * keys_and_values * each_way
    traded = (2 * work.heads + 2 * kv_heads) * head * work.compute_bytes
    sent["all-to-all"] = _share(degree) * traded * (runs.forward + (1 + work.full_remat) * runs.backward)
    return sent


def _experts(layout: Layout, work: Work) -> dict[str, float]:
    """Rows to their experts and back, where loads are even, and their gradients likewise."""
    runs, rows = _runs(layout, work), work.experts_per_token * _rows(layout, work)
    ways = 2 * (runs.forward + (1 + work.full_remat) * runs.backward) * work.sparse_layers / layout.sizes["stage"]
    return {"all-to-all": _share(layout.sizes["expert"]) * rows * work.width * work.compute_bytes * ways}


def _named(arrays: Tree, logical_axes: Tree) -> list[tuple[tuple, Any]]:
    """The logical axes of every array, and the array."""
    names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    return list(zip(names, jax.tree.leaves(arrays), strict=True))


def _rows(layout: Layout, work: Work) -> float:
    """Tokens of a microbatch on a device, where `tensor` doesn't split them."""
    return work.examples / layout.batch_shards * work.sequence_length / layout.sizes["sequence"]


def _share(ways: int) -> float:
    return (ways - 1) / ways
