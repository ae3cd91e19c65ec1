"""What every implementation is given: the operands, the constants, which keys a query sees, and the derivative rule."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from crescendo.pallas_kernels import op
from crescendo.pallas_kernels.sharded import laid_out_as, sharded


@dataclasses.dataclass(frozen=True)
class Config:
    """The constants of a call.

    A score is `soft_cap * tanh(scale * q.k / soft_cap) + bias`, without the cap where `soft_cap` is None. Where
    `sees_itself`, query i is sure to see key i, and no row is empty. `return_lse`: see the op.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sees_itself: bool = False
    return_lse: bool = False

    @property
    def masks(self) -> bool:
        """Whether positions matter."""
        return self.causal or self.window is not None


class Operands(NamedTuple):
    """The arrays of a call; those that are absent are None.

    `q` is `[B, T, H, D]`, `k` and `v` `[B, S, K, D]`, `bias` broadcasts to `[B, H, T, S]`; segments and positions are
    int32 `[B, T]` or `[B, S]`. `begin`, int32 `[1]`, is the position of the first query where there are no such arrays:
    the next queries follow it, and the keys are counted from 0 on (`positions`).
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    q_segments: Any = None
    k_segments: Any = None
    q_positions: Any = None
    k_positions: Any = None
    begin: Any = None

    @property
    def dims(self) -> tuple[int, int, int, int, int, int]:
        """B, T, S, H, K, D."""
        (batch, length, heads, width), (_, keys, kv_heads, _) = self.q.shape, self.k.shape
        return batch, length, keys, heads, kv_heads, width

    @property
    def metadata(self) -> tuple:
        return self[4:8]

    @property
    def has_metadata(self) -> bool:
        """Whether what a query sees depends on arrays of a number for each query or key."""
        return any(array is not None for array in self.metadata)

    def with_positions(self) -> "Operands":
        """The same with arrays in the place of `begin`."""
        if self.begin is None:
            return self
        batch, length, keys, *_ = self.dims
        of_queries, of_keys = positions(self)
        of_queries, of_keys = jnp.broadcast_to(of_queries, (batch, length)), jnp.broadcast_to(of_keys, (batch, keys))
        return self._replace(q_positions=of_queries, k_positions=of_keys, begin=None)


def positions(operands: Operands) -> tuple[Any, Any]:
    """Of queries and keys, `[B or 1, T]` and `[B or 1, S]`."""
    if operands.q_positions is not None:
        return operands.q_positions, operands.k_positions
    _, length, keys, *_ = operands.dims
    of_queries, of_keys = jnp.arange(length, dtype=jnp.int32)[None], jnp.arange(keys, dtype=jnp.int32)[None]
    return of_queries if operands.begin is None else of_queries + operands.begin, of_keys


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


def ranges_of_tile(
    config: Config, tile, side: str, lengths: tuple[int, int], block_q: int, block_k: int, begin=None
) -> Ranges:
    """The blocks that a tile of queries (`side` "q") or of keys ("k") needs, where index is position.

    Args:
      tile: its number, or several numbers: int32, also in a kernel.
      side: whose tile it is; the blocks are of the other side.
      lengths: T and S; a tile past its side's end needs nothing.
      begin: the position of the first query, of a tile of queries; None for 0.
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
    if begin is not None:
        first, last = first + begin, last + begin
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
    if not operands.has_metadata and operands.begin is None:
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


