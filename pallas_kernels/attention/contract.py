"""What every implementation is given: the operands, the constants, which keys a query sees, and the derivative rule."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from crescendo.pallas_kernels.sharded import sharded


@dataclasses.dataclass(frozen=True)
class Config:
    """The constants of a call.

    A score is `soft_cap * tanh(scale * q.k / soft_cap) + bias`, without the cap where `soft_cap` is None. Where
    `sees_itself`, query i is sure to see key i, and no row is empty.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sees_itself: bool = False

    @property
    def masks(self) -> bool:
        """Whether positions matter."""
        return self.causal or self.window is not None


class Operands(NamedTuple):
    """The arrays of a call; those that are absent are None.

    `q` is `[B, T, H, D]`, `k` and `v` `[B, S, K, D]`, `bias` broadcasts to `[B, H, T, S]`; the others are int32
    `[B, T]` or `[B, S]`.
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    q_segments: Any = None
    k_segments: Any = None
    q_positions: Any = None
    k_positions: Any = None

    @property
    def dims(self) -> tuple[int, int, int, int, int, int]:
        """B, T, S, H, K, D."""
        (batch, length, heads, width), (_, keys, kv_heads, _) = self.q.shape, self.k.shape
        return batch, length, keys, heads, kv_heads, width

    @property
    def metadata(self) -> tuple:
        return self[4:]

    @property
    def has_metadata(self) -> bool:
        """Whether what a query sees depends on arrays."""
        return any(array is not None for array in self.metadata)


def positions(operands: Operands) -> tuple[Any, Any]:
    """Of queries and keys, `[B or 1, T]` and `[B or 1, S]`."""
    if operands.q_positions is not None:
        return operands.q_positions, operands.k_positions
    _, length, keys, *_ = operands.dims
    return jnp.arange(length, dtype=jnp.int32)[None], jnp.arange(keys, dtype=jnp.int32)[None]


def visible(config: Config, q_segments, k_segments, q_positions, k_positions):
    """Which keys each query sees: bool `[..., T, S]`, or None where it sees all; segments may be None."""
    mask = None
    if q_segments is not None:
        mask = q_segments[..., :, None] == k_segments[..., None, :]
    if config.masks:
        ahead = q_positions[..., :, None] - k_positions[..., None, :]
        near = ahead >= 0 if config.causal else -ahead < (config.window or 0)
        if config.window is not None:
            near &= ahead < config.window
        mask = near if mask is None else mask & near
    return mask


def seen_pairs(bias, mask):
    """Which pairs count, bool, broadcasting to `[B, H, T, S]`; None where all do.

    Args:
      bias: of the scores, or None.
      mask: as `visible` gives it, or None.
    """
    seen = None if mask is None else mask[:, None]
    if bias is not None:
        allowed = bias != -jnp.inf
        seen = allowed if seen is None else seen & allowed
    return seen


# A pair that isn't seen has weight 0, but 0 times NaN or infinity is NaN. So in matmuls such entries are 0; the weights
# of their rows are NaN instead, and those of pairs that aren't seen are selected away.
def only_finite(array):
    """The array, 0 where it isn't finite."""
    return jnp.where(jnp.isfinite(array), array, 0)


def taint(rows, dtype):
    """Of each row `[..., D]`: 0 if it is finite, else NaN."""
    return jnp.where(jnp.isfinite(rows).all(-1), 0, jnp.nan).astype(dtype)


class Ranges(NamedTuple):
    """The key blocks that a query block needs: from `lo` to `hi`, those from `full_lo` to `full_hi` without a mask."""

    lo: Any
    full_lo: Any
    full_hi: Any
    hi: Any


