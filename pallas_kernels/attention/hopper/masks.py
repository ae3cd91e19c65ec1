"""Which scores of a block count, and what becomes of them: masks, the cap, weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.hopper.products import COLUMN_LAYOUT, ROW_LAYOUT, along_columns, along_rows
from crescendo.pallas_kernels.hopper.ring import Part, Slots

LOG2_E = math.log2(math.e)


class Ids(NamedTuple):
    """Segments and positions of queries or of keys, int32, or references to them; those that are absent are None."""

    segments: Any = None
    positions: Any = None

    def each(self, function: Callable) -> "Ids":
        """The function of those that are there."""
        return Ids(*(None if array is None else function(array) for array in self))

    def parts(self, block: int) -> dict[str, Part]:
        """What a ring's slot has of them."""
        return {name: Part((block,), jnp.int32) for name, array in self._asdict().items() if array is not None}

    def sources(self, at: tuple) -> dict[str, Any]:
        """What fills these parts."""
        return {name: array.at[at] for name, array in self._asdict().items() if array is not None}

    def of(self, slots: Slots, slot) -> "Ids":
        """References to what lies in a slot."""
        return Ids(**{name: slots[name].at[slot] for name, array in self._asdict().items() if array is not None})


def ids_of(operands: Operands) -> tuple[Ids, Ids]:
    """Of the queries, and of the keys."""
    return Ids(operands.q_segments, operands.q_positions), Ids(operands.k_segments, operands.k_positions)


def hide(scores, config: Config, q_ids: Ids, k_ids: Ids, first_row, first_column, *, transposed=False, keys):
    """One block of scores with -inf where the query doesn't see the key.

    Args:
      scores: `[rows, columns]`, queries by keys; keys by queries where `transposed`.
      config: of the call.
      q_ids, k_ids: of the block's queries and keys.
      first_row, first_column: index of the block's first query, and of its first key.
      transposed: whether the block's rows are keys.
      keys: the first that counts, and the first that doesn't any more; None where no key is outside.
    """
    q_dim, k_dim = (1, 0) if transposed else (0, 1)
    shape = scores.shape
    over, layouts = (along_rows, along_columns), (ROW_LAYOUT, COLUMN_LAYOUT)

    def index(dim, first):
        numbers = plgpu.broadcasted_iota(jnp.int32, (shape[dim],), 0, layout=layouts[dim])
        # Or the compiler finds that one element's row less its column is always the same, and keeps all of these.
        return lax.optimization_barrier(numbers) + first

    def compare(relation, of_queries, of_keys):
        return relation(over[q_dim](of_queries, shape), over[k_dim](of_keys, shape))

    masks = []
    if q_ids.segments is not None:
        masks.append(compare(jnp.equal, q_ids.segments, k_ids.segments))
    if config.masks:
        q_positions = index(q_dim, first_row) if q_ids.positions is None else q_ids.positions
        k_positions = index(k_dim, first_column) if k_ids.positions is None else k_ids.positions
        if config.causal:
            masks.append(compare(jnp.greater_equal, q_positions, k_positions))
        else:
            masks.append(compare(jnp.greater, q_positions, k_positions - config.window))
        if config.window is not None:
            masks.append(compare(jnp.less, q_positions, k_positions + config.window))
    first, end = keys
    if first is not None:
        masks.append(over[k_dim](index(k_dim, first_column), shape) >= first)
    if end is not None:
        masks.append(over[k_dim](index(k_dim, first_column), shape) < end)
    for mask in masks:  # one after the other: all at once would need more registers
        scores = jnp.where(mask, scores, -jnp.inf)
    return scores


def capped(config: Config, scores):
    """`(scores as they count, what times them is their exponent in base 2, tanh of the cap or None)`."""
    if config.soft_cap is None:
        return scores, config.scale * LOG2_E, None
    tanh = jnp.tanh(scores * (config.scale / config.soft_cap))
    return config.soft_cap * tanh, LOG2_E, tanh


def where_edge(scores, masked: Callable, edge):
    """`masked(scores)` in blocks that are seen in part; `edge` says so, None where no block can be one."""
    return scores if edge is None else lax.cond(edge, masked, lambda scores: scores, scores)


def weights_again(config: Config, scores, lse, masked: Callable, edge):
    """`P = exp(score - lse)` from the log-sum-exp in base 2, and the capped score's derivative (None without a cap)."""
    scores, factor, tanh = capped(config, scores)
    scores = where_edge(scores, masked, edge)
    return jnp.exp2(scores * factor - lse), None if tanh is None else 1 - tanh * tanh
