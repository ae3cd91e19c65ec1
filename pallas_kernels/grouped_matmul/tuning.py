"""What `python -m crescendo.pallas_kernels.tune grouped_matmul` chooses: the tiles of the kernels for Hopper."""

import functools

import jax

from crescendo.pallas_kernels.grouped_matmul import mosaic_gpu
from crescendo.pallas_kernels.grouped_matmul.mosaic_gpu import Tile
from crescendo.pallas_kernels.hopper import memory
from crescendo.pallas_kernels.op import Spec
from crescendo.pallas_kernels.tune import Problem, Tunable


def _problem(kernel: str, spec: Spec) -> Problem:
    (x, w, sizes), _ = spec.abstract()
    mosaic_gpu.grouped_matmul(x, w, sizes)  # or Unsupported
    transposed, of_groups = kernel == "transposed rows", kernel == "groups"
    depth, columns = w.shape[:0:-1] if transposed else w.shape[1:]

    def arrays():
        """What is multiplied, and the sizes."""
        x, w, sizes = spec.inputs()[0]
        dy = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[2]), x.dtype)
        return (x, dy, sizes) if of_groups else (dy if transposed else x, w, sizes)

    def run(tile: Tile):
        if of_groups:
            return functools.partial(mosaic_gpu.of_groups, tile=tile)
        return functools.partial(mosaic_gpu.of_rows, transposed=transposed, tile=tile)

    def fits(tile: Tile) -> bool:
        tile = tile.of(columns)
        # Registers of the sums, and of the sums before in 16 bits.
        matrices = tile.columns // 2 + tile.columns // 4
        return tile.columns % tile.leaving == 0 and memory.fits(
            tile.scratch(x.dtype, kernel), matrices, mosaic_gpu.CONSUMERS
        )

    return Problem(mosaic_gpu.key(depth, columns), x.shape[0], mosaic_gpu.DEFAULTS[kernel], arrays, run, fits)


_VALUES = (
    {"columns": (128, 256), "stages": (3, 4, 5, 6)},
    {"together": (4, 8, 16)},
)
TUNABLES = tuple(
    Tunable(kernel, functools.partial(_problem, kernel), _VALUES) for kernel in ("rows", "transposed rows", "groups")
)
