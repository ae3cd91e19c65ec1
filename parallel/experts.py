"""Experts over devices: each has some of them, or a part of their width, and tokens go to where theirs are.

All of it runs inside `shard_map`, manual over every axis. Rows that lie expert by expert are sent along the mesh axes
that split the experts, into slots: of p devices each has room for the most rows that another one may have for it,
source by source. There they are put in the order of its own experts, multiplied, and sent back the same way (GShard,
Lepikhin et al., 2020, https://arxiv.org/abs/2006.16668, but that no row is dropped). The axes are any along which
tokens differ: what attention splits along them is its own affair (MoE Parallel Folding, Liu et al., 2025,
https://arxiv.org/abs/2504.14960).

Tokens may be cut into chunks, each with an exchange of its own: what is sent of one waits for no product of another,
so that the compiler may let them run beside each other (Tutel, Hwang et al., 2022, https://arxiv.org/abs/2206.03382).

Sending and sending back are each the derivative of the other. Where XLA has no ragged exchange, on CPUs, all of the
slots are sent, the empty ones too, by which tests know the ragged one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axes = tuple[str, ...]


def on_device(
    function: Callable,
    *arrays: jax.Array,
    gathers: Sequence[Sequence],
    tensor: bool,
    axes: Axes = (),
    chunks: int = 1,
    ragged: bool = False,
) -> jax.Array:
    """`function(*tokens, *kernels, exchange=...)` of a device's own rows, `[B, T / tensor, D]`.

    Args:
      function: gives `[B, T, D]`, what this device's part of the experts' width adds.
      arrays: the tokens, `[B, T / tensor, ...]` each; behind them the kernels as they are stored.
      gathers: for each kernel the mesh axes of each of its axes along which other devices have the rest of it.
      tensor: whether the mesh axis `tensor` splits the experts' width, and what is before and behind them by tokens.
      axes: the mesh axes that split the experts; tokens differ along each.
      chunks, ragged: see `Exchange`.
    """
    devices = math.prod(map(jax.lax.axis_size, axes))
    options = {"exchange": Exchange(axes, devices, chunks, ragged)} if axes else {}

    def run(*arrays):
        tokens, kernels = list(arrays[: -len(gathers)]), list(arrays[-len(gathers) :])
        if tensor:
            tokens = [jax.lax.all_gather(x, "tensor", axis=1, tiled=True) for x in tokens]
        for i, along in enumerate(gathers):
            for axis, names in enumerate(along):
                kernels[i] = jax.lax.all_gather(kernels[i], names, axis=axis, tiled=True) if names else kernels[i]
        return function(*tokens, *kernels, **options)

    # What is gathered is gathered again in the backward pass, and not kept whole until then.
    y_BTD = jax.checkpoint(run, policy=_all_but_gathers)(*arrays)
    return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True) if tensor else y_BTD


def _all_but_gathers(primitive, *_, **__) -> bool:
    """What is kept: neither gathers nor views and parts of what they give."""
    return primitive.name not in ("all_gather", "reshape", "slice", "split")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Brings rows to the devices that have their experts, and back; see `models.layout`.

    Attributes:
      axes: the mesh axes that split the experts.
      devices: along all of them, p.
      chunks: into how many the tokens are cut, d.
      ragged: whether XLA has an exchange of as many rows as there are on these devices; else every slot is sent.
    """

    axes: Axes
    devices: int
    chunks: int = 1
    ragged: bool = False

    def __call__(
        self, of_experts: Callable, rows: Sequence[jax.Array], sizes: Sequence[jax.Array], most: int | None
    ) -> list[jax.Array]:
        """What `of_experts(rows, sizes)` makes of each chunk's rows on the devices that have their experts."""
        p, how, count = self.devices, (self.axes, self.ragged), len(rows[0])
        own = len(sizes[0]) // p
        room = count if most is None else min(count, most * own)
        sizes_PCX = jnp.stack(sizes).reshape(-1, p, own).swapaxes(0, 1)
        sent_PC = jnp.sum(sizes_PCX, axis=2)
        begins_PC = jnp.cumsum(sent_PC, axis=0) - sent_PC
        told = jnp.concatenate([sizes_PCX, begins_PC[..., None]], axis=2)
        told = jax.lax.all_to_all(told, self.axes, 0, 0, tiled=True)
        # Of each source how many rows, by chunk and expert, and where it has its rows for here.
        came_PCX, there_PC = told[..., :-1], told[..., -1]
        ways = [_Ways(*x) for x in zip(begins_PC.T, sent_PC.T, jnp.sum(came_PCX, axis=2).T, there_PC.T, strict=True)]

        def work(slots_RD, came_PX):
            # Expert by expert: empty slots belong to none, and so lie behind all.
            ends_PX = jnp.cumsum(came_PX, axis=1)
            expert_PR = jnp.sum(jnp.arange(room)[None, :, None] >= ends_PX[:, None, :], axis=-1)
            order_R = jnp.argsort(expert_PR.reshape(-1), stable=True)
            inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(p * room), unique_indices=True)
            made_RD = of_experts(_permuted(slots_RD, order_R, inverse_R), jnp.sum(came_PX, axis=0))
            return _permuted(made_RD, inverse_R, order_R)

        results, slots_RD = [], _send(how, room, rows[0], ways[0])
        for i in range(len(rows)):
            # Both what is sent next and what is worked on are there before either begins, and the next work waits for
            # both: so in whatever order the compiler writes them down, they are beside each other, backward likewise.
            if following := i + 1 < len(rows):
                slots_RD, rows_MD = jax.lax.optimization_barrier((slots_RD, rows[i + 1]))
                following_RD = _send(how, room, rows_MD, ways[i + 1])
            made_RD = work(slots_RD, came_PCX[:, i])
            if following:
                made_RD, slots_RD = jax.lax.optimization_barrier((made_RD, following_RD))
            results.append(_send_back(how, count, made_RD, ways[i]))
        return results


