"""How the backward kernels that recompute the weights are cut up."""

import dataclasses

from crescendo.pallas_kernels.attention.contract import Operands
from crescendo.pallas_kernels.hopper.memory import ROWS


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """How one of the backward kernels is cut up.

    Attributes:
      block: queries (or keys) of a step.
      consumers: warpgroups, each with 64 keys (or queries) of the tile.
      stages: blocks in flight.
      pairs: whether causal tiles are taken in pairs (`Schedule`).
      persistent: whether a block of threads takes several tiles, or pairs.
      behind: whether the product with the gradients of the scores comes a step later, behind the next scores: then it
        has not to be waited for, and a block of the other side is held for two steps.
    """

    block: int
    consumers: int = 2
    stages: int = 2
    pairs: bool = True
    persistent: bool = True
    behind: bool = False

    @property
    def rows(self) -> int:
        return ROWS * self.consumers


def default_tiles(operands: Operands) -> tuple[BackwardTile, BackwardTile]:
    """Of the kernel for k and v, and of the one for q, where nobody measured."""
    width = operands.dims[-1]
    if width <= 64:
        # Tiles of packed rows differ in work: the device hands them out as blocks of threads become free.
        tile = BackwardTile(block=128, persistent=operands.q_segments is None)
        return tile, tile
    if width <= 128:
        tile = BackwardTile(block=64, stages=3, persistent=False, behind=True)
        return tile, tile
    tile = BackwardTile(block=64, consumers=1, behind=True)
    return tile, tile
