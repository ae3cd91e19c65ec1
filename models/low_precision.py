"""Matrix products of the blocks in fewer bits than the compute dtype's: recipes by name, and their derivative rule.

With Q an operand that is quantised, a product and its gradients are

    y = Q(x) Q(w),    dx = Q(dy) Q(w)^T,    dw = Q(x)^T Q(dy)

so the derivative of rounding is taken to be 1. Sums are in float32 as the matrix units add (of 8-bit products Hopper
keeps 14 bits), results in the compute dtype, master weights stay float32, and nothing is kept from step to step.
`reference` is the specification; a new recipe is an entry of `RECIPES`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from crescendo.models import axes
from crescendo.models.layout import Layout, Names
from crescendo.pallas_kernels.op import once_differentiable, target_device
from crescendo.pallas_kernels.quantize import power_of_two_scale, quantize, turned

MULTIPLE = 16
"""Of which the widths of a quantised product are multiples: matrix instructions of 8 bits take no others."""


class Quantized(NamedTuple):
    """An operand `[*outer, *inner]`.

    Attributes:
      rows: for sums over the inner axes, as it lies.
      columns: for sums over the outer axes, `[*inner, *outer]`.
      inverse: float32 scalar: what both are to be multiplied by.
    """

    rows: jax.Array
    columns: jax.Array
    inverse: jax.Array


Parts = Callable[..., tuple[jax.Array, jax.Array]]
"""Calls a function of `(x, scale)` on each device's own part of x."""


@dataclasses.dataclass(frozen=True)
class Float8:
    """One scale a tensor, from its present largest value: `float8_e4m3fn` or `float8_e5m2`."""

    dtype: str

    def __call__(self, x: jax.Array, largest: jax.Array, inner: int, on_parts: Parts) -> Quantized:
        """The operand in 8 bits."""
        scale, inverse = power_of_two_scale(largest, float(jnp.finfo(self.dtype).max))
        rows, columns = on_parts(functools.partial(quantize, dtype=self.dtype, inner=inner), x, scale)
        return Quantized(rows, columns, inverse)


@dataclasses.dataclass(frozen=True)
class NVFP4:
    """Blocks of 16 along the axis that is summed, in e2m1, with a scale in e4m3 each and one a tensor; emulated.

    The numbers are those of the format, in bfloat16, which holds their products with the blocks' scales exactly.
    """

    block: int = 16
    dtype: str = "bfloat16"

    def __call__(self, x: jax.Array, largest: jax.Array, inner: int, on_parts: Parts) -> Quantized:
        """The operand in 4 bits, twice: blocks lie along the sum."""
        del on_parts
        scale, inverse = power_of_two_scale(largest, 6 * 448.0)
        x = x.astype(jnp.float32) * scale
        columns = self._blocks(turned(x, inner), x.ndim - inner)
        return Quantized(self._blocks(x, inner), columns, inverse)

    def _blocks(self, x: jax.Array, inner: int) -> jax.Array:
        flat = x.reshape(*x.shape[: x.ndim - inner], -1)
        ragged = -flat.shape[-1] % self.block
        blocks = jnp.pad(flat, ((0, 0),) * (flat.ndim - 1) + ((0, ragged),))
        blocks = blocks.reshape(*flat.shape[:-1], -1, self.block)
        largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        scales = (largest / 6).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        fractions = jnp.clip(blocks / jnp.where(scales > 0, scales, 1.0), -6.0, 6.0)
        rounded = fractions.astype(jnp.float4_e2m1fn).astype(jnp.float32) * scales
        return rounded.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]].reshape(x.shape).astype(self.dtype)


class Format(Protocol):
    """How one operand is quantised.

    Attributes:
      dtype: of what it becomes.
    """

    @property
    def dtype(self) -> str: ...

    def __call__(self, x: jax.Array, largest: jax.Array, inner: int, on_parts: Parts) -> Quantized:
        """The operand, whose last `inner` axes are inner ones.

        Args:
          x: the operand.
          largest: the greatest absolute value of all that shares its scale.
          inner: see `Quantized`.
          on_parts: calls a kernel on each device's own part.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the operands of a product are quantised.

    Attributes:
      inputs, weights, gradients: what makes an operand `Quantized`: x, w, and the gradient of y.
      rotated: x and w are first multiplied by Hadamard matrices along their shared width, which spreads outliers
        over many entries; the product is what it was, and dx and dw are rotated back (after HALO).
      capability: the least compute capability of an NVIDIA GPU that has the numbers; None: emulated, on any device.
    """

    inputs: Format
    weights: Format
    gradients: Format
    rotated: bool = False
    capability: float | None = None


FP8 = Recipe(Float8("float8_e4m3fn"), Float8("float8_e4m3fn"), Float8("float8_e5m2"), capability=8.9)

