"""Flax (nnx) models: they name logical axes and call kernels, and know nothing of meshes, data or optimizers."""

from crescendo.models.config import ModelConfig
from crescendo.models.transformer import Transformer, apply, initialize, logical_axes

__all__ = ["ModelConfig", "Transformer", "apply", "initialize", "logical_axes"]
