"""What a user would write otherwise, for a compiler to fuse; and tokamax's kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.rms_norm import reference


def _plain(x, scale, *, eps, residual=None):
    h = x if residual is None else x + residual
    wide = h.astype(jnp.float32)
    if scale.ndim > 1:  # of each example
        scale = jnp.expand_dims(scale, tuple(range(scale.ndim - 1, x.ndim - 1)))
    y = (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps) * scale).astype(x.dtype)
    return y if residual is None else (y, h)


def _tokamax(x, scale, *, eps, residual=None):
    import tokamax

    from crescendo.pallas_kernels.triton_call import RESULTS

    if RESULTS != "out_type":
        raise NotImplementedError("tokamax's kernel needs jax-triton 0.4 or later, which needs triton 3.7")
    if residual is not None:
        raise NotImplementedError("tokamax has no residual")
    return tokamax.layer_norm(x, scale.astype(x.dtype), None, epsilon=eps, subtract_mean=False, implementation="triton")


PEERS: dict[str, dict[str, Callable]] = {
    "rms_norm": {"jax": _plain, "tokamax": _tokamax},
    "qk_norm_rotary": {"jax": reference.qk_norm_rotary},
}


def torch_peers(op_name: str) -> dict[str, Callable]:
    """Functions of tensors, which torch compiles."""
    if op_name != "rms_norm":
        return {}

    def rms_norm(x, scale, *, eps, residual=None):
        import torch

        h = x if residual is None else x + residual
        wide = h.float()
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)
        return y if residual is None else (y, h)

    return {"torch.compile": rms_norm}
