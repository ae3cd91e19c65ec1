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
    function: Callable, *arrays: jax.Array, gathers: Sequence[Sequence], tensor: bool, axes: Axes = (), chunks: int = 1
) -> jax.Array:
    """`function(*tokens, *kernels, exchange=...)` of a device's own rows, `[B, T / tensor, D]`.

    Args:
      function: gives `[B, T, D]`, what this device's part of the experts' width adds; token by token.
      arrays: the tokens, `[B, T / tensor, ...]` each; behind them the kernels as they are stored.
      gathers: for each kernel the mesh axes of each of its axes along which other devices have the rest of it.
      tensor: whether the mesh axis `tensor` splits the experts' width, and what is before and behind them by tokens.
      axes: the mesh axes that split the experts; tokens differ along each.
      chunks: into how many the tokens are cut; it divides T.
    """
    options = {"exchange": Exchange(axes, math.prod(map(jax.lax.axis_size, axes)))} if axes else {}

    def run(*arrays):
        tokens, kernels = list(arrays[: -len(gathers)]), list(arrays[-len(gathers) :])
        if tensor:
            tokens = [jax.lax.all_gather(x, "tensor", axis=1, tiled=True) for x in tokens]
        for i, along in enumerate(gathers):
            for axis, names in enumerate(along):
                kernels[i] = jax.lax.all_gather(kernels[i], names, axis=axis, tiled=True) if names else kernels[i]
        if chunks == 1:
            return function(*tokens, *kernels, **options)
        made = [function(*each, *kernels, **options) for each in zip(*(cut(x, chunks) for x in tokens), strict=True)]
        return jnp.concatenate(made).reshape(*tokens[0].shape[:2], -1)

    # What is gathered is gathered again in the backward pass, and not kept whole until then.
    y_BTD = jax.checkpoint(run, policy=_all_but_gathers)(*arrays)
    return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True) if tensor else y_BTD


def cut(x_BT: jax.Array, chunks: int) -> list[jax.Array]:
    """Equal parts of the tokens, in their order: of rows, and of parts of rows where there are too few rows.

    A part has as few different rows as can be: an expert that takes so many tokens of a row at most may then need room
    for no more than these in each.

    >>> [x.shape for x in cut(jnp.zeros((6, 8)), 2)], [x.shape for x in cut(jnp.zeros((2, 8)), 4)]
    ([(3, 8), (3, 8)], [(1, 4), (1, 4), (1, 4), (1, 4)])
    """
    rows, length = x_BT.shape[:2]
    pieces = chunks // math.gcd(rows, chunks)  # of a row
    return jnp.split(x_BT.reshape(rows * pieces, length // pieces, *x_BT.shape[2:]), chunks)


def _all_but_gathers(primitive, *_, **__) -> bool:
    """What is kept: neither gathers nor views and parts of what they give."""
    return primitive.name not in ("all_gather", "reshape", "slice", "split")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Brings rows to the devices that have their experts, and back; see `models.layout`.

    Attributes:
      axes: the mesh axes that split the experts.
      devices: along all of them, p.
    """

    axes: Axes
    devices: int

    def __call__(self, of_experts: Callable, rows_MD: jax.Array, sizes_X: jax.Array, most: int | None) -> jax.Array:
        """What `of_experts(rows, sizes)` makes of the rows on the devices that have their experts."""
        p, rows, own = self.devices, len(rows_MD), len(sizes_X) // self.devices
        room = rows if most is None else min(rows, most * own)
        sizes_PX = sizes_X.reshape(p, own)
        came_PX = jax.lax.all_to_all(sizes_PX, self.axes, 0, 0, tiled=True)  # of each source, by expert
        sent_P, came_P = jnp.sum(sizes_PX, axis=1), jnp.sum(came_PX, axis=1)
        begins_P = jnp.cumsum(sent_P) - sent_P
        there_P = jax.lax.all_to_all(begins_P, self.axes, 0, 0, tiled=True)  # where each source has its rows for here
        ways = _Ways(begins_P, sent_P, came_P, there_P)
        slots_RD = _send(self.axes, room, rows_MD, ways)
        # Expert by expert: empty slots belong to none, and so lie behind all.
        ends_PX = jnp.cumsum(came_PX, axis=1)
        expert_PR = jnp.sum(jnp.arange(room)[None, :, None] >= ends_PX[:, None, :], axis=-1)
        order_R = jnp.argsort(expert_PR.reshape(-1), stable=True)
        inverse_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(p * room), unique_indices=True)
        made_RD = of_experts(_permuted(slots_RD, order_R, inverse_R), jnp.sum(came_PX, axis=0))
        return _send_back(self.axes, rows, _permuted(made_RD, inverse_R, order_R), ways)


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
def _send(axes: Axes, room: int, rows_MD, ways: _Ways):
    """Into slots `[p * room, D]`, those of a source side by side; zeros where nothing came."""
    padded, ragged = (functools.partial(send, axes, room) for send in (padded_send, ragged_send))
    return jax.lax.platform_dependent(rows_MD, ways, cpu=padded, default=ragged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send_back(axes: Axes, rows: int, slots_RD, ways: _Ways):
    """What lies in the slots to where it came from, `[M, D]`; zeros for rows that went nowhere."""
    padded, ragged = (functools.partial(send, axes, rows) for send in (padded_send_back, ragged_send_back))
    return jax.lax.platform_dependent(slots_RD, ways, cpu=padded, default=ragged)


_send.defvjp(
    lambda axes, room, rows_MD, ways: (_send(axes, room, rows_MD, ways), (len(rows_MD), ways)),
    lambda axes, room, kept, g: (_send_back(axes, kept[0], g, kept[1]), None),
)
_send_back.defvjp(
    lambda axes, rows, slots_RD, ways: (
        _send_back(axes, rows, slots_RD, ways),
        (len(slots_RD) // len(ways.sent), ways),
    ),
    lambda axes, rows, kept, g: (_send(axes, kept[0], g, kept[1]), None),
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
