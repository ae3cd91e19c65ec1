"""jax-triton, on GPUs that have 8-bit floating numbers: x is read once, and both orders are written."""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.custom_batching import custom_vmap

from crescendo.pallas_kernels.op import require_gpu
from crescendo.pallas_kernels.rows import check
from crescendo.pallas_kernels.triton_call import triton_call

# A tile: 128 rows make a whole line of memory in a column's 8 bits, 64 columns one in a row's 16.
ROWS, COLUMNS = 128, 64
WARPS = 4


def quantize(x, scale, *, dtype, inner: int):
    """See the op."""
    check(x, dtypes=(jnp.float32, jnp.bfloat16))
    require_gpu(8.9)
    outer = x.ndim - inner

    @custom_vmap
    def call(x, scale):
        m, n = math.prod(x.shape[:outer]), math.prod(x.shape[outer:])
        results = [jax.ShapeDtypeStruct((m, n), dtype), jax.ShapeDtypeStruct((n, m), dtype)]
        rows, columns = triton_call(
            x.reshape(m, n),
            scale.reshape(1),
            kernel=_quantize,
            out_shape=results,
            grid=(triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS),),
            num_warps=WARPS,
            M=m,
            N=n,
            BLOCK_M=ROWS,
            BLOCK_N=COLUMNS,
            MOST=float(jnp.finfo(dtype).max),
        )
        return rows.reshape(x.shape), columns.reshape(*x.shape[outer:], *x.shape[:outer])

    @call.def_vmap
    def _(size, in_batched, x, scale):
        x, scale = (
            array if batched else jnp.broadcast_to(array, (size, *array.shape))
            for array, batched in zip((x, scale), in_batched, strict=True)
        )
        return jax.lax.map(lambda each: call(*each), (x, scale)), (True, True)

    return call(x, scale)


@triton.jit
def _quantize(
    x_ptr,
    scale_ptr,
    rows_ptr,
    columns_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    q = tl.minimum(tl.maximum(x, -MOST), MOST).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + at, q, mask=exists)
    turned = n[:, None].to(tl.int64) * M + m[None, :]
    tl.store(columns_ptr + turned, tl.trans(q), mask=(n[:, None] < N) & (m[None, :] < M))
