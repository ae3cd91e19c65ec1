"""A small residual network for grey or coloured pictures, with the shape of CIFAR's ResNets.

A 3x3 convolution, three stages of blocks of two 3x3 convolutions each, the second and the third at half the size and
twice the channels, then the mean over the picture and a matrix (He et al., 2016, "Deep Residual Learning", section
4.2, https://arxiv.org/abs/1512.03385). The normalisation is a group norm: a batch norm would couple the examples of a
batch, so that its result depended on how the batch is cut over devices and microbatches.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes, functional
from crescendo.models.config import Dtype, identity
from crescendo.models.layers import Linear, parameter
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.pallas_kernels.rms_norm.examples import for_examples
from crescendo.ranges import Count, Positive, check_fields

STAGES = 3
PICTURES = (axes.BATCH, None, None, None)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The shape of a `ResNet`.

    Args:
      classes: the size of the output.
      in_channels: of the pictures: 1 grey, 3 coloured.
      width: channels of the first stage.
      blocks: per stage; the network has `6 blocks + 2` layers with weights.
      group_width: channels that share a norm's statistics.
      norm_epsilon: added to the variance.
      dtype: "float32" or "bfloat16", that of the convolutions (parameters and norms are float32). None: bfloat16 on
        accelerators, float32 on the CPU.

    Raises:
      ValueError: for a field out of its range, or a width that groups don't divide.

    >>> ResNetConfig(width=12)
    Traceback (most recent call last):
    ...
    ValueError: width = 12 must be a multiple of group_width = 8
    """

    classes: Count = 10
    in_channels: Count = 1
    width: Count = 16
    blocks: Count = 3
    group_width: Count = 8
    norm_epsilon: Positive = 1e-5
    dtype: Dtype | None = None

    def __post_init__(self):
        check_fields(self)
        if self.width % self.group_width:
            raise ValueError(f"width = {self.width} must be a multiple of group_width = {self.group_width}")

    @property
    def identity(self) -> dict[str, Any]:
        """What the model computes, as JSON: every field but those that only say how fast."""
        return identity(self)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """The channels that go in and out of every block."""
        outputs = [self.width * 2**stage for stage in range(STAGES) for _ in range(self.blocks)]
        return tuple(zip([self.width, *outputs], outputs, strict=False))

    def flops_per_example(self, height: int, width: int) -> float:
        """Forward and backward FLOPs of the convolutions and the last matrix, for a picture of this size.

        >>> round(ResNetConfig().flops_per_example(28, 28) / 1e6)
        185
        """
        total, pixels = 9 * self.in_channels * self.width * height * width, height * width
        for inputs, outputs in self.stages:
            if inputs != outputs:
                height, width = -(-height // 2), -(-width // 2)
                pixels = height * width
            total += 9 * (inputs + outputs) * outputs * pixels
        return 6.0 * (total + self.stages[-1][1] * self.classes)

    def for_platform(self, platform: str) -> "ResNetConfig":
        """This configuration with `dtype` decided for "cpu", "gpu" or "tpu"."""
        return dataclasses.replace(self, dtype=self.dtype or ("float32" if platform == "cpu" else "bfloat16"))


class Convolution(nnx.Module):
    """`3 x 3` over the picture, zeros around it, no bias; drawn with variance `2 / fan_in` (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dtype, rngs: nnx.Rngs):
        names = (axes.WINDOW, axes.WINDOW, axes.IN_CHANNELS, axes.CHANNELS)
        self.kernel = parameter(rngs, (3, 3, inputs, outputs), names, (2 / (9 * inputs)) ** 0.5)
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x_BHWC):
        return jax.lax.conv_general_dilated(
            x_BHWC,
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`, statistics per example and group of channels, in float32.

    The scale is `[C]`, or `[B, C]` with one for each example (see `norm_probes`).

    Wu and He, 2018, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """

    def __init__(self, channels: int, group_width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(channels), axes=(axes.CHANNELS,))
        self.bias = nnx.Param(jnp.zeros(channels), axes=(axes.CHANNELS,))
        self.group_width = group_width
        self.epsilon = epsilon

    def __call__(self, x_BHWC):
        grouped = x_BHWC.astype(jnp.float32).reshape(*x_BHWC.shape[:3], -1, self.group_width)
        mean = jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 2, 4), keepdims=True)
        normalised = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x_BHWC.shape)
        scale = self.scale[...]
        if scale.ndim == 2:
            scale = for_examples(scale, x_BHWC.shape)
        return (normalised * scale + self.bias[...]).astype(x_BHWC.dtype)


