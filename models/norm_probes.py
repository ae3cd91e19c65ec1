"""Per-example gradients of the normalisation layers' scales, as the backward pass forms them.

The gradient of `y = x_hat * scale` for example b is `sum_t dy[b, t] * x_hat[b, t]`: the backward pass computes it on
the way to the scale's own gradient, which is the sum over b. So the scale is given to the layer as one row for each
example, `scale + probe[b]` with a probe of zeros, and the probe's gradient is the per-example gradient: no further
matrix product, and no second pass over the activations (Gray et al., 2024, https://arxiv.org/abs/2411.00999).
"""

import jax
import jax.numpy as jnp


def norm_scales(tree: dict) -> dict[str, jax.Array]:
    """The scales of the normalisation layers by their path, out of parameters or gradients.

    >>> list(norm_scales({"blocks": {"norm": {"scale": jnp.ones(2)}, "bias": jnp.ones(2)}}))
    ['blocks/norm/scale']
    """
    named = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: leaf for name, leaf in named.items() if name.split("/")[-1] == "scale"}


def norm_probes(parameters: dict, examples: int) -> dict[str, jax.Array]:
    """Zeros `[..., examples, D]` for each of the normalisation layers' scales `[..., D]`.

    >>> parameters = {"blocks": {"norm": {"scale": jnp.ones((3, 8))}, "kernel": jnp.ones((3, 8, 8))}}
    >>> jax.tree.map(jnp.shape, norm_probes(parameters, 2))
    {'blocks/norm/scale': (3, 2, 8)}
    """
    scales = norm_scales(parameters)
    return {name: jnp.zeros((*x.shape[:-1], examples, x.shape[-1]), x.dtype) for name, x in scales.items()}


def with_probes(parameters: dict, probes: dict[str, jax.Array]) -> dict:
    """The parameters to apply a model with: every probed scale as `scale + probe`, one row for each example.

    >>> parameters = {"norm": {"scale": jnp.ones(2)}, "bias": jnp.ones(2)}
    >>> print(with_probes(parameters, norm_probes(parameters, 3))["norm"]["scale"].shape)
    (3, 2)
    """

    def add(path, leaf):
        return leaf[..., None, :] + probes[_name(path)] if _name(path) in probes else leaf

    return jax.tree.map_with_path(add, parameters)


def example_squared_norms(probe_gradients: dict[str, jax.Array]) -> jax.Array:
    """`||g_b||^2` over all normalisation layers' scales, float32 `[examples]`, from the gradients of the probes.

    >>> print(example_squared_norms({"norm/scale": jnp.array([[1.0, 2.0], [3.0, 4.0]])}))
    [ 5. 25.]
    """
    squares = [jnp.square(g.astype(jnp.float32)) for g in probe_gradients.values()]
    sums = [jnp.sum(x, axis=tuple(i for i in range(x.ndim) if i != x.ndim - 2)) for x in squares]
    return jnp.sum(jnp.stack(sums), axis=0)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
