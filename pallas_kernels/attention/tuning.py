"""What `python -m crescendo.pallas_kernels.tune attention` chooses: the tiles of the kernels for Hopper."""

import functools

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.attention import mosaic_gpu, mosaic_gpu_backward
from crescendo.pallas_kernels.attention.op import attention
from crescendo.pallas_kernels.attention.tiles import key
from crescendo.pallas_kernels.op import Spec
from crescendo.pallas_kernels.tune import Problem, Tunable

ROWS = mosaic_gpu.ROWS
SHARED_BYTES = 227 * 1024 - 4096  # of a block of threads, less barriers, metadata and row sums
OTHER_REGISTERS = 30  # of a thread, beside matrices: indices, addresses, row sums


def _call(spec: Spec):
    args, options = spec.inputs()
    checked = attention.check(*args, **options)  # type: ignore[attr-defined]
    mosaic_gpu.check(checked["operands"])
    return checked["config"], checked["operands"]


def _fits(width: int, own: int, passing: int, matrices: int, consumers: int) -> bool:
    """Whether a tile fits: rows of `width` held and streamed in shared memory, and registers of a consumer's thread."""
    registers = mosaic_gpu.REGISTERS[consumers][1]
    return 2 * width * (own + passing) <= SHARED_BYTES and matrices + OTHER_REGISTERS <= registers


def _forward(spec: Spec) -> Problem:
    config, operands = _call(spec)
    named = key(config, operands)
    width = named["width"]

    def fits(tile: mosaic_gpu.ForwardTile) -> bool:
        # A matrix of 64 rows has half a register in each of 128 threads for each float32 column.
        matrices = width // 2 + tile.block_k // 2 + tile.block_k // 4
        own = tile.block_q * (2 if width <= 128 else 1)
        return _fits(width, own, 2 * tile.stages * tile.block_k, matrices, tile.consumers)

    return Problem(
        named,
        operands.dims[1],
        mosaic_gpu.forward_tile(operands),
        lambda: (operands,),
        lambda tile: functools.partial(mosaic_gpu.forward, config, tile=tile),
        fits,
    )


def _for_backward(config, operands) -> tuple:
    """The arrays of a backward pass."""
    out, lse = jax.jit(mosaic_gpu.forward, static_argnums=0)(config, operands)
    dout = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    return operands, lse, dout, jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), dout.astype(jnp.float32))


def _backward(which: int, spec: Spec) -> Problem:
    """Of the kernel for the gradients of k and v (0) or that for q (1), beside the other with its default."""
    config, operands = _call(spec)
    named = key(config, operands)
    width, defaults = named["width"], mosaic_gpu_backward.tiles_for(operands)

    def run(tile):
        pair = (tile, defaults[1]) if which == 0 else (defaults[0], tile)

        def gradients(operands, lse, dout, delta):
            return mosaic_gpu_backward.backward(config, operands, lse, dout, delta, pair)[:3]

        return gradients

    def fits(tile: mosaic_gpu_backward.BackwardTile) -> bool:
        gradients = (2 if which == 0 and width <= 128 else 1) * width // 2
        return _fits(width, 2 * tile.rows, 2 * tile.stages * tile.block, gradients + tile.block, tile.consumers)

    return Problem(
        named, operands.dims[1], defaults[which], functools.partial(_for_backward, config, operands), run, fits
    )


BACKWARD = ({"block": (64, 128), "consumers": (1, 2, 3), "stages": (1, 2, 3)}, {"persistent": (True, False)})
TUNABLES = (
    Tunable(
        "forward",
        _forward,
        (
            {"block_k": (64, 128, 192), "consumers": (2, 3), "stages": (2, 3, 4)},
            {"turns": (True, False), "persistent": (True, False)},
        ),
    ),
    Tunable("gradients of k and v", functools.partial(_backward, 0), BACKWARD),
    Tunable("gradient of q", functools.partial(_backward, 1), BACKWARD),
)
