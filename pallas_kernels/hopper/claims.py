"""Tiles of unequal work: in order, each goes to the block of threads that is free first.

A block has the tile of its own number first. The warpgroup that loads claims the next one ahead of time, from a counter
of the device, and leaves its number in shared memory for the consumers. In an interpreter blocks take turns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from crescendo.pallas_kernels.hopper.memory import REGISTERS
from crescendo.pallas_kernels.op import target_device

SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Claims:
    """What is fixed.

    Attributes:
      blocks: of threads.
      consumers: warpgroups of a block that compute.
    """

    blocks: int
    consumers: int

    def scratch(self) -> dict[str, Any]:
        """What a kernel allocates, and `warpgroups` takes."""
        return {
            "numbers": plgpu.SMEM((SLOTS,), jnp.int32),
            "full": plgpu.Barrier(num_barriers=SLOTS),
            "free": plgpu.Barrier(num_arrivals=self.consumers, num_barriers=SLOTS),
        }

    def warpgroups(
        self,
        refs,
        tiles,
        *,
        place: Callable,
        load: Callable,
        begin: Callable,
        compute: Callable,
        drain: Callable,
        end: Callable,
    ) -> None:
        """The body of a kernel that `block.launch` launches.

        Args:
          refs: of `scratch`.
          tiles: how many there are.
          place: `tile -> place`, numbers that are read of a tile, while the one before is worked on.
          load: `(place, step) -> step`, of the warpgroup that loads: fills rings for a tile, from step `step` on.
          begin: `() -> state`, of each of the others, before its first tile.
          compute: `(consumer, place, state) -> state`, of each of the others.
          drain: `(steps)`, after the last tile of the warpgroup that loads: drains its rings.
          end: `(consumer, state)`, after the last one of a consumer.
        """
        warpgroup, block = lax.axis_index("wg"), lax.axis_index("block")
        counter = None if target_device().interpreted else pl.get_global(plgpu.SemaphoreType.REGULAR((1,)))
        placed = lambda tile: place(jnp.minimum(tile, tiles - 1))  # noqa: E731
        first = (jnp.int32(0), jnp.int32(block), placed(block))
        left = lambda state: state[1] < tiles  # noqa: E731

        def taken(n):
            """The number of the block's n-th tile, once it is there."""
            plgpu.barrier_wait(refs["full"].at[lax.rem(n, SLOTS)])
            return refs["numbers"][lax.rem(n, SLOTS)]

        def claim(n):
            slot = lax.rem(n, SLOTS)
            pl.when(n > SLOTS)(lambda: plgpu.barrier_wait(refs["free"].at[slot]))
            if counter is None:
                refs["numbers"][slot] = block + n * self.blocks
            else:
                _claim(self.blocks)(counter, refs["numbers"].at[pl.ds(slot, 1)], jnp.int32(tiles - 1))
            plgpu.barrier_arrive(refs["full"].at[slot])

        @pl.when(warpgroup == self.consumers)
        def _load():
            plgpu.set_max_registers(REGISTERS[self.consumers][0], action="decrease")

            def one(state):
                n, _, at, step = state
                claim(n + 1)
                tile = taken(n + 1)
                after = placed(tile)
                return n + 1, tile, after, load(at, step)

            n, *_, steps = lax.while_loop(left, one, (*first, jnp.int32(0)))
            drain(steps)

            @pl.loop(jnp.maximum(n - SLOTS, 0), n)
            def _see_free(n):
                plgpu.barrier_wait(refs["free"].at[lax.rem(n + 1, SLOTS)])

        @pl.when(warpgroup < self.consumers)
        def _compute():
            plgpu.set_max_registers(REGISTERS[self.consumers][1], action="increase")

            def one(state):
                n, _, at, own = state
                tile = taken(n + 1)
                plgpu.barrier_arrive(refs["free"].at[lax.rem(n + 1, SLOTS)])
                after = placed(tile)
                return n + 1, tile, after, compute(warpgroup, at, own)

            *_, own = lax.while_loop(left, one, (*first, begin()))
            end(warpgroup, own)


def _claim(first: int) -> Callable:
    """`(counter, number, last)`: the number is `first` and the counter, which one of all goes up by 1.

    Behind `last` it is 0 again. A launch claims as often as there are tiles, and so leaves the counter as it found it:
    XLA sets it to 0 before each, but where that was seen to fail tiles were skipped, and no one was told.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def claim(_, counter, number, last):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref

        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            given = utils.memref_ptr(counter), last.registers.item()
            before = utils.inline_ptx("atom.inc.u32 $0, [$1], $2;", *given, result_types=i32, has_side_effects=True)
            value = arith.addi(before, utils.c(first, i32))
            memref.store(value, number, [utils.c(0, index)])

    return claim
