"""For any device: XLA's own fusions, with the shared gradient, which keeps only h."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.op import leave_to_others, target_device
from crescendo.pallas_kernels.rows import Passes


def rms_norm(**_):
    """See the op."""
    return Passes(forward, backward, split_by_xla=True)


layer_norm = rms_norm


def qk_norm_rotary(**_):
    """See the op."""
    if target_device().platform != "gpu":
        leave_to_others("is first on GPUs only: elsewhere XLA fuses the plain formula with the projections about it")
    return Passes(rotary_forward, rotary_backward, split_by_xla=True)


def forward(eps, x_GRD, scale_GD, bias_GD, residual_GRD):
    """`(y,)`, or `(y, h)` with a residual."""
    h = x_GRD if residual_GRD is None else x_GRD + residual_GRD
    wide, inverse = _inverse(h, eps, centered=bias_GD is not None)
    y = wide * inverse * scale_GD[:, None, :]
    y = (y if bias_GD is None else y + bias_GD[:, None, :]).astype(h.dtype)
    return (y,) if residual_GRD is None else (y, h)


def backward(eps, centered, h_GRD, scale_GD, dy_GRD, dh_GRD):
    """`(dx, dscale)`, and dbias if centered; with u = h inverse and g = dy scale, `dx = inverse (g - u mean(g u))`.

    Centered, h less its mean is in the place of h, and `inverse mean(g)` is taken off.
    """
    dx, dscale_GD = _gradients(h_GRD, scale_GD[:, None, :], dy_GRD, eps, (1,), centered=centered)
    dx = (dx if dh_GRD is None else dx + dh_GRD).astype(h_GRD.dtype)
    return (dx, dscale_GD, jnp.sum(dy_GRD.astype(dscale_GD.dtype), axis=1)) if centered else (dx, dscale_GD)


def rotary_forward(eps, x_BTHE, scale_BE, cosine_BTC, sine_BTC):
    """`(y,)`."""
    wide, inverse = _inverse(x_BTHE, eps)
    turned = _turn(wide * inverse * scale_BE[:, None, None, :], cosine_BTC[:, :, None], sine_BTC[:, :, None])
    return (turned.astype(x_BTHE.dtype),)


def rotary_backward(eps, x_BTHE, scale_BE, cosine_BTC, sine_BTC, dy_BTHE):
    """`(dx, dscale)`: turned back, then as the norm's."""
    wide = jnp.promote_types(x_BTHE.dtype, jnp.float32)
    dy = _turn(dy_BTHE.astype(wide), cosine_BTC[:, :, None], -sine_BTC[:, :, None])
    dx, dscale_BE = _gradients(x_BTHE, scale_BE[:, None, None, :], dy, eps, (1, 2))
    return dx.astype(x_BTHE.dtype), dscale_BE


def _inverse(h, eps, *, centered=False):
    """h, less its mean if it is to be centered, and `1 / rms` of that, in at least float32."""
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True) if centered else wide
    return wide, jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


def _gradients(h, scale, dy, eps, axes, *, centered=False):
    wide, inverse = _inverse(h, eps, centered=centered)
    u, dy = wide * inverse, dy.astype(wide.dtype)
    g = dy * scale
    dx = g - u * jnp.mean(g * u, axis=-1, keepdims=True)
    dx = dx - jnp.mean(g, axis=-1, keepdims=True) if centered else dx
    return inverse * dx, jnp.sum(dy * u, axis=axes)


def _turn(x, cosine, sine):
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cosine - x2 * sine, x2 * cosine + x1 * sine], axis=-1)
