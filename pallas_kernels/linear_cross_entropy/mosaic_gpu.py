"""Pallas for Hopper: a chunk's logits live once, in 16 bits, and dW is added to while the next tile is multiplied.

`exponentials` multiplies a chunk by the table and leaves, in the place of logits, `e = 2^(l log2(e) - n)` rounded to
16 bits, with the integer exponent n of each row of a tile (the pairs of Dukhan and Ablavatski, 2020): every e keeps
its relative precision however large the logit is, which a logit in 16 bits would not. The sums of e, in float32, give
the log-sum-exp. XLA turns e into the gradient in one pass.

`add_product` adds `g^T x` to dW by the copy engine's own addition: a tile of dW is never read into the kernel, and the
addition of one overlaps the matmul of the next. So chunks may be small, where a plain matmul would wait for dW.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.linear_cross_entropy import chunked, xla
from crescendo.pallas_kernels.op import Unsupported, require_gpu, target_device

LOG2E = 1.4426950408889634
TILE_K = 64
# Each of the two warpgroups that multiply owns a square of the tile of a streaming multiprocessor.
SQUARE = 128
# Blocks of K that are on their way at a time, and rows of tiles that are worked on together.
STAGES = 4
TILES_TOGETHER = 4


def linear_cross_entropy(x, w, labels, weights, **options):
    """See the op."""
    require_gpu(9.0, below=10.0)
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"takes bfloat16 and float16, not {x.dtype}")
    if options["vocab_axis"] is not None:
        raise Unsupported("has no kernel for a vocabulary that is split inside shard_map")
    if options["soft_cap"] is not None:
        raise Unsupported(f"keeps no logits, which the gradient of soft_cap = {options['soft_cap']} needs")
    vocab_size, width = w.shape
    if vocab_size % SQUARE or width % (2 * SQUARE) or x.size == 0:
        raise Unsupported(f"needs V = {vocab_size} to be a multiple of {SQUARE} and D = {width} of {2 * SQUARE}")
    return chunked.chunked(x, w, labels, weights, kernels=KERNELS, **options)


def logit_pass(x, w, labels, coefficients, options: chunked.Options) -> chunked.Rows:
    """As XLA's, which also takes over where the partitioner split the vocabulary."""
    if options.vocab_axis is not None:
        return xla.logit_pass(x, w, labels, coefficients, options)
    smoothing, vocab_size = options.label_smoothing, w.shape[0]
    label_logit = jnp.einsum("cd,cd->c", x, w[labels], preferred_element_type=jnp.float32)
    target_logit = (1 - smoothing) * label_logit
    if smoothing:
        row_sum = jnp.sum(w, axis=0, dtype=jnp.float32)
        target_logit += smoothing / vocab_size * jnp.dot(x, row_sum.astype(jnp.float32), precision="highest")
    e, exponents, sums = exponentials(x, w)
    highest = jnp.max(exponents, axis=0)
    lse = (jnp.log2(jnp.sum(sums * jnp.exp2(exponents - highest), axis=0)) + highest) / LOG2E
    if coefficients is None:
        return chunked.Rows(lse, target_logit, None)
    factor = (coefficients.constant + coefficients.lse * lse) * jnp.exp2(exponents - lse * LOG2E)
    tile, column = (lax.broadcasted_iota(labels.dtype, e.shape, axis) for axis in (1, 2))
    is_label = tile * SQUARE + column == labels[:, None, None]
    target = jnp.where(is_label, 1 - smoothing + smoothing / vocab_size, smoothing / vocab_size)
    gradient = e.astype(jnp.float32) * factor.T[:, :, None] - coefficients.target[:, None, None] * target
    return chunked.Rows(lse, target_logit, gradient.astype(x.dtype).reshape(-1, vocab_size))


