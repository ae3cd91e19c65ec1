"""The dtypes of an optimizer: arithmetic in float32 or better, moments stored in a chosen dtype."""

import jax
import jax.numpy as jnp
import optax

from crescendo.optim.checks import check_moment_dtype, check_real


def in_float32(
    inner: optax.GradientTransformation,
    *,
    moment_dtype: jax.typing.DTypeLike | None = None,
    real: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner` computed in float32 (float64 where the input is), its moments stored in `moment_dtype`.

    Parameters and gradients are cast on entry and the update is rounded once, to the gradient's dtype, on exit; in
    between steps every state array that mirrors the parameters has `moment_dtype`. Under jit the casts are part
    of the same fused loop, so low-precision moments are read and written at their own size. optax's `mu_dtype` casts
    the first moment alone, and computes in the parameters' dtype.

    Parameters may be complex: squares are `|g|^2`, and gradients are to be conjugated before they come here, as optax
    wants them (`jax.grad` of a real loss gives the conjugate of the direction of ascent).

    Args:
      inner: any transformation.
      moment_dtype: None: the parameters' dtype, as it is of complex ones in any case. bfloat16 halves the memory, but a
        second moment with b2 near 1 then moves by less than its rounding and sticks: keep b2 at 0.95 or below.
      real: the name of an optimizer that can't train complex parameters, to refuse them by.

    Raises:
      ValueError: a dtype that isn't floating, or of 8 bits or fewer; at `init`, complex parameters under `real`.

    >>> transform = in_float32(optax.scale_by_adam(b2=0.95), moment_dtype="bfloat16")
    >>> transform.init(jnp.ones(2)).nu.dtype
    dtype(bfloat16)
    """
    check_moment_dtype(moment_dtype)
    inner = optax.with_extra_args_support(inner)

    def stored(param: jax.typing.ArrayLike) -> jax.Array:
        return jnp.asarray(param, None if jnp.iscomplexobj(param) else moment_dtype)

    def init(params: optax.Params) -> optax.OptState:
        if real is not None:
            check_real(params, real)
        state = inner.init(jax.tree.map(widen, params))
        narrow = jax.eval_shape(inner.init, jax.tree.map(stored, params))
        mirrors = optax.tree_map_params(inner, lambda _: True, state, transform_non_params=lambda _: False)
        return jax.tree.map(lambda mirror, x, n: x.astype(n.dtype) if mirror else x, mirrors, state, narrow)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: object
    ) -> tuple[optax.Updates, optax.OptState]:
        wide_params = None if params is None else jax.tree.map(widen, params)
        wide_state = optax.tree_map_params(inner, widen, state)
        wide, new_state = inner.update(jax.tree.map(widen, updates), wide_state, wide_params, **extra_args)
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), wide, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def squares(x: jax.typing.ArrayLike) -> jax.Array:
    """`|x|^2` entry by entry, of complex numbers too, in float32 at least.

    >>> print(squares(jnp.array([3 + 4j])), squares(jnp.array([3.0], jnp.bfloat16)))
    [25.] [9.]
    """
    wide = widen(x)
    return jnp.real(jnp.conj(wide) * wide)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
    """At least float32."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))
