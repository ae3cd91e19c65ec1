"""Pallas for TPU: forward and backward, after FlashAttention-2, deterministic.

Everything is transposed, tokens along the lanes: q, k and v are `[D, tokens]`, which no head width pads, and scores are
`[keys, queries]`, so that the statistics of a query are entries of a row vector, and its maximum and its sum run down
the sublanes.

A step of the grid holds a block of queries and a long chunk of keys, all of them where they fit, in vector memory, and
walks over the blocks of that chunk in a loop of its own. Blocks that causality, window or segments hide are never
computed, chunks of them never loaded (`contract.block_ranges`), and only blocks on an edge pay for a mask. The queries
of a group walk over one copy of their keys. The gradients of k and v are computed the other way round.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from crescendo.pallas_kernels.attention.contract import Config, Kernels, Operands, Ranges, block_ranges
from crescendo.pallas_kernels.attention.tiles import tuned
from crescendo.pallas_kernels.op import Unsupported
from crescendo.pallas_kernels.sharded import result_like
from crescendo.pallas_kernels.tpu_rows import VMEM_BYTES, padded, product, require_tpu

LANES = 128
FLOOR = -1e30  # the least maximum: finite, so that a row which has seen nothing makes no NaN
# What a product sums over: the rows of both operands, the columns of both, or columns and rows.
DOWN, ALONG, ACROSS = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a call is cut up.

    Attributes:
      block: queries, and keys, of a block at most.
      chunk_bytes: of vector memory, for the two arrays that are walked over, twice.
      bias_bytes: of vector memory, for the bias of a block and a chunk.
    """

    block: int = 512
    chunk_bytes: int = 2**24
    bias_bytes: int = 2**23


def attention(config: Config, operands: Operands) -> Kernels:
    del config  # any will do
    require_tpu()
    if operands.q.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"takes float32 and bfloat16, not {operands.q.dtype}")
    if operands.dims[-1] > 512:
        raise Unsupported(f"needs a head width of at most 512, not {operands.dims[-1]}")
    return Kernels(forward, backward)