RECIPES: dict[str, Recipe | None] = {
    "dtype": None,
    "fp8": FP8,
    "fp8-hadamard": dataclasses.replace(FP8, rotated=True),
    "nvfp4": Recipe(NVFP4(), NVFP4(), NVFP4()),
}
"""By the name that `ModelConfig.matmul` takes; "dtype" multiplies in the compute dtype.

References:
  Micikevicius et al., 2022, `FP8 Formats for Deep Learning <https://arxiv.org/abs/2209.05433>`_;
  Ashkboos et al., 2025, `HALO <https://arxiv.org/abs/2501.02625>`_ (rotations);
  Castro et al., 2025, `Quartet <https://arxiv.org/abs/2505.14669>`_ (training in 4 bits)
"""


def weight_dtype(matmul: str, dtype: Any) -> Any:
    """In which weights are gathered: a recipe's own, else the compute dtype.

    >>> weight_dtype("fp8", "bfloat16"), weight_dtype("dtype", "bfloat16")
    ('float8_e4m3fn', 'bfloat16')
    """
    recipe = RECIPES[matmul]
    return dtype if recipe is None else recipe.weights.dtype


def check_device(matmul: str, device: Any = None) -> None:
    """Raises ValueError for a recipe whose numbers a device doesn't have; on a CPU all are emulated.

    Args:
      matmul: a key of `RECIPES`.
      device: of `crescendo.pallas_kernels.op.Device`'s kind; None: the one that is traced for.
    """
    recipe, device = RECIPES[matmul], target_device() if device is None else device
    if recipe is None or recipe.capability is None or device.platform == "cpu":
        return
    if device.platform != "gpu" or device.compute_capability < recipe.capability:
        raise ValueError(
            f"matmul = {matmul!r} needs an NVIDIA GPU of compute capability {recipe.capability} or later (H100, H200, "
            f"B200), or a CPU, which emulates it, and not {device.kind}: use 'dtype' there"
        )


