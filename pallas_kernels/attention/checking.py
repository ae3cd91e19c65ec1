"""What comparisons of implementations share: a spec's call taken apart, everything that it computes, and errors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crescendo.pallas_kernels.attention.op import attention
from crescendo.pallas_kernels.op import Spec


class Case(NamedTuple):
    """A call: what has gradients (q, k, v and bias where there is one), the other arrays, and the constants."""

    arrays: dict[str, Any]
    metadata: dict[str, Any]
    options: dict[str, Any]


def case(spec: Spec, seed: int | None = None, dtype: Any = None) -> Case:
    """The spec's call on random inputs, or on shapes where `seed` is None; `dtype` replaces its own."""
    arguments, kwargs = spec.abstract() if seed is None else spec.inputs(seed)
    arrays = dict(zip("qkv", arguments, strict=True))
    if "bias" in kwargs:
        arrays["bias"] = kwargs.pop("bias")
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    metadata = {name: kwargs.pop(name) for name in ("segment_ids", "positions") if name in kwargs}
    return Case(arrays, metadata, kwargs)


def cotangents(spec: Spec, seed: int) -> tuple[jax.Array, jax.Array]:
    """Of result and log-sum-exp: float32, exact in bfloat16."""
    shape = spec.abstract()[0][0].shape
    of_out, of_lse = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    drawn = jax.random.normal(of_out, shape, jnp.bfloat16), jax.random.normal(of_lse, shape[:3], jnp.bfloat16)
    return drawn[0].astype(jnp.float32), drawn[1].astype(jnp.float32)


def everything(implementation, options, arrays, metadata, cotangents, return_lse: bool = True) -> dict[str, jax.Array]:
    """Result, log-sum-exp (0 where it is -inf), where it is finite, and the gradients of both together.

    To be compiled with `arrays`, `metadata` and `cotangents` as arguments. Without `return_lse` the log-sum-exp and its
    cotangent take no part.
    """

    def call(arrays):
        result = attention(**arrays, **metadata, **options, return_lse=return_lse, implementation=implementation)
        return result if return_lse else (result, jnp.zeros(result.shape[:3], jnp.float32))

    (out, lse), pull = jax.vjp(call, arrays)
    dout, dlse = cotangents
    finite = jnp.isfinite(lse)
    (gradients,) = pull((dout.astype(out.dtype), jnp.where(finite, dlse, 0).astype(lse.dtype)))
    results = {"out": out, "lse": jnp.where(finite, lse, 0), "seen": finite}
    return results | {f"d{name}": gradient for name, gradient in gradients.items()}


def exactly(case: Case) -> Callable[..., dict[str, np.ndarray]]:
    """`everything` of the reference as a function of the cotangents, in float64 on the host."""
    run = jax.jit(functools.partial(everything, "reference", case.options))

    def at(cotangents):
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            arrays, wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (case.arrays, cotangents))
            results = run(arrays, jax.tree.map(np.asarray, case.metadata), wide)
            return {name: np.asarray(value) for name, value in results.items()}

    return at


def error(computed, exact, xp: Any = np):
    """The norm of the difference to that of the exact array; NaN where something is not finite.

    In float64 on the host, or in float32 where `xp` is `jax.numpy`. Entries that are 1e-3 in the mean count as that
    large: below, both are rounding (where one key is seen, q has no gradient).
    """
    wide = np.float64 if xp is np else np.float32
    computed, exact = xp.asarray(computed, wide).ravel(), xp.asarray(exact, wide).ravel()
    return xp.linalg.norm(computed - exact) / xp.maximum(xp.linalg.norm(exact), 1e-3 * exact.size**0.5)