class Call:
    """The blocks of a call, and its arrays as the kernels read them."""

    def __init__(self, config: Config, operands: Operands):
        self.config, self.tile = config, tuned("on TPU", config, operands, Tile())
        self.batch, self.length, self.keys, heads, self.kv_heads, self.width = operands.dims
        self.groups = heads // self.kv_heads
        self.block_q, self.block_k = (min(self.tile.block, -(-n // LANES) * LANES) for n in (self.length, self.keys))
        self.count_q, self.count_k = pl.cdiv(self.length, self.block_q), pl.cdiv(self.keys, self.block_k)
        self.segmented = operands.q_segments is not None
        self.positioned = operands.q_positions is not None
        self.like = operands.q
        self.masked = self.segmented or config.masks or self.keys % self.block_k != 0
        self.dtype = operands.q.dtype
        self.by_query, self.by_key = block_ranges(config, operands, self.block_q, self.block_k)
        self.arrays = {"q": self.tokens_last(operands.q, self.block_q)}
        self.arrays |= {name: self.tokens_last(getattr(operands, name), self.block_k) for name in ("k", "v")}
        self.bias_shape: tuple[int, ...] = ()  # or four sizes
        if operands.bias is not None:
            self.bias_shape = operands.bias.shape
            self.arrays["bias"] = self._blocked_bias(operands.bias)
        for name in ("q_segments", "k_segments", "q_positions", "k_positions"):
            array = getattr(operands, name)
            if array is not None:
                self.arrays[name] = self.rows(array.astype(jnp.int32), name[0])

    def tokens_last(self, array, block: int):
        """`[B, N, H, D]` as `[B, H, D, blocks * block]`."""
        return padded(array.transpose(0, 2, 3, 1), 3, block)

    def tokens_first(self, array, count: int):
        """And back, without the padding."""
        return array[..., :count].transpose(0, 3, 1, 2)

    def rows(self, array, side: str, fill=0):
        """`[..., T]` or `[..., S]` as `[..., blocks, 1, block]`."""
        block = self.block_q if side == "q" else self.block_k
        return padded(array, array.ndim - 1, block, fill).reshape(*array.shape[:-1], -1, 1, block)

    def _blocked_bias(self, bias):
        """`[B, H, T, S]` as `[B, H, query blocks, keys, block_q]`; sizes of 1 stay so."""
        bias = bias.swapaxes(2, 3)
        if self.bias_shape[3] > 1:
            bias = padded(bias, 2, self.block_k)
        if self.bias_shape[2] > 1:
            bias = padded(bias, 3, self.block_q)
        block = min(bias.shape[3], self.block_q)
        return bias.reshape(*bias.shape[:3], -1, block).transpose(0, 1, 3, 2, 4)

    def chunk(self, side: str) -> int:
        """How many blocks of a side are walked over in one step of the grid."""
        block, count = (self.block_q, self.count_q) if side == "q" else (self.block_k, self.count_k)
        most = self.tile.chunk_bytes // (4 * self.width * self.dtype.itemsize * block)
        if self.bias_shape:
            other = self.block_k if side == "q" else self.block_q
            most = min(most, self.tile.bias_bytes // (2 * 4 * block * other))
        return max(1, min(most, count))

    def ranges(self, ranges: Ranges):
        """The ranges in scalar memory: `[B or 1, blocks, 4]` in one dimension."""
        return jnp.stack(ranges, -1).reshape(-1)

    def spec(self, name: str, place: Callable, q_blocks: int, k_blocks: int) -> pl.BlockSpec:
        """Of an array, in steps of so many blocks; `place(*indices, ranges)` gives (b, kv, g, query, key) steps."""
        block_q, block_k, groups, bias = self.block_q, self.block_k, self.groups, self.bias_shape

        shape: tuple[int | None, ...]
        at: Callable[..., tuple]

        def head(kv, g):
            return kv * groups + g

        if name in ("q", "dout", "out"):
            shape, at = (None, None, self.width, q_blocks * block_q), lambda b, kv, g, i, j: (b, head(kv, g), 0, i)
        elif name in ("k", "v"):
            shape, at = (None, None, self.width, k_blocks * block_k), lambda b, kv, g, i, j: (b, kv, 0, j)
        elif name in ("lse", "delta"):
            shape, at = (None, None, q_blocks, 1, block_q), lambda b, kv, g, i, j: (b, head(kv, g), i, 0, 0)
        elif name.startswith("q_"):
            shape, at = (None, q_blocks, 1, block_q), lambda b, kv, g, i, j: (b, i, 0, 0)
        elif name.startswith("k_"):
            shape, at = (None, k_blocks, 1, block_k), lambda b, kv, g, i, j: (b, j, 0, 0)
        else:
            whole_b, whole_h, whole_q, whole_k = (size > 1 for size in bias)
            rows, columns = k_blocks * block_k if whole_k else 1, block_q if whole_q else 1
            shape = (None, None, q_blocks if whole_q else 1, rows, columns)
            at = lambda b, kv, g, i, j: (b * whole_b, head(kv, g) * whole_h, i * whole_q, j * whole_k, 0)  # noqa: E731
        return pl.BlockSpec(shape, lambda *indices: at(*place(*indices)))

    def run(self, kernel, arrays: dict, ranges: Ranges, grid, place, blocks, outputs, *, scratch=(), sequential=1):
        """Runs `kernel(ranges, references by name, outputs, scratch)` on a grid.

        `outputs` are pairs of a spec and a shape; the last `sequential` axes of the grid add to one block of results.
        """
        names = list(arrays)
        specs = [self.spec(name, place, *blocks) for name in names]

        def body(ranges_ref, *refs):
            given, rest = dict(zip(names, refs, strict=False)), refs[len(names) :]
            kernel(ranges_ref, given, rest[: len(outputs)], rest[len(outputs) :])

        order = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=tuple(grid),
                in_specs=specs,
                out_specs=[spec for spec, _ in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[result_like(self.like, shape.shape, shape.dtype) for _, shape in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
        )(self.ranges(ranges), *(arrays[name] for name in names))


def _range(ranges_ref, per_row: bool, row, block, count: int):
    """The range of a block, from scalar memory."""
    start = 4 * ((row * count if per_row else 0) + block)
    return Ranges(*(ranges_ref[start + i] for i in range(4)))


def _walk(call: Call, reach: Ranges, first, count: int, step: Callable):
    """`step(block, masked)` for the blocks of a range among the `count` blocks from `first` on."""
    begin, end = jnp.maximum(reach.lo, first), jnp.minimum(reach.hi, first + count)
    if not call.masked:
        lax.fori_loop(begin, end, lambda block, _: step(block, False), None)
        return
    full = jnp.clip(reach.full_lo, begin, jnp.maximum(begin, end))
    rest = jnp.clip(reach.full_hi, full, jnp.maximum(full, end))
    for start, stop, masked in ((begin, full, True), (full, rest, False), (rest, end, True)):
        lax.fori_loop(start, stop, lambda block, _, masked=masked: step(block, masked), None)


def _nearest(reach: Ranges, step, blocks: int):
    """The chunk to hold at a step: one that the range has no part in is not loaded, but the nearest that it has."""
    first, last = reach.lo // blocks, jnp.maximum(reach.hi - 1, reach.lo) // blocks
    return jnp.clip(step, first, last)


def _tokens(ref, block: int, at):
    """Block `at` of `[D, blocks * block]`."""
    return ref[:, pl.ds(pl.multiple_of(at * block, block), block)]


def _scores(call: Call, refs, q, k, i, j, here, there, masked: bool):
    """Scores of query block i and key block j, `[keys, queries]`, -inf where unseen, and the cap's derivative or None.

    `here` and `there` are the blocks' places in what the step holds.
    """
    config, shape = call.config, (call.block_k, call.block_q)
    scores, slope = config.scale * product(k, q, DOWN), None
    if config.soft_cap is not None:
        capped = jnp.tanh(scores / config.soft_cap)
        scores, slope = config.soft_cap * capped, 1 - capped * capped
    if "bias" in refs:
        of_queries = refs["bias"].at[here if call.bias_shape[2] > 1 else 0]
        keys = pl.ds(pl.multiple_of(there * call.block_k, call.block_k), call.block_k)
        bias = of_queries[keys, :] if call.bias_shape[3] > 1 else of_queries[...]
        scores += bias.astype(jnp.float32)
    if not masked:
        return scores, slope
    k_index = lax.broadcasted_iota(jnp.int32, shape, 0) + j * call.block_k
    seen = []
    if call.keys % call.block_k:
        seen.append(k_index < call.keys)
    if call.segmented:
        seen.append(refs["q_segments"][here] == _down(refs["k_segments"][there], call.block_q))
    if config.masks:
        if call.positioned:
            ahead = refs["q_positions"][here] - _down(refs["k_positions"][there], call.block_q)
        else:
            ahead = lax.broadcasted_iota(jnp.int32, shape, 1) + i * call.block_q - k_index
        if config.causal:
            seen.append(ahead >= 0)
        else:
            seen.append(ahead > -(config.window or 0))
        if config.window is not None:
            seen.append(ahead < config.window)
    return jnp.where(functools.reduce(jnp.logical_and, seen), scores, -jnp.inf), slope


def _down(row, columns: int):
    """A row vector down the sublanes, `[N, columns]`."""
    return jnp.broadcast_to(row, (columns, row.shape[1])).T


def _by_query(call: Call):
    """Grid and places of a kernel that walks over the keys."""
    chunk = call.chunk("k")
    per_row = call.by_query.lo.shape[0] > 1

    def reach(ranges_ref, b, i):
        return _range(ranges_ref, per_row, b, i, call.count_q)

    def place(b, kv, g, i, c, ranges_ref):
        return b, kv, g, i, _nearest(reach(ranges_ref, b, i), c, chunk)

    return (call.batch, call.kv_heads, call.groups, call.count_q, pl.cdiv(call.count_k, chunk)), place, reach, chunk


def forward(config: Config, operands: Operands):
    call = Call(config, operands)
    grid, place, reach, chunk = _by_query(call)
    q = call.arrays["q"]
    lse_shape = (*q.shape[:2], call.count_q, 1, call.block_q)
    outputs = [
        (call.spec("out", place, 1, chunk), jax.ShapeDtypeStruct(q.shape, q.dtype)),
        (call.spec("lse", place, 1, chunk), jax.ShapeDtypeStruct(lse_shape, jnp.float32)),
    ]

    def kernel(ranges_ref, refs, outputs, scratch):
        b, i, c = pl.program_id(0), pl.program_id(3), pl.program_id(4)
        out_ref, lse_ref = outputs
        maximum_ref, total_ref, mixed_ref = scratch

        @pl.when(c == 0)
        def start():
            maximum_ref[...] = jnp.full_like(maximum_ref, FLOOR)
            total_ref[...] = jnp.zeros_like(total_ref)
            mixed_ref[...] = jnp.zeros_like(mixed_ref)

        q = refs["q"][...]

        def step(j, masked):
            there = j - c * chunk
            k, v = (_tokens(refs[name], call.block_k, there) for name in ("k", "v"))
            scores, _ = _scores(call, refs, q, k, i, j, 0, there, masked)
            maximum = jnp.maximum(maximum_ref[...], jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp(scores - maximum), jnp.exp(maximum_ref[...] - maximum)
            total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            mixed_ref[...] = mixed_ref[...] * shrink + product(v, weights.astype(v.dtype), ACROSS)
            maximum_ref[...] = maximum

        _walk(call, reach(ranges_ref, b, i), c * chunk, chunk, step)

        @pl.when(c == pl.num_programs(4) - 1)
        def finish():
            seen = total_ref[...] > 0
            total = jnp.where(seen, total_ref[...], 1)
            out_ref[...] = (mixed_ref[...] / total).astype(out_ref.dtype)
            lse_ref[0] = jnp.where(seen, maximum_ref[...] + jnp.log(total), -jnp.inf)

    scratch = [(1, call.block_q), (1, call.block_q), (call.width, call.block_q)]
    out, lse = call.run(kernel, call.arrays, call.by_query, grid, place, (1, chunk), outputs, scratch=scratch)
    lse = lse.reshape(*lse.shape[:2], -1)[..., : call.length]
    return call.tokens_first(out, call.length), lse


def backward(config: Config, operands: Operands, lse, dout, delta, _out=None):
    call = Call(config, operands)
    # exp(score - inf) = 0: queries that see nothing, and those that are padding, take no part.
    arrays = call.arrays | {
        "lse": call.rows(jnp.where(jnp.isfinite(lse), lse, jnp.inf), "q", jnp.inf),
        "delta": call.rows(delta.astype(jnp.float32), "q"),
        "dout": call.tokens_last(dout.astype(call.dtype), call.block_q),
    }
    dq = _gradient_of_q(call, arrays)
    dk, dv = _gradients_of_k_and_v(call, arrays)
    dbias = None if operands.bias is None else _gradient_of_bias(call, arrays)
    return dq, dk, dv, dbias


def _weights_and_gradient(call: Call, refs, q, k, v, dout, i, j, here, there, masked: bool):
    """P of two blocks, and the gradients of their capped scores and of their products q.k, all `[keys, queries]`."""
    scores, slope = _scores(call, refs, q, k, i, j, here, there, masked)
    weights = jnp.exp(scores - refs["lse"][here])
    dscores = weights * (product(v, dout, DOWN) - refs["delta"][here])
    dproducts = call.config.scale * (dscores if slope is None else dscores * slope)
    return weights, dscores, dproducts


def _gradient_of_q(call: Call, arrays):
    grid, place, reach, chunk = _by_query(call)
    q = arrays["q"]

    def kernel(ranges_ref, refs, outputs, scratch):
        b, i, c = pl.program_id(0), pl.program_id(3), pl.program_id(4)
        (dq_ref,), (sum_ref,) = outputs, scratch

        @pl.when(c == 0)
        def start():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        q, dout = refs["q"][...], refs["dout"][...]

        def step(j, masked):
            there = j - c * chunk
            k, v = (_tokens(refs[name], call.block_k, there) for name in ("k", "v"))
            *_, dproducts = _weights_and_gradient(call, refs, q, k, v, dout, i, j, 0, there, masked)
            sum_ref[...] += product(k, dproducts.astype(k.dtype), ACROSS)

        _walk(call, reach(ranges_ref, b, i), c * chunk, chunk, step)

        @pl.when(c == pl.num_programs(4) - 1)
        def finish():
            dq_ref[...] = sum_ref[...].astype(dq_ref.dtype)

    outputs = [(call.spec("out", place, 1, chunk), jax.ShapeDtypeStruct(q.shape, q.dtype))]
    scratch = [(call.width, call.block_q)]
    (dq,) = call.run(kernel, arrays, call.by_query, grid, place, (1, chunk), outputs, scratch=scratch)
    return call.tokens_first(dq, call.length)


def _gradients_of_k_and_v(call: Call, arrays):
    chunk, k = call.chunk("q"), arrays["k"]
    per_row = call.by_key.lo.shape[0] > 1

    def reach(ranges_ref, b, j):
        return _range(ranges_ref, per_row, b, j, call.count_k)

    def place(b, kv, j, g, c, ranges_ref):
        return b, kv, g, _nearest(reach(ranges_ref, b, j), c, chunk), j

    def kernel(ranges_ref, refs, outputs, scratch):
        b, j, g, c = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

        @pl.when((g == 0) & (c == 0))
        def start():
            for sum_ref in scratch:
                sum_ref[...] = jnp.zeros_like(sum_ref)

        dk_sum, dv_sum = scratch
        k, v = refs["k"][...], refs["v"][...]

        def step(i, masked):
            here = i - c * chunk
            q, dout = (_tokens(refs[name], call.block_q, here) for name in ("q", "dout"))
            weights, _, dproducts = _weights_and_gradient(call, refs, q, k, v, dout, i, j, here, 0, masked)
            dv_sum[...] += product(dout, weights.astype(dout.dtype), ALONG)
            dk_sum[...] += product(q, dproducts.astype(q.dtype), ALONG)

        _walk(call, reach(ranges_ref, b, j), c * chunk, chunk, step)

        @pl.when((g == pl.num_programs(3) - 1) & (c == pl.num_programs(4) - 1))
        def finish():
            for ref, sum_ref in zip(outputs, scratch, strict=True):
                ref[...] = sum_ref[...].astype(ref.dtype)

    grid = (call.batch, call.kv_heads, call.count_k, call.groups, pl.cdiv(call.count_q, chunk))
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)
    outputs = [(call.spec("k", place, chunk, 1), like)] * 2
    scratch = [(call.width, call.block_k)] * 2
    results = call.run(kernel, arrays, call.by_key, grid, place, (chunk, 1), outputs, scratch=scratch, sequential=2)
    return tuple(call.tokens_first(array, call.keys) for array in results)


def _gradient_of_bias(call: Call, arrays):
    """`[B, K * g, t, s]`, where g, t and s are 1 where bias has the size 1.

    A kernel of its own, computed only where somebody asks for it: every block once, those that add to one block of
    the result one after the other.
    """
    _, whole_h, whole_q, whole_k = (size > 1 for size in call.bias_shape)
    names = {"b": call.batch, "kv": call.kv_heads, "g": call.groups, "i": call.count_q, "j": call.count_k}
    summed = {"g": not whole_h, "i": not whole_q, "j": not whole_k}
    order = sorted(names, key=lambda name: summed.get(name, False))
    per_row = call.by_query.lo.shape[0] > 1

    def place(*indices):
        at = dict(zip(order, indices, strict=False))
        return tuple(at[name] for name in names)

    def kernel(ranges_ref, refs, outputs, _):
        at = {name: pl.program_id(axis) for axis, name in enumerate(order)}
        (dbias_ref,) = outputs

        @pl.when(sum(at[name] for name in summed if summed[name]) == 0)
        def start():
            dbias_ref[...] = jnp.zeros_like(dbias_ref)

        reach = _range(ranges_ref, per_row, at["b"], at["i"], call.count_q)

        @pl.when((reach.lo <= at["j"]) & (at["j"] < reach.hi))
        def add():
            q, k, v, dout = (refs[name][...] for name in ("q", "k", "v", "dout"))
            _, dscores, _ = _weights_and_gradient(call, refs, q, k, v, dout, at["i"], at["j"], 0, 0, call.masked)
            if not whole_k:
                dscores = jnp.sum(dscores, axis=0, keepdims=True)
            if not whole_q:
                dscores = jnp.sum(dscores, axis=1, keepdims=True)
            dbias_ref[0] += dscores

    heads = call.kv_heads * (call.groups if whole_h else 1)
    _, _, query_blocks, keys, block_q = arrays["bias"].shape
    shape = (call.batch, heads, query_blocks, keys, block_q)

    def at_output(*indices):
        b, kv, g, i, j = place(*indices)
        return b, (kv * call.groups + g if whole_h else kv), i * whole_q, j * whole_k, 0

    spec = pl.BlockSpec((None, None, 1, call.block_k if whole_k else 1, block_q), at_output)
    outputs = [(spec, jax.ShapeDtypeStruct(shape, jnp.float32))]
    grid = [names[name] for name in order]
    sequential = sum(summed.values())
    (dbias,) = call.run(kernel, arrays, call.by_query, grid, place, (1, 1), outputs, sequential=sequential)
    dbias = dbias.transpose(0, 1, 3, 2, 4).reshape(call.batch, heads, keys, -1).swapaxes(2, 3)
    return dbias[:, :, : call.length, : call.keys]