def ranges_of_tile(config: Config, tile, side: str, lengths: tuple[int, int], block_q: int, block_k: int) -> Ranges:
    """The blocks that a tile of queries (`side` "q") or of keys ("k") needs, where index is position.

    Args:
      tile: its number, or several numbers: int32, also in a kernel.
      side: whose tile it is; the blocks are of the other side.
      lengths: T and S; a tile past its side's end needs nothing.
    """
    (length, keys), seen = lengths, None if config.window is None else config.window - 1
    # How far a row of the tile sees, back and ahead.
    back, ahead = seen, 0 if config.causal else seen
    rows, size, block, others = block_q, length, block_k, keys
    full_blocks: Any = keys // block_k
    if side == "k":
        back, ahead = ahead, back
        rows, size, block, others = block_k, keys, block_q, length
        # Of a tile that ends past the keys no block is full.
        full_blocks = jnp.where(tile < keys // block_k, -(-length // block_q), 0)
    count = -(-others // block)

    def block_of(index):
        return jax.lax.div(jnp.maximum(index, 0), jnp.int32(block))

    first = tile * rows
    last = jnp.minimum(first + rows, size) - 1
    sees_any = first < size
    lo: Any = 0
    full_lo: Any = 0
    hi: Any = count
    full_hi: Any = jnp.minimum(full_blocks, count)
    if back is not None:
        lo, full_lo = block_of(first - back), block_of(last - back + block - 1)
        sees_any = sees_any & (first - back < others)
    if ahead is not None:
        hi = jnp.minimum(block_of(last + ahead) + 1, count)
        # The last block ends where its side ends.
        beyond = first + ahead >= others - 1
        full_hi = jnp.minimum(full_hi, jnp.where(beyond, count, block_of(first + ahead + 1)))
    hi = jnp.where(sees_any, hi, 0)
    lo, full_hi = jnp.minimum(lo, hi), jnp.minimum(full_hi, hi)
    full_lo = jnp.maximum(full_lo, lo)
    some = full_lo < full_hi
    return Ranges(lo, jnp.where(some, full_lo, hi), jnp.where(some, full_hi, hi), hi)


def _reduced(array, block: int, fill_low, fill_high):
    """Minimum and maximum of each block of `array[..., N]`."""
    extra = -array.shape[-1] % block
    pad = [(0, 0)] * (array.ndim - 1) + [(0, extra)]
    low = jnp.pad(array, pad, constant_values=fill_low).reshape(*array.shape[:-1], -1, block).min(-1)
    high = jnp.pad(array, pad, constant_values=fill_high).reshape(*array.shape[:-1], -1, block).max(-1)
    return low, high


def block_ranges(config: Config, operands: Operands, block_q: int, block_k: int) -> tuple[Ranges, Ranges]:
    """For every query block the key blocks it needs, and the other way round: int32 `[B or 1, blocks]`.

    A block outside of its range holds no visible pair; one inside may, and is computed under the mask. Segments are
    compared by the least and the greatest id of a block and by the set of ids modulo 32, so that any ids are right
    and those of packed rows, padding at the end among them, are tight.
    """
    _, length, keys, *_ = operands.dims
    if not operands.has_metadata:
        tiles = {"q": -(-length // block_q), "k": -(-keys // block_k)}

        def of(side: str) -> Ranges:
            index = jnp.arange(tiles[side], dtype=jnp.int32)[None]
            ranges = ranges_of_tile(config, index, side, (length, keys), block_q, block_k)
            return Ranges(*(jnp.broadcast_to(array, index.shape).astype(jnp.int32) for array in ranges))

        return of("q"), of("k")
    big = np.iinfo(np.int32).max
    q_positions, k_positions = positions(operands)
    q_low, q_high = _reduced(q_positions, block_q, big, -big)
    k_low, k_high = _reduced(k_positions, block_k, big, -big)
    q_low, q_high, k_low, k_high = q_low[..., :, None], q_high[..., :, None], k_low[..., None, :], k_high[..., None, :]
    active = jnp.ones((1, q_low.shape[-2], k_low.shape[-1]), bool)
    full = active
    if config.causal:
        active, full = active & (k_low <= q_high), full & (k_high <= q_low)
    if config.window is not None:
        active, full = active & (k_high > q_low - config.window), full & (k_low > q_high - config.window)
        if not config.causal:
            active, full = active & (k_low < q_high + config.window), full & (k_high < q_low + config.window)
    if operands.q_segments is not None:
        q_low, q_high = (x[..., :, None] for x in _reduced(operands.q_segments, block_q, big, -big))
        k_low, k_high = (x[..., None, :] for x in _reduced(operands.k_segments, block_k, big, -big))
        q_ids, k_ids = _id_sets(operands.q_segments, block_q)[..., :, None], _id_sets(operands.k_segments, block_k)
        active = active & (q_low <= k_high) & (k_low <= q_high) & ((q_ids & k_ids[..., None, :]) != 0)
        full = full & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if keys % block_k:
        full = full & (jnp.arange(full.shape[-1]) < keys // block_k)
    return _runs(active, full), _runs(active.swapaxes(-1, -2), full.swapaxes(-1, -2))


def _id_sets(segments, block: int):
    """The ids of each block, modulo 32, as the bits of a uint32."""
    extra = -segments.shape[-1] % block
    bits = jnp.left_shift(jnp.uint32(1), (segments % 32).astype(jnp.uint32))
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, extra)]).reshape(*bits.shape[:-1], -1, block)
    return jax.lax.reduce(bits, np.uint32(0), jax.lax.bitwise_or, (bits.ndim - 1,))


def _runs(active, full) -> Ranges:
    """The range of active blocks along the last axis, and in it the first run of full ones."""
    count = active.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    lo = jnp.where(active, index, count).min(-1)
    hi = jnp.where(active, index + 1, 0).max(-1)
    lo = jnp.minimum(lo, hi)
    full = full & active
    full_lo = jnp.minimum(jnp.where(full, index, count).min(-1), hi)
    full_hi = jnp.where(~full & (index >= full_lo[..., None]), index, count).min(-1)
    full_hi = jnp.minimum(full_hi, hi)
    return Ranges(*(array.astype(jnp.int32) for array in (lo, full_lo, full_hi, hi)))


class Kernels(NamedTuple):
    """A pair of functions: the forward pass and its derivative.

    `forward(config, operands)` gives `out [B, T, H, D]` and `lse`, float32 `[B, H, T]` (-inf where a query sees
    nothing). `backward(config, operands, lse, dout, delta)` gives the gradients of q, k, v and bias (None where it is
    absent); with P = exp(score - lse), dScore = P * (dout.v - delta), and `delta`, float32 `[B, H, T]`, is dout.out
    less the gradient of `lse`. The gradient of bias need not be summed over dimensions in which bias has the size 1.

    Kernels that read `dout` anyway may add dout.out themselves (`adds_out`): then `backward` takes `out` as well, and
    `delta` is the rest, None for 0.
    """

    forward: Callable
    backward: Callable
    adds_out: bool = False


# Letters of the operands' dimensions: key heads k, each with a group g of query heads.
LETTERS = Operands("b t k g d", "b s k d", "b s k d", None, "b t", "b s", "b t", "b s")


def _bias_letters(operands: Operands) -> list[str]:
    """Of bias' five dimensions; one of size 1 that is broadcast has a letter of its own."""
    batch, length, keys, heads, *_ = operands.dims
    sizes = zip("bkgts", (0, 1, 1, 2, 3), (batch, heads, heads, length, keys), strict=True)
    return [letter if operands.bias.shape[axis] == size else f"{letter}1" for letter, axis, size in sizes]


def per_device(kernels: Kernels) -> Kernels:
    """Kernels run by every device of a mesh on its own examples and key heads, and under `vmap`.

    They give the gradient of bias as `[B, K * g, t, s]`, where g, t and s are 1 where bias has the size 1.
    """

    def split(array, axis, kv_heads, groups):
        return array.reshape(*array.shape[:axis], kv_heads, groups, *array.shape[axis + 1 :])

    def joined(array, axis):
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    def run(function, operands: Operands, extra: list[tuple[str, Any]], outputs: list[str]):
        _, _, _, heads, kv_heads, _ = operands.dims
        groups, letters = heads // kv_heads, LETTERS
        given = operands._replace(q=split(operands.q, 2, kv_heads, groups))
        if operands.bias is not None:
            by_head = operands.bias.shape[1] == heads
            given = given._replace(bias=split(operands.bias, 1, *((kv_heads, groups) if by_head else (1, 1))))
            letters = LETTERS._replace(bias=" ".join(_bias_letters(operands)))
        present = [i for i, array in enumerate(given) if array is not None]
        arrays = [*(given[i] for i in present), *(array for _, array in extra)]
        inputs = [*(letters[i] for i in present), *(of_array for of_array, _ in extra)]

        def local(*arrays):
            fields: list[Any] = [None] * len(operands)
            for i, array in zip(present, arrays, strict=False):
                fields[i] = array
            part = Operands(*fields)
            here, groups = part.q.shape[2:4]
            part = part._replace(q=joined(part.q, 2), bias=None if part.bias is None else joined(part.bias, 1))
            return function(part, here, groups, *arrays[len(present) :])

        return sharded(local, inputs, outputs, batch=("b", "k"))(*arrays)

    def forward(config, operands):
        def local(operands, kv_heads, groups):
            out, lse = kernels.forward(config, operands)
            return split(out, 2, kv_heads, groups), split(lse, 1, kv_heads, groups)

        out, lse = run(local, operands, [], ["b t k g d", "b k g t"])
        return out.reshape(operands.q.shape), lse.reshape(lse.shape[0], -1, lse.shape[-1])

    def backward(config, operands, lse, dout, delta, out=None):
        _, _, _, heads, kv_heads, _ = operands.dims
        groups = heads // kv_heads
        of_lse, of_out = ("b k g t", 1), ("b t k g d", 2)
        given = [(lse, *of_lse), (dout, *of_out), (delta, *of_lse), (out, *of_out)]

        def local(operands, kv_heads, groups, *extra):
            parts = iter(extra)
            joint = [None if array is None else joined(next(parts), axis) for array, _, axis in given]
            dq, dk, dv, dbias = kernels.backward(config, operands, *joint[: 4 if kernels.adds_out else 3])
            last = [] if dbias is None else [split(dbias, 1, kv_heads, -1)]
            return split(dq, 2, kv_heads, groups), dk, dv, *last

        extra = [(letters, split(array, axis, kv_heads, groups)) for array, letters, axis in given if array is not None]
        outputs = ["b t k g d", "b s k d", "b s k d"]
        if operands.bias is not None:
            outputs.append(" ".join(["b", "k", *_bias_letters(operands)[2:]]))
        dq, dk, dv, *dbias = run(local, operands, extra, outputs)
        return dq.reshape(operands.q.shape), dk, dv, joined(dbias[0], 1) if dbias else None

    return Kernels(forward, backward, kernels.adds_out)


def attend(kernels: Kernels, config: Config, operands: Operands, return_lse: bool):
    """Runs a pair of kernels as one differentiable function."""
    out, lse = _attend(kernels, config, operands)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels: Kernels, config: Config, operands: Operands):
    return kernels.forward(config, operands)


def _attend_forward(kernels, config, operands):
    operands = jax.custom_derivatives.custom_vjp_primal_tree_values(operands)
    out, lse = kernels.forward(config, operands)
    return (out, lse), (operands, out, lse)


def dout_out(dout, out):
    """Of each row, `[B, H, T]`, in float32 or wider."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return jnp.einsum("bthd,bthd->bht", dout.astype(wide), out.astype(wide))


def _attend_backward(kernels, config, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros(out.shape, out.dtype)
    # sum_j P_j (dout.v_j) = dout.out; the gradient of lse adds P * dlse to that of the scores.
    delta = None if isinstance(dlse, SymbolicZero) else -jnp.where(jnp.isfinite(lse), dlse, 0)
    if kernels.adds_out:
        dq, dk, dv, dbias = kernels.backward(config, operands, lse, dout, delta, out)
    else:
        total = dout_out(dout, out)
        dq, dk, dv, dbias = kernels.backward(config, operands, lse, dout, total if delta is None else total + delta)
    if dbias is not None:
        once = [axis for axis, size in enumerate(operands.bias.shape) if size != dbias.shape[axis]]
        dbias = dbias.sum(once, keepdims=True).astype(operands.bias.dtype)
    nothing = tuple(None for _ in operands.metadata)
    return (Operands(dq, dk, dv, dbias, *nothing),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