@dataclasses.dataclass(frozen=True)
class Kernels(op.Kernels):
    """A pair of functions over plain arrays: the forward pass and its derivative.

    `forward(config, operands)` gives `out [B, T, H, D]` and `lse`, float32 `[B, H, T]` (-inf where a query sees
    nothing). `backward(config, operands, lse, dout, delta, out)` gives the gradients of q, k, v and bias (None where it
    is absent); with P = exp(score - lse), dScore = P * (dout.v - delta), and `delta`, float32 `[B, H, T]`, is dout.out
    less the gradient of `lse`. The gradient of bias need not be summed over dimensions in which bias has the size 1.

    Attributes:
      adds_out: whether `backward` adds dout.out itself, as kernels may that read `dout` anyway: then it takes `out`,
        and `delta` is the rest, None for 0. Otherwise `out` is None.
      takes_begin: whether `forward` reads `Operands.begin`; others, and every `backward`, find positions in its place.
      split_by_xla: whether XLA knows how to split the functions over devices, and `vmap` how to map them. Others give
        the gradient of bias as `[B, H or K, t, s]`: K where bias has one head; t and s are 1 where it has the size 1.
    """

    forward: Callable
    backward: Callable
    adds_out: bool = False
    takes_begin: bool = False
    split_by_xla: bool = False

    def forward_on_parts(self, config: Config, operands: Operands) -> Callable:
        """`operands -> out, lse`, of each device of a mesh its own examples and key heads, and under `vmap`."""
        function, heads = functools.partial(self.forward, config), _heads(operands)
        return self._on_parts(function, operands, (), (f"b t {heads} d", f"b {heads} t"))

    def backward_on_parts(self, config: Config, operands: Operands, *others) -> Callable:
        """`operands, *others -> dq, dk, dv, dbias` likewise; `others` as `backward` takes them."""
        function, heads = functools.partial(self.backward, config), _heads(operands)
        like_q, rows = f"b t {heads} d", f"b {heads} t"
        letters = tuple(None if a is None else of for a, of in zip(others, (rows, like_q, rows, like_q), strict=True))
        of_bias = None
        if operands.bias is not None:
            _, of_heads, *rest = _bias_letters(operands)
            of_bias = " ".join(["b", "k" if operands.bias.shape[1] == 1 else of_heads, *rest])
        return self._on_parts(function, operands, letters, (like_q, "b s k d", "b s k d", of_bias))

    def _on_parts(self, function: Callable, operands: Operands, others: tuple, outputs: tuple) -> Callable:
        # Under an explicit mesh XLA takes arrays only as they lie, and they may not lie alike.
        if self.split_by_xla and AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return function
        heads = _heads(operands)
        letters = Operands(f"b t {heads} d", "b s k d", "b s k d", None, "b t", "b s", "b t", "b s", "one")
        letters = Operands(*(None if a is None else name for a, name in zip(operands, letters, strict=True)))
        if operands.bias is not None:
            letters = letters._replace(bias=" ".join(_bias_letters(operands)))
        sizes = {"g": operands.dims[3] // operands.dims[4]} if heads == "k*g" else {}
        return sharded(function, (letters, *others), outputs, batch=("b", "k"), sizes=sizes)


def _heads(operands: Operands) -> str:
    """The letters of query heads: key heads k, each with a group g, which stays together; no factor may be 1."""
    *_, heads, kv_heads, _ = operands.dims
    return "k" if heads == kv_heads else "g" if kv_heads == 1 else "k*g"


def _bias_letters(operands: Operands) -> list[str]:
    """Of bias' dimensions; one of size 1 that is broadcast has a letter of its own."""
    batch, length, keys, heads, *_ = operands.dims
    full = zip(
        ("b", _heads(operands), "t", "s"), "bhts", (batch, heads, length, keys), operands.bias.shape, strict=True
    )
    return [letter if size == whole else f"{alone}1" for letter, alone, whole, size in full]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernels: Kernels, config: Config, operands: Operands):
    """Runs a pair of kernels as one differentiable function."""
    operands = operands if kernels.takes_begin else operands.with_positions()
    return _results(config, *kernels.forward_on_parts(config, operands)(operands))


def _results(config: Config, out, lse):
    return (out, lse.swapaxes(1, 2)) if config.return_lse else out


def _attend_forward(kernels, config, operands):
    operands = jax.custom_derivatives.custom_vjp_primal_tree_values(operands)
    spelled_out = operands.with_positions()
    operands = operands if kernels.takes_begin else spelled_out
    out, lse = kernels.forward_on_parts(config, operands)(operands)
    return _results(config, out, lse), (spelled_out, out, lse)


def dout_out(dout, out):
    """Of each row, `[B, H, T]`, in float32 or wider."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return jnp.einsum("bthd,bthd->bht", dout.astype(wide), out.astype(wide))


def _attend_backward(kernels, config, residuals, cotangents):
    operands, out, lse = residuals
    dout, dlse = cotangents if config.return_lse else (cotangents, None)
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros(out.shape, out.dtype)
    # sum_j P_j (dout.v_j) = dout.out; the gradient of lse adds P * dlse to that of the scores.
    delta = None
    if dlse is not None and not isinstance(dlse, SymbolicZero):
        delta = -jnp.where(jnp.isfinite(lse), dlse.swapaxes(1, 2), 0)
    others = (lse, dout, delta, out)
    if not kernels.adds_out:
        total = dout_out(dout, out)
        others = (lse, dout, total if delta is None else total + delta, None)
    dq, dk, dv, dbias = kernels.backward_on_parts(config, operands, *others)(operands, *others)
    if dbias is not None:
        once = [axis for axis, size in enumerate(operands.bias.shape) if size != dbias.shape[axis]]
        dbias = dbias.sum(once, keepdims=True).astype(operands.bias.dtype)
    nothing = tuple(None for _ in operands.metadata)
    return (laid_out_as(operands, Operands(dq, dk, dv, dbias, *nothing)),)


attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
