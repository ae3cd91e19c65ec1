"""What a run trains: the decoder decided for data and devices, and the chain of transforms around its optimizer."""

import dataclasses
import hashlib
import json

import jax
import optax
from jax.sharding import Mesh

from crescendo.experiments.data import TextData
from crescendo.experiments.errors import user_values
from crescendo.experiments.state import initial_state
from crescendo.models import ModelConfig
from crescendo.optim.batch_size import BatchSizePolicy, adaptive_batch_size
from crescendo.optim.noise_scale import required_statistics

# The vocabulary is rounded up to this, so that the output matmul fills the hardware's tiles.
VOCAB_MULTIPLE = 128
# The fields of a model that say how fast it runs and not what it computes.
_SPEED_FIELDS = ("scan_layers", "remat", "dtype")


def decide_model(model: ModelConfig, data: TextData, mesh: Mesh) -> ModelConfig:
    """The model with the data's vocabulary, and with what the platform decides."""
    vocab_size = -(-data.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return dataclasses.replace(model, vocab_size=vocab_size).for_platform(mesh.devices.flat[0].platform)


def chain_transforms(
    optimizer: optax.GradientTransformation,
    policy: BatchSizePolicy,
    *,
    noise_scale: optax.GradientTransformation | None = None,
    coupling: str = "sqrt",
    base_batch_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with the batch-size policy behind it and, where one is given, the noise scale before it."""
    with user_values():
        adaptive = adaptive_batch_size(policy, coupling, base_batch_size=base_batch_size)
        return optax.chain(*([] if noise_scale is None else [noise_scale]), optimizer, adaptive)


def needed_statistics(
    config: ModelConfig, chain: optax.GradientTransformationExtraArgs, policy: BatchSizePolicy
) -> tuple[str, ...]:
    """What the step must measure for the policy and for the transforms (`crescendo.optim.batch_size.STATISTICS`)."""
    opt_state = jax.eval_shape(lambda: initial_state(config, chain, 0)).opt_state
    return tuple(sorted({*policy.statistics, *required_statistics(opt_state)}))


def fingerprint(config: ModelConfig, data: TextData) -> str:
    """Of the model and the rows that it reads: what a curve of critical batch sizes was measured on."""
    model = {name: value for name, value in dataclasses.asdict(config).items() if name not in _SPEED_FIELDS}
    return hashlib.blake2b(json.dumps([model, data.fingerprint]).encode(), digest_size=8).hexdigest()
