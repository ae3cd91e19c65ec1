"""The backward pass: which kernels a call takes, in which order, and in how many parts.

The kernel of `key_gradients` recomputes the weights from the log-sum-exp. Where `scores` serves, it also writes down
the gradients of the scores, and that of q is made from them. Elsewhere the kernel of `query_gradients` recomputes the
weights once more; it comes first, as it has the rows of dout at hand, and leaves each row's dout.out for the other. No
two blocks of threads add to the same place.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from crescendo.pallas_kernels.attention.contract import Config, Operands, dout_out
from crescendo.pallas_kernels.attention.hopper import scores, tiling
from crescendo.pallas_kernels.attention.hopper.key_gradients import KeyGradients, compute
from crescendo.pallas_kernels.attention.hopper.masks import LOG2_E
from crescendo.pallas_kernels.attention.hopper.query_gradients import QueryGradients
from crescendo.pallas_kernels.attention.hopper.tiles import BackwardTile, default_tiles
from crescendo.pallas_kernels.attention.tiles import tuned
from crescendo.pallas_kernels.sharded import results_of


def backward(
    config: Config,
    operands: Operands,
    lse,
    dout,
    delta,
    out=None,
    tiles: tuple[BackwardTile, BackwardTile | scores.ScoresTile] | None = None,
):
    """The gradients of q, k and v (and None for the bias, which these kernels don't take).

    `tiles` are of the kernel for k and v and of that for q: where the latter is a `ScoresTile`, it takes the gradients
    of the scores from the former: part after part that kernel leaves them, and dq is made.
    """
    keys_tile, queries_tile = tiles or tuned_tiles(config, operands)
    if not isinstance(queries_tile, scores.ScoresTile):
        return *_in_two_passes(config, operands, lse, dout, delta, out, keys_tile, queries_tile), None
    parts = scores.parts_for(config, operands, keys_tile)
    assert parts is not None, "such a tile is for calls that keep the gradients of their scores"
    _, length, keys, heads, kv_heads, width = operands.dims
    if out is not None:
        delta = dout_out(dout, out) if delta is None else delta + dout_out(dout, out)
    paired = tiling.in_pairs(config, keys_tile, keys, keys_tile.rows)
    queries_paired = tiling.in_pairs(config, queries_tile, length, queries_tile.rows)
    block_q = math.lcm(keys_tile.block, queries_tile.rows * (2 if queries_paired else 1))
    blocked, like_q, of_queries = _in_blocks(operands, block_q, keys_tile.rows * (2 if paired else 1))
    # exp(score - inf) = 0: rows that see nothing, and rows of padding, take no part.
    lse = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf)
    call = KeyGradients(config, keys_tile, blocked, (length, keys), paired, parts=parts)
    of_q = scores.FromScores(config, queries_tile, blocked, (length, keys), queries_paired, parts.store)
    rows = {"dout": like_q(dout), "lse": of_queries(lse, jnp.inf), "delta": of_queries(delta, 0)}
    stored = (jax.ShapeDtypeStruct(parts.store.shape, call.dtype),)

    def every_part(gradients):
        dq, dk, dv = gradients

        def one_part(index, _):
            first = jnp.full((1,), index * parts.units, jnp.int32)
            (dscores,) = call.run(compute, call.arrays(operands, first=first, **rows), stored, (dk, dv))
            of_q.run(scores.compute, of_q.reads(dscores, first * (heads // kv_heads)), (), (dq,))

        lax.fori_loop(0, parts.count, one_part, None)

    made = pl.run_state(every_part)(tuple(lax.empty(array.shape, array.dtype) for array in blocked[:3]))
    dq, dk, dv = results_of(operands, made)
    return dq[:, :length, :, :width], dk[:, :keys, :, :width], dv[:, :keys, :, :width], None


def tuned_tiles(config: Config, operands: Operands) -> tuple[BackwardTile, BackwardTile | scores.ScoresTile]:
    """The measured tiles, of the kernel for k and v and of that for q."""
    of_keys, of_queries = default_tiles(operands)
    keys_tile = tuned("gradients of k and v", config, operands, of_keys)
    parts = scores.parts_for(config, operands, keys_tile)
    if parts is None:
        return keys_tile, tuned("gradient of q", config, operands, of_queries)
    return keys_tile, tuned("gradient of q from scores", config, operands, scores.default_tile(config, operands, parts))


def _in_blocks(operands: Operands, block_q: int, block_k: int):
    """The operands in full blocks, and what brings an array like q there, and one of a number for each query."""
    length = operands.q.shape[1]
    blocked = tiling.padded(operands, block_q, block_k)
    more = [(0, 0), (0, 0), (0, blocked.q.shape[1] - length)]

    def like_q(array):
        return None if array is None else tiling.padded(operands._replace(q=array), block_q, block_k).q

    def of_queries(numbers, value):
        return None if numbers is None else jnp.pad(numbers[..., :length], more, constant_values=value)

    return blocked, like_q, of_queries


def _in_two_passes(config, operands: Operands, lse, dout, delta, out, keys_tile, queries_tile):
    """The kernel for q and then that for k and v, each with weights of its own."""
    _, length, keys, _, _, width = operands.dims
    paired = tiling.in_pairs(config, queries_tile, length, queries_tile.rows)
    blocked, like_q, of_queries = _in_blocks(operands, queries_tile.rows * (2 if paired else 1), queries_tile.block)
    call = QueryGradients(config, queries_tile, blocked, (length, keys), paired)
    rows = {"dout": like_q(dout), "out": like_q(out), "lse": of_queries(lse, -jnp.inf), "delta": of_queries(delta, 0)}
    dq, lse, delta = call.gradient(operands, **rows)

    paired = tiling.in_pairs(config, keys_tile, keys, keys_tile.rows)
    blocked, like_q, of_queries = _in_blocks(operands, keys_tile.block, keys_tile.rows * (2 if paired else 1))
    rows = {"dout": like_q(dout), "lse": of_queries(lse, jnp.inf), "delta": of_queries(delta, 0)}
    gradients: dict[str, jax.Array] = {}
    # Wide heads leave registers for one gradient at a time.
    for wanted in (("dk",), ("dv",)) if width > 128 else (("dk", "dv"),):
        one = KeyGradients(config, keys_tile, blocked, (length, keys), paired, wanted)
        gradients |= zip(wanted, one.gradients(operands, **rows), strict=True)
    dk, dv = (gradients[name][:, :keys, :, :width] for name in ("dk", "dv"))
    return dq[:, :length, :, :width], dk, dv
