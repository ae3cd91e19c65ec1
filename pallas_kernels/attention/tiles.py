"""Which tile a call of attention takes: `tiles.json` beside this, by width, masks and length."""

from crescendo.pallas_kernels import tiles
from crescendo.pallas_kernels.attention.contract import Config, Operands


def key(config: Config, operands: Operands) -> dict:
    """Calls that share a tile: the width in full swizzles of 64, and which blocks are skipped and masked."""
    if operands.q_segments is not None:
        masks = "segments"
    elif config.window is not None:
        masks = "window"
    else:
        masks = "causal" if config.causal else "full"
    return {"width": -(-operands.dims[-1] // 64) * 64, "masks": masks}


def tuned(kernel: str, config: Config, operands: Operands, default):
    """The measured tile for a call, or `default`."""
    return tiles.tuned("attention", kernel, key(config, operands), operands.dims[1], default)
