"""What a training step sends between devices, in closed form: the bytes that each device sends, by kind of collective.

With Psi parameters, ZeRO moves 2, 2, 2 and 3 Psi a step (data, zero1, zero2, fsdp), the last two once a microbatch; a
layer's tensor parallelism moves its residual stream ten times; ring attention its keys and values, Ulysses its heads.
Experts on other devices get the rows of their tokens and send them back. A pipeline sends a residual stream to the next
stage and its gradient to the one before, in every tick, and its stages sum what they look up and the gradients of what
they all see. Where it interleaves chunks of layers, these move to the stages whose work they are and their gradients
back, once a step. Sums of scalars and of whole vectors are left out.

By the rates of links the same says how long sending takes at least, and so along which axes a layer's experts are split
best: their weights are gathered along the others, or tokens are sent to them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from crescendo.parallel.chunks import share_moved
from crescendo.parallel.collectives import KINDS
from crescendo.parallel.layout import Layout
from crescendo.parallel.mesh import AXES, slow_factors
from crescendo.parallel.rules import NOT_OF_EXPERTS, Table, mesh_axes

Tree = Any
FLOAT32 = 4


class Sent(NamedTuple):
    """What each device sends in a step, of one kind.

    Attributes:
      kind: of collective.
      axes: of the mesh, along which devices take part together.
      size: in bytes.
    """

    kind: str
    axes: tuple[str, ...]
    size: float


class Links(NamedTuple):
    """How fast a device sends, bytes per second in one direction.

    Attributes:
      within: to another device of its host.
      across: to another host.
      devices: of a host.
    """

    within: float
    across: float
    devices: int


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
      shared_layers: whether the layers have one block's matrices, which are not stacked then.
      sparse_layers: how many layers have experts.
      experts_per_token: of these.
      shared_expert: whether these layers have an expert besides for every token.
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
    shared_layers: bool = False
    sparse_layers: int = 0
    experts_per_token: int = 0
    shared_expert: bool = False


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
    for kind, _, size in step_sends(layout, arrays, logical_axes, work):
        sent[kind] += size
    return sent


def step_sends(layout: Layout, arrays: Tree, logical_axes: Tree, work: Work) -> list[Sent]:
    """What `step_traffic` sums up, by the axes too."""
    moved = Sent("collective-permute", ("stage",), moved_bytes(layout, arrays, logical_axes))
    parts = (_tensor(layout, work), _sequence(layout, work), _stages(layout, work), _experts(layout, work), [moved])
    return [*itertools.chain(_parameters(layout, arrays, logical_axes, work), *parts)]


def _parameters(layout: Layout, arrays: Tree, logical_axes: Tree, work: Work) -> Iterator[Sent]:
    """Parameters and gradients."""
    sizes, strategy, runs = layout.sizes, layout.strategy, _runs(layout, work)
    named = _named(arrays, logical_axes)
    tables = sum("vocab" in names for names, _ in named)

    def along(table: Table, names, axes) -> tuple[str, ...]:
        return tuple(axis for each in mesh_axes(table, names) for axis in each if axis in axes)

    def ways(axes: Iterable[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    for names, array in named:
        stacked = "layers" in names
        of_block = work.shared_layers and "vocab" not in names and len(names) > 1 and not stacked
        # Matrices of layers are cast before they cross; tables and vectors, which are used in float32, are not.
        matrix = of_block or (stacked and len(names) > 2)
        each = work.compute_bytes if matrix else FLOAT32
        gathered = FLOAT32 if not matrix else each if "experts" in names else work.weight_bytes
        of_experts = strategy.experts if "experts" in names else ()
        count = math.prod(array.shape) / ways(along(strategy.parameters, names, ("stage", "tensor", *of_experts)))
        split = tuple(axis for axis in ("fsdp", "expert", "sequence") if axis not in of_experts)
        of_parameters = along(strategy.parameters, names, split)
        of_gradients = along(strategy.gradients, names, split)
        of_updates = along(strategy.optimizer, names, split)
        gathers = scatters = runs.leaves
        if stacked:  # of a device's layers a pass goes through one chunk
            chunk = runs.layers * sizes["stage"] / work.layers
            gathers, scatters = runs.gathers * chunk, runs.backward * chunk
        elif of_block:  # in each layer anew, where the compiler doesn't gather it before their loop
            gathers, scatters = runs.gathers * work.layers, runs.backward * work.layers
        if "vocab" in names and layout.schedule is not None:  # looked up and multiplied by apart, all tables together
            gathers, scatters = (runs.enters + runs.leaves) / tables, 2 * runs.leaves / tables
        # A device works with its own copy of a key head: so much of the weight, replicated along `tensor`, crosses.
        copied = layout.key_copies > 1 and "kv_heads" in names
        heads = sizes["tensor"] // layout.key_copies if copied else 1
        if ways(of_parameters) > 1:  # gathered for the forward pass, and a layer again for the backward pass
            size = gathers * _share(ways(of_parameters)) * count / heads * gathered
            yield Sent("all-gather", of_parameters, size)
        elif ways(of_updates) > 1:
            yield Sent("all-gather", of_updates, _share(ways(of_updates)) * count * FLOAT32)
        if ways(of_gradients) > 1:
            size = scatters * _share(ways(of_gradients)) * count / heads * each
            yield Sent("reduce-scatter", of_gradients, size)
            count /= ways(of_gradients)
        else:
            summed = tuple(axis for axis in split if axis not in layout.deferred)
            yield Sent("all-reduce", summed, 2 * scatters * _share(ways(summed)) * count / heads * each)
        if copied:
            yield Sent("all-reduce", ("tensor",), 2 * scatters * _share(layout.key_copies) * count / heads * each)
            yield Sent("all-gather", ("tensor",), scatters * _share(heads) * count * each)
        rest = [axis for axis in layout.deferred if axis != "fsdp"]
        if "fsdp" in layout.deferred:
            if ways(along(strategy.optimizer, names, ("fsdp",))) > 1:
                yield Sent("reduce-scatter", ("fsdp",), _share(sizes["fsdp"]) * count * FLOAT32)
                count /= sizes["fsdp"]
            else:
                rest.append("fsdp")
        yield Sent("all-reduce", tuple(rest), 2 * _share(ways(rest)) * count * FLOAT32)


def _tensor(layout: Layout, work: Work) -> list[Sent]:
    """Megatron with sequence-split norms: a layer takes in all tokens twice and gives back its share of them twice.

    Forward that is two gathers and two scattered sums; backward their transposes, and the two gathers again, because
    what the backward pass needs is split. Embedding and output gather once each way; the embedding scatters once,
    and the loss, whose gradients are computed with it, adds up those of its hidden states unsplit and in float32, over
    all that split the vocabulary. Quantised inputs are kept unsplit, and their gradients are four scattered sums: of q,
    k, v, and gate with up, which is gathered once more. Experts that `tensor` splits take in the tokens as they lie.
    """
    ways, runs = layout.sizes["tensor"], _runs(layout, work)
    entries = _rows(layout, work) * work.width
    residual = entries * _share(ways) * work.compute_bytes
    recomputed = work.full_remat  # the sum behind attention is needed again, the one behind the feed-forward part not
    gathered = 3 + 2 * recomputed if work.quantised else 4
    scattered = (4 if work.quantised else 2) + recomputed
    folded = work.sparse_layers / work.layers if "tensor" in layout.expert_axes and not work.shared_expert else 0
    gathers = runs.layers * ((2 - folded) * runs.forward + (gathered - 2 * folded) * runs.backward) + 2 * runs.leaves
    scatters = runs.layers * ((2 - folded) * runs.forward + (scattered - folded) * runs.backward) + runs.enters
    whole = 2 * entries * _share(ways * layout.sizes["stage"]) * FLOAT32 * runs.leaves
    return [
        Sent("all-gather", ("tensor",), residual * gathers),
        Sent("reduce-scatter", ("tensor",), residual * scatters),
        Sent("all-reduce", ("stage", "tensor"), whole),
    ]


def _stages(layout: Layout, work: Work) -> list[Sent]:
    """Sent to a neighbour, to and from all stages."""
    runs, stages = _runs(layout, work), layout.sizes["stage"]
    residual = _rows(layout, work) * work.width * work.compute_bytes / layout.sizes["tensor"]
    # What is looked up, and what the last stage has made; the gradient that the first one has.
    summed = 2 * runs.enters + runs.leaves
    return [
        Sent("collective-permute", ("stage",), 2 * runs.ticks * residual),
        Sent("all-reduce", ("stage",), 2 * _share(stages) * summed * residual),
    ]


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


def _sequence(layout: Layout, work: Work) -> list[Sent]:
    """Ring and Ulysses attention."""
    degree = layout.strategy.ulysses
    ring = layout.sizes["sequence"] // degree
    runs = _runs(layout, work)
    # Of one head over the device's tokens; groups of Ulysses trade tokens for heads, which changes no size.
    head = _rows(layout, work) * work.head_width * runs.layers / layout.sizes["tensor"]
    kv_heads = max(work.kv_heads, degree * layout.sizes["tensor"])  # copies, so that each device has a head
    keys_and_values = 2 * kv_heads * head
    # Once forward and once backward, where layers that are computed again use the same; their gradients in float32.
    each_way = runs.forward * work.compute_bytes + runs.backward * (work.compute_bytes + FLOAT32)
    traded = (2 * work.heads + 2 * kv_heads) * head * work.compute_bytes
    trades = _share(degree) * traded * (runs.forward + (1 + work.full_remat) * runs.backward)
    return [
        Sent("collective-permute", ("sequence",), (ring - 1) * keys_and_values * each_way),
        Sent("all-to-all", ("sequence",), trades),
    ]


def _experts(layout: Layout, work: Work) -> list[Sent]:
    """Rows to their experts and back, where loads are even, and their gradients likewise."""
    runs, rows, axes = _runs(layout, work), work.experts_per_token * _rows(layout, work), layout.expert_axes
    if "tensor" in axes:  # else all of a row's devices along it have its tokens
        rows /= layout.sizes["tensor"]
    sparse = runs.layers * work.sparse_layers / work.layers  # that a pass goes through
    times = 2 * (runs.forward + (1 + work.full_remat) * runs.backward) * sparse
    share = _share(math.prod(layout.sizes[axis] for axis in axes))
    return [Sent("all-to-all", axes, share * rows * work.width * work.compute_bytes * times)]


def seconds(sends: Iterable[Sent], layout: Layout, links: Links) -> float:
    """How long a device sends at least, one thing behind the other, each bound by the links that are busy longest.

    What is exchanged goes from each device to each; what is gathered or summed crosses to another host once for all the
    devices of a host; between neighbours the slowest link counts.

    >>> from crescendo.parallel.mesh import MeshSpec
    >>> layout = Layout(MeshSpec(data=2, tensor=4).abstract(8))
    >>> links = Links(within=100, across=10, devices=4)
    >>> seconds([Sent("all-to-all", ("tensor",), 200)], layout, links)
    2.0
    >>> seconds([Sent("all-reduce", ("data",), 200)], layout, links)
    20.0
    """
    slow = dict(zip(AXES, slow_factors(layout.sizes, max(1, layout.mesh.size // links.devices)), strict=True))
    total = 0.0
    for kind, axes, size in sends:
        n, hosts = (math.prod(of[axis] for axis in axes) for of in (layout.sizes, slow))
        if n == 1:
            continue
        near = n // hosts
        across = {
            "all-to-all": (n - near) / (n - 1),
            "collective-permute": float(hosts > 1),
        }.get(kind, (hosts - 1) / (n - 1))
        total += max(size * across / links.across, size * (1 - across) / links.within)
    return total


class Split(NamedTuple):
    """Along which axes a layer's experts may be split, and what a device then sends in a step.

    Attributes:
      axes: of the mesh, of several devices.
      rows: bytes of tokens to their experts and back.
      rest: bytes of all else: weights that are gathered and gradients that are summed, and what doesn't depend on it.
      seconds: how long it sends at least, where links are known; in that order.
    """

    axes: tuple[str, ...]
    rows: float
    rest: float
    seconds: float | None


def ways_to_split(sizes: dict[str, int], experts: int) -> list[tuple[str, ...]]:
    """The axes of several devices along which so many experts can be split, every choice of them; none first.

    >>> ways_to_split(dict(data=8, stage=1, fsdp=1, expert=1, sequence=2, tensor=4), experts=4)
    [(), ('sequence',), ('tensor',)]
    """
    could = [axis for axis in AXES if axis not in NOT_OF_EXPERTS and sizes[axis] > 1]
    needed = {"expert"} & {*could}  # or experts would be replicas along it
    chosen = itertools.chain.from_iterable(itertools.combinations(could, n) for n in range(len(could) + 1))
    return [axes for axes in chosen if needed <= {*axes} and experts % math.prod(sizes[axis] for axis in axes) == 0]


def expert_splits(
    layout: Layout, arrays: Tree, logical_axes: Tree, work: Work, *, experts: int, links: Links | None = None
) -> list[Split]:
    """Every way to split a layer's experts over this mesh: that which sends for the least time first, or fewest bytes.

    Sending tokens moves rows in each microbatch, gathering weights moves the experts': of many experts and few tokens
    the former is less.

    Args:
      layout, arrays, logical_axes, work: as `step_traffic` takes them.
      experts: of a layer.
      links: of the devices; None: unknown.
    """
    found = []
    for axes in ways_to_split(layout.sizes, experts):
        other = Layout(layout.mesh, layout.strategy.with_experts_over(axes)).with_heads(work.heads, work.kv_heads)
        sends = step_sends(other, arrays, logical_axes, work)
        rows, total = sum(size for _, _, size in _experts(other, work)), sum(size for _, _, size in sends)
        found.append(Split(axes, rows, total - rows, None if links is None else seconds(sends, other, links)))
    return sorted(found, key=lambda split: split.rows + split.rest if split.seconds is None else split.seconds)


def _named(arrays: Tree, logical_axes: Tree) -> list[tuple[tuple, Any]]:
    """The logical axes of every array, and the array."""
    names = jax.tree.leaves(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    return list(zip(names, jax.tree.leaves(arrays), strict=True))


def _rows(layout: Layout, work: Work) -> float:
    """Tokens of a microbatch on a device, where `tensor` doesn't split them."""
    return work.examples / layout.batch_shards * work.sequence_length / layout.sizes["sequence"]


def _share(ways: int) -> float:
    return (ways - 1) / ways