class _Ways(NamedTuple):
    """Which rows go where, int32 `[p]` each.

    Attributes:
      begins: where the rows for each device begin among those of this one.
      sent: how many there are.
      came: how many each device has sent here.
      there: where these begin among its own.
    """

    begins: jax.Array
    sent: jax.Array
    came: jax.Array
    there: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(how: tuple[Axes, bool], room: int, rows_MD, ways: _Ways):
    """Into slots `[p * room, D]`, those of a source side by side; zeros where nothing came."""
    axes, ragged = how
    return (ragged_send if ragged else padded_send)(axes, room, rows_MD, ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send_back(how: tuple[Axes, bool], rows: int, slots_RD, ways: _Ways):
    """What lies in the slots to where it came from, `[M, D]`; zeros for rows that went nowhere."""
    axes, ragged = how
    return (ragged_send_back if ragged else padded_send_back)(axes, rows, slots_RD, ways)


_send.defvjp(
    lambda how, room, rows_MD, ways: (_send(how, room, rows_MD, ways), (len(rows_MD), ways)),
    lambda how, room, kept, g: (_send_back(how, kept[0], g, kept[1]), None),
)
_send_back.defvjp(
    lambda how, rows, slots_RD, ways: (_send_back(how, rows, slots_RD, ways), (len(slots_RD) // len(ways.sent), ways)),
    lambda how, rows, kept, g: (_send(how, kept[0], g, kept[1]), None),
)


def padded_send(axes: Axes, room: int, rows_MD, ways: _Ways):
    """See `_send`: every slot is sent."""
    places_PR = ways.begins[:, None] + jnp.arange(room)
    full_PR = jnp.arange(room) < ways.sent[:, None]
    slots_PRD = rows_MD.at[jnp.where(full_PR, places_PR, len(rows_MD))].get(mode="fill", fill_value=0)
    return jax.lax.all_to_all(slots_PRD.reshape(-1, rows_MD.shape[1]), axes, 0, 0, tiled=True)


def padded_send_back(axes: Axes, rows: int, slots_RD, ways: _Ways):
    """See `_send_back`: every slot is sent."""
    room = len(slots_RD) // len(ways.sent)
    slots_RD = jax.lax.all_to_all(slots_RD, axes, 0, 0, tiled=True)
    row_M = jnp.arange(rows)
    device_M = jnp.sum(row_M[:, None] >= jnp.cumsum(ways.sent), axis=1)  # p: of none
    place_M = device_M * room + row_M - ways.begins.at[device_M].get(mode="clip")
    return slots_RD.at[jnp.where(device_M < len(ways.sent), place_M, len(slots_RD))].get(mode="fill", fill_value=0)


def ragged_send(axes: Axes, room: int, rows_MD, ways: _Ways):
    """See `_send`: only rows are sent."""
    p = len(ways.sent)
    here = jnp.full(p, jax.lax.axis_index(axes) * room)
    slots_RD = _zeros_like(rows_MD, p * room)
    return jax.lax.ragged_all_to_all(rows_MD, slots_RD, ways.begins, ways.sent, here, ways.came, axis_name=axes)


def ragged_send_back(axes: Axes, rows: int, slots_RD, ways: _Ways):
    """See `_send_back`: only rows are sent."""
    begins = jnp.arange(len(ways.sent)) * (len(slots_RD) // len(ways.sent))
    rows_MD = _zeros_like(slots_RD, rows)
    return jax.lax.ragged_all_to_all(slots_RD, rows_MD, begins, ways.came, ways.there, ways.sent, axis_name=axes)


def _zeros_like(x, rows: int):
    """So many rows of zeros, which vary over devices as those of x do."""
    return jnp.broadcast_to(jnp.zeros_like(x[:1]), (rows, x.shape[1]))


@jax.custom_vjp
def _permuted(x_RD, order_R, inverse_R):
    """`x[order]`, whose derivative is a gather too."""
    del inverse_R
    return x_RD[order_R]


_permuted.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))