class Block(nnx.Module):
    """`relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))`; the shortcut drops pixels and adds channels of zeros."""

    def __init__(self, inputs: int, outputs: int, config: ResNetConfig, *, dtype, rngs: nnx.Rngs):
        self.stride = 1 if inputs == outputs else 2
        self.new_channels = outputs - inputs
        self.conv1 = Convolution(inputs, outputs, stride=self.stride, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(outputs, config.group_width, config.norm_epsilon)
        self.conv2 = Convolution(outputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs, config.group_width, config.norm_epsilon)

    def __call__(self, x_BHWC):
        y_BHWC = jax.nn.relu(self.norm1(self.conv1(x_BHWC)))
        shortcut_BHWC = x_BHWC[:, :: self.stride, :: self.stride]
        shortcut_BHWC = jnp.pad(shortcut_BHWC, ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return jax.nn.relu(shortcut_BHWC + self.norm2(self.conv2(y_BHWC)))


class ResNet(nnx.Module):
    """Call it with pictures, float `[B, height, width, in_channels]`; it returns logits, float32 `[B, classes]`.

    `layout` says how examples lie over the devices; a picture is never split.

    Args:
      config: `dtype` decided (`ResNetConfig.for_platform`).

    Raises:
      ValueError: an undecided dtype.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        if config.dtype is None:
            raise ValueError("dtype is undecided: pass config.for_platform('cpu' | 'gpu' | 'tpu')")
        self.dtype = jnp.dtype(config.dtype)
        self.stem = Convolution(config.in_channels, config.width, dtype=self.dtype, rngs=rngs)
        self.stem_norm = GroupNorm(config.width, config.group_width, config.norm_epsilon)
        self.blocks = nnx.List(
            Block(inputs, outputs, config, dtype=self.dtype, rngs=rngs) for inputs, outputs in config.stages
        )
        last = config.stages[-1][1]
        self.head = Linear((last,), (config.classes,), (axes.CHANNELS, axes.CLASSES), dtype=jnp.float32, rngs=rngs)

    def __call__(self, x_BHWC, *, layout: Layout = ONE_DEVICE):
        return self.head(self.features(x_BHWC, layout), layout)

    def features(self, x_BHWC, layout: Layout = ONE_DEVICE):
        """The mean over pixels behind all blocks, float32 `[B, C]`: what makes the logits."""
        x_BHWC = jax.nn.relu(self.stem_norm(self.stem(layout.constrain(x_BHWC.astype(self.dtype), PICTURES))))
        for block in self.blocks:
            x_BHWC = layout.constrain(block(x_BHWC), PICTURES)
        return jnp.mean(x_BHWC.astype(jnp.float32), axis=(1, 2))


def initialize(config: ResNetConfig, key) -> dict:
    """Fresh float32 parameters as nested dicts of arrays; pure, so it can be jitted with output shardings.

    >>> config = ResNetConfig().for_platform("cpu")
    >>> shapes = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    >>> sum(x.size for x in jax.tree.leaves(shapes))
    269424
    """
    return functional.initialize(ResNet, config, key)


def apply(config: ResNetConfig, parameters: dict) -> ResNet:
    """The model that holds `parameters` (as `initialize` makes them).

    >>> config = ResNetConfig(width=8, blocks=1).for_platform("cpu")
    >>> parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    >>> jax.eval_shape(lambda p: apply(config, p)(jnp.zeros((2, 28, 28, 1))), parameters).shape
    (2, 10)
    """
    return functional.apply(ResNet, config, parameters)


def logical_axes(config: ResNetConfig) -> dict:
    """The logical axis names of every parameter, as nested dicts of tuples."""
    return functional.logical_axes(ResNet, config)
