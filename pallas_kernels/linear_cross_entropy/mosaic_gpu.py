"""Pallas for Hopper: a chunk's logits exist once, in 16 bits, and no pass goes over them.

The gradient of a logit is `e^(l - lse)` times a number of its row, minus one at the label. So if e^(l - r) is stored,
with any reference r of the row, everything else that the softmax's gradient needs may be done to the small operands of
the matmuls: `dX = diag(s) E W` and `dW = E^T diag(s) X`, with `s = e^(r - lse)` times the row's coefficient. What the
labels add is a row of W and of X for each, in float32, and 0 in E. `exponentials` multiplies a chunk by the table and
leaves E, rounded to bfloat16, and its row sums in float32.

The logit of the label serves as r: no row of E can underflow to 0, and one overflows only where its loss is above
`MAX_LOSS`. If there is one, everything is done again with the rows' maxima, which need another matmul.
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
from crescendo.pallas_kernels.rows import check
from crescendo.pallas_kernels.sharded import results_of

LOG2E = 1.4426950408889634
# Of a row whose exponentials relative to its label are certain to fit in bfloat16 and float32, with room for sums and
# for weights down to 1e-12.
MAX_LOSS = 60.0
TILE_K = 64
# Each of the two warpgroups that multiply owns a square of the tile of a streaming multiprocessor.
SQUARE = 128
# Blocks of K that are on their way at a time, and rows of tiles that are worked on together.
STAGES = 3
TILES_TOGETHER = 4
# Of a square, on its way to device memory: a warpgroup has two in shared memory.
PIECE = (128, 64)


def linear_cross_entropy(x, w, options: chunked.Options, **_):
    """See the op."""
    require_gpu(9.0, below=10.0)
    check(x, dtypes=(jnp.bfloat16,))
    if options.vocab_axis is not None:
        raise Unsupported("has no kernel for a vocabulary that is split inside shard_map")
    if options.soft_cap is not None:
        raise Unsupported(f"keeps no logits, which the gradient of soft_cap = {options.soft_cap} needs")
    vocab_size, width = w.shape
    if vocab_size % SQUARE or width % TILE_K or width < STAGES * TILE_K:
        raise Unsupported(
            f"needs V = {vocab_size} to be a multiple of {SQUARE}, and D = {width} one of {TILE_K} from "
            f"{STAGES * TILE_K} on"
        )
    return KERNELS


def _of_label(x, w, label_logit):
    """The reference of usual rows."""
    del x, w
    return label_logit


def _highest(x, w, label_logit):
    """The rows' maxima: a reference for any logits."""
    groups = w.shape[0] // SQUARE
    together = max(n for n in range(1, 65) if groups % n == 0)
    parts = w.reshape(groups // together, together * SQUARE, w.shape[1])
    highest = lambda part: jnp.max(jnp.dot(x, part.T, preferred_element_type=jnp.float32), axis=1)  # noqa: E731
    return jax.lax.scan(lambda top, part: (jnp.maximum(top, highest(part)), None), label_logit, parts)[0]


def _pass(find_reference: Callable, x, w, labels, coefficients, options: chunked.Options) -> chunked.Rows:
    """A pass relative to `find_reference(x, w, label_logit)`; XLA's where the partitioner split the vocabulary."""
    if options.vocab_axis is not None:
        return xla.logit_pass(x, w, labels, coefficients, options)
    label_logit = jnp.einsum("cd,cd->c", x, w[labels], preferred_element_type=jnp.float32)
    reference = find_reference(x, w, label_logit)
    smoothing, vocab_size = options.label_smoothing, w.shape[0]
    target_logit = (1 - smoothing) * label_logit
    if smoothing:
        row_sum = jnp.sum(w, axis=0, dtype=jnp.float32)
        target_logit += smoothing / vocab_size * jnp.dot(x, row_sum.astype(jnp.float32), precision="highest")
    # Not beyond what float32 holds, whatever the logits are: a row that is not finite is done again, and stays so.
    reference = jnp.nan_to_num(reference)
    e, sums = exponentials(x, w, reference)
    total = jnp.sum(sums, axis=0)
    loss = jnp.log(total)
    lse = jnp.where(loss > MAX_LOSS, jnp.inf, loss + reference)
    if coefficients is None:
        return chunked.Rows(lse, target_logit, None)
    factor = coefficients.constant + coefficients.lse * lse
    scale = factor / total
    if smoothing:
        # In units of the scale, which is 0 where nothing counts.
        unit = jnp.where(scale == 0, 0, coefficients.target / jnp.where(scale == 0, 1, scale))
        e = (e - (smoothing / vocab_size) * unit[:, None]).astype(x.dtype)
    row = lax.iota(labels.dtype, len(labels))
    e = e.at[row, labels].set(0, unique_indices=True, indices_are_sorted=True)
    of_label = factor * jnp.exp(label_logit - lse) - coefficients.target * (1 - smoothing + smoothing / vocab_size)
    return chunked.Rows(lse, target_logit, e, scale, of_label)


def exponentials(x, w, reference):
    """`e^(x w^T - reference)`, `[C, V]`, and the sums of each row in each tile, float32 `[V / 128, C]`.

    Args:
      x: `[C, D]`, C a multiple of 256 and D of 64.
      w: `[V, D]`, V a multiple of 128.
      reference: float32 `[C]`.
    """
    rows, vocab_size = x.shape[0], w.shape[0]

    def body(x_ref, w_ref, reference_ref, e_ref, sums_ref):
        def finish(logits, row, column, warpgroup, block, sums):
            reference = plgpu.load(reference_ref.at[pl.ds(row, SQUARE)], layout=ROW, optimized=False)
            e = jnp.exp2(logits * LOG2E - lax.broadcast_in_dim(reference * LOG2E, logits.shape, [0]))
            total = jnp.sum(e, axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sums[warpgroup] = total
            _write(e.astype(x.dtype), e_ref, row, column, block.at[warpgroup])
            plgpu.copy_smem_to_gmem(sums.at[warpgroup], sums_ref.at[column // SQUARE, pl.ds(row, SQUARE)])

        scratch = {"block": _block(x.dtype), "sums": plgpu.SMEM((2, SQUARE), jnp.float32)}
        _multiply(x_ref, w_ref, finish=finish, **scratch)

    results = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, vocab_size), x.dtype),
            jax.ShapeDtypeStruct((vocab_size // SQUARE, rows), jnp.float32),
        ),
        grid=(target_device().cores,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, w, reference)
    return results_of((x, w), results)


ROW = plgpu.Layout.WGMMA.reduce(1)
KERNELS = chunked.Kernels(
    functools.partial(_pass, _highest),
    functools.partial(_pass, _of_label),
    bytes_per_logit=lambda dtype: dtype.itemsize,
    row_multiple=2 * SQUARE,
)


def _transforms(columns: int, dtype):
    """The swizzled layout of a block in shared memory that the tensor cores and the copy engine read."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def _block(dtype):
    """Two slots for each warpgroup to leave a square in, piece by piece."""
    return plgpu.SMEM((2, 2, *PIECE), dtype, transforms=_transforms(PIECE[1], dtype))


def _write(square, ref, row, column, block):
    """Copies a square to `ref[row:, column:]`, one piece on its way while the next one is written to shared memory."""
    _, rows, columns = block.shape
    for i in range(SQUARE // rows):
        for j in range(SQUARE // columns):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            slot = block.at[(i * (SQUARE // columns) + j) % 2]
            slot[...] = square[rows * i : rows * (i + 1), columns * j : columns * (j + 1)]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, ref.at[pl.ds(row + rows * i, rows), pl.ds(column + columns * j, columns)])


def _multiply(a_ref, b_ref, *, finish: Callable, **scratch):
    """Every tile of `a b^T`, spread over the device; `finish(square, row, column, warpgroup, **scratch)` takes each.

    A tile is 256 x 128, half its rows to each of two warpgroups. A third one copies ahead.
    """
    (m, k), n = a_ref.shape, b_ref.shape[0]
    tile_m, tile_n = 2 * SQUARE, SQUARE

    def spec(rows):
        return plgpu.BlockSpec((rows, TILE_K), lambda step: (0, step), transforms=_transforms(TILE_K, a_ref.dtype))

    def pipeline(step, context):
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // TILE_K,),
            memory_registers=40,
            in_specs=[spec(tile_m), spec(tile_n)],
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
                    finish(accumulator[...], row + warpgroup * SQUARE, column, warpgroup, **scratch)

            def step(_, a, b, accumulator):
                plgpu.wgmma(accumulator, a.at[mine], b.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return accumulator

            a_part, b_part = a_ref.at[pl.ds(row, tile_m)], b_ref.at[pl.ds(column, tile_n)]
            pipeline(step, context)(a_part, b_part, allocations=allocations)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