def check_widths(matmul: str, **widths: int) -> None:
    """Raises ValueError for the first width that isn't a multiple of `MULTIPLE`.

    >>> check_widths("fp8", mlp_width=1000)
    Traceback (most recent call last):
    ...
    ValueError: mlp_width = 1000 must be a multiple of 16 with matmul = 'fp8': the nearest are 992 and 1008
    """
    for name, width in widths.items():
        below = width // MULTIPLE * MULTIPLE
        if below != width:
            nearest = f"nearest are {below} and {below + MULTIPLE}" if below else f"least is {MULTIPLE}"
            raise ValueError(
                f"{name} = {width} must be a multiple of {MULTIPLE} with matmul = {matmul!r}: the {nearest}"
            )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a product has to know of a weight.

    Attributes:
      names: the logical names of its axes, `[*inputs, *outputs]`; None is one that isn't split.
      inputs: how many of them are summed over.
    """

    names: Names
    inputs: int

    @property
    def turned(self) -> Names:
        return self.names[self.inputs :] + self.names[: self.inputs]

    @property
    def taken(self) -> Names:
        """The names of x."""
        return (axes.BATCH, axes.LENGTH, *self.names[: self.inputs])

    @property
    def summed(self) -> Names:
        """The names of dx, where it is a sum over devices that have a part of the outputs."""
        if self.names[: self.inputs] == (axes.EMBED,):
            return (axes.BATCH, axes.RESIDUAL_LENGTH, None)
        return self.taken

    @property
    def given(self) -> Names:
        """The names of y."""
        return (axes.BATCH, axes.LENGTH, *self.names[self.inputs :])


Weight = jax.Array | Sequence[jax.Array]
"""A weight `[*inputs, *outputs]`, or several that are multiplied as one, with an axis of them before the last."""


def products(
    recipe: Recipe, x: jax.Array, weights: Sequence[Weight], kernels: Sequence[Kernel], layout: Layout
) -> tuple[jax.Array, ...]:
    """The products of one input with several weights; it is quantised once.

    Args:
      recipe: of `RECIPES`.
      x: `[B, T, *inputs]`, bfloat16.
      weights: float32.
      kernels: what each is.
      layout: where they lie. Weights are quantised where they are, by the scale of all, and gathered in that form.

    Returns:
      `[B, T, *outputs]` each, in x's dtype.
    """
    inner, lead, dtype = kernels[0].inputs, x.ndim - kernels[0].inputs, x.dtype

    def turn(array, axis: int):
        return rotate(array, axis) if recipe.rotated else array

    @jax.named_scope("quantize")
    def of_activation(operand: Format, x, names: Names, inner: int) -> Quantized:
        outer = x.ndim - inner
        swapped = (*names[outer:], *names[:outer])

        def on_parts(function, x, scale):
            return layout.on_parts(function, (x, scale), (names, ()), (names, swapped))

        return operand(x, _largest(x), inner, on_parts)

    @jax.named_scope("quantize")
    def of_weight(weight: Weight) -> Quantized:
        parts = [turn(part, inner - 1) for part in jax.tree.leaves(weight)]
        largest = functools.reduce(jnp.maximum, map(_largest, parts))
        outputs = parts[0].ndim - inner
        done = [recipe.weights(part, largest, outputs, _as_it_lies) for part in parts]
        if len(parts) == 1:
            return done[0]
        rows, columns = jnp.stack([q.rows for q in done], -2), jnp.stack([q.columns for q in done], outputs - 1)
        return Quantized(rows, columns, done[0].inverse)

    def forward(x, weights):
        x = of_activation(recipe.inputs, turn(x, -1), kernels[0].taken, inner)
        results, shards = [], []
        for weight, kernel in zip(weights, kernels, strict=True):
            w = of_weight(weight)
            y = _sum(x.rows, layout.whole(w.columns, kernel.turned), inner, dtype)
            results.append(_scaled(y, x.inverse, w.inverse))
            shards.append((w.rows, w.inverse))
        return tuple(results), (x.columns, x.inverse, shards)

    def backward(kept, gradients):
        columns, inverse, shards = kept
        parts, dweights = [], []
        for weight, dy, (rows, w_inverse), kernel in zip(weights, gradients, shards, kernels, strict=True):
            outputs = dy.ndim - lead
            dy = of_activation(recipe.gradients, dy, kernel.given, outputs)
            part = _sum(dy.rows, layout.whole(rows, kernel.names), outputs, dtype)
            parts.append(_scaled(layout.constrain(part, kernel.summed), dy.inverse, w_inverse))
            # Scaled where it is already scattered: what stood between the sum and the split would part them.
            dw = layout.weight_gradient(_sum(columns, dy.columns, lead, dtype), kernel.names)
            dw = turn(_scaled(dw.astype(jnp.float32), inverse, dy.inverse), inner - 1)
            dweights.append(dw if isinstance(weight, jax.Array) else tuple(jnp.moveaxis(dw, -2, 0)))
        return turn(functools.reduce(jnp.add, parts), -1).astype(dtype), tuple(dweights)

    @jax.custom_vjp
    def call(x, weights):
        return forward(x, weights)[0]

    # A cast to 8 bits has no derivative that means anything.
    call.defvjp(forward, once_differentiable(backward, "a quantised product", "set model.matmul = 'dtype'"))
    return call(x, tuple(weight if isinstance(weight, jax.Array) else tuple(weight) for weight in weights))


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x))


def _sum(a, b, axes: int, dtype) -> jax.Array:
    """The products of both over their last axes, summed in float32."""
    over_a, over_b = (tuple(range(x.ndim - axes, x.ndim)) for x in (a, b))
    return jax.lax.dot_general(a, b, ((over_a, over_b), ((), ())), preferred_element_type=dtype)


def _scaled(y, a_inverse, b_inverse) -> jax.Array:
    """Times a power of two, which rounds nothing."""
    return y * (a_inverse * b_inverse).astype(y.dtype)


def rotate(x: jax.Array, axis: int) -> jax.Array:
    """x times a Hadamard matrix along each block of an axis, in float32; once more gives x.

    Blocks are of 64, or of the largest power of 4 below that divides the axis, so that the matrix's entries, plus or
    minus the reciprocal of a power of two, are exact in any dtype.

    >>> print(rotate(jnp.array([4.0, 0.0, 0.0, 0.0]), 0))
    [2. 2. 2. 2.]
    """
    axis %= x.ndim
    size = next(size for size in (64, 16, 4, 1) if x.shape[axis] % size == 0)
    hadamard = functools.reduce(jnp.kron, [jnp.array([[1, 1], [1, -1]])] * round(math.log2(size)), jnp.ones((1, 1)))
    blocks = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    hadamard = (hadamard / math.sqrt(size)).astype(x.dtype)
    mixed = jnp.tensordot(blocks, hadamard, axes=((axis + 1,), (0,)), preferred_element_type=jnp.float32)
    return jnp.moveaxis(mixed, -1, axis + 1).reshape(x.shape)


def reference(recipe: Recipe, x: jax.Array, w: jax.Array) -> jax.Array:
    """The specification of a product of matrices, `[M, K]` and `[K, N]`: quantised, dequantised, and all in float32."""

    def along(operand: Format, a: jax.Array, axis: int) -> jax.Array:
        """A matrix, quantised for a sum over an axis."""
        q = operand(a, _largest(a), 1, _as_it_lies)
        return (q.rows if axis == 1 else q.columns.T).astype(jnp.float32) * q.inverse

    @jax.custom_vjp
    def product(x, w):
        return along(recipe.inputs, x, 1) @ along(recipe.weights, w, 0)

    def gradients(kept, dy):
        x, w = kept
        dx = along(recipe.gradients, dy, 1) @ along(recipe.weights, w, 1).T
        return dx, along(recipe.inputs, x, 0).T @ along(recipe.gradients, dy, 0)

    product.defvjp(lambda x, w: (product(x, w), (x, w)), gradients)
    return product(rotate(x, 1), rotate(w, 0)) if recipe.rotated else product(x, w)


def _as_it_lies(function, x, scale):
    """What XLA can split over devices however the array lies."""
    return function(x, scale, implementation="reference")
