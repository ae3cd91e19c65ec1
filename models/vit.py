"""A vision transformer: patches of a picture through the decoder's own blocks, attention both ways.

Patches are multiplied by a matrix and get a learned vector for their place; behind the blocks come a norm, the mean
over the patches and a matrix (Dosovitskiy et al., 2021, "An Image is Worth 16x16 Words",
https://arxiv.org/abs/2010.11929; the mean instead of a class token: Beyer et al., 2022,
https://arxiv.org/abs/2205.01580).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from crescendo.models import axes, functional
from crescendo.models.axes import RESIDUAL
from crescendo.models.config import Dtype, ModelConfig, Remat, identity
from crescendo.models.layers import Linear, RMSNorm, of_rows, parameter
from crescendo.models.layout import ONE_DEVICE, Layout
from crescendo.models.transformer import Stream, stacked_blocks, through_blocks, within_segments
from crescendo.ranges import Count, Decay, Positive, check_fields


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The shape of a `ViT`.

    Args:
      image_size: pixels along each side of what the model sees; smaller pictures get zeros around them.
      patch_size: pixels along each side of a patch; `image_size` must be a multiple of it.
      in_channels: of the pictures: 1 grey, 3 coloured.
      classes: the size of the output.
      width, layers, heads, mlp_width, qk_norm, norm_epsilon, dropout, scan_layers, remat, dtype: see `ModelConfig`.

    Raises:
      ValueError: for a field out of its range, patches or heads that don't divide, and what `ModelConfig` refuses.

    >>> ViTConfig().patches
    64
    """

    image_size: Count = 32
    patch_size: Count = 4
    in_channels: Count = 1
    classes: Count = 10
    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    mlp_width: Count = 384
    qk_norm: bool = True
    norm_epsilon: Positive = 1e-6
    dropout: Decay = 0.0
    scan_layers: bool | None = None
    remat: Remat = "none"
    dtype: Dtype | None = None

    def __post_init__(self):
        check_fields(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        _ = self.blocks  # which checks the rest

    @property
    def patches(self) -> int:
        """How many patches a picture has, N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def blocks(self) -> ModelConfig:
        """The blocks as a decoder has them; a patch's values stand where it has its vocabulary."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(ModelConfig)}
        values = {name: getattr(self, name) for name in shared}
        return ModelConfig(vocab_size=self.patch_size**2 * self.in_channels, kv_heads=self.heads, **values)

    @property
    def identity(self) -> dict[str, Any]:
        """What the model computes, as JSON: every field but those that only say how fast."""
        return identity(self)

    def for_platform(self, platform: str) -> "ViTConfig":
        """This configuration with `scan_layers` and `dtype` decided for "cpu", "gpu" or "tpu"."""
        decided = self.blocks.for_platform(platform)
        return dataclasses.replace(self, scan_layers=decided.scan_layers, dtype=decided.dtype)

    def flops_per_example(self) -> float:
        """Forward and backward matmul FLOPs a picture: `N (6 M + 12 L H E N) + 6 D C`, M the parameters of each patch.

        >>> round(ViTConfig().flops_per_example() / 1e6)
        353
        """
        return self.patches * self.blocks.flops_per_token(self.patches, causal=False) + 6.0 * self.width * self.classes


class ViT(nnx.Module):
    """Call it with pictures, float `[B, height, width, in_channels]`; it returns logits, float32 `[B, classes]`.

    `implementation` is of the attention, `layout` says how activations lie over the devices, and `dropout_keys_B` are
    random keys for the examples' dropout; see `Transformer`.

    Args:
      config: `scan_layers` and `dtype` decided (`ViTConfig.for_platform`).

    Raises:
      ValueError: an undecided configuration, or pictures larger than it.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        if config.scan_layers is None or config.dtype is None:
            raise ValueError("scan_layers and dtype are undecided: pass config.for_platform('cpu' | 'gpu' | 'tpu')")
        self.config = config
        dtype, width = jnp.dtype(config.dtype), config.width
        values = config.patch_size**2 * config.in_channels
        self.patch = Linear((values,), (width,), (axes.PATCH, axes.EMBED), dtype=dtype, rngs=rngs)
        self.places = parameter(rngs, (config.patches, width), (axes.PLACES, axes.EMBED), 0.02)
        self.blocks = stacked_blocks(config.blocks, dtype=dtype, rngs=rngs)
        self.final_norm = RMSNorm(width, axes.EMBED, config.norm_epsilon)
        self.head = Linear((width,), (config.classes,), (axes.EMBED, axes.CLASSES), dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        x_BHWC,
        *,
        implementation: str | None = None,
        layout: Layout = ONE_DEVICE,
        dropout_keys_B=None,
    ):
        stream = self.through(
            self.enter(x_BHWC, layout), implementation=implementation, layout=layout, dropout_keys_B=dropout_keys_B
        )
        return self.leave(stream, layout, implementation=implementation)

    def enter(self, x_BHWC, layout: Layout = ONE_DEVICE) -> Stream:
        """The residual stream before the layers."""
        config = self.config
        values_BNP = layout.in_row_order(cut_into_patches(x_BHWC, config.image_size, config.patch_size))
        values_BNP = layout.constrain(values_BNP, (axes.BATCH, axes.LENGTH, None))
        places_ND = layout.in_row_order(self.places[...], axis=0).astype(config.dtype)
        return layout.constrain(self.patch(values_BNP.astype(config.dtype), layout) + places_ND, RESIDUAL), None

    def through(
        self,
        stream: Stream,
        *,
        implementation: str | None = None,
        layout: Layout = ONE_DEVICE,
        dropout_keys_B=None,
        first_layer=0,
    ) -> Stream:
        """The residual stream behind the layers that the model holds; the first one has the number `first_layer`."""
        config, (x_BTD, _) = self.config, stream
        still = jnp.zeros((*x_BTD.shape[:2], config.blocks.head_size // 2), jnp.float32)  # places aren't rotated
        one_segment_BT = layout.constrain(jnp.ones(x_BTD.shape[:2], jnp.int32), (axes.BATCH, axes.LENGTH))
        return through_blocks(
            self.blocks,
            config.blocks,
            stream,
            within_segments(one_segment_BT, causal=False, implementation=implementation, layout=layout),
            jnp.cos(still),
            jnp.sin(still),
            implementation=implementation,
            layout=layout,
            dropout_keys_B=dropout_keys_B if config.dropout else None,
            first_layer=first_layer,
        )[0]

    def leave(self, stream: Stream, layout: Layout = ONE_DEVICE, *, implementation: str | None = None):
        """Logits of what is behind all layers."""
        return self.head(self.features(stream, layout, implementation=implementation), layout)

    def features(self, stream: Stream, layout: Layout = ONE_DEVICE, *, implementation: str | None = None):
        """The mean of the normalised hidden states behind all layers, float32 `[B, D]`: what makes the logits."""
        x_BTD, _ = self.final_norm(*stream, layout, implementation=of_rows(implementation))
        return layout.constrain(jnp.mean(x_BTD.astype(jnp.float32), axis=1), (axes.BATCH, None))


def cut_into_patches(x_BHWC, image_size: int, patch_size: int):
    """`[B, N, patch_size^2 C]`: row by row, of pictures with zeros around them to `image_size`.

    Raises:
      ValueError: pictures larger than that.

    >>> cut_into_patches(jnp.zeros((2, 28, 28, 1)), 32, 4).shape
    (2, 64, 16)
    """
    batch, height, width, channels = x_BHWC.shape
    if max(height, width) > image_size:
        raise ValueError(f"image_size = {image_size} is smaller than pictures of {height} x {width}: raise it")
    before = [(image_size - size) // 2 for size in (height, width)]
    around = [(b, image_size - size - b) for b, size in zip(before, (height, width), strict=True)]
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *around, (0, 0)))
    side = image_size // patch_size
    x = x_BHWC.reshape(batch, side, patch_size, side, patch_size, channels)
    return x.swapaxes(2, 3).reshape(batch, side**2, patch_size**2 * channels)


def initialize(config: ViTConfig, key) -> dict:
    """Fresh float32 parameters as nested dicts of arrays; pure, so it can be jitted with output shardings."""
    return functional.initialize(ViT, config, key)


def apply(config: ViTConfig, parameters: dict) -> ViT:
    """The model that holds `parameters` (as `initialize` makes them).

    >>> import jax
    >>> config = ViTConfig(layers=1).for_platform("cpu")
    >>> parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    >>> jax.eval_shape(lambda p: apply(config, p)(jnp.zeros((2, 28, 28, 1))), parameters).shape
    (2, 10)
    """
    return functional.apply(ViT, config, parameters)


def logical_axes(config: ViTConfig) -> dict:
    """The logical axis names of every parameter, as nested dicts of tuples; blocks have a leading `layers`."""
    return functional.logical_axes(ViT, config, stacked=("blocks",))
