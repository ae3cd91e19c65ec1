"""cuDNN's fused attention, as `jax.nn` offers it: where its features suffice."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.attention.contract import Config, Operands
from crescendo.pallas_kernels.op import Unsupported, leave_to_others, require_gpu


def attention(config: Config, operands: Operands):
    require_gpu(8.0)
    _, length, keys, *_, width = operands.dims
    bias = operands.bias
    refusals = {
        f"needs bfloat16 or float16, not {operands.q.dtype}": operands.q.dtype not in (jnp.bfloat16, jnp.float16),
        f"needs a head width that is a multiple of 8 and at most 128, not {width}": width % 8 or width > 128,
        "takes no soft_cap": config.soft_cap is not None,
        "gives no gradient of the log-sum-exp": config.return_lse,
        "gives no zeros where a row sees nothing": operands.q_segments is not None and not config.sees_itself,
        "takes no positions": operands.q_positions is not None or operands.begin is not None,
        "takes a window with causal only": config.window is not None and not config.causal,
        f"is not asked for causal lengths that differ, {length} and {keys}": config.causal and length != keys,
        # Known only when the gradient is lowered, too late for another to be asked.
        f"gives gradients for even lengths only, not {length} and {keys}": length % 2 or keys % 2,
    }
    for reason, refused in refusals.items():
        if refused:
            raise Unsupported(reason)
    if bias is not None:
        leave_to_others("would give NaN where a row's bias is -inf everywhere")
    mask = None
    if operands.q_segments is not None:
        # Dense, quadratic in the length; causality and windows are cuDNN's own.
        mask = (operands.q_segments[:, :, None] == operands.k_segments[:, None, :])[:, None]
    try:
        return jax.nn.dot_product_attention(
            *operands[:3],
            bias=bias,
            mask=mask,
            scale=config.scale,
            is_causal=config.causal,
            local_window_size=None if config.window is None else (config.window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        # Its version is asked for while tracing.
        if "cuDNN" not in str(error):
            raise
        raise Unsupported(f"says: {error}") from None
