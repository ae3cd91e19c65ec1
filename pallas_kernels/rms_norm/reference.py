"""The specification: a few plain lines, differentiated by JAX (but for the probe, whose gradient is a definition)."""

import jax
import jax.numpy as jnp

from crescendo.pallas_kernels.rms_norm.examples import for_examples


def rms_norm(x, scale, *, eps, residual, probe):
    """See the op."""
    h = x if residual is None else x + residual
    if scale.ndim == 1 and probe is not None:
        scale = jnp.broadcast_to(scale, (x.shape[0], x.shape[-1]))
    if probe is not None:
        scale = _probed(scale, probe)
    if scale.ndim == 2:
        scale = jnp.expand_dims(scale, range(1, x.ndim - 1))
    y = _normalised(h, eps) * scale
    return y.astype(x.dtype) if residual is None else (y.astype(x.dtype), h)


def qk_norm_rotary(q, k, q_scale, k_scale, cosine, sine, *, eps):
    """See the op."""
    cosine, sine = (jax.lax.stop_gradient(angle[:, :, None, :]) for angle in (cosine, sine))

    def turned(x, scale):
        u = _normalised(x, eps) * (scale if scale.ndim == 1 else for_examples(scale, x.shape))
        # Two steps, each with a result in x's dtype.
        u1, u2 = jnp.split(u.astype(x.dtype).astype(u.dtype), 2, axis=-1)
        return jnp.concatenate([u1 * cosine - u2 * sine, u2 * cosine + u1 * sine], axis=-1).astype(x.dtype)

    return turned(q, q_scale), turned(k, k_scale)


def _normalised(h, eps):
    wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


@jax.custom_vjp
def _probed(scale, probe):
    """The scale, whose gradient's squared norms are the probe's gradient."""
    del probe
    return scale


def _probed_backward(probe, dscale):
    return dscale, jnp.sum(jnp.square(dscale.astype(jnp.float32)), axis=-1).astype(probe.dtype)


_probed.defvjp(lambda scale, probe: (scale, probe), _probed_backward)