def exponentials(x, w):
    """`e` `[C, V / 128, 128]`, and the exponents and sums of each row in each tile, float32 `[V / 128, C]`.

    Args:
      x: `[C, D]`, C a multiple of 256.
      w: `[V, D]`, V a multiple of 128.
    """
    rows, vocab_size = x.shape[0], w.shape[0]

    def body(x_ref, w_ref, e_ref, exponents_ref, sums_ref):
        def finish(logits, row, column, warpgroup, block, statistics):
            exponents = jnp.round(jnp.max(logits, axis=1) * LOG2E)
            e = jnp.exp2(logits * LOG2E - lax.broadcast_in_dim(exponents, logits.shape, [0]))
            sums, e = jnp.sum(e, axis=1), e.astype(x.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            statistics[warpgroup, 0] = exponents
            statistics[warpgroup, 1] = sums
            _write(e, e_ref.at[:, column // SQUARE], row, 0, block.at[warpgroup])
            for i, ref in enumerate((exponents_ref, sums_ref)):
                plgpu.copy_smem_to_gmem(statistics.at[warpgroup, i], ref.at[column // SQUARE, pl.ds(row, SQUARE)])

        scratch = {"block": _block(x.dtype), "statistics": plgpu.SMEM((2, 2, SQUARE), jnp.float32)}
        _multiply(x_ref, w_ref, by_rows=True, a_transposed=False, b_transposed=True, finish=finish, **scratch)

    statistic = jax.ShapeDtypeStruct((vocab_size // SQUARE, rows), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows, vocab_size // SQUARE, SQUARE), x.dtype), statistic, statistic),
        grid=(target_device().cores,),
        **LAUNCH,
    )(x, w)


def add_product(dw, gradient, x):
    """`dw + gradient^T x`, in the memory of dw.

    Args:
      dw: float32 `[V, D]`, V a multiple of 128 and D of 256.
      gradient: `[C, V]`, C a multiple of 64.
      x: `[C, D]`.
    """

    def kernel(refs):
        dw_ref, gradient_ref, x_ref = refs

        def finish(product, row, column, warpgroup, block):
            _write(product, dw_ref, row, column, block.at[warpgroup], reduction_op="add")

        @pl.core_map(
            plgpu.Mesh(grid=(target_device().cores,), **{k: v for k, v in LAUNCH.items() if k != "compiler_params"}),
            compiler_params=LAUNCH["compiler_params"],
        )
        def _():
            by_columns = {"by_rows": False, "a_transposed": True, "b_transposed": False}
            _multiply(gradient_ref, x_ref, **by_columns, finish=finish, block=_block(jnp.float32))

    return pl.run_state(kernel)((dw, gradient, x))[0]


LAUNCH: dict[str, Any] = {
    "grid_names": ("sm",),
    "num_threads": 3,
    "thread_name": "warpgroup",
    "compiler_params": plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
}
KERNELS = chunked.Kernels(
    logit_pass, add_product, bytes_per_logit=lambda dtype: 2 * dtype.itemsize, row_multiple=2 * SQUARE
)


def _transforms(columns: int, dtype):
    """The swizzled layout of a block in shared memory that the tensor cores and the copy engine read."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def _block(dtype):
    """Two slots for each warpgroup to leave a square in, piece by piece: 64 rows of 64 bytes or 128."""
    columns = 32
    return plgpu.SMEM((2, 2, 64, columns), dtype, transforms=_transforms(columns, dtype))


def _write(square, ref, row, column, block, **how):
    """Copies a square to `ref[row:, column:]`, one piece on its way while the next one is written to shared memory."""
    _, rows, columns = block.shape
    for i in range(SQUARE // rows):
        for j in range(SQUARE // columns):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            slot = block.at[(i * (SQUARE // columns) + j) % 2]
            slot[...] = square[rows * i : rows * (i + 1), columns * j : columns * (j + 1)]
            plgpu.commit_smem()
            there = ref.at[pl.ds(row + rows * i, rows), pl.ds(column + columns * j, columns)]
            plgpu.copy_smem_to_gmem(slot, there, **how)


def _multiply(a_ref, b_ref, *, by_rows: bool, a_transposed: bool, b_transposed: bool, finish: Callable, **scratch):
    """Every tile of `a b`, spread over the device; `finish(square, row, column, warpgroup, **scratch)` takes each.

    A tile is 256 x 128 and split by rows, or 128 x 256 and split by columns. A third warpgroup copies ahead.
    """
    m, k = a_ref.shape[::-1] if a_transposed else a_ref.shape
    n = b_ref.shape[0] if b_transposed else b_ref.shape[1]
    tile_m, tile_n = (2 * SQUARE, SQUARE) if by_rows else (SQUARE, 2 * SQUARE)
    a_block = (TILE_K, tile_m) if a_transposed else (tile_m, TILE_K)
    b_block = (tile_n, TILE_K) if b_transposed else (TILE_K, tile_n)

    def spec(block, k_first: bool):
        index = (lambda step: (step, 0)) if k_first else (lambda step: (0, step))
        return plgpu.BlockSpec(block, index, transforms=_transforms(block[1], a_ref.dtype))

    def pipeline(step, context):
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // TILE_K,),
            memory_registers=40,
            in_specs=[spec(a_block, a_transposed), spec(b_block, not b_transposed)],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=STAGES,
            compute_context=context,
        )

    nothing = lambda *_, **__: None  # noqa: E731
    allocations = pipeline(nothing, nothing).get_allocations(a_ref, b_ref)

    scoped: Any = functools.partial(pl.run_scoped, allocations=allocations, collective_axes="warpgroup", **scratch)

    @scoped
    def _(allocations, **scratch):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * SQUARE, SQUARE)

        @plgpu.nd_loop(((m // tile_m) * (n // tile_n),), collective_axes="sm")
        def _(loop):
            # Neighbours in time share their rows or columns, which the cache then holds.
            i, j = plgpu.planar_snake(loop.index[0], (m // tile_m, n // tile_n), minor_dim=0, tile_width=TILES_TOGETHER)
            row, column = i * tile_m, j * tile_n

            def context(run):
                @functools.partial(pl.run_scoped, accumulator=plgpu.ACC((SQUARE, SQUARE), jnp.float32))
                def _(accumulator):
                    run(accumulator)
                    offset = warpgroup * SQUARE
                    place = (row + offset, column) if by_rows else (row, column + offset)
                    finish(accumulator[...], *place, warpgroup, **scratch)

            def step(_, a, b, accumulator):
                if by_rows:
                    a = a.at[:, mine] if a_transposed else a.at[mine]
                else:
                    b = b.at[mine] if b_transposed else b.at[:, mine]
                a = a.transpose((1, 0)) if a_transposed else a
                b = b.transpose((1, 0)) if b_transposed else b
                plgpu.wgmma(accumulator, a, b)
                plgpu.wgmma_wait(0)
                return accumulator

            rows, columns = pl.ds(row, tile_m), pl.ds(column, tile_n)
            a_part = a_ref.at[:, rows] if a_transposed else a_ref.at[rows]
            b_part = b_ref.at[columns] if b_transposed else b_ref.at[:, columns]
            pipeline(step, context)(a_part, b_part, allocations=allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
