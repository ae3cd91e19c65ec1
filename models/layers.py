"""Small layers: every parameter is float32 and carries the logical names of its axes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.low_precision import RECIPES, Kernel, products
from crescendo.pallas_kernels import rms_norm


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], standard_deviation: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution cut at two standard deviations."""
    # The cut at +-2 shrinks the standard deviation to 0.8796 of the uncut one.
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * (standard_deviation / 0.87962566)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """`y = sum over the input axes of x W`, with no bias.

    Args:
      inputs: the sizes contracted, the last ones of `x`.
      outputs: the sizes that take their place.
      axes: the logical names of `inputs + outputs`.
      scale: multiplies the standard deviation `1 / sqrt(fan_in)` at initialisation.
      matmul: a recipe for the product, see `crescendo.models.low_precision`.
    """

    def __init__(self, inputs, outputs, axes, *, dtype, rngs: nnx.Rngs, scale: float = 1.0, matmul: str = "dtype"):
        fan_in = 1
        for size in inputs:
            fan_in *= size
        self.kernel = parameter(rngs, (*inputs, *outputs), axes, scale * fan_in**-0.5)
        self.contracted = len(inputs)
        self.dtype, self.axes, self.matmul = dtype, axes, matmul

    def __call__(self, x, layout: Layout = ONE_DEVICE):
        if RECIPES[self.matmul] is not None:
            return of_one_input((self,), x, layout)[0]
        kernel = layout.weight(self.kernel[...].astype(self.dtype), self.axes)
        return jnp.tensordot(x, kernel, axes=self.contracted)


def side_by_side(layers: Sequence[Linear], x, layout: Layout):
    """What several layers of the same shape make of x, by one product: an axis of them before the outputs' last one.

    The kernels are put together as they are cast, which copies nothing besides.
    """
    like, kernels = layers[0], [layer.kernel[...] for layer in layers]
    names, recipe = (*like.axes[:-1], None, like.axes[-1]), RECIPES[like.matmul]
    if recipe is not None:
        return products(recipe, x, [kernels], [Kernel(names, like.contracted)], layout)[0]
    kernel = layout.weight(jnp.stack([kernel.astype(like.dtype) for kernel in kernels], axis=-2), names)
    return jnp.tensordot(x, kernel, axes=like.contracted)


def of_one_input(layers: Sequence[Linear], x, layout: Layout) -> tuple[jax.Array, ...]:
    """What each of several layers makes of x, which a recipe quantises once."""
    recipe = RECIPES[layers[0].matmul]
    if recipe is None:
        return tuple(layer(x, layout) for layer in layers)
    kernels = [Kernel(layer.axes, layer.contracted) for layer in layers]
    return products(recipe, x, [layer.kernel[...] for layer in layers], kernels, layout)


class RMSNorm(nnx.Module):
    """`(y, h)` with `h = x + added` and `y = h / sqrt(mean(h^2) + epsilon) * scale`, see the op `rms_norm`.

    The residual stream `x` is `[B, T, D]`, and `added`, alike, what a branch adds to it; without it h is x. The scale
    is `[D]`, or `[B, D]` with one for each example (see `norm_probes`). `implementation` is the op's.
    """

    def __init__(self, size: int, axis: str, epsilon: float):
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x_BTD, added_BTD=None, layout: Layout = ONE_DEVICE, *, implementation: str | None = None):
        norm = functools.partial(rms_norm, eps=self.epsilon, implementation=implementation)
        scale, stream = self.scale[...], axes.RESIDUAL
        of_scale = scale_names(scale)
        if added_BTD is None:
            return layout.on_parts(norm, (x_BTD, scale), (stream, of_scale), stream), x_BTD
        return layout.on_parts(
            lambda x, scale, residual: norm(x, scale, residual=residual),
            (added_BTD, scale, x_BTD),
            (stream, of_scale, stream),
            (stream, stream),
        )


def scale_names(scale) -> tuple[str | None, ...]:
    """The logical names of a norm's scale where it is used: one of each example, or one of all."""
    return (axes.BATCH, None) if scale.ndim == 2 else (None,)


def of_rows(implementation: str | None) -> str | None:
    """What an option that names the attention's implementation says of the ops on rows: "reference", or nothing."""
    return implementation if implementation == "reference" else None


class Table(nnx.Module):
    """`[V, D]` vectors of the vocabulary: looked up at the input, multiplied at the output."""

    def __init__(self, vocab_size: int, width: int, axes: tuple[str, str], *, rngs: nnx.Rngs):
        self.table = parameter(rngs, (vocab_size, width), axes, 0.02)


def rotary(positions_BT, head_width: int, theta: float):
    """Cosines and sines `[B, T, E / 2]` (float32) of the rotary angles `position * theta^(-2 i / E)`."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHE, cosine, sine):
    """Turns the pairs `(x[i], x[i + E / 2])` by the angle of their position (RoFormer, Su et al. 2021).

    Args:
      x_BTHE: queries or keys.
      cosine, sine: float32 `[B, T, E / 2]`, see `rotary`.
    """
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    first, second = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHE.dtype)
